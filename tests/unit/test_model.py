import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from matryoshka import model
from matryoshka.artifacts import Manifest
from matryoshka.model import ModelInfo

Copy = Callable[..., Path]


def write_folder(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path = path.with_suffix(".safetensors" if name == "model" else ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "vocab.txt").touch()
    return folder


def describe_modules(*modules: tuple[str, str]) -> list[dict[str, str]]:
    return [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]


def test_minilm_is_what_it_is_known_to_be(minilm: ModelInfo):
    assert (minilm.width, minilm.max_tokens, minilm.is_tuned) == (384, 256, False)
    assert minilm.dims == (384, 256, 128, 64, 32)


def test_the_fingerprint_does_not_depend_on_the_place_or_on_notes(minilm: ModelInfo, minilm_copy: Copy):
    folder = minilm_copy()
    (folder / "README.md").write_text("Other words.")
    (folder / ".cache.json").write_text("{}")
    (folder / "training_log.json").write_text("[]")
    assert model.describe(str(folder)).fingerprint == minilm.fingerprint


def test_the_model_that_made_something_is_found_where_it_was_or_where_it_is_now(minilm: ModelInfo, minilm_copy: Copy):
    there = Manifest("index", {"model": minilm.fingerprint}, facts={"model": "minilm"})
    moved = minilm_copy()
    assert model.describe_maker(Path("index"), there, None) == minilm
    assert model.describe_maker(Path("index"), there, str(moved)).folder == moved
    (moved / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    with pytest.raises(ValueError, match=rf"^{moved}: is not the model that index was made with\. Index again\.$"):
        model.describe_maker(Path("index"), there, str(moved), "Index again")


@pytest.mark.parametrize(
    "changes",
    [
        {"config_sentence_transformers": {"prompts": {"query": "query: "}}},
        {"sentence_bert_config": {"max_seq_length": 128}},
        {"1_Pooling/config": {"pooling_mode_cls_token": True}},
        {"tokenizer_config": {"do_lower_case": False}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_decides_the_vectors_changes_the_fingerprint(minilm: ModelInfo, minilm_copy: Copy, changes: dict):
    assert model.describe(str(minilm_copy(**changes))).fingerprint != minilm.fingerprint


def test_a_tuned_model_has_the_dims_that_it_was_trained_for(minilm_copy: Copy):
    folder = minilm_copy()
    Manifest("model", {"dims": (384, 96)}, is_complete=True).write(folder)
    info = model.describe(str(folder))
    assert (info.dims, info.is_tuned) == ((384, 96), True)
    Manifest("model", {"dims": (384, 96)}).write(folder)
    with pytest.raises(ValueError, match=r"minilm-copy: not finished\. Run python -m jobs\.finetune again"):
        model.describe(str(folder))


WIDTHS = {
    "plain": ({"config": {"hidden_size": 64, "max_position_embeddings": 512}}, (64, 512)),
    "limited by its tokenizer, as sentence-transformers saves it": (
        {"config": {"hidden_size": 64, "max_position_embeddings": 512}, "tokenizer_config": {"model_max_length": 256}},
        (64, 256),
    ),
    "limited by its positions, whatever its tokenizer says": (
        {"config": {"hidden_size": 64, "max_position_embeddings": 512}, "tokenizer_config": {"model_max_length": int(1e30)}},
        (64, 512),
    ),
    "pooled": ({"config": {"hidden_size": 64}, "modules": describe_modules(("", "Transformer"), ("1_Pooling", "Pooling")),
                "1_Pooling__config": {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}}, (64, None)),
    "pooled twice": ({"modules": describe_modules(("1_Pooling", "Pooling")), "1_Pooling__config":
                      {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
                     (128, None)),
    "new pooling": ({"modules": describe_modules(("1_Pooling", "Pooling")),
                     "1_Pooling__config": {"embedding_dimension": 64, "pooling_mode": "mean"}}, (64, None)),
    "dense after pooling": ({"modules": describe_modules(("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_N", "Normalize")),
                             "1_Pooling__config": {"word_embedding_dimension": 64}, "2_Dense__config": {"out_features": 16},
                             "sentence_bert_config": {"max_seq_length": 99}}, (16, 99)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WIDTHS)
def test_width_and_window_are_read_from_the_files(tmp_path: Path, kind: str):
    files, expected = WIDTHS[kind]
    info = model.describe(str(write_folder(tmp_path, model={}, **files)))
    assert (info.width, info.max_tokens) == expected


def test_a_model_is_loaded_in_float32_and_at_full_width(minilm_copy: Copy):
    loaded = model.load(minilm_copy(config={"dtype": "float16"}, config_sentence_transformers={"truncate_dim": 64}), "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.encode(["text"]).shape == (1, 384)


@pytest.mark.parametrize(("dropout", "expected"), [(None, {0.1}), (0.0, {0.0}), (0.3, {0.3})])
def test_dropout_overrides_the_rates_of_the_model(minilm: ModelInfo, dropout: float | None, expected: set[float]):
    loaded = model.load(minilm.folder, "cpu", dropout=dropout)
    rates = {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)}
    np.testing.assert_allclose(sorted(rates), sorted(expected))


def test_weights_are_weighed_by_their_headers(minilm: ModelInfo):
    num_bytes, num_parameters = model.weigh(minilm.folder)
    assert num_bytes == (minilm.folder / "model.safetensors").stat().st_size
    assert num_parameters == sum(part.numel() for part in model.load(minilm.folder, "cpu").parameters())


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"])
def test_weights_that_are_not_safetensors_are_named(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        model.weigh(tmp_path)

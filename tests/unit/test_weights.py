"""How far weights moved: laws on files made by hand, and on models of several families."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Dense

from matryoshka import weights

LAYER = "encoder.layer.{}.output.dense.weight"
TENSORS = {
    "embeddings.word_embeddings.weight": np.arange(1, 13, dtype=np.float32).reshape(6, 2),
    LAYER.format(0): np.full((4, 3), 2, np.float32),
    LAYER.format(1): np.full((4, 3), 3, np.float32),
    "encoder.layer.1.output.dense.bias": np.zeros(3, np.float32),
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, tensors: Mapping[str, np.ndarray], file: str = "model.safetensors") -> Path:
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path)
        return tmp_path / name

    return written


def test_a_model_has_not_moved_from_itself(write: Write):
    folder = write("model", TENSORS)
    assert weights.measure_changes(folder, folder) == weights.Changes({"embeddings": 0, "layer 0": 0, "layer 1": 0}, ())


def test_each_layer_moved_as_far_as_it_was_moved(write: Write):
    moved = {name: own * (1.1 if ".1." in name else 1) for name, own in TENSORS.items()}
    moved[LAYER.format(0)] = TENSORS[LAYER.format(0)] - 1
    found = weights.measure_changes(write("before", TENSORS), write("after", moved)).by_layer
    assert list(found) == ["embeddings", "layer 0", "layer 1"]
    assert list(found.values()) == pytest.approx([0, 0.5, 0.1], abs=1e-6)


def test_blocks_give_what_the_whole_gives(write: Write, monkeypatch: pytest.MonkeyPatch):
    before = {"embeddings.weight": np.random.default_rng(0).standard_normal((7, 3)), "layers.0.scale": np.array(2.0)}
    after = {name: np.asarray(own + 0.5) for name, own in before.items()}
    folders = write("before", before), write("after", after)
    whole = weights.measure_changes(*folders)
    monkeypatch.setattr(weights, "_BLOCK_NUMBERS", 6)
    assert weights.measure_changes(*folders).by_layer == pytest.approx(whole.by_layer)
    wanted = 0.5 * np.sqrt(21) / np.linalg.norm(before["embeddings.weight"])
    assert whole.by_layer == pytest.approx({"embeddings": wanted, "layer 0": 0.25})


@pytest.mark.parametrize("side", ["before", "after"])
def test_names_may_go_on_to_the_left_on_either_side(write: Write, side: str):
    tensors = TENSORS | {"final_norm.weight": np.ones(2, np.float32)}
    longer = {f"model.{name}": own for name, own in tensors.items()} | {"lm_head.weight": np.ones(5, np.float32)}
    folders = {"before": write("before", tensors), "after": write("after", tensors)}
    folders[side] = write("longer", longer)
    found = weights.measure_changes(folders["before"], folders["after"])
    assert found == weights.Changes({"embeddings": 0, "layer 0": 0, "layer 1": 0, "head": 0}, ("lm_head.weight",))


def test_a_weight_of_another_shape_or_of_one_model_only_is_left_out_and_named(write: Write):
    larger = TENSORS | {"embeddings.word_embeddings.weight": np.ones((7, 2), np.float32), "extra.weight": np.ones(1, np.float32)}
    found = weights.measure_changes(write("before", TENSORS), write("after", larger))
    assert list(found.by_layer) == ["layer 0", "layer 1"]
    assert found.left_out == ("embeddings.word_embeddings.weight", "extra.weight")


def test_whole_numbers_and_a_pooler_that_no_vector_depends_on_are_no_weights(write: Write):
    more = {"embeddings.position_ids": np.arange(4), "pooler.dense.weight": np.ones((2, 2), np.float32)}
    found = weights.measure_changes(write("before", TENSORS | more), write("after", TENSORS))
    assert (list(found.by_layer), found.left_out) == (["embeddings", "layer 0", "layer 1"], ())


def test_what_was_zero_has_no_relative_change(write: Write):
    zero = TENSORS | {"norm.bias": np.zeros(3, np.float32)}
    assert weights.measure_changes(write("before", zero), write("after", zero)).by_layer["head"] is None


def test_models_without_a_weight_in_common_are_refused(write: Write):
    folders = write("before", TENSORS), write("after", {"other.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"after: has no weight in common with .*before\. Compare a model with the one"):
        weights.measure_changes(*folders)


def test_a_damaged_file_is_named(write: Write):
    folder = write("before", TENSORS)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file\. Save the model again\.$"):
        weights.measure_changes(folder, folder)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "modernbert", "mpnet", "qwen3", "roberta"])
def test_layers_of_every_family_are_known_by_their_names(tmp_path: Path, family: str):
    before = tiny_model.save(tmp_path / "before", seed=3, family=family, tail=[Dense(64, 16)])
    after = shutil.copytree(before, tmp_path / "after")
    tensors = load_file(after / "model.safetensors")
    save_file({name: own * (2 if ".1." in name else 1) for name, own in tensors.items()}, after / "model.safetensors")
    found = weights.measure_changes(before, after)
    assert (list(found.by_layer), found.left_out) == (["embeddings", "layer 0", "layer 1", "head"], ())
    # Attention's own lists in some families hold a "1" as well.
    assert [round(found.by_layer[name] or 0, 6) for name in ("embeddings", "layer 1")] == [0, 1]

"""The padded model is the oracle for the packed one: every family, every pooling, every kind of module after it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from texts import WORDS
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from matryoshka import model, packed
from matryoshka.encode import Encoder
from matryoshka.packed import Attention, CannotPackError, PackedModel

POOLINGS = ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("cls", "weightedmean")]
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}  # Qwen's second layer looks back 8 tokens
TEXTS = [
    WORDS[0],
    "",
    "q",
    *(" ".join(WORDS[start : start + 12]) for start in (40, 80, 120)),  # of equal length, short of a whole tile
    " ".join(WORDS[200:214]),  # one tile, with the special tokens
    " ".join(WORDS[300:330]),  # longer than the sliding windows
    " ".join(reversed(WORDS[300:330])),
    " ".join(WORDS[:200]),  # longer than the model's window
    " ".join(WORDS[1:201]),
]

Make = Callable[..., Path]


@pytest.fixture
def make_tiny(tmp_path: Path) -> Make:
    def make(family: str, pooling: str | Sequence[str] = "mean", **options: Any) -> Path:
        return tiny_model.save(tmp_path / family, seed=3, family=family, pooling=pooling, **options)

    return make


def padded_vectors(folder: Path) -> np.ndarray:
    return model.load(folder, "cpu").encode(TEXTS, normalize_embeddings=True)


def packed_vectors(loaded: Any, attention: Attention, texts: Sequence[str]) -> np.ndarray:
    """Returns what a packed model gives for texts in one step, longest first, in the order of the texts."""
    found = PackedModel(loaded, attention)
    documents = loaded.tokenizer(list(texts), truncation=True, max_length=tiny_model.MAX_TOKENS)["input_ids"]
    order = sorted(range(len(texts)), key=lambda number: -len(documents[number]))
    lengths = np.array([len(documents[number]) for number in order])
    ids = torch.tensor([token for number in order for token in documents[number]], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]) + found.first_position
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths))
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)
    with torch.inference_mode():
        vectors = found(ids, positions, owners, bounds, lengths, {}).numpy()
    return vectors[np.argsort(order)]


def assert_same_vectors(vectors: np.ndarray, reference: np.ndarray) -> None:
    left, right = vectors.astype(np.float64), reference.astype(np.float64)
    left, right = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (left, right))
    # Sums in another order, in float32, and vectors rounded to float16: far below what one wrong neighbour would do.
    assert ((left * right).sum(axis=1) >= 0.99999).all()
    assert ((left * np.roll(right, 1, axis=0)).sum(axis=1) < 0.999).all()


def assert_packs_as_padded(folder: Path) -> None:
    encoder = Encoder(folder, "cpu", "float32")
    assert encoder.notice == ""
    encoded = encoder.encode(TEXTS, "document")
    assert 0 <= encoded.num_padded_tokens - encoded.num_tokens < 64, "one step, filled up to the next tile"
    reference = padded_vectors(folder)
    assert_same_vectors(encoded.vectors, reference)
    alone = np.concatenate([encoder.encode([text], "document").vectors for text in TEXTS])
    assert_same_vectors(alone, reference)


@pytest.mark.parametrize("family", packed.FIRST_POSITIONS)
def test_every_family_has_the_vectors_of_its_padded_model(family: str, make_tiny: Make):
    assert_packs_as_padded(make_tiny(family, "lasttoken" if family == "qwen3" else "mean"))


def test_documents_of_whole_tiles_need_no_moving():
    assert packed.group_documents(np.array([32, 32, 16]), 80, "cpu")[1:] == (None, None)


@tiny_model.needs_compiler
@pytest.mark.parametrize(("family", "options"), [("bert", {}), ("modernbert", {}), ("qwen3", SLIDING)], ids=str)
def test_a_compiled_model_has_the_vectors_of_its_padded_model(family: str, options: dict[str, Any], make_tiny: Make):
    folder = make_tiny(family, "lasttoken" if family == "qwen3" else "mean", **options)
    encoder = Encoder(folder, "cpu", "float32", is_compiled=True)
    assert (encoder.notice, encoder.is_compiled) == ("", True)
    reference = padded_vectors(folder)
    num_programs = counters["stats"]["unique_graphs"]
    assert_same_vectors(encoder.encode(TEXTS, "document").vectors, reference)
    assert_same_vectors(np.concatenate([encoder.encode([text], "document").vectors for text in TEXTS]), reference)
    assert counters["stats"]["unique_graphs"] == num_programs, "one program does steps of any length"


def test_a_model_that_cannot_be_compiled_packs_all_the_same_and_says_why(make_tiny: Make):
    encoder = Encoder(make_tiny("mpnet"), "cpu", "float32", is_compiled=True)
    assert (encoder.notice, encoder.is_compiled) == (
        "the model is not compiled: the attention of its family is not replaced by name",
        False,
    )
    assert_same_vectors(encoder.encode(TEXTS, "document").vectors, padded_vectors(make_tiny("mpnet")))


def test_without_a_compiler_a_model_packs_all_the_same_and_says_why(make_tiny: Make):
    folder = make_tiny("bert")
    with inductor.patch({"cpp.cxx": ("/no/compiler/here",)}), fresh_cache():
        encoder = Encoder(folder, "cpu", "float32", is_compiled=True)
    assert encoder.notice.startswith("the model is not compiled: ")
    assert not encoder.is_compiled
    assert_same_vectors(encoder.encode(TEXTS, "document").vectors, padded_vectors(folder))


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_every_pooling_has_the_vectors_of_the_padded_model(pooling: str | Sequence[str], make_tiny: Make):
    assert_packs_as_padded(make_tiny("bert", pooling))


def test_a_causal_model_with_a_sliding_window_has_the_vectors_of_its_padded_model(make_tiny: Make):
    assert_packs_as_padded(make_tiny("qwen3", "weightedmean", **SLIDING))


def test_modules_after_the_pooling_run_as_they_are(make_tiny: Make):
    folder = make_tiny("bert", ("mean", "max"), tail=[Dense(2 * tiny_model.WIDTH, 48), Normalize()])
    assert_packs_as_padded(folder)
    assert Encoder(folder, "cpu", "float32").encode(TEXTS, "document").vectors.shape == (len(TEXTS), 48)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=tiny_model.needs_compiler)])
def test_a_model_in_bf16_packs_within_the_rounding_of_bf16(is_compiled: bool, make_tiny: Make):
    folder = make_tiny("modernbert")
    encoder = Encoder(folder, "cpu", "bf16", is_compiled=is_compiled)
    assert (encoder.notice, encoder.is_compiled) == ("", is_compiled)
    cosines = (encoder.encode(TEXTS, "document").vectors * padded_vectors(folder)).sum(axis=1)
    assert (cosines >= 0.99).all()  # 8 bits, through two layers of large random weights


def test_a_wrong_first_position_is_noticed_and_the_model_runs_padded(make_tiny: Make, monkeypatch: pytest.MonkeyPatch):
    folder = make_tiny("roberta")
    monkeypatch.setitem(packed.FIRST_POSITIONS, "roberta", 0)
    encoder = Encoder(folder, "cpu", "float32")
    assert encoder.notice.startswith("batches are padded: packed vectors differ from padded ones by ")
    assert_same_vectors(encoder.encode(TEXTS, "document").vectors, padded_vectors(folder))


def test_a_family_that_is_not_known_runs_padded_and_says_so(make_tiny: Make):
    folder = make_tiny("albert")
    encoder = Encoder(folder, "cpu", "float32")
    assert encoder.notice == "batches are padded: models of type 'albert' are not known to pack"
    encoded = encoder.encode(TEXTS, "document")
    assert encoded.num_padded_tokens > encoded.num_tokens
    assert_same_vectors(encoded.vectors, padded_vectors(folder))


def test_a_model_without_pooling_is_not_packed(make_tiny: Make):
    loaded = model.load(make_tiny("bert"), "cpu")
    del loaded[1]
    with pytest.raises(CannotPackError, match="its second module does not pool"):
        PackedModel(loaded, "grouped")


def test_relative_positions_need_grouped_attention(make_tiny: Make):
    with pytest.raises(CannotPackError, match="its relative positions need grouped attention"):
        PackedModel(model.load(make_tiny("mpnet"), "cpu"), "varlen")


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_model_that_was_packed_still_runs_padded_as_before(family: str, make_tiny: Make, monkeypatch: pytest.MonkeyPatch):
    loaded = model.load(make_tiny(family), "cpu")
    before, warnings = loaded.encode(TEXTS), []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", warnings.append)
    packed_vectors(loaded, "grouped", TEXTS)
    np.testing.assert_array_equal(loaded.encode(TEXTS), before)
    assert warnings == []


def plain_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention by its formula, one document after the other, under the kernel's own conventions; [T, H, d]."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert int(cu_seq_q[-1]) == len(query) == len(key) == len(value)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    left, right = (len(query) if reach < 0 else reach for reach in window_size)
    results = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (part[start:stop].transpose(0, 1) for part in (query, key, value))
        ahead = torch.arange(stop - start) - torch.arange(stop - start)[:, None]
        scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill((ahead > right) | (-ahead > left), float("-inf"))
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize(
    ("family", "config", "windows"),
    [
        ("bert", {}, {(-1, -1)}),
        ("modernbert", {}, {(-1, -1), (8, 8)}),  # local_attention=16: 8 to each side
        ("qwen3", {}, {(-1, 0)}),
        ("qwen3", SLIDING, {(-1, 0), (7, 0)}),  # the 8 include the token itself
    ],
)
def test_the_variable_length_kernel_is_called_so_that_vectors_are_those_of_the_padded_model(
    family: str,
    config: dict[str, Any],
    windows: set[tuple[int, int]],
    make_tiny: Make,
    monkeypatch: pytest.MonkeyPatch,
):
    seen = set()

    def varlen_attn(*arguments: Any, **named: Any) -> torch.Tensor:
        seen.add(named["window_size"])
        return plain_varlen_attn(*arguments, **named)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    folder = make_tiny(family, "lasttoken" if family == "qwen3" else "mean", **config)
    assert_same_vectors(packed_vectors(model.load(folder, "cpu"), "varlen", TEXTS), padded_vectors(folder))
    assert seen == windows


@given(st.lists(st.integers(0, 70) | st.sampled_from([16, 32]), min_size=1, max_size=20), st.integers(0, 2))
def test_groups_hold_every_token_once_in_whole_tiles(values: list[int], filling: int):
    lengths = np.array(sorted(values, reverse=True), dtype=np.int64)
    groups, spread, collect = packed.group_documents(lengths, int(lengths.sum()) + filling, "cpu")
    if spread is None:
        spread = collect = np.arange(lengths.sum())
        assert filling == 0
    assert len(collect) == lengths.sum() + filling
    np.testing.assert_array_equal(spread[collect[: lengths.sum()]], np.arange(lengths.sum()))
    assert len(spread) == sum(group.num_documents * group.length for group in groups)
    np.testing.assert_array_equal(
        np.repeat([group.length for group in groups], [g.num_documents for g in groups]), -(-lengths // 16) * 16
    )
    assert len({group.length for group in groups}) == len(groups)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=20))
def test_a_place_of_a_group_holds_a_token_of_its_own_document(values: list[int]):
    lengths = np.array(sorted(values, reverse=True), dtype=np.int64)
    groups, spread, _ = packed.group_documents(lengths, int(lengths.sum()) + 1, "cpu")
    owners = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.repeat(np.arange(len(lengths)), -(-lengths // 16) * 16)
    np.testing.assert_array_equal(owners[spread], rows)
    real = [np.ones((g.num_documents, g.length), bool) if g.is_real is None else g.is_real.numpy() for g in groups]
    np.testing.assert_array_equal(np.concatenate([mask.sum(axis=1) for mask in real]), lengths)

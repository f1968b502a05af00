import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import WORDS

from matryoshka import model
from matryoshka.encode import Encoder
from matryoshka.model import ModelInfo
from matryoshka.packed import PackedModel
from matryoshka.stream import end_of_step
from matryoshka.tokens import Long, Tokens

lengths = st.lists(st.integers(1, 60), max_size=40).map(lambda values: np.array(sorted(values, reverse=True), dtype=np.int64))
TEXTS = [
    "A funnel searches coarse to fine.",
    "",
    "gr\u00f6\u00dfer \U0001f600 \u4e2d\u6587",
    "word " * 60,
    "word " * 400,  # longer than the window of 256 tokens
    "short",
    "x",
    "Two\nlines\tand a tab.",
]
SHORT = [text for text in TEXTS if len(text) < 100]


def watch_steps(monkeypatch: pytest.MonkeyPatch, most_tokens: int | None = None) -> list[list[int]]:
    """Returns a list that fills with the lengths in each packed step; steps above ``most_tokens`` run out of memory."""
    own, steps = PackedModel.__call__, []

    def call(packed: PackedModel, ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if most_tokens is not None and len(ids) > most_tokens:
            raise torch.OutOfMemoryError("no memory")
        steps.append(arguments[3].tolist())
        return own(packed, ids, *arguments)

    monkeypatch.setattr(PackedModel, "__call__", call)
    return steps


def break_vectors(monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
    """Makes the packed vectors of documents of these lengths anything but numbers."""
    own = PackedModel.__call__

    def call(packed: PackedModel, *arguments: Any) -> torch.Tensor:
        vectors = own(packed, *arguments)
        vectors[torch.from_numpy(np.isin(arguments[4], broken))] = float("nan")
        return vectors

    monkeypatch.setattr(PackedModel, "__call__", call)


def window(tokens: Tokens, number: int) -> Tokens:
    """Returns one of the windows as a text of its own."""
    start = int(tokens.lengths[:number].sum())
    lengths = tokens.lengths[number : number + 1]
    return Tokens(tokens.ids[start : start + int(lengths[0])], lengths, np.zeros(1, np.int64), 1)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def steps_of(rows: np.ndarray, tokens_per_step: int, *, is_padded: bool) -> list[tuple[int, int]]:
    edges = [0]
    while edges[-1] < len(rows):
        edges.append(end_of_step(rows, edges[-1], tokens_per_step, is_padded=is_padded))
        assert edges[-1] > edges[-2]
    return list(itertools.pairwise(edges))


@given(lengths, st.integers(1, 100), st.booleans())
def test_steps_end_with_the_last_window_and_each_is_as_large_as_the_budget_lets_it_be(
    rows: np.ndarray, tokens_per_step: int, is_padded: bool
):
    def cost(start: int, stop: int) -> int:
        return int(rows[start]) * (stop - start) if is_padded else int(rows[start:stop].sum())

    steps = steps_of(rows, tokens_per_step, is_padded=is_padded)
    assert [row for start, stop in steps for row in range(start, stop)] == list(range(len(rows)))
    for start, stop in steps:
        assert stop - start == 1 or cost(start, stop) <= tokens_per_step
        assert stop == len(rows) or cost(start, stop + 1) > tokens_per_step


def test_vectors_are_those_of_sentence_transformers_in_the_order_of_the_texts(minilm: ModelInfo, encoder: Encoder):
    reference = model.load(minilm.folder, "cpu").encode(TEXTS, normalize_embeddings=True)
    vectors = encoder.encode(TEXTS, "document").vectors
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float16
    # float16 keeps 11 bits of each component, which moves the angle of a vector by about 2e-4, its cosine by 2e-8.
    assert (cosines(vectors, reference) >= 0.99999).all()
    assert (cosines(vectors, np.roll(reference, 1, axis=0)) < 0.99).all()


@pytest.mark.parametrize("tokens_per_step", [1, 300])
def test_vectors_do_not_depend_on_how_texts_share_steps(
    minilm: ModelInfo, encoder: Encoder, tokens_per_step: int, monkeypatch: pytest.MonkeyPatch
):
    expected, small = encoder.encode(TEXTS, "document"), Encoder(minilm.folder, "cpu", "float32", tokens_per_step)
    steps = watch_steps(monkeypatch)
    found = small.encode(TEXTS, "document")
    # Groups of another size change the order of sums; the differences are those of float32, then rounded to float16.
    assert (cosines(found.vectors, expected.vectors) >= 0.99999).all()
    assert found.num_tokens == sum(sum(step) for step in steps)
    assert found.num_padded_tokens == sum(-(-sum(step) // 64) * 64 for step in steps)  # a stream is filled up, no document is
    assert all(len(step) == 1 or sum(step) <= tokens_per_step for step in steps)
    assert [length for step in steps for length in step] == sorted((length for step in steps for length in step), reverse=True)
    assert found.tokens_per_step == tokens_per_step


def test_vectors_are_of_unit_length(encoder: Encoder):
    norms = np.linalg.norm(encoder.encode(TEXTS, "query").vectors.astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)  # float16 rounding moves a norm by up to 2e-4


def test_bf16_gives_nearly_the_same_vectors(minilm: ModelInfo, encoder: Encoder):
    vectors = Encoder(minilm.folder, "cpu", "bf16").encode(TEXTS, "document").vectors
    # bf16 keeps 8 bits: six layers of it move a unit vector by about 1e-2.
    assert (cosines(vectors, encoder.encode(TEXTS, "document").vectors) >= 0.999).all()


def test_no_texts_give_no_vectors(encoder: Encoder):
    encoded = encoder.encode([], "document")
    assert encoded.vectors.shape == (0, 384)
    assert (encoded.num_tokens, encoded.num_padded_tokens, encoded.num_truncated, encoded.num_flops) == (0, 0, 0, 0)


def test_tokens_are_counted_with_special_ones_and_texts_that_were_cut(encoder: Encoder):
    encoded = encoder.encode(["word", "word " * 300], "document")
    assert encoded.num_tokens == 3 + 256
    assert (encoded.num_truncated, encoded.num_cut_tokens, encoded.num_split) == (1, 46, 0)


def test_a_text_that_just_fits_the_window_was_not_cut(encoder: Encoder):
    encoded = encoder.encode(["word " * 254], "document")  # and two special tokens
    assert (encoded.num_tokens, encoded.num_truncated) == (256, 0)


def test_prompts_are_put_before_texts_once_and_by_role(minilm_copy: Callable[..., Path], encoder: Encoder):
    prompts = {"query": "find this: ", "document": "title: "}
    prompted = Encoder(minilm_copy(config_sentence_transformers={"prompts": prompts}), "cpu", "float32")
    for role, prompt in prompts.items():
        found, by_hand = prompted.encode(SHORT, role), encoder.encode([prompt + text for text in SHORT], "document")
        np.testing.assert_array_equal(found.vectors, by_hand.vectors)
        assert found.num_tokens == by_hand.num_tokens
    # The model's own prompts are empty, so that role does not matter there.
    np.testing.assert_array_equal(encoder.encode(SHORT, "query").vectors, encoder.encode(SHORT, "document").vectors)


def test_a_prompt_that_its_pooling_leaves_out_is_left_out(minilm_copy: Callable[..., Path]):
    changes = {
        "config_sentence_transformers": {"prompts": {"query": "find this: "}},
        "1_Pooling/config": {"include_prompt": False},
    }
    folder = minilm_copy(**changes)
    reference = model.load(folder, "cpu").encode(SHORT, prompt_name="query", normalize_embeddings=True)
    vectors = Encoder(folder, "cpu", "float32").encode(SHORT, "query").vectors
    assert (cosines(vectors, reference) >= 0.99999).all()  # float16, as above


def test_a_long_text_has_the_mean_of_its_windows_weighted_by_their_tokens(tiny: str):
    texts = ["short", " ".join(WORDS[:300]), "", " ".join(WORDS[80::-1])]
    encoder, averaging = Encoder(Path(tiny), "cpu", "float32"), Encoder(Path(tiny), "cpu", "float32", long="mean")
    tokens = averaging.tokenise(texts, "document")
    sums = np.zeros((len(texts), 64))
    for number, owner in enumerate(tokens.owners):
        sums[owner] += tokens.lengths[number] * encoder.compute(window(tokens, number), "document").vectors[0].astype(np.float64)
    encoded = averaging.encode(texts, "document")
    assert len(set(tokens.lengths[tokens.owners == 1].tolist())) > 1
    assert (encoded.num_split, encoded.num_truncated, encoded.num_cut_tokens) == (2, 0, 0)
    assert encoded.num_tokens == tokens.lengths.sum()
    np.testing.assert_allclose(encoded.vectors, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-3)  # float16
    # The short ones are as they were.
    np.testing.assert_allclose(encoded.vectors[::2], encoder.encode(texts[::2], "document").vectors, atol=1e-3)


def test_steps_are_halved_when_memory_runs_out(tiny: str, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(Path(tiny), "cpu", "float32", tokens_per_step=400)
    texts = [" ".join(WORDS[:count]) for count in (60, 3, 61, 62, 17, 0, 30, 40, 50)]
    expected = encoder.encode(texts, "document")
    steps = watch_steps(monkeypatch, most_tokens=120)
    found = encoder.encode(texts, "document")
    # Groups of another size change the order of sums, as above.
    assert (cosines(found.vectors, expected.vectors) >= 0.99999).all()
    assert expected.tokens_per_step == 400
    assert 0 < found.tokens_per_step <= 120, "half of the last step that did not fit"
    assert found.num_tokens == sum(sum(step) for step in steps) == expected.num_tokens
    assert encoder.encode(texts, "document").tokens_per_step == found.tokens_per_step


def test_a_document_that_does_not_fit_into_memory_is_named_by_its_tokens(tiny: str, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(Path(tiny), "cpu", "float32")
    watch_steps(monkeypatch, most_tokens=20)
    with pytest.raises(RuntimeError, match="a document of 32 tokens does not fit into the memory of the cpu device"):
        encoder.encode([WORDS[0], " ".join(WORDS[:30])], "document")


def test_vectors_that_only_the_packed_model_breaks_come_from_the_padded_one(tiny: str, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(Path(tiny), "cpu", "float32", tokens_per_step=100)
    texts = [" ".join(WORDS[count : 2 * count]) for count in (3, 40, 10, 20, 30, 10)]
    expected = encoder.encode(texts, "document").vectors
    break_vectors(monkeypatch, 5, 12, 42)  # the shortest first, in the order of the texts
    assert (cosines(encoder.encode(texts, "document").vectors, expected) >= 0.99999).all()


@pytest.mark.parametrize("long", ["truncate", "mean"])
def test_texts_whose_vectors_are_no_numbers_are_named_by_their_numbers(tiny: str, tmp_path: Path, long: Long):
    loaded = model.load(Path(tiny), "cpu")
    loaded[0].auto_model.embeddings.word_embeddings.weight.data[loaded.tokenizer.convert_tokens_to_ids("x")] = float("nan")
    loaded.save_pretrained(str(tmp_path / "broken"), create_model_card=False)
    encoder = Encoder(tmp_path / "broken", "cpu", "float32", long=long)
    assert encoder.notice == ""  # its check does not meet the broken token
    texts = [WORDS[0], "x", " ".join(WORDS[:100]), WORDS[1] + " x", " ".join(["x", *WORDS[:200]])]
    with pytest.raises(ValueError, match="not finite or have no length") as caught:
        encoder.encode(texts, "document")
    assert caught.value.args[1] == [1, 3, 4]
    assert encoder.encode(texts[::2][:2], "document").vectors.shape == (2, 64)


def test_texts_without_any_token_are_named_by_their_numbers(encoder: Encoder):
    tokens = Tokens(np.array([101, 102], np.int32), np.array([0, 2, 0]), np.arange(3), 3)
    with pytest.raises(ValueError, match="texts without any token have no vector") as caught:
        encoder.compute(tokens, "document")
    assert caught.value.args[1] == [0, 2]


def test_threads_that_share_an_encoder_get_their_own_vectors(tiny: str):
    encoder = Encoder(Path(tiny), "cpu", "float32", tokens_per_step=200)
    texts = [[" ".join(WORDS[first + at : first + at + at % 50]) for at in range(60)] for first in (0, 100, 200)]
    alone = [encoder.encode(own, "document").vectors for own in texts]
    together: list[list[np.ndarray]] = [[] for _ in texts]

    def encode_often(number: int) -> None:
        together[number] = [encoder.encode(texts[number], "document").vectors for _ in range(4)]

    threads = [threading.Thread(target=encode_often, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 4
        for vectors in found:
            np.testing.assert_array_equal(vectors, expected)


def test_tokenising_processes_change_nothing(minilm: ModelInfo, encoder: Encoder):
    with_processes = Encoder(minilm.folder, "cpu", "float32", num_tokenisers=1)
    try:
        found = with_processes.encode(TEXTS, "query")
    finally:
        with_processes.close()
    np.testing.assert_array_equal(found.vectors, encoder.encode(TEXTS, "query").vectors)


def test_operations_grow_with_tokens_and_with_the_squares_of_lengths(encoder: Encoder):
    one, other = (encoder.encode(["word " * count], "document").num_flops for count in (98, 198))  # 100 and 200 tokens
    linear, square = (4 * one - other) / 200, (other - 2 * one) / 20_000
    # Six layers: 384 x 384 four times and 384 x 1536 twice, and one pooler; a product costs two operations per weight.
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert square == pytest.approx(4 * 384 * 6)
    assert weights <= linear / 2 <= weights + 384 * 384

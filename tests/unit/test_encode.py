from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import model
from matryoshka.encode import Encoder, plan_steps
from matryoshka.model import ModelInfo

lengths = st.lists(st.integers(0, 60), max_size=40).map(lambda values: np.array(values, dtype=np.int64))
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


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


@given(lengths, st.integers(1, 100))
def test_every_row_is_in_exactly_one_step(rows: np.ndarray, tokens_per_step: int):
    steps = plan_steps(rows, tokens_per_step)
    assert sorted(row for step in steps for row in step.tolist()) == list(range(len(rows)))
    assert all(len(step) for step in steps)


@given(lengths, st.integers(1, 100))
def test_a_padded_step_is_within_the_budget_or_a_single_text(rows: np.ndarray, tokens_per_step: int):
    for step in plan_steps(rows, tokens_per_step):
        assert len(step) == 1 or len(step) * max(int(rows[step].max()), 1) <= tokens_per_step


@given(lengths, st.integers(1, 100))
def test_the_longest_texts_come_first(rows: np.ndarray, tokens_per_step: int):
    steps = plan_steps(rows, tokens_per_step)
    assert [int(rows[row]) for step in steps for row in step] == sorted(rows.tolist(), reverse=True)


def test_vectors_are_those_of_sentence_transformers_in_the_order_of_the_texts(minilm: ModelInfo, encoder: Encoder):
    reference = model.load(minilm.folder, "cpu").encode(TEXTS, normalize_embeddings=True)
    vectors = encoder.encode(TEXTS, "document").vectors
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float16
    # float16 keeps 11 bits of each component, which moves the angle of a vector by about 2e-4, its cosine by 2e-8.
    assert (cosines(vectors, reference) >= 0.99999).all()
    assert (cosines(vectors, np.roll(reference, 1, axis=0)) < 0.99).all()


@pytest.mark.parametrize("tokens_per_step", [1, 300])
def test_vectors_do_not_depend_on_how_texts_share_steps(minilm: ModelInfo, encoder: Encoder, tokens_per_step: int):
    found = Encoder(minilm.folder, "cpu", "float32", tokens_per_step).encode(TEXTS, "document")
    # Padding changes the order of sums in attention; the differences are those of float32, then rounded to float16.
    assert (cosines(found.vectors, encoder.encode(TEXTS, "document").vectors) >= 0.99999).all()
    assert found.num_padded_tokens >= found.num_tokens


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
    assert (encoded.num_tokens, encoded.num_padded_tokens, encoded.num_truncated) == (0, 0, 0)


def test_tokens_are_counted_with_special_ones_and_texts_that_were_cut(encoder: Encoder):
    encoded = encoder.encode(["word", "word " * 300], "document")
    assert encoded.num_tokens == 3 + 256
    assert encoded.num_truncated == 1


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

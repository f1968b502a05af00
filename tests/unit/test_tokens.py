"""transformers' own call is the oracle for short texts; windows of long ones are held to their laws."""

import itertools
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import WORDS
from transformers import AutoTokenizer

from matryoshka.model import ModelInfo
from matryoshka.tokens import Long, Tokeniser, TokeniserPool, Tokens

WINDOW = 256
PROMPTS = {"query": "find this: ", "document": "title: "}
TEXTS = [
    "",
    "x",
    "gr\u00f6\u00dfer \U0001f600 \u4e2d\u6587",
    "Two\nlines\tand a tab.",
    "word " * 254,
    "word " * 255,
    "long " * 700,
]
PARENT = """
import sys, time
from pathlib import Path
from tokenizers import Tokenizer
from matryoshka.tokens import Tokeniser, TokeniserPool

if __name__ == "__main__":
    pool = TokeniserPool(Tokeniser(Tokenizer.from_file(sys.argv[1]), 64, {}, "truncate"), 2)
    print(pool(["a text"] * 2_500, "document").num_texts, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def tokenizer(minilm: ModelInfo) -> Any:
    return AutoTokenizer.from_pretrained(minilm.folder)


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny: str) -> Any:
    """Words of ``WORDS`` are one token each, others one per letter; quick to copy."""
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def tokeniser(tokenizer: Any) -> Tokeniser:
    return Tokeniser(tokenizer.backend_tokenizer, WINDOW, PROMPTS, "truncate")


@pytest.fixture
def pool(tokeniser: Tokeniser) -> Iterator[TokeniserPool]:
    pool = TokeniserPool(tokeniser, 2)
    yield pool
    pool.close()


def windows(tokens: Tokens) -> list[list[int]]:
    assert tokens.ids.dtype == np.int32
    assert tokens.lengths.sum() == len(tokens.ids)
    return [part.tolist() for part in np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])]


def assert_same_tokens(left: Tokens, right: Tokens) -> None:
    for name in Tokens.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def children() -> set[psutil.Process]:
    return {psutil.Process(child.pid) for child in multiprocessing.active_children()}


def wait_for_the_end_of(processes: set[psutil.Process], seconds: float = 20) -> None:
    """Returns once all have ended; a process that nobody waits for has ended when it is a zombie."""
    deadline = time.monotonic() + seconds
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.1)


@pytest.mark.parametrize("role", PROMPTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_are_those_of_the_models_own_tokenizer(role: str, side: str, tokenizer: Any):
    tokens = Tokeniser(tokenizer.backend_tokenizer, WINDOW, PROMPTS, "truncate", side)(TEXTS, role)
    tokenizer.truncation_side = side
    expected = tokenizer([PROMPTS[role] + text for text in TEXTS], truncation=True, max_length=WINDOW)["input_ids"]
    assert windows(tokens) == expected
    np.testing.assert_array_equal(tokens.owners, np.arange(len(TEXTS)))


def test_a_role_without_prompt_has_none(tokenizer: Any):
    tokeniser = Tokeniser(tokenizer.backend_tokenizer, WINDOW, {}, "truncate")
    assert windows(tokeniser(["a text"], "query")) == tokenizer(["a text"])["input_ids"]


def test_the_models_own_tokenizer_stays_as_it_is(tokenizer: Any):
    before = tokenizer.backend_tokenizer.to_str()
    Tokeniser(tokenizer.backend_tokenizer, 16, PROMPTS, "mean")(TEXTS, "query")
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_truncation_cuts_off_is_counted(tokenizer: Any, side: str):
    tokeniser = Tokeniser(tokenizer.backend_tokenizer, WINDOW, {}, "truncate", side)
    tokens = tokeniser(["word " * 254, "word " * 300, "word " * 1_000], "document")  # two special tokens in each window of 256
    assert (tokens.num_truncated, tokens.num_cut_tokens, tokens.num_split) == (2, 46 + 746, 0)


def test_every_word_of_a_long_text_is_in_one_of_its_windows(tokenizer: Any):
    # Not whole tokens of the vocabulary: many windows begin in the middle of a word.
    words = [f"{word}ing{number}" for number, word in enumerate(WORDS)]
    text = " ".join(words)
    found = windows(Tokeniser(tokenizer.backend_tokenizer, WINDOW, {}, "mean")([text], "document"))
    decoded = [tokenizer.decode(window, skip_special_tokens=True) for window in found]
    assert len(decoded) > 10
    assert [word for word in words if not any(word in part for part in decoded)] == []


@given(
    texts=st.lists(st.lists(st.sampled_from([*WORDS, "off", "a1b2c3"]), max_size=100).map(" ".join), min_size=1, max_size=5),
    prompt=st.sampled_from(["", f"{WORDS[7]}: "]),
    max_tokens=st.integers(5, 64),
)
def test_windows_cover_their_text_and_overlap(texts: list[str], prompt: str, max_tokens: int, tiny_tokenizer: Any):
    tokenizer = tiny_tokenizer
    tokens = Tokeniser(tokenizer.backend_tokenizer, max_tokens, {"query": prompt}, "mean")(texts, "query")
    before, after = [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]], [tokenizer.sep_token_id]
    room = max_tokens - len(before) - len(after)
    assert (np.diff(tokens.owners) >= 0).all()
    assert sorted(set(tokens.owners.tolist())) == list(range(len(texts)))
    assert (tokens.num_texts, tokens.num_truncated, tokens.num_cut_tokens) == (len(texts), 0, 0)
    parts: list[list[list[int]]] = [[] for _ in texts]
    for owner, window in zip(tokens.owners, windows(tokens), strict=True):
        assert len(window) <= max_tokens
        assert (window[: len(before)], window[-1:]) == (before, after)
        parts[owner].append(window[len(before) : -1])
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    shared = room // 8
    for own, expected in zip(parts, whole, strict=True):
        together = own[0]
        for previous, following in itertools.pairwise(own):
            assert len(previous) == room  # only the last is shorter
            assert len(following) > shared  # and says more than what it shares
            assert previous[len(previous) - shared :] == following[:shared]
            together = together + following[shared:]
        assert together == expected
    assert tokens.num_split == sum(len(own) > 1 for own in parts) == sum(len(ids) > room for ids in whole)


def test_a_prompt_that_fills_the_window_leaves_room_for_something_of_the_text(tiny_tokenizer: Any):
    texts = ["", WORDS[1]]
    tokens = Tokeniser(tiny_tokenizer.backend_tokenizer, 8, {"query": f"{WORDS[0]} " * 9}, "mean")(texts, "query")
    assert tokens.lengths.max() <= 8
    assert set(tokens.owners.tolist()) == {0, 1}
    assert tiny_tokenizer.convert_tokens_to_ids(WORDS[1]) in tokens.ids


@given(groups=st.lists(st.lists(st.integers(0, 90), max_size=4), max_size=4), long=st.sampled_from(["truncate", "mean"]))
def test_joined_tokens_are_those_of_all_texts_at_once(groups: list[list[int]], long: Long, tiny_tokenizer: Any):
    tokeniser = Tokeniser(tiny_tokenizer.backend_tokenizer, 32, {}, long)
    texts = [[" ".join(WORDS[:count]) for count in group] for group in groups]
    joined = Tokens.join([tokeniser(group, "document") for group in texts])
    assert_same_tokens(joined, tokeniser([text for group in texts for text in group], "document"))


def test_processes_give_the_tokens_that_the_calling_thread_gives(tokenizer: Any):
    tokeniser = Tokeniser(tokenizer.backend_tokenizer, WINDOW, PROMPTS, "mean")
    lengths = [300 if number % 100 == 0 else number % 10 for number in range(2_100)]  # three tasks, some texts beyond the window
    texts = [" ".join(random.Random(number).choices(WORDS, k=length)) for number, length in enumerate(lengths)]
    in_thread, in_processes = TokeniserPool(tokeniser, 0), TokeniserPool(tokeniser, 2)
    try:
        for role in PROMPTS:
            assert_same_tokens(in_processes(texts, role), in_thread(texts, role))
        assert in_processes([], "query").num_texts == in_thread([], "query").num_texts == 0
    finally:
        in_processes.close()
        in_thread.close()


def test_closing_ends_the_processes(tokeniser: Tokeniser):
    before = children()
    pool = TokeniserPool(tokeniser, 2)
    pool(TEXTS, "query")
    started = children() - before
    assert started
    pool.close()
    wait_for_the_end_of(started)


def test_a_lost_process_fails_the_call_and_the_next_one_has_new_ones(pool: TokeniserPool):
    before = children()
    expected = pool(TEXTS * 300, "document")  # three tasks, so that both processes are there
    started = children() - before
    assert len(started) == 2
    next(iter(started)).kill()
    wait_for_the_end_of(started)  # the other one is ended with it
    with pytest.raises(RuntimeError, match="a tokenising process was lost"):
        pool(TEXTS, "document")
    assert_same_tokens(pool(TEXTS * 300, "document"), expected)


def test_tokenising_processes_end_when_their_parent_is_killed(minilm: ModelInfo, tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(minilm.folder / "tokenizer.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() == "2500"
        started = set(psutil.Process(parent.pid).children(recursive=True))
        assert len(started) >= 2
        parent.kill()
    wait_for_the_end_of(started)

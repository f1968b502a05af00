"""Text to token ids, beside the thread that computes: threads on a CPU worker, processes beside a GPU.

Prompts are put before texts here and nowhere else.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Role = Literal["query", "document"]
Long = Literal["truncate", "mean"]

_TEXTS_PER_TASK = 1_000
_OVERLAP = 8  # consecutive windows share an eighth
_WATCH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of some texts, end to end, cut into windows that fit the model.

    Attributes:
        ids: Of all windows, one after the other, special tokens included; [T].
        lengths: Tokens of each window; they add up to T.
        owners: Number of the text that each window belongs to, ascending; every text has at least one window.
        num_texts: How many texts there were.
        num_truncated: Texts that were longer than the model's window and lost their end.
        num_cut_tokens: Tokens that they lost.
        num_split: Texts that were longer than the window and have several windows instead.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]
    num_texts: int
    num_truncated: int = 0
    num_cut_tokens: int = 0
    num_split: int = 0

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Returns the tokens of several runs of texts as those of one."""
        if not parts:
            return cls(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), 0)
        firsts = np.cumsum([0, *(part.num_texts for part in parts)])
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.owners + first for part, first in zip(parts, firsts[:-1], strict=True)]),
            int(firsts[-1]),
            sum(part.num_truncated for part in parts),
            sum(part.num_cut_tokens for part in parts),
            sum(part.num_split for part in parts),
        )


class Tokeniser:
    """Turns texts into token ids as the model was trained to see them; can be sent to another process.

    Args:
        tokenizer: The model's own.
        max_tokens: The model's window, special tokens included.
        prompts: What to put before a text, by role.
        long: What becomes of a longer text: ``truncate`` cuts its end off, ``mean`` cuts it into windows that overlap.
        cut: The side that ``truncate`` cuts off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        prompts: Mapping[str, str],
        long: Long,
        cut: Literal["left", "right"] = "right",
    ) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens, direction=cut)
        self._prompts, self._long, self._cut = dict(prompts), long, cut
        self._num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        self._max_tokens = max_tokens
        whole, bare = (self._tokenizer.encode("a", add_special_tokens=is_whole).ids for is_whole in (True, False))
        first = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        self._before, self._after = whole[:first], whole[first + len(bare) :]  # special tokens

    def __call__(self, texts: Sequence[str], role: Role) -> Tokens:
        """Returns the tokens of texts with the prompt of their role."""
        prompt = self._prompts.get(role) or ""
        encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        over = [number for number, encoding in enumerate(encodings) if encoding.overflowing]
        windows: list[list[int]] = [encoding.ids for encoding in encodings]
        owners = np.arange(len(texts))
        num_cut = 0
        if self._long == "mean" and over:
            pieces = {number: self._split(texts[number], prompt) for number in over}
            windows = list(chain.from_iterable(pieces.get(number) or [ids] for number, ids in enumerate(windows)))
            owners = np.repeat(owners, [len(pieces.get(number) or [0]) for number in range(len(texts))])
        else:
            num_cut = sum(len(part) - self._num_special for number in over for part in encodings[number].overflowing)
        lengths = np.fromiter(map(len, windows), np.int64, len(windows))
        ids = np.fromiter(chain.from_iterable(windows), np.int32, int(lengths.sum()))
        num_truncated, num_split = (len(over), 0) if self._long == "truncate" else (0, len(over))
        return Tokens(ids, lengths, owners, len(texts), num_truncated, num_cut, num_split)

    def _split(self, text: str, prompt: str) -> list[list[int]]:
        """Returns the windows of a long text, each with the prompt and the special tokens around it.

        The tokens are those of the whole text: a piece of it, tokenised anew, may have more of them and lose its end.
        """
        self._tokenizer.no_truncation()
        try:
            whole = self._tokenizer.encode(prompt + text, add_special_tokens=False)
        finally:
            self._tokenizer.enable_truncation(self._max_tokens, direction=self._cut)
        num_prompt = sum(end <= len(prompt) for _, end in whole.offsets) if prompt else 0
        num_prompt = min(num_prompt, self._max_tokens - self._num_special - 1)
        before, own = self._before + whole.ids[:num_prompt], whole.ids[num_prompt:]
        room = self._max_tokens - self._num_special - num_prompt
        step = max(room - room // _OVERLAP, 1)
        starts = range(0, max(len(own) - (room - step), 1), step)
        return [before + own[start : start + room] + self._after for start in starts]


class TokeniserPool:
    """Tokenises in ``num_processes`` processes, or, with 0, in the thread that asks.

    The Rust tokenizer lets other threads run while it works, so on a CPU worker a thread is enough; a GPU needs more tokens
    than one process can hand over.
    """

    def __init__(self, tokeniser: Tokeniser, num_processes: int) -> None:
        self._tokeniser, self._num_processes = tokeniser, num_processes
        self._lock = threading.Lock()  # splitting a long text changes the tokenizer for a moment
        self._executor = self._start_processes() if num_processes else None

    def _start_processes(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that CUDA's and Ray's threads hold
        return ProcessPoolExecutor(self._num_processes, context, initializer=_adopt, initargs=(self._tokeniser, os.getpid()))

    def __call__(self, texts: Sequence[str], role: Role) -> Tokens:
        """Returns the tokens of texts, in their order.

        Raises:
            RuntimeError: A tokenising process was lost; the next call has new ones.
        """
        parts = [texts[start : start + _TEXTS_PER_TASK] for start in range(0, len(texts), _TEXTS_PER_TASK)]
        executor = self._executor
        if executor is None:
            with self._lock:
                return Tokens.join([self._tokeniser(part, role) for part in parts])
        try:
            return Tokens.join(list(executor.map(_tokenise, parts, [role] * len(parts))))
        except BrokenProcessPool:
            with self._lock:
                if self._executor is executor:  # no other thread has replaced it yet
                    self._executor = self._start_processes()
            raise RuntimeError("a tokenising process was lost") from None

    def close(self) -> None:
        """Ends the processes."""
        if self._executor:
            self._executor.shutdown(cancel_futures=True)


_adopted: list[Tokeniser] = []


def _adopt(tokeniser: Tokeniser, parent: int) -> None:
    """Prepares a tokenising process: it ends by itself when the worker that started it is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _adopted.append(tokeniser)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _tokenise(texts: Sequence[str], role: Role) -> Tokens:
    return _adopted[0](texts, role)

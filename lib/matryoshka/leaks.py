"""Near-duplicates across splits: what a model has nearly seen while training tells nothing when it is asked. The only room
that knows datasketch.

Source: Broder 1997, On the resemblance and containment of documents; Lee et al. 2022, arXiv:2107.06499.
"""

import functools
import re
import zlib
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matryoshka import storage
from matryoshka.splits import STRENGTH
from matryoshka.storage import Place

NOWHERE = -1
"""The home of a text that is no document."""

_SHINGLE_WORDS = 3
_NUM_HASHES = 128
_MOST_MISSES = 1e-4
# Scripts without spaces between words: each character is one. Thai and Lao; Myanmar; Khmer; kana; Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\u1780-\u17ff"
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+[+#]*")  # "C", "C++" and "C#" are three words
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)

Shingles = npt.NDArray[np.uint32]


def shingle(text: str) -> Shingles:
    """Returns the hashes of all runs of three words, each once, sorted; a shorter text is one run.

    Where a script has no spaces, each character is a word.

    >>> len(shingle("What is (are) Leukemia?")), len(shingle("Hello!")), len(shingle("..."))
    (2, 1, 0)
    """
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.casefold())]
    if not words:
        return np.empty(0, np.uint32)
    words += [0] * (_SHINGLE_WORDS - len(words))
    runs = np.lib.stride_tricks.sliding_window_view(np.array(words, np.uint64), _SHINGLE_WORDS)
    mixed = (runs * _MIX).sum(axis=1, dtype=np.uint64)
    return np.unique(((mixed ^ (mixed >> 29)) * _MIX[1] >> 32).astype(np.uint32))


def similarity(left: Shingles, right: Shingles) -> float:
    """Returns the Jaccard similarity of two texts: the share of their runs of words that both have."""
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / max(len(left) + len(right) - both, 1)


def plan_bands(threshold: float) -> tuple[int, int]:
    """Returns (bands, hashes per band) for which texts at the threshold share a band, all but one in ten thousand.

    Texts that share a band are then compared exactly, so one that is not close enough costs time only.

    >>> plan_bands(0.9)
    (18, 7)
    """
    fitting = (rows for rows in range(_NUM_HASHES, 1, -1) if (1 - threshold**rows) ** (_NUM_HASHES // rows) < _MOST_MISSES)
    rows = next(fitting, 1)
    return _NUM_HASHES // rows, rows


class References:
    """Texts of dev and test that a training pair may not come close to.

    Args:
        threshold: The Jaccard similarity from which on two texts count as near-duplicates.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH  # half a second to import, for those that look for leaks

        self._threshold = threshold
        self._index = MinHashLSH(num_perm=_NUM_HASHES, params=plan_bands(threshold))
        self._splits: list[str] = []
        self._homes: list[int] = []
        self._shingles: list[Shingles] = []

    def find(self, text: str, home: int = NOWHERE) -> str | None:
        """Returns the strongest split that has a near-duplicate of a text from ``home``, itself left aside, or None."""
        own = shingle(text)
        others = (number for number in self._candidates(own) if home == NOWHERE or self._homes[number] != home)
        found = {self._splits[number] for number in others if self._is_near(own, number)}
        return min(found, key=STRENGTH.__getitem__, default=None)

    def _candidates(self, own: Shingles) -> list[int]:
        return self._index.query(_sketch(own)) if len(own) and self._shingles else []

    def _is_near(self, own: Shingles, number: int) -> bool:
        return similarity(own, self._shingles[number]) >= self._threshold

    def count_near(self, split: str, other: str) -> int:
        """Returns how many texts of one split have a near-duplicate in another."""
        return sum(
            any(self._splits[near] == other and self._is_near(own, near) for near in self._candidates(own))
            for own, own_split in zip(self._shingles, self._splits, strict=True)
            if own_split == split
        )

    @classmethod
    def load(cls, folder: Place, threshold: float) -> Self:
        """Returns the references that tasks saved in a folder."""
        references = cls(threshold)
        paths: list[Place] = sorted(folder.glob("*.npz"), key=lambda path: path.name)
        for path in paths:
            with np.load(storage.local(path), allow_pickle=False) as file:
                parts = np.split(file["shingles"], np.cumsum(file["lengths"])[:-1]) if len(file["lengths"]) else []
                columns = parts, file["sketches"], file["splits"].tolist(), file["homes"].tolist()
                for own, sketch, split, home in zip(*columns, strict=True):
                    references._add(own, sketch, split, home)
        return references

    def _add(self, own: Shingles, sketch: npt.NDArray[np.uint32], split: str, home: int) -> None:
        if len(own):
            self._index.insert(len(self._splits), _as_minhash(sketch))
            self._splits.append(split)
            self._homes.append(home)
            self._shingles.append(own)


def save(path: Place, texts: Iterable[tuple[str, int, str]]) -> None:
    """Writes what ``References.load`` reads of texts, each with its split and home: the slow part, for several tasks."""
    found = [(split, home, shingle(text)) for split, home, text in texts]
    sketches = [_sketch(own).hashvalues for _, _, own in found]
    with storage.publish(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            splits=np.array([split for split, _, _ in found], "U8"),
            homes=np.array([home for _, home, _ in found], np.int64),
            lengths=np.array([len(own) for _, _, own in found], np.int64),
            shingles=np.concatenate([np.empty(0, np.uint32), *(own for _, _, own in found)]),
            sketches=np.array(sketches, np.uint32).reshape(-1, _NUM_HASHES),
        )


def _sketch(own: Shingles) -> Any:
    minhash = _blank().copy()
    minhash.update_batch(own.tolist())
    return minhash


def _as_minhash(sketch: npt.NDArray[np.uint32]) -> Any:
    minhash = _blank().copy()
    minhash.hashvalues = sketch
    return minhash


@functools.lru_cache(maxsize=1)
def _blank() -> Any:
    """Returns what the others are copied from: making one anew takes six times as long as hashing a document."""
    from datasketch import MinHash

    return MinHash(_NUM_HASHES, hashfunc=int, scheme="affine32")

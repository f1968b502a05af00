"""Which split a row belongs to: by hash, by a column, or by the name of its file."""

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matryoshka import units

TEST, DEV, TRAIN = "test", "dev", "train"
STRENGTH = {TEST: 0, DEV: 1, TRAIN: 2}
"""A text that stands in several splits stays in the first of these."""

_NAMES = {"validation": DEV, "valid": DEV, "val": DEV, **{name: name for name in STRENGTH}}
_FILE_NAME = re.compile(rf"({'|'.join(_NAMES)})([-_.].*)?", re.IGNORECASE)

SplitBy = Literal["hash", "column", "files"]


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How rows get their split.

    Attributes:
        by: The hash of a group, the value of a column, or the name of the file.
        fractions: Share of each split, where the hash decides; the last one takes what the others leave.
        salt: See ``units.choose_split``.
        root: Of the input: folders above it name no split.
    """

    by: SplitBy
    fractions: Mapping[str, float]
    salt: str
    root: str = ""

    def of(self, group: str) -> str:
        """Returns the split of a group by its hash."""
        return units.choose_split(group, self.fractions, self.salt)

    def of_path(self, path: str) -> str:
        """Returns the split that the path of a file names; empty where names do not decide."""
        return of_file(path.removeprefix(self.root)) or "" if self.by == "files" else ""


def known(value: str) -> str | None:
    """Returns the split that a text names, or None.

    >>> known("Validation"), known("exam")
    ('dev', None)
    """
    return _NAMES.get(value.strip().casefold())


def checked(value: str, where: str) -> str:
    """Returns the split that a text names.

    Raises:
        ValueError: It names none.
    """
    split = known(value)
    if split is None:
        raise ValueError(f"{where}: no split '{value}'. Write train, dev or test, or leave --split-column out.")
    return split


def of_file(name: str) -> str | None:
    """Returns the split that the name of a file begins with, or else the split that one of its folders is named, or None.

    Args:
        name: The file's path below the root of the input: what lies above it says nothing.

    >>> of_file("train-00001-of-00004.parquet"), of_file("validation/0000.csv"), of_file("training.csv")
    ('train', 'dev', None)
    """
    *folders, own = name.split("/")
    match = _FILE_NAME.fullmatch(own)
    if match:
        return _NAMES[match[1].casefold()]
    return next((split for folder in reversed(folders) if (split := known(folder))), None)


def name_splits(names: Sequence[str]) -> bool:
    """Returns whether files name the splits of their rows: at least two of them together.

    >>> name_splits(["train.csv", "test/a.csv"]), name_splits(["train-0.csv", "train-1.csv"])
    (True, False)
    """
    return len({of_file(name) for name in names} - {None}) > 1


def check_names(names: Sequence[str]) -> None:
    """Checks that every file names the split of its rows.

    Raises:
        ValueError: One does not.
    """
    for name in names:
        if of_file(name) is None:
            raise ValueError(
                f"{name}: neither its name nor its folder's says a split. Begin one with train, dev or test, take the file out,"
                " or pass --split-by hash."
            )


def strongest(splits: Iterable[str]) -> str:
    """Returns the split in which a text stays that stands in all of these."""
    return min(splits, key=STRENGTH.__getitem__)


Cutoffs = Mapping[str, bytes | None]


class Sample:
    """The keys of each split that a limit lets in, chosen by hash: a larger limit only adds.

    What several tasks have seen is merged, in memory for as many keys as the limits allow.
    """

    def __init__(self, limits: Mapping[str, int | None], salt: str) -> None:
        self._salt = salt
        self.lowest: dict[str, list[bytes]] = {split: [] for split, limit in limits.items() if limit}
        self._limits = limits

    def add(self, split: str, key: str) -> None:
        """Counts a key of a split in."""
        if split in self.lowest:
            self.lowest[split].append(units.sample_rank(key, self._salt))

    def merge(self, other: Mapping[str, list[bytes]]) -> None:
        """Counts in what another sample has seen."""
        for split, ranks in other.items():
            self.lowest[split] = heapq.nsmallest(self._limits[split] or 0, [*self.lowest[split], *ranks])

    def cut(self) -> dict[str, list[bytes]]:
        """Returns what is worth telling another sample."""
        return {split: heapq.nsmallest(self._limits[split] or 0, ranks) for split, ranks in self.lowest.items()}

    def cutoffs(self) -> Cutoffs:
        """Returns the highest rank of each split that is let in; None where all are."""
        return {split: max(ranks) if len(ranks) == self._limits[split] else None for split, ranks in self.cut().items()}


def is_let_in(key: str, split: str, cutoffs: Cutoffs, salt: str) -> bool:
    """Returns whether the limit of its split lets a key in."""
    cutoff = cutoffs.get(split)
    return cutoff is None or units.sample_rank(key, salt) <= cutoff

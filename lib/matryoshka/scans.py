"""Scans: every document is compared with every query by matrix products, and what may be among the best is noted.

Products are rounded, so they only choose: by how much rounding may move a score is known, and whatever might be among the best
in spite of it is noted.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from matryoshka import kernels, rates, topk
from matryoshka.nested import Float32Array
from matryoshka.topk import PADDING, IntArray, Mask

T = TypeVar("T")

_QUERIES = {"cpu": 1_024, "cuda": 1 << 12}  # of one product
_SCORES = {"cpu": 1 << 19, "cuda": 1 << 27}  # of one product: on CPUs they stay in a core's cache
_MOST_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 17}  # of one product with few queries
_MOST_NOTED = 1 << 24  # of the queries of one product: 200 MB
_GROUP = 16  # documents whose best one tells, on a GPU, how good the best are at least
_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_LAST_BIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half a unit in the last place, as a share


def most_moved(width: int, longest: float, dtype: torch.dtype, *, is_rounded: bool) -> float:
    """Returns by how much, at most, a product differs from a score before it is rounded itself, per unit of a query's length.

    Of q.x, summing moves at most a share of |q| |x| (Cauchy-Schwarz), and so does rounding each factor. Products, final scores
    and lengths are such sums.

    Args:
        width: Components of each vector.
        longest: Length of the longest document.
        dtype: Of the products.
        is_rounded: Whether documents and queries are rounded to that dtype first.
    """
    moved = longest * 1.5 * width * 2.0**-23
    return moved + longest * 2.01 * _LAST_BIT[dtype] if is_rounded and dtype != torch.float32 else moved


@dataclass(slots=True)
class _Lot:
    """Some queries of a scan on CPUs, and what was noted of them so far; see ``kernels``.

    Shapes: queries [Q, dim], rounded [Q, dim], margins [Q], bars [Q], counts [Q], limits [Q], notes [Q, room].
    """

    queries: Float32Array
    rounded: torch.Tensor
    margins: Float32Array
    bars: npt.NDArray[Any]
    counts: IntArray
    limits: IntArray
    notes: IntArray

    @classmethod
    def of(cls, queries: Float32Array, dtype: torch.dtype, moved: float, limit: int, room: int) -> "_Lot":
        rounded, size = torch.from_numpy(queries).to(dtype), len(queries)
        margins = (2 * moved * torch.linalg.vector_norm(rounded.float(), dim=1)).numpy()
        bars = torch.full((size,), torch.iinfo(_INTEGERS[dtype]).min, dtype=_INTEGERS[dtype]).numpy()
        notes = np.empty((size, room), np.int64)
        return cls(queries, rounded, margins, bars, np.zeros(size, np.int64), np.full(size, limit), notes)

    def double_room(self) -> None:
        """Makes room for twice as many notes."""
        self.notes = np.concatenate([self.notes, np.empty_like(self.notes)], axis=1)


class CpuScan:
    """A scan by all cores, each with queries of its own.

    The scores of a product are compared with a bar while they are in the cache.

    Args:
        queries: As they are compared.
        num_kept: How many of the best are wanted.
        moved: What ``most_moved`` returns.

    Shapes: queries [Q, dim].
    """

    def __init__(self, queries: Float32Array, num_kept: int, moved: float) -> None:
        self._dtype = scan_dtype("cpu")
        self._num_kept = num_kept
        self._share = 1.01 * _LAST_BIT[self._dtype]  # products were rounded; the bar is rounded down
        most = max(_MOST_NOTED // (2 * num_kept), 1)
        size = max(min(-(-len(queries) // num_threads("cpu")), _QUERIES["cpu"], most), 1)
        self._num_columns = min(_SCORES["cpu"] // size // kernels.BLOCK * kernels.BLOCK, _MOST_COLUMNS["cpu"])
        limit = 3 * num_kept // 2 + 32
        room = limit + kernels.BLOCK
        starts = range(0, len(queries), size)
        self._lots = [_Lot.of(queries[start : start + size], self._dtype, moved, limit, room) for start in starts]

    def look_through(self, block: torch.Tensor, start: int, allowed: Mask | None) -> None:
        """Notes the documents of a segment that may be among the best.

        Args:
            block: Vectors of the segment, in the dtype of the products.
            start: Row of the first.
            allowed: Which may be found.

        Shapes: block [N, dim], allowed [N].
        """
        visible = np.ones(0, np.bool_) if allowed is None else np.ascontiguousarray(allowed)
        in_threads(lambda lot: self._look(lot, block, start, visible), self._lots)

    def _look(self, lot: _Lot, block: torch.Tensor, start: int, allowed: Mask) -> None:
        product = lot.rounded.new_empty(len(lot.rounded), self._num_columns)
        scores = product.view(_INTEGERS[self._dtype]).numpy()
        for first in range(0, len(block), self._num_columns):
            columns = block[first : first + self._num_columns]
            if len(columns) == self._num_columns:
                torch.mm(lot.rounded, columns.T, out=product)
            else:
                product[:, : len(columns)] = lot.rounded @ columns.T
            own = allowed[first : first + self._num_columns]
            limits = self._num_kept, lot.margins, self._share
            done, num_blocks = 0, scores.size // kernels.BLOCK
            while done < num_blocks:
                noted = lot.bars, lot.counts, lot.limits, lot.notes
                done = kernels.note(scores, len(columns), start + first, own, *limits, *noted, done)
                if done < num_blocks:
                    lot.double_room()

    def best(self, stored: npt.NDArray[Any], *, is_scaled: bool) -> list[tuple[Float32Array, IntArray]]:
        """Returns (scores, rows) of the best documents, lot by lot, and of all that tie with the last of them; -1 pads.

        Args:
            stored: All documents, as ``kernels`` takes them.
            is_scaled: Whether their prefixes are brought to unit length.

        Shapes: stored [N, D] -> each [Q, M], [Q, M].
        """
        return in_threads(lambda lot: self._finish(lot, stored, is_scaled), self._lots)

    def _finish(self, lot: _Lot, stored: npt.NDArray[Any], is_scaled: bool) -> tuple[Float32Array, IntArray]:
        limits = self._num_kept, lot.margins, self._share
        kernels.finish(lot.queries, stored, is_scaled, *limits, lot.bars, lot.counts, lot.notes)
        return read_noted(lot.counts, lot.notes)


def read_noted(counts: IntArray, notes: IntArray) -> tuple[Float32Array, IntArray]:
    """Returns the scores and rows at the front of each query's notes, which are of final scores; -1 pads.

    Shapes: counts [Q], notes [Q, room] -> [Q, M], [Q, M].
    """
    width = int(counts.max(initial=0))
    scores, rows = kernels.read(notes[:, :width])
    is_padding = np.arange(width) >= counts[:, None]
    scores[is_padding], rows[is_padding] = PADDING, -1
    return scores, rows


def compare_few(
    queries: Float32Array, stored: npt.NDArray[Any], num_kept: int, allowed: Mask | None, *, is_scaled: bool
) -> tuple[Float32Array, IntArray]:
    """Returns what a ``CpuScan`` of all documents finds, by scoring them one by one: sooner where there are few queries.

    Args:
        queries: As they are compared.
        stored: As ``kernels`` takes them.
        num_kept: How many of the best are wanted.
        allowed: Which rows may be found; None: all.
        is_scaled: Whether prefixes of documents are brought to unit length.

    Shapes: queries [Q, dim], stored [N, D], allowed [N] -> [Q, M], [Q, M].
    """
    visible = np.ones(0, np.bool_) if allowed is None else np.ascontiguousarray(allowed)
    edges = np.linspace(0, len(stored), num_threads("cpu") + 1).astype(np.int64)

    def compare(part: tuple[int, tuple[int, int]]) -> tuple[Float32Array, IntArray]:
        number, (first, last) = part
        notes = np.empty(last - first, np.int64)  # of which no more is touched than is needed
        count = kernels.compare(queries[number], stored, is_scaled, num_kept, first, last, visible, notes)
        return kernels.read(notes[None, :count])

    ranges = list(itertools.pairwise(edges.tolist()))
    found = in_threads(compare, itertools.product(range(len(queries)), ranges))
    lines = []
    for start in range(0, len(found), len(ranges)):
        scores, rows = (np.concatenate(own, axis=1) for own in zip(*found[start : start + len(ranges)], strict=True))
        lines.append(topk.cut(scores, rows, num_kept))
    return topk.pad(lines)


@dataclass(slots=True)
class _GpuLot:
    """Some queries of a scan on a GPU, and what was noted of them so far.

    Attributes:
        part: Which queries.
        rounded: The queries in the dtype of products.
        margins: See ``kernels.note``.
        best: Scores of which so many documents have at least as much.
        noted: Numbers of queries, rows, and scores.

    Shapes: rounded [Q, dim], margins [Q], best [Q, num_kept or fewer].
    """

    part: slice
    rounded: torch.Tensor
    margins: torch.Tensor
    best: torch.Tensor
    noted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)


class GpuScan:
    """A scan by torch's own calls.

    Args:
        queries: As they are compared, on the device.
        num_kept: How many of the best are wanted.
        moved: What ``most_moved`` returns.

    Shapes: queries [Q, dim].
    """

    def __init__(self, queries: torch.Tensor, num_kept: int, moved: float) -> None:
        self._dtype = scan_dtype("cuda")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # ``most_moved`` counts on sums in float32
        self._num_kept = num_kept
        size = min(len(queries), _QUERIES["cuda"])
        self._num_columns = min(_SCORES["cuda"] // size, _MOST_COLUMNS["cuda"])
        self._lots = []
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            rounded = queries[part].to(self._dtype)
            margins = 2 * moved * torch.linalg.vector_norm(rounded.float(), dim=1)
            self._lots.append(_GpuLot(part, rounded, margins, rounded.new_empty(len(rounded), 0)))

    def look_through(self, block: torch.Tensor, start: int, allowed: Mask | None) -> None:
        """Notes the documents of a segment that may be among the best; see ``CpuScan.look_through``."""
        hidden = None if allowed is None else torch.from_numpy(~allowed).to(block.device)
        for lot in self._lots:
            for first in range(0, len(block), self._num_columns):
                part = slice(first, first + self._num_columns)
                self._look(lot, block[part], start + first, None if hidden is None else hidden[part])

    def _look(self, lot: _GpuLot, columns: torch.Tensor, first_row: int, hidden: torch.Tensor | None) -> None:
        product = lot.rounded @ columns.T
        if hidden is not None:
            product.masked_fill_(hidden, PADDING)
        is_telling = product.shape[1] % _GROUP == 0 and product.shape[1] // _GROUP >= self._num_kept
        told_by = product.view(len(product), -1, _GROUP).amax(dim=2) if is_telling else product
        lot.best = torch.cat([lot.best, told_by], dim=1)
        if lot.best.shape[1] > self._num_kept:
            lot.best = lot.best.topk(self._num_kept, dim=1, sorted=False).values
        numbers, places = ((product >= self._bars(lot)[:, None]) & (product > PADDING)).nonzero(as_tuple=True)
        lot.noted.append((numbers, first_row + places, product[numbers, places]))

    def _bars(self, lot: _GpuLot) -> torch.Tensor:
        """Returns the scores below which no document can be among the best, whatever was rounded.

        Shapes: [Q].
        """
        if lot.best.shape[1] < self._num_kept:
            return torch.full_like(lot.best[:, 0], PADDING)
        worst = lot.best.amin(dim=1).float()
        # Scores and the bar were rounded alike, which keeps their order.
        return (worst - lot.margins - 1.01 * _LAST_BIT[self._dtype] * worst.abs()).to(self._dtype)

    def noted(self) -> Iterator[tuple[slice, IntArray, IntArray]]:
        """Yields, lot by lot, which queries, and numbers (within the lot) and rows of all that may be among the best."""
        for lot in self._lots:
            numbers, rows, scores = (torch.cat(own) for own in zip(*lot.noted, strict=True))
            is_good = scores >= self._bars(lot)[numbers]
            yield lot.part, numbers[is_good].cpu().numpy(), rows[is_good].cpu().numpy()


def in_threads(function: Callable[[T], Any], parts: Iterable[T]) -> list[Any]:
    """Calls a function for each part, in threads of one core each, which do not wait for each other at every product."""
    return list(_threads().map(function, parts))


_starting = threading.Lock()


def _threads() -> ThreadPoolExecutor:
    """Returns threads in which torch uses one core; everywhere else it keeps the number that it had."""
    with _starting:  # two that start at once would take each other's number of threads for the process's
        return _start_threads()


@functools.cache
def _start_threads() -> ThreadPoolExecutor:
    number, before = num_threads("cpu"), torch.get_num_threads()
    pool = ThreadPoolExecutor(number, "products", initializer=_take_one_core)
    all_there = threading.Barrier(number)
    list(pool.map(lambda _: all_there.wait(), range(number)))
    torch.set_num_threads(before)  # which the last one to start had set for threads to come
    return pool


def _take_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number of the process when it first asks


@functools.cache
def num_threads(device: str) -> int:
    """Returns how many parts are worked on side by side."""
    return torch.get_num_threads() if device == "cpu" else 1


@functools.cache
def scan_dtype(device: str) -> torch.dtype:
    """Returns the dtype of products that choose: bf16 where it is faster here, which is measured once."""
    return torch.bfloat16 if rates.best_precision(device) == "bf16" else torch.float32

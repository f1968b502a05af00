"""Inner products of queries and stored vectors as dense matrix work: of a few candidates each, or of every document.

On CPUs a score depends on its query and its document alone, never on what else is in the batch: sums of float32 run over each
vector by itself, in one order. Matrix products, which do not keep such an order, only choose what is scored; see ``scans``.
"""

import copy
import functools
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from matryoshka import kernels, scans, topk
from matryoshka.nested import Float32Array
from matryoshka.scans import CpuScan, GpuScan
from matryoshka.topk import IntArray, Mask
from matryoshka.vectors import ArrayWriter

Ranked = tuple[Float32Array, IntArray]

_LEAST_PAIRS = 4_096  # that are worth a thread
_FEW = {"plain": 2, "rounded": 7}  # queries: on a CPU each document is then scored at once
_TIMED_PASSES = 20
_ROWS_AT_ONCE = 1 << 14  # that are written in another order
_GATHERED_SHARE = 0.75  # of the rows: copying four fifths takes what it saves (100,000 rows of 384 dims on a CPU)


@dataclass(frozen=True, slots=True)
class _Parts:
    """How much is worked on at once on a device.

    Attributes:
        segment: Documents whose scores are looked through together.
        rounded: The same, where vectors are first brought into the dtype of products.
        widened: Documents whose vectors are widened to float32 at once.
        pairs: Candidates whose vectors are.
    """

    segment: int
    rounded: int
    widened: int
    pairs: int


_PARTS = {"cpu": _Parts(1 << 17, 1 << 16, 1 << 12, 1 << 10), "cuda": _Parts(1 << 18, 1 << 18, 1 << 18, 1 << 18)}


class StoredVectors:
    """Vectors on a device, of which prefixes of any dim can be asked for.

    Args:
        stored: float16 or int8, each vector up to a factor of its own: prefixes are brought to unit length when they are used.
            uint16: the bits of bfloat16, to be used as they are. May be mapped from disk.
        device: ``cpu`` or ``cuda``.

    Shapes: stored [N, D].
    """

    def __init__(self, stored: npt.NDArray[Any], device: str = "cpu") -> None:
        self._is_plain = stored.dtype == np.uint16
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it may not be written to; nothing here does
            vectors = torch.from_numpy(stored.view(np.int16) if self._is_plain else stored)
        self._vectors = (vectors.view(torch.bfloat16) if self._is_plain else vectors).to(device)
        self._parts = _PARTS[self._vectors.device.type]

    def __len__(self) -> int:
        return int(self._vectors.shape[0])

    @functools.cached_property
    def _longest(self) -> float:
        """The greatest length of a vector, as it is compared."""
        if not self._is_plain:
            return 1.0
        parts = (part.float() for part in torch.split(self._vectors, self._parts.segment))
        return max((float(torch.linalg.vector_norm(part, dim=1).max()) for part in parts if len(part)), default=0.0)

    @functools.cached_property
    def bits(self) -> npt.NDArray[Any]:
        """The vectors as ``kernels`` takes them.

        Shapes: [N, D].
        """
        vectors = self._vectors
        bits = vectors.numpy() if vectors.dtype == torch.int8 else vectors.view(torch.int16).numpy()
        view = bits.view(np.uint16) if vectors.dtype == torch.float16 else bits.view()
        view.flags.writeable = False
        return view

    def score(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        """Returns the inner products of chosen queries with chosen vectors, pair by pair.

        Shapes: queries [Q, dim], numbers [P] (of queries), rows [P] -> [P].
        """
        queries = self.as_compared(queries)
        if self._vectors.device.type == "cpu":
            return self._score_on_cpu(queries, np.ascontiguousarray(numbers), np.ascontiguousarray(rows))
        on_device = [torch.from_numpy(np.ascontiguousarray(own)).to(self._vectors.device) for own in (numbers, rows)]
        return self._score_on_gpu(torch.from_numpy(queries).to(self._vectors.device), *on_device).cpu().numpy()

    def best(self, queries: Float32Array, num_kept: int, allowed: Mask | None = None) -> Ranked:
        """Returns (scores, rows) of the best documents of each query, and of all that tie with the last of them; -1 pads.

        Every document is compared by a matrix product, and noted if it may belong to the best in spite of rounding; what was
        noted is scored. For few queries every document is.

        Shapes: queries [Q, dim], allowed [N] -> [Q, M], [Q, M]; in no order.
        """
        if not len(self) or not len(queries):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        device, compared, num_kept = self._vectors.device.type, self.as_compared(queries), min(num_kept, len(self))
        if device == "cpu" and len(queries) <= _FEW["plain" if self._is_plain else "rounded"]:
            return scans.compare_few(compared, self.bits, num_kept, allowed, is_scaled=not self._is_plain)
        dtype = scans.scan_dtype(device)
        moved = scans.most_moved(queries.shape[1], self._longest, dtype, is_rounded=not self._is_plain)
        on_device = torch.from_numpy(compared).to(self._vectors.device)
        scan = CpuScan(compared, num_kept, moved) if device == "cpu" else GpuScan(on_device, num_kept, moved)
        size = self._parts.segment if self._is_plain else self._parts.rounded
        room = on_device.new_empty(0 if self._is_plain else min(size, len(self)), queries.shape[1], dtype=dtype)
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            scan.look_through(self._block(part, room), start, None if allowed is None else allowed[part])
        if isinstance(scan, CpuScan):
            return topk.pad(scan.best(self.bits, is_scaled=not self._is_plain))
        return topk.pad([self._finish(compared[part], numbers, rows, num_kept) for part, numbers, rows in scan.noted()])

    def find(self, queries: Float32Array, num_kept: int, allowed: Mask | None = None) -> Ranked:
        """Returns what ``best`` does; where few documents are allowed, no other is looked at.

        Shapes: queries [Q, dim], allowed [N] -> [Q, M], [Q, M]; in no order.
        """
        if allowed is not None and np.count_nonzero(allowed) < _GATHERED_SHARE * len(self):
            return self.best_of(queries, num_kept, np.flatnonzero(allowed))
        return self.best(queries, num_kept, allowed)

    def best_of(self, queries: Float32Array, num_kept: int, chosen: IntArray) -> Ranked:
        """Returns what ``best`` does where only some rows are allowed, for the cost of looking at these rows alone.

        Shapes: queries [Q, dim], chosen [R] -> [Q, M], [Q, M]; in no order.
        """
        prefixes, parts = self._vectors[:, : queries.shape[1]], []
        for start in range(0, max(len(chosen), 1), self._parts.segment):
            own, gathered = chosen[start : start + self._parts.segment], copy.copy(self)
            gathered._vectors = prefixes.index_select(0, torch.from_numpy(own).to(prefixes.device))
            gathered.__dict__.pop("bits", None)
            scores, places = gathered.best(queries, num_kept)
            parts.append((scores, np.where(places >= 0, own[places], -1)))
        scores, rows = (np.concatenate(lists, axis=1) for lists in zip(*parts, strict=True))
        return topk.cut(scores, rows, num_kept)

    def _finish(self, queries: Float32Array, numbers: IntArray, rows: IntArray, num_kept: int) -> Ranked:
        scores = self.score(queries, numbers, rows)
        return topk.cut(*topk.line_up(len(queries), numbers, rows, scores), num_kept)

    def as_compared(self, queries: Float32Array) -> Float32Array:
        """Returns queries as they are multiplied: with vectors that are bfloat16 themselves, as bfloat16 too.

        Raises:
            ValueError: They are wider than the vectors.
        """
        if queries.shape[1] > self._vectors.shape[1]:
            raise ValueError(f"queries of {queries.shape[1]} dims: vectors have {self._vectors.shape[1]}. Cut the queries.")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        return torch.from_numpy(queries).bfloat16().float().numpy() if self._is_plain else queries

    def _block(self, part: slice, room: torch.Tensor) -> torch.Tensor:
        """Returns prefixes, at unit length unless they are plain, in the dtype of products; in memory that is at hand.

        Shapes: room [N or more, dim] -> [N, dim].
        """
        prefixes = self._vectors[part, : room.shape[1]]
        if self._is_plain:
            return prefixes.to(room.dtype)
        block = room[: len(prefixes)]

        def fill(start: int) -> None:
            wide = prefixes[start : start + self._parts.widened].float()
            wide.div_(torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(1e-30))
            block[start : start + self._parts.widened] = wide

        starts = range(0, len(prefixes), self._parts.widened)
        if room.device.type == "cpu":
            scans.in_threads(fill, starts)
        else:
            for start in starts:
                fill(start)
        return block

    def _score_on_cpu(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        scores = np.empty(len(rows), np.float32)

        def fill(part: slice) -> None:
            kernels.score_pairs(queries, self.bits, not self._is_plain, numbers[part], rows[part], scores[part])

        size = max(-(-len(rows) // scans.num_threads("cpu")), _LEAST_PAIRS)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        if len(parts) > 1:
            scans.in_threads(fill, parts)
        else:
            fill(slice(None))
        return scores

    def _score_on_gpu(self, queries: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        prefixes = self._vectors[:, : queries.shape[1]]
        scores = torch.empty(len(rows), device=queries.device)
        for start in range(0, len(rows), self._parts.pairs):
            part = slice(start, start + self._parts.pairs)
            candidates = prefixes[rows[part]].float()
            products = (candidates * queries[numbers[part]]).sum(1)
            norms = 1.0 if self._is_plain else candidates.square_().sum(1).sqrt_().clamp_min_(1e-30)
            scores[part] = products / norms
        return scores


def time_products(queries: Float32Array, documents: Float32Array) -> float:
    """Returns the seconds of one matrix product of queries and documents on the CPU: the least of twenty, after a warm-up.

    Shapes: queries [Q, dim], documents [N, dim].
    """
    rows, columns = torch.from_numpy(queries), torch.from_numpy(documents).T
    room, taken = torch.empty(len(queries), len(documents)), []
    for _ in range(_TIMED_PASSES + 1):
        start = time.perf_counter()
        torch.matmul(rows, columns, out=room)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


class CoarseVectors:
    """Collects coarse vectors, block by block, as the bits of bfloat16."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.uint16]] = []

    def add(self, vectors: Float32Array) -> None:
        """Adds documents after those that are there.

        Shapes: vectors [N, dim].
        """
        self._parts.append(torch.from_numpy(vectors).bfloat16().view(torch.int16).numpy().view(np.uint16))

    @property
    def dial(self) -> None:
        """Nothing can be tuned when searching: all are compared."""

    def stored(self) -> StoredVectors:
        """Returns them in a form that can be searched."""
        return StoredVectors(np.concatenate(self._parts))

    def write(self, path: Path) -> None:
        """Writes what ``StoredVectors`` takes, as a file that can be mapped into memory."""
        with ArrayWriter(path, sum(map(len, self._parts))) as file:
            for part in self._parts:
                file.append(part)

    def write_in_order(self, path: Path, rows: IntArray) -> None:
        """Writes the same with the documents in another order.

        Shapes: rows [N], a permutation.
        """
        self._parts = [every := np.concatenate(self._parts)]  # the parts themselves are in nobody's way any more
        with ArrayWriter(path, len(rows)) as file:
            for start in range(0, max(len(rows), 1), _ROWS_AT_ONCE):
                file.append(every[rows[start : start + _ROWS_AT_ONCE]])


def read_coarse(path: Path, order: npt.NDArray[np.integer[Any]] | None = None) -> Float32Array:
    """Returns the coarse vectors that ``CoarseVectors`` wrote, in this order, as float32, as they were added.

    Shapes: order [N] -> [N, dim].
    """
    bits = np.load(path, allow_pickle=False)
    bits = bits if order is None else bits[np.argsort(order)]
    vectors: Float32Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return vectors

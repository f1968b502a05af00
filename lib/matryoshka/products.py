"""Inner products of queries and stored vectors as dense matrix work: of a few candidates each, or of every document.

The room of torch for searching; on a GPU the same code runs there. A score depends on its query and its document alone, never
on what else is in the batch: sums of float32 run over each vector by itself, in one order. Matrix products, which do not keep
such an order, only choose what is scored.
"""

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from matryoshka import rates, topk
from matryoshka.nested import Float32Array
from matryoshka.topk import PADDING, IntArray

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
Lists = tuple[Float32Array, IntArray]

_GROUP = 4  # documents of which the best one's score is noted
_SUPERGROUP = 32  # documents of which the best one's is noted as well, to find the groups by
_FOLDED_AT_ONCE = 8  # products
_LEAST_PAIRS = 4_096  # that are worth a thread
_QUERIES_AT_ONCE = 1_024
_BIN = 256  # documents of which the best one's tells how good the best so many are at least
_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_LAST_BIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half a unit in the last place, as a share


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How much is multiplied at once on a device.

    Attributes:
        queries: Of one product.
        documents: Of one product; with the queries, scores that stay in a core's cache.
        most_documents: Of one product with few queries.
        segment: Documents whose scores are looked through together.
        rounded: The same, where vectors are first brought into the dtype of products.
        widened: Documents whose vectors are widened to float32 at once.
        pairs: Candidates whose vectors are.
    """

    queries: int
    documents: int
    most_documents: int
    segment: int
    rounded: int
    widened: int
    pairs: int


_TILES = {
    "cpu": _Tiles(1_024, 1_024, 1 << 14, 1 << 17, 1 << 16, 1 << 12, 1 << 10),
    "cuda": _Tiles(1 << 12, 1 << 15, 1 << 17, 1 << 18, 1 << 18, 1 << 18, 1 << 18),
}


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
        self._tiles = _TILES[self._vectors.device.type]

    def __len__(self) -> int:
        return int(self._vectors.shape[0])

    @functools.cached_property
    def _longest(self) -> float:
        """The greatest length of a vector, as it is compared."""
        if not self._is_plain:
            return 1.0
        starts = range(0, len(self), self._tiles.segment)
        parts = (self._vectors[start : start + self._tiles.segment].float() for start in starts)
        return max((float(torch.linalg.vector_norm(part, dim=1).max()) for part in parts), default=0.0)

    def score(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        """Returns the inner products of chosen queries with chosen vectors, pair by pair.

        Shapes: queries [Q, dim], numbers [P] (of queries), rows [P] -> [P].
        """
        queries = self._as_compared(queries)
        if self._vectors.device.type == "cpu":
            return self._score_in_threads(queries, numbers, rows)
        on_device = [torch.from_numpy(np.ascontiguousarray(own)).to(self._vectors.device) for own in (numbers, rows)]
        wide = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self._vectors.device)
        return self._score_on_gpu(wide, *on_device).cpu().numpy()

    def best(self, queries: Float32Array, num_kept: int, allowed: Mask | None = None) -> Lists:
        """Returns (scores, rows) of the best documents of each query, and of all that tie with the last of them; -1 pads.

        Every document is compared by a matrix product, and noted if it may belong to the best in spite of rounding; what was
        noted is scored.

        Shapes: queries [Q, dim], allowed [N] -> [Q, M], [Q, M]; in no order.
        """
        if not len(self) or not len(queries):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        compared = torch.from_numpy(self._as_compared(queries)).to(self._vectors.device)
        scan = _Scan(compared, num_kept, len(self), self._tiles, self._longest, is_rounded=not self._is_plain)
        size = self._tiles.segment if self._is_plain else self._tiles.rounded
        room = torch.empty(min(size, len(self)), queries.shape[1], dtype=scan.dtype, device=compared.device)
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            scan.look_through(self._block(part, room), start, None if allowed is None else allowed[part])
        return topk.pad([self._finish(queries[part], numbers, rows, num_kept) for part, numbers, rows in scan.noted()])

    def best_of(self, queries: Float32Array, num_kept: int, chosen: IntArray) -> Lists:
        """Returns what ``best`` does where only some rows are allowed, for the cost of looking at these rows alone.

        Shapes: queries [Q, dim], chosen [R] -> [Q, M], [Q, M]; in no order.
        """
        prefixes, parts = self._vectors[:, : queries.shape[1]], []
        for start in range(0, max(len(chosen), 1), self._tiles.segment):
            own, gathered = chosen[start : start + self._tiles.segment], copy.copy(self)
            gathered._vectors = prefixes.index_select(0, torch.from_numpy(own).to(prefixes.device))
            scores, places = gathered.best(queries, num_kept)
            parts.append((scores, np.where(places >= 0, own[places], -1)))
        scores, rows = (np.concatenate(lists, axis=1) for lists in zip(*parts, strict=True))
        return topk.cut(scores, rows, num_kept)

    def _finish(self, queries: Float32Array, numbers: IntArray, rows: IntArray, num_kept: int) -> Lists:
        scores = self.score(queries, numbers, rows)
        return topk.cut(*topk.line_up(len(queries), numbers, rows, scores), num_kept)

    def _as_compared(self, queries: Float32Array) -> Float32Array:
        """Returns queries as they are multiplied: with vectors that are bfloat16 themselves, as bfloat16 too."""
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
        starts = range(0, len(prefixes), self._tiles.widened)

        def fill(start: int) -> None:
            wide = prefixes[start : start + self._tiles.widened].float()
            wide.div_(torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(1e-30))
            block[start : start + self._tiles.widened] = wide

        _in_threads(fill, starts, room.device.type)
        return block

    def _score_in_threads(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        size = max(-(-len(rows) // _num_threads("cpu")), _LEAST_PAIRS)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        if len(parts) < 2:
            return self._score_on_cpu(queries, numbers, rows)
        return np.concatenate(list(_threads().map(lambda part: self._score_on_cpu(queries, numbers[part], rows[part]), parts)))

    def _score_on_cpu(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        dim = queries.shape[1]
        scores = np.empty(len(rows), np.float32)
        step = max(self._tiles.pairs * 384 // dim, 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            candidates = self._vectors[:, :dim].index_select(0, torch.from_numpy(rows[part])).float().numpy()
            products = np.einsum("pd,pd->p", candidates, queries[numbers[part]])
            if not self._is_plain:
                norms = np.sqrt(np.einsum("pd,pd->p", candidates, candidates))
                np.divide(products, norms, out=products, where=norms > 0)
            scores[part] = products
        return scores

    def _score_on_gpu(self, queries: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        prefixes = self._vectors[:, : queries.shape[1]]
        scores = torch.empty(len(rows), device=queries.device)
        for start in range(0, len(rows), self._tiles.pairs):
            part = slice(start, start + self._tiles.pairs)
            candidates = prefixes[rows[part]].float()
            products = (candidates * queries[numbers[part]]).sum(1)
            norms = 1.0 if self._is_plain else candidates.square_().sum(1).sqrt_().clamp_min_(1e-30)
            scores[part] = products / norms
        return scores


def nearest(queries: Float32Array, documents: Float32Array, num_kept: int) -> Lists:
    """Returns (scores, rows) of the best documents of each query by plain products, which rounding moves; in no order.

    Where a hundred are wanted of each query, this takes a third of the time of ``StoredVectors.best``.

    Shapes: queries [Q, dim], documents [N, dim] -> [Q, min(num_kept, N)] each.
    """
    columns, width = torch.from_numpy(documents).T, min(num_kept, len(documents))
    scores, rows = np.empty((len(queries), width), np.float32), np.empty((len(queries), width), np.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        best = torch.topk(torch.from_numpy(queries[part]) @ columns, width, dim=1, sorted=False)
        scores[part], rows[part] = best.values.numpy(), best.indices.numpy()
    return scores, rows


class CoarseVectors:
    """Collects coarse vectors, block by block, as the bits of bfloat16."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.uint16]] = []

    def add(self, vectors: Float32Array) -> None:
        """Adds documents after those that are there.

        Shapes: vectors [N, dim].
        """
        self._parts.append(torch.from_numpy(vectors).bfloat16().view(torch.int16).numpy().view(np.uint16))

    def stored(self) -> StoredVectors:
        """Returns them in a form that can be searched."""
        return StoredVectors(np.concatenate(self._parts))

    def write(self, path: Path) -> None:
        """Writes what ``StoredVectors`` takes, as a file that can be mapped into memory."""
        np.save(path, np.concatenate(self._parts), allow_pickle=False)


def read_coarse(path: Path) -> Float32Array:
    """Returns the coarse vectors that ``CoarseVectors`` wrote, as float32.

    Shapes: [N, dim].
    """
    bits = np.load(path, allow_pickle=False)
    vectors: Float32Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return vectors


@dataclass(slots=True)
class _Lot:
    """Some queries of a scan, and what was noted of them so far.

    Attributes:
        part: Which queries.
        rounded: The queries in the dtype of products.
        best: The best scores of bins so far: so many documents score at least as much.
        noted: Numbers of queries, rows, and the bits of their group's best score, segment by segment.

    Shapes: rounded [Q, dim], best [Q, num_kept or fewer].
    """

    part: slice
    rounded: torch.Tensor
    best: torch.Tensor
    noted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)


class _Scan:
    """Looks through documents, segment by segment, for those that may be among the best of some queries.

    Scores that are not negative have the order of their bits, which are compared as integers: that is faster. Negative ones
    are below all of those, but in no order among themselves; where the bar is not above zero, everything is noted.
    """

    def __init__(
        self, queries: torch.Tensor, num_kept: int, num_documents: int, tiles: _Tiles, longest: float, *, is_rounded: bool
    ) -> None:
        self.dtype = _scan_dtype(queries.device.type)
        self._num_kept = num_kept
        size = min(max(-(-len(queries) // _num_threads(queries.device.type)), 1), tiles.queries)
        room = tiles.queries * tiles.documents // size
        self._num_columns = max(
            min(1 << (room.bit_length() - 1), tiles.most_documents, 1 << (num_documents - 1).bit_length()), _BIN
        )
        self._lots = []
        # Of q.x, summing moves at most a share of |q| |x| (Cauchy-Schwarz), and so does rounding each factor. Products, final
        # scores and lengths are such sums.
        self._moved = longest * 1.5 * queries.shape[1] * 2.0**-23
        if is_rounded and self.dtype != torch.float32:
            self._moved += longest * 2.01 * _LAST_BIT[self.dtype]
        for start in range(0, len(queries), size):
            own = queries[start : start + size]
            nothing = torch.empty(len(own), 0, dtype=self.dtype, device=queries.device)
            self._lots.append(_Lot(slice(start, start + len(own)), own.to(self.dtype), nothing))

    def look_through(self, block: torch.Tensor, start: int, allowed: Mask | None) -> None:
        """Notes the groups of a segment that may hold one of the best documents.

        Args:
            block: Vectors of the segment.
            start: Row of the first.
            allowed: Which may be found.

        Shapes: block [N, dim], allowed [N].
        """
        hidden = torch.zeros(len(block), dtype=torch.bool) if allowed is None else torch.from_numpy(~allowed)
        whole = len(block) - len(block) % self._num_columns
        if whole:
            self._look_at_all(block[:whole], hidden[:whole].to(block.device), start)
        if whole < len(block):
            missing = self._num_columns - len(block) + whole
            rest = torch.nn.functional.pad(block[whole:], (0, 0, 0, missing))
            rest_hidden = torch.nn.functional.pad(hidden[whole:], (0, missing), value=True)
            self._look_at_all(rest, rest_hidden.to(block.device), start + whole)

    def _look_at_all(self, block: torch.Tensor, hidden: torch.Tensor, start: int) -> None:
        _in_threads(lambda lot: self._look(lot, block, hidden, start), self._lots, block.device.type)

    def _look(self, lot: _Lot, block: torch.Tensor, hidden: torch.Tensor, start: int) -> None:
        groups, supergroups, bins = levels = self._maxima(lot, block, hidden)
        told_by = next((own for own in reversed(levels) if own.shape[0] * own.shape[2] >= self._num_kept), groups)
        lot.best = torch.cat([lot.best, told_by.transpose(0, 1).reshape(len(lot.best), -1).view(self.dtype)], dim=1)
        if lot.best.shape[1] > self._num_kept:
            lot.best = lot.best.topk(self._num_kept, dim=1, sorted=False).values
        bars = self._bars(lot)
        found = _Found.of(bins, bars).inside(supergroups, bars).inside(groups, bars)
        numbers, products = found.lines % len(bars), torch.div(found.lines, len(bars), rounding_mode="floor")
        rows = _members(products * self._num_columns + found.places, groups.shape[2], _GROUP)
        is_seen = ~hidden[rows]
        numbers, scores = numbers[:, None].expand_as(rows), found.scores[:, None].expand_as(rows)
        lot.noted.append((numbers[is_seen], start + rows[is_seen], scores[is_seen]))

    def _maxima(self, lot: _Lot, block: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the bits of the best scores of groups, supergroups and bins of documents.

        The columns of each product are folded in the middle until one stands for a group, and further: so the documents of a
        group stand at equal distances within the product.

        Shapes: block [N, dim], hidden [N] -> [products, Q, groups of a product], [products, Q, ...], [products, Q, ...].
        """
        num_products = len(block) // self._num_columns
        product, groups, supergroups, bins = _room(lot.rounded, num_products, self._num_columns)
        left, right = product.view(groups.dtype).chunk(2, dim=1)
        near, far = left.chunk(2, dim=1)
        is_hidden = hidden.view(num_products, -1)
        has_hidden = is_hidden.any(dim=1).tolist()
        for number, columns in enumerate(torch.split(block.T, self._num_columns, dim=1)):
            torch.mm(lot.rounded, columns, out=product)
            if has_hidden[number]:
                product.masked_fill_(is_hidden[number], PADDING)
            torch.maximum(left, right, out=left)
            torch.maximum(near, far, out=groups[number])
            if number % _FOLDED_AT_ONCE == _FOLDED_AT_ONCE - 1 or number == num_products - 1:  # while they are in the cache
                recent = slice(number - number % _FOLDED_AT_ONCE, number + 1)
                _fold(groups[recent], supergroups[recent])
                _fold(supergroups[recent], bins[recent])
        return groups, supergroups, bins

    def _bars(self, lot: _Lot) -> torch.Tensor:
        """Returns the bits of the scores below which no document can be among the best, whatever was rounded.

        So many bins have a document that scores at least ``worst``, give or take what it was moved by.

        Shapes: [Q].
        """
        integer = _INTEGERS[self.dtype]
        if lot.best.shape[1] < self._num_kept:
            return torch.full((len(lot.best),), torch.iinfo(integer).min, dtype=integer, device=lot.best.device)
        worst = lot.best.amin(dim=1).float()
        moved = self._moved * torch.linalg.vector_norm(lot.rounded.float(), dim=1)
        # ``worst`` was rounded; and so are scores and the bar, which keep their order by that.
        bars = (worst - 2 * moved - 1.01 * _LAST_BIT[self.dtype] * worst.abs()).to(self.dtype)
        return torch.where(bars > 0, bars.view(integer), torch.iinfo(integer).min)

    def noted(self) -> Iterator[tuple[slice, IntArray, IntArray]]:
        """Yields, lot by lot, which queries, and numbers (within the lot) and rows of all documents that may be among the best.

        They are the documents of groups whose best one may be.
        """
        for lot in self._lots:
            numbers, rows, scores = (torch.cat(own) for own in zip(*lot.noted, strict=True))
            is_good = scores >= self._bars(lot)[numbers]
            yield lot.part, numbers[is_good].cpu().numpy(), rows[is_good].cpu().numpy()


@dataclass(frozen=True, slots=True)
class _Found:
    """Columns that reach the bar: those of bins, then of the supergroups inside them, then of the groups inside those.

    Attributes:
        lines: Of products: number of the product times number of queries, plus number of the query.
        places: In the line.
        scores: As bits.
        width: Of a line.

    Shapes: lines [P], places [P], scores [P].
    """

    lines: torch.Tensor
    places: torch.Tensor
    scores: torch.Tensor
    width: int

    @classmethod
    def of(cls, bins: torch.Tensor, bars: torch.Tensor) -> "_Found":
        """Returns the bins that reach the bar.

        Shapes: bins [products, Q, width], bars [Q].
        """
        width = bins.shape[2]
        flat = (bins >= bars[:, None]).view(-1).nonzero().squeeze(1)
        return cls(torch.div(flat, width, rounding_mode="floor"), flat % width, bins.view(-1)[flat], width)

    def inside(self, columns: torch.Tensor, bars: torch.Tensor) -> "_Found":
        """Returns the narrower columns that reach the bar among those that were folded into these.

        Shapes: columns [products, Q, width], bars [Q].
        """
        width = columns.shape[2]
        size = width // self.width
        places = _members(self.places, self.width, size)
        scores = columns.view(-1)[(self.lines * width)[:, None] + places]
        good = (scores >= bars[self.lines % len(bars)][:, None]).view(-1).nonzero().squeeze(1)
        lines = self.lines[torch.div(good, size, rounding_mode="floor")]
        return _Found(lines, places.view(-1)[good], scores.view(-1)[good], width)


def _fold(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the greatest of columns at equal distances, halving again and again.

    Shapes: bits [..., N], out [..., N / size].
    """
    while bits.shape[-1] > out.shape[-1]:
        is_last = bits.shape[-1] == 2 * out.shape[-1]
        bits = torch.maximum(*bits.chunk(2, dim=-1), out=out if is_last else None)


_rooms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def _room(queries: torch.Tensor, num_products: int, num_columns: int) -> tuple[torch.Tensor, ...]:
    """Returns this thread's memory for a product, and for its groups, supergroups and bins.

    On CPUs it is the same every time, about 80 MB for each core: memory that is fresh from the system costs more than what
    is written to it.

    Shapes: [Q, columns], [products, Q, groups], [products, Q, supergroups], [products, Q, bins].
    """
    size, thread = len(queries) * num_columns, threading.get_ident()
    widths = [num_columns // own for own in (_GROUP, _SUPERGROUP, _BIN)]
    product, rest = _rooms.get(thread, (queries.new_empty(0), queries.new_empty(0)))
    num_wanted = num_products * len(queries) * sum(widths)
    is_other = product.dtype != queries.dtype or product.device != queries.device
    if is_other or len(product) < size or len(rest) < num_wanted:
        product, rest = queries.new_empty(size), queries.new_empty(num_wanted, dtype=_INTEGERS[queries.dtype])
        if queries.device.type == "cpu":
            _rooms[thread] = product, rest
    parts = torch.split(rest[:num_wanted], [num_products * len(queries) * width for width in widths])
    shaped = (part.view(num_products, len(queries), width) for part, width in zip(parts, widths, strict=True))
    return product[:size].view(len(queries), -1), *shaped


def _members(places: torch.Tensor, distance: int, size: int) -> torch.Tensor:
    """Returns the places, one level down in their product, of what was folded into each of some places.

    Shapes: places [P] -> [P, size].
    """
    return places[:, None] + distance * torch.arange(size, device=places.device)


def _in_threads(function: Callable[[T], None], parts: Iterable[T], device: str) -> None:
    """Calls a function for each part; on CPUs in threads of one core each, which do not wait for each other at every product."""
    if device == "cpu":
        list(_threads().map(function, parts))
    else:
        for part in parts:
            function(part)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Returns threads in which torch uses one core; everywhere else it keeps the number that it had."""
    number, before = _num_threads("cpu"), torch.get_num_threads()
    pool = ThreadPoolExecutor(number, "products", initializer=_take_one_core)
    all_there = threading.Barrier(number)
    list(pool.map(lambda _: all_there.wait(), range(number)))
    torch.set_num_threads(before)  # which the last one to start had set for threads to come
    return pool


def _take_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number of the process when it first asks


@functools.cache
def _num_threads(device: str) -> int:
    """Returns how many queries are looked at side by side."""
    return torch.get_num_threads() if device == "cpu" else 1


@functools.cache
def _scan_dtype(device: str) -> torch.dtype:
    """Returns the dtype of products that choose: bf16 where it is faster here, which is measured once."""
    return torch.bfloat16 if rates.best_precision(device) == "bf16" else torch.float32

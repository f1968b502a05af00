"""Inner products of queries and stored vectors as dense matrix work: of a few candidates each, or of every document.

The room of torch for searching; on a GPU the same code runs there. A score depends on its query and its document alone, never
on what else is in the batch: sums of float32 run over each vector by itself, in one order.
"""

import functools
import warnings

import numpy as np
import numpy.typing as npt
import torch

from matryoshka import rates, topk
from matryoshka.nested import Float32Array
from matryoshka.topk import PADDING, IntArray

Stored = npt.NDArray[np.float16] | npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]

_PAIR_BYTES = 1 << 20  # float32 vectors of candidates at once: they stay in a core's cache
_BLOCK_DOCUMENTS = 8_192
_GATHERED_DOCUMENTS = 16 * _BLOCK_DOCUMENTS
_QUERIES_AT_ONCE = 1_024
_GROUP = 16
_ENOUGH_GROUPS = 4_096

# Of two unit vectors rounded to a dtype, the largest error of their inner product: each factor of each product is off by half a
# unit in the last place, |q1 x1| + ... <= 1 by Cauchy-Schwarz, and the sum itself is rounded once more.
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8 + 2.0**-9 + 1e-4}


class StoredVectors:
    """The vectors of a shard on a device, each up to a factor of its own: they are brought to unit length when they are used.

    Args:
        stored: float16, or int8; may be mapped from disk, or be on the device already.
        device: ``cpu`` or ``cuda``.

    Shapes: stored [N, D].
    """

    def __init__(self, stored: Stored | torch.Tensor, device: str | torch.device = "cpu") -> None:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it may not be written to; nothing here does
            self._vectors = torch.as_tensor(stored).to(device)

    def __len__(self) -> int:
        return int(self._vectors.shape[0])

    @property
    def width(self) -> int:
        """D."""
        return int(self._vectors.shape[1])

    def score(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        """Returns the inner products of chosen queries with prefixes, at unit length, of chosen vectors; pair by pair.

        Shapes: queries [Q, dim], numbers [P] (of queries), rows [P] -> [P].
        """
        on_device = torch.from_numpy(np.ascontiguousarray(queries)).to(self._vectors.device)
        return self._score(on_device, self._move(numbers), self._move(rows)).cpu().numpy()

    def best(self, queries: Float32Array, num_kept: int, allowed: Mask | None = None) -> tuple[Float32Array, IntArray]:
        """Returns (scores, rows) of the best documents of each query, and of all that tie with the last of them; -1 pads.

        Every document is compared: first in bf16 where that is faster, and the best of each small group kept; then, in
        float32, whatever rounding could have put in a wrong place.

        Shapes: queries [Q, dim], allowed [N] -> [Q, M], [Q, M].
        """
        parts = [
            self._best(torch.from_numpy(np.ascontiguousarray(queries[start : start + _QUERIES_AT_ONCE])), num_kept, allowed)
            for start in range(0, len(queries), _QUERIES_AT_ONCE)
        ]
        return topk.pad(parts)

    def best_of(self, queries: Float32Array, num_kept: int, chosen: IntArray) -> tuple[Float32Array, IntArray]:
        """Returns what ``best`` does where only some rows are allowed, for the cost of looking at these rows alone.

        Shapes: queries [Q, dim], chosen [R] -> [Q, M], [Q, M].
        """
        prefixes, parts = self._vectors[:, : queries.shape[1]], []
        for start in range(0, max(len(chosen), 1), _GATHERED_DOCUMENTS):
            own = chosen[start : start + _GATHERED_DOCUMENTS]
            gathered = StoredVectors(prefixes[self._move(own)], self._vectors.device)
            scores, places = gathered.best(queries, num_kept)
            parts.append((scores, np.where(places >= 0, own[places], -1)))
        scores, rows = (np.concatenate(lists, axis=1) for lists in zip(*parts, strict=True))
        return topk.cut(scores, rows, num_kept)

    def _best(self, queries: torch.Tensor, num_kept: int, allowed: Mask | None) -> tuple[Float32Array, IntArray]:
        device, dim = self._vectors.device, queries.shape[1]
        queries = queries.to(device)
        dtype = _scan_dtype(device.type)
        rounded = queries.to(dtype)
        group = max(min(_GROUP, len(self) // _ENOUGH_GROUPS), 1)
        bar = None if allowed is None else torch.where(torch.from_numpy(allowed), 0.0, PADDING).to(device, dtype)
        maxima, starts = [], list(range(0, len(self), _BLOCK_DOCUMENTS))
        for start in starts:
            block = _to_unit_length(self._vectors[start : start + _BLOCK_DOCUMENTS, :dim]).to(dtype)
            scores = rounded @ block.T
            if bar is not None:
                scores += bar[start : start + _BLOCK_DOCUMENTS]
            maxima.append(_group_maxima(scores, group))
        best = torch.cat(maxima, dim=1)  # [Q, groups]
        num_groups = min(num_kept, best.shape[1])
        # So many different documents score at least this, so the last of the best does, but for rounding.
        worst = best.topk(num_groups, dim=1, sorted=False).values.amin(dim=1).float() - 2 * _ROUNDING[dtype]
        if num_groups < num_kept:
            worst = torch.full_like(worst, torch.finfo(torch.float32).min)
        numbers, groups = torch.nonzero(best.float() >= worst[:, None], as_tuple=True)
        rows, is_row = self._rows_of(groups, group)
        numbers = numbers.repeat_interleave(group)[is_row]
        if allowed is not None:
            is_allowed = torch.from_numpy(allowed).to(device)[rows]
            numbers, rows = numbers[is_allowed], rows[is_allowed]
        scores = self._score(queries, numbers, rows)
        return _collect(len(queries), numbers.cpu().numpy(), rows.cpu().numpy(), scores.cpu().numpy(), num_kept)

    def _rows_of(self, groups: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows of each group one after the other, and which of all places have one.

        A group holds every n-th row of its block, n being the groups of a block: so the best of each is found by wide steps.
        """
        per_block = _BLOCK_DOCUMENTS // group
        starts = torch.div(groups, per_block, rounding_mode="floor") * _BLOCK_DOCUMENTS
        sizes = (len(self) - starts).clamp(max=_BLOCK_DOCUMENTS)
        strides = torch.div(sizes + group - 1, group, rounding_mode="floor")
        rows = starts[:, None] + groups[:, None] % per_block + strides[:, None] * torch.arange(group, device=groups.device)
        rows = rows.reshape(-1)
        is_row = rows < len(self)
        return rows[is_row], is_row

    def _score(self, queries: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        dim = queries.shape[1]
        prefixes = self._vectors[:, :dim]
        scores = torch.empty(len(rows), device=queries.device)
        step = max(_PAIR_BYTES // (4 * dim), 1) if queries.device.type == "cpu" else 1 << 18
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            candidates = prefixes[rows[part]].float()
            norms = (candidates * candidates).sum(1).sqrt_()
            products = candidates.mul_(queries[numbers[part]]).sum(1)
            scores[part] = torch.where(norms > 0, products / norms, 0.0)
        return scores

    def _move(self, numbers: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self._vectors.device)


def _collect(
    num_queries: int, numbers: IntArray, rows: IntArray, scores: Float32Array, num_kept: int
) -> tuple[Float32Array, IntArray]:
    """Returns pairs, sorted by query, as one line per query: the best so many, and all that tie with the last of them."""
    counts = np.bincount(numbers, minlength=num_queries)
    width = int(counts.max(initial=0))
    columns = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    dense_scores = np.full((num_queries, width), PADDING, np.float32)
    dense_rows = np.full((num_queries, width), -1, np.int64)
    dense_scores[numbers, columns] = scores
    dense_rows[numbers, columns] = rows
    return topk.cut(dense_scores, dense_rows, num_kept)


def _group_maxima(scores: torch.Tensor, group: int) -> torch.Tensor:
    """Returns the best score of each group of columns, of which one holds every n-th column.

    Shapes: scores [Q, N] -> [Q, ceil(N / group)].
    """
    if group == 1:
        return scores
    missing = -scores.shape[1] % group
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=PADDING)
    return scores.view(len(scores), group, -1).amax(dim=1)


def _to_unit_length(vectors: torch.Tensor) -> torch.Tensor:
    wide = vectors.float()
    return torch.nn.functional.normalize(wide, dim=1)


@functools.cache
def _scan_dtype(device: str) -> torch.dtype:
    """Returns the dtype of first products: bf16 where it is faster here, which is measured once."""
    return torch.bfloat16 if rates.best_precision(device) == "bf16" else torch.float32

"""Texts of a batch as one stream of tokens, longest first, and how it is cut into steps under a token budget."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def put(values: npt.NDArray[Any] | Tensor, device: str | torch.device) -> Tensor:
    """Returns values on a device, without waiting for them to be there."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """Values on their way from a device to the host; nobody waits until they are asked for.

    Args:
        values: On any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrival = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def get(self) -> Tensor:
        """Returns the values, once all that was queued before them is done."""
        if self._arrival:
            self._arrival.synchronize()
        return self._values


@dataclass(frozen=True, slots=True)
class Stream:
    """Windows end to end, longest first: ids, positions and owners of T tokens on the device, lengths of N windows here."""

    ids: Tensor
    positions: Tensor
    owners: Tensor
    bounds: Tensor
    lengths: npt.NDArray[np.int64]
    edges: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        ids: npt.NDArray[np.int32] | Tensor,
        lengths: npt.NDArray[np.int64],
        order: npt.NDArray[np.int64],
        first_position: int,
        device: str,
    ) -> "Stream":
        """Returns the stream of some windows, with one copy to the device for each part.

        Args:
            ids: Tokens of all windows, one window after the other, on the host or on the device.
            lengths: Of these windows.
            order: Which of them to take, and in what order.
            first_position: Where the model's positions start.
            device: Where the stream goes.
        """
        firsts = np.cumsum(lengths) - lengths
        lengths, firsts = lengths[order], firsts[order]
        edges = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)  # [T], of each token in its window
        numbers = np.repeat(firsts, lengths) + places
        owners = np.repeat(np.arange(len(order)), lengths)

        return cls(
            ids[put(numbers, device)] if isinstance(ids, Tensor) else put(ids[numbers], device),
            put(places + first_position, device),
            put(owners, device),
            put(edges.astype(np.int32), device),
            lengths,
            edges,
        )

    def step(self, start: int, stop: int) -> "Stream":
        """Returns windows ``start`` to ``stop`` as a stream of their own; nothing is copied from the host."""
        rows = slice(int(self.edges[start]), int(self.edges[stop]))
        return replace(
            self,
            ids=self.ids[rows],
            positions=self.positions[rows],
            owners=self.owners[rows] - start,
            bounds=self.bounds[start : stop + 1] - rows.start,
            lengths=self.lengths[start:stop],
            edges=self.edges[start : stop + 1] - rows.start,
        )


def end_of_step(lengths: npt.NDArray[np.int64], start: int, tokens_per_step: int, *, is_padded: bool = False) -> int:
    """Returns where the step that begins at ``start`` ends: as many windows as the budget holds, and at least one.

    Longest first makes the first step the largest, so that memory runs out at once or never.

    Args:
        lengths: Tokens of all windows, longest first; [N].
        start: First window of the step.
        tokens_per_step: Most tokens of a step; a longer window is a step of its own.
        is_padded: Whether every window of a step costs as much as its longest.

    >>> end_of_step(np.array([9, 4, 3, 2]), 1, tokens_per_step=9)
    4
    >>> end_of_step(np.array([9, 4, 3, 2]), 1, tokens_per_step=9, is_padded=True)
    3
    """
    if is_padded:
        count = tokens_per_step // max(int(lengths[start]), 1)
    else:
        count = int(np.searchsorted(np.cumsum(lengths[start : start + tokens_per_step]), tokens_per_step, side="right"))
    return int(min(start + max(count, 1), len(lengths)))

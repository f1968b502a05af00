"""Which pairs make a step, as pure array functions: fixed by seed and step alone, whoever computes it and however often.

So a run that is taken up at any step, in any epoch and with any number of ranks, sees what the undisturbed run would have seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batches of all epochs; every epoch draws them anew, and leaves out what fills no whole batch.

    Attributes:
        num_pairs: N.
        batch_size: B, over all ranks together.
        seed: Another one gives other batches.
        labels: A number for each pair, where no two pairs of a batch may share one; [N].

    Raises:
        ValueError: No batch can be made.
    """

    num_pairs: int
    batch_size: int
    seed: int
    labels: IntArray | None = None
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        if self.labels is None:
            count = self.num_pairs // self.batch_size
        else:
            sizes = np.unique(self.labels, return_counts=True)[1]
            if len(sizes) < self.batch_size:
                raise ValueError(
                    f"--batch-size {self.batch_size}: the training pairs have {len(sizes)} labels, and no two pairs of a batch"
                    f" may share one. Pass at most {len(sizes)}."
                )
            count = _count_batches(sizes, self.batch_size)
        if not count:
            raise ValueError(
                f"--batch-size {self.batch_size}: {self.num_pairs} training pairs do not fill one batch."
                f" Bring at least {self.batch_size} pairs, or pass a smaller --batch-size."
            )
        object.__setattr__(self, "steps_per_epoch", count)

    def batches(self, first_step: int, num_steps: int) -> Iterator[IntArray]:
        """Yields the rows of the pairs of each step, from ``first_step`` (counted from 0) up to ``num_steps``.

        Shapes: each [B].
        """
        step = first_step
        while step < num_steps:
            epoch, number = divmod(step, self.steps_per_epoch)
            batches = self._epoch(epoch)[number:][: num_steps - step]
            yield from batches
            step += len(batches)

    def _epoch(self, epoch: int) -> IntArray:
        """Returns the batches of one epoch; [steps, B]."""
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(self.num_pairs)
        num_rows = self.steps_per_epoch * self.batch_size
        if self.labels is None:
            return order[:num_rows].reshape(-1, self.batch_size)
        # Each label gives at most one row for each batch. Dealt out in turn, label after label, none meets itself.
        rank_of_label = draw.permutation(int(self.labels.max()) + 1)
        order = order[np.argsort(rank_of_label[self.labels[order]], kind="stable")]
        _, firsts, sizes = np.unique(rank_of_label[self.labels[order]], return_index=True, return_counts=True)
        number_in_label = np.arange(len(order)) - np.repeat(firsts, sizes)
        dealt = order[number_in_label < self.steps_per_epoch][:num_rows].reshape(self.batch_size, -1).T
        return np.ascontiguousarray(dealt[draw.permutation(len(dealt))])


def _count_batches(sizes: IntArray, batch_size: int) -> int:
    """Returns the most batches that labels of these sizes fill, each label at most once in each of them."""
    low, high = 0, int(sizes.sum()) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(sizes, middle).sum() >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low


def deal(lengths: IntArray, num_ranks: int) -> IntArray:
    """Returns the places of a batch's pairs by rank, so that every rank gets as many pairs, and about as many tokens.

    The longest go round first, there and back again.

    Args:
        lengths: Tokens of each pair; [B], B a multiple of the ranks.
        num_ranks: W.

    Shapes: result [W, B / W].

    >>> deal(np.array([9, 1, 8, 2]), 2).tolist()
    [[0, 1], [2, 3]]
    """
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, num_ranks)
    rounds[1::2] = rounds[1::2, ::-1]
    return np.ascontiguousarray(rounds.T)

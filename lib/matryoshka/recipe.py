"""A training recipe as plain data: what decides the outcome of a fine-tuning run, and how many steps it takes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what a training run makes of a model.

    Attributes:
        dims: The resolutions that the loss is summed over.
        batch_size: Pairs per step over all ranks together; each query sees every other pair's document as a negative.
        mini_batch_size: Pairs that go through the model at once; None: the whole batch, which is faster where it fits.
        max_tokens: Longer texts are cut here while training; the model's own window stays.
        dropout: None keeps the model's own rates.
    """

    dims: tuple[int, ...]
    num_steps: int
    batch_size: int
    mini_batch_size: int | None
    learning_rate: float
    warmup: float
    max_tokens: int | None
    dropout: float | None
    seed: int


def count_steps(num_pairs: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Returns how many optimiser steps a run takes; only whole batches count.

    Raises:
        ValueError: There are fewer pairs than one batch, so that no step could be made.

    >>> count_steps(num_pairs=1000, batch_size=64, epochs=1, max_steps=None)
    15
    """
    if num_pairs < batch_size:
        raise ValueError(
            f"finetune: {num_pairs} training pairs are fewer than one batch of {batch_size}."
            f" Bring at least {batch_size} pairs, or pass a smaller --batch-size."
        )
    steps = max(int(num_pairs // batch_size * epochs), 1)
    return min(steps, max_steps) if max_steps else steps

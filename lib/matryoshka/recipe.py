"""A training recipe as plain data: what decides the outcome of a fine-tuning run, and how many steps it takes."""

from dataclasses import dataclass

_LOG_ENTRIES = 50


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what a training run makes of a model.

    Attributes:
        dims: The resolutions that the loss is summed over.
        num_steps: Optimiser steps.
        batch_size: Pairs per step over all ranks together; each query sees every other pair's documents as negatives.
        learning_rate: The highest; it rises, then falls linearly to 0.
        warmup: Share of the steps in which the learning rate rises.
        seed: Of the order of pairs, and of dropout.
        num_negatives: Hard negatives of each pair that take part.
        max_tokens: Longer texts are cut here while training; the model's own window stays. None: at the window.
        dropout: None keeps the model's own rates.
        mini_batch_tokens: Tokens that go through the model at once, by gradient caching; None: those of the whole batch.
        top_layers: How many of the transformer's layers are trained, from the top; None: all of the model.
        layer_decay: Learning rate of a layer over that of the one above it.
        lora_rank: Rank of low-rank additions that are trained instead of the layers' own weights; None: their own weights.
        evaluations: How often the dev split is looked at, evenly spread, besides before the first step; 0: never.
        patience: Evaluations without a better figure after which training ends early; None: never.
        checkpoint_steps: Steps between two checkpoints.
    """

    dims: tuple[int, ...]
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    seed: int = 7
    num_negatives: int = 0
    max_tokens: int | None = None
    dropout: float | None = 0.0
    mini_batch_tokens: int | None = None
    top_layers: int | None = None
    layer_decay: float = 1.0
    lora_rank: int | None = None
    evaluations: int = 0
    patience: int | None = None
    checkpoint_steps: int = 100

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """After how many steps the dev split is looked at: 0, and evenly spread up to the last.

        >>> sorted(Recipe(dims=(8,), num_steps=10, batch_size=2, learning_rate=1e-4, evaluations=3).evaluation_steps)
        [0, 3, 6, 10]
        """
        if not self.evaluations:
            return frozenset()
        return frozenset(self.num_steps * number // self.evaluations for number in range(self.evaluations + 1))

    @property
    def log_steps(self) -> int:
        """After how many steps each the loss is noted."""
        return max(self.num_steps // _LOG_ENTRIES, 1)

    def rate_at(self, step: int) -> float:
        """Returns the share of the highest learning rate that the step after ``step`` steps takes.

        >>> recipe = Recipe(dims=(8,), num_steps=10, batch_size=2, learning_rate=1e-4, warmup=0.2)
        >>> [round(recipe.rate_at(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        num_rising = round(self.num_steps * self.warmup)
        if step < num_rising:
            return (step + 1) / num_rising
        return (self.num_steps - step) / max(self.num_steps - num_rising, 1)


def count_steps(num_pairs: int, batch_size: int, epochs: float, max_steps: int | None, steps_per_epoch: int | None = None) -> int:
    """Returns how many optimiser steps a run takes; only whole batches count.

    Args:
        num_pairs: Training pairs.
        batch_size: Pairs per step.
        epochs: Passes over the pairs.
        max_steps: Most steps.
        steps_per_epoch: Of a pass, where it has fewer batches than the pairs would fill.

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
    steps = max(int((steps_per_epoch or num_pairs // batch_size) * epochs), 1)
    return min(steps, max_steps) if max_steps else steps

"""Nested vectors: a lower resolution is a prefix of the full vector, brought back to unit length.

The only place in the project that cuts and renormalises, and the home of the funnel plan, which says in what order.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

_USUAL_DIMS = (2048, 1024, 768, 512, 256, 128, 64, 32)


def shrink(vectors: npt.NDArray[np.floating[Any]], dim: int) -> Float32Array:
    """Returns the first ``dim`` components of each vector as float32, at unit length; a zero prefix stays zero.

    Shapes: vectors [..., D] -> [..., dim].

    Raises:
        ValueError: ``dim`` is below 1 or above D.

    Source: Kusupati et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147.

    >>> shrink(np.array([[3.0, 4.0, 12.0]]), 2).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    width = vectors.shape[-1]
    if not 1 <= dim <= width:
        raise ValueError(f"dim {dim}: vectors have {width} dims. Choose 1 to {width}.")
    prefix = vectors[..., :dim].astype(np.float32)
    norms = np.sqrt(np.einsum("...d,...d->...", prefix, prefix, dtype=np.float64))[..., None]
    np.divide(prefix, norms, out=prefix, where=norms > 0, casting="same_kind")
    return prefix


def default_dims(width: int) -> tuple[int, ...]:
    """Returns the full width and the usual resolutions below it.

    >>> default_dims(384)
    (384, 256, 128, 64, 32)
    """
    return (width, *(dim for dim in _USUAL_DIMS if dim < width))


def check_dims(dims: Iterable[int], width: int, place: str, declared: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns the dims, widest first and each once.

    Args:
        dims: What was asked for.
        width: D of the model.
        place: What to name in an error.
        declared: The resolutions that a tuned model was trained for; others are refused.

    Raises:
        ValueError: There is none, one is below 1 or above ``width``, or the model was not trained for it.
    """
    ordered = tuple(sorted(set(dims), reverse=True))
    if not ordered:
        raise ValueError(f"{place}: no dims. Pass at least one, for example --dims {width}.")
    if ordered[0] > width or ordered[-1] < 1:
        wrong = ", ".join(str(dim) for dim in ordered if not 1 <= dim <= width)
        raise ValueError(f"{place}: dims {wrong} do not fit a model of width {width}. Choose from 1 to {width}.")
    strangers = [dim for dim in ordered if declared and dim not in declared]
    if strangers:
        known = ", ".join(map(str, declared))
        raise ValueError(f"{place}: the model was not trained for {', '.join(map(str, strangers))} dims. Choose from {known}.")
    return ordered


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a funnel: score at ``dim``, keep the best ``keep``; ``parameters`` are the coarse index's own (``nprobe``)."""

    dim: int
    keep: int
    parameters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """The step as it is written on a command line."""
        return ":".join([str(self.dim), str(self.keep), *(f"{name}={value}" for name, value in self.parameters)])


@dataclass(frozen=True, slots=True)
class FunnelPlan:
    """How to search coarse to fine: the first step makes the shortlist from all documents, each later one reranks.

    Raises:
        ValueError: There is no step, dims do not grow, a later step keeps more than the one before it or has parameters.

    >>> FunnelPlan((Step(64, 200, (("nprobe", 16),)), Step(384, 50))).describe()
    '64d keep 200 (nprobe 16) > 384d keep 50'
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("funnel: no steps. Give at least one, as dim:keep.")
        numbers = [number for step in self.steps for number in (step.dim, step.keep, *(value for _, value in step.parameters))]
        if min(numbers) < 1:
            raise ValueError(f"funnel: {self.describe()} has a number below 1. Give positive numbers.")
        for step, later in itertools.pairwise(self.steps):
            if later.dim <= step.dim or later.keep > step.keep:
                raise ValueError(
                    f"funnel: {self.describe()} does not narrow. Each step needs a larger dim and no longer a shortlist."
                )
            if later.parameters:
                raise ValueError(f"funnel: {self.describe()} has parameters in a later step. They belong to the first one.")

    @property
    def shortlist(self) -> Step:
        """The first step, which sees every document."""
        return self.steps[0]

    @property
    def reranks(self) -> tuple[Step, ...]:
        """The steps after the shortlist."""
        return self.steps[1:]

    def describe(self) -> str:
        """Returns the plan on one line, for people."""

        def words(step: Step) -> str:
            own = ", ".join(f"{name} {value}" for name, value in step.parameters)
            return f"{step.dim}d keep {step.keep}{own and f' ({own})'}"

        return " > ".join(map(words, self.steps))

    @property
    def parts(self) -> list[str]:
        """The plan as ``parse`` reads it."""
        return [str(step) for step in self.steps]

    def for_results(self, num_results: int) -> "FunnelPlan":
        """Returns the plan with every shortlist at least as long as the results asked for."""
        return FunnelPlan(tuple(replace(step, keep=max(step.keep, num_results)) for step in self.steps))

    @classmethod
    def parse(cls, parts: Sequence[str]) -> "FunnelPlan":
        """Returns the plan that parts such as ``("64:200:nprobe=16", "384:50")`` give.

        Raises:
            ValueError: A part is not ``dim:keep`` with parameters after it, or the plan does not narrow.
        """
        return cls(tuple(_parse_step(part) for part in parts))


def _parse_step(part: str) -> Step:
    dim, _, rest = part.partition(":")
    keep, *own = rest.split(":")
    pairs = [tuple(word.strip() for word in text.split("=")) for text in own]
    are_numbers = all(text.strip().isdecimal() for text in (dim, keep, *(pair[-1] for pair in pairs)))
    if not are_numbers or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"funnel: '{part}' is not dim:keep. Write for example 64:200,384:100 or 64:200:nprobe=16,384:100.")
    return Step(int(dim), int(keep), tuple((name, int(value)) for name, value in pairs))


def default_plan(dims: Sequence[int]) -> FunnelPlan:
    """Returns a cautious plan for dims given widest first: 200 documents at a sixth of the width, then full width.

    >>> default_plan((384, 256, 128, 64, 32)).describe()
    '64d keep 200 > 384d keep 100'
    """
    width = max(dims)
    narrow = [dim for dim in dims if dim * 6 <= width] or [dim for dim in dims if dim < width][-1:]
    return FunnelPlan((*(Step(dim, 200) for dim in narrow[:1]), Step(width, 100)))


def exact_plan(width: int, num_results: int = 10) -> FunnelPlan:
    """Returns the plan of one step that compares every document at full width.

    >>> exact_plan(384).describe()
    '384d keep 10'
    """
    return FunnelPlan((Step(width, num_results),))

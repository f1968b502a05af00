"""What pays on this machine, by small measurements: which precision, which size of step, whether to compile.

Drivers import this room too, for what is chosen: the encoder, with its libraries, is imported where there is one to be measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from matryoshka import rates
from matryoshka.rates import TOKENS_PER_STEP, Precision
from matryoshka.storage import Place
from matryoshka.tokens import Tokens

if TYPE_CHECKING:
    from matryoshka.encode import Encoder

W = TypeVar("W")

_BUDGETS = {"cpu": (1_024, 2_048, 4_096), "cuda": (16_384, 32_768, 65_536)}
_ROUNDS = 2
COMPILING_MAY_PAY_AFTER = 300.0  # seconds of a worker's work: for less it is not even tried


@dataclass(frozen=True, slots=True)
class Choice:
    """How a worker runs, as far as it was asked for or chosen before; None is open."""

    precision: Precision | None = None
    tokens_per_step: int | None = None
    is_compiled: bool | None = None

    @property
    def is_open(self) -> bool:
        """Whether anything is to be measured."""
        return None in (self.precision, self.tokens_per_step, self.is_compiled)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a worker should run, and what it could reach at most.

    Attributes:
        precision: The faster one.
        tokens_per_step: The fastest budget.
        is_compiled: Whether compiling the model pays.
        flops_per_second: Of a large matrix product in this precision: a worker's ceiling; None where it was not measured.
        notice: Why the model could not be compiled; empty where it could, or where that was not tried.
    """

    precision: Precision
    tokens_per_step: int
    is_compiled: bool = False
    flops_per_second: float | None = None
    notice: str = ""

    @property
    def choice(self) -> Choice:
        """The same as a choice in which nothing is open."""
        return Choice(self.precision, self.tokens_per_step, self.is_compiled)


def calibrate(folder: Place, device: str, choice: Choice, texts: Sequence[str], num_documents: int) -> Calibration:
    """Returns how to run a model on this machine; what is chosen is kept, what is open is measured.

    Args:
        folder: The model.
        device: ``cpu`` or ``cuda``.
        choice: See ``rates.best_precision``, ``best_budget`` and ``pays_to_compile``.
        texts: A sample of the documents.
        num_documents: How many of them a worker will have to do.
    """
    from matryoshka.encode import Encoder

    precision = choice.precision or rates.best_precision(device)
    budget, is_compiled, notice = choice.tokens_per_step, choice.is_compiled, ""
    texts = [texts[number] for number in np.random.default_rng(0).permutation(len(texts))]  # a file may be sorted by length
    if budget is None or is_compiled is None:
        encoder = Encoder(folder, device, precision, budget)
        try:
            budget = budget or best_budget(encoder, device, texts)
            encoder.tokens_per_step = budget
            if is_compiled is None:
                is_compiled, notice = pays_to_compile(encoder, folder, device, precision, texts, num_documents)
        except ValueError:  # a document of the sample has no vector: its unit says so, with the document's name
            budget, is_compiled = budget or TOKENS_PER_STEP[device], bool(is_compiled)
    return Calibration(precision, budget, is_compiled, rates.matrix_rate(device, precision), notice)


def best_budget(encoder: "Encoder", device: str, texts: Sequence[str]) -> int:
    """Returns the tokens per step with which a sample of documents is encoded fastest; without any, the usual ones.

    Raises:
        ValueError: The model gives no finite vector for a document of the sample.
    """
    budgets = _BUDGETS[device]
    if not texts:
        return TOKENS_PER_STEP[device]
    sample = _sample(encoder.tokenise(list(texts), "document"), 4 * budgets[-1])

    def compute(budget: int) -> float:
        encoder.tokens_per_step = budget
        return encoder.compute(sample, "document").compute_seconds

    seconds = _best_seconds(compute, budgets)
    return min(budgets, key=lambda budget: seconds[budget])


def pays_to_compile(
    encoder: "Encoder", folder: Place, device: str, precision: Precision, texts: Sequence[str], num_documents: int
) -> tuple[bool, str]:
    """Returns whether so many documents are done sooner by a compiled model, and why it could not be compiled.

    What a sample of the documents takes is held against the time that the model needs to start, compiling included.

    Args:
        encoder: The model, not compiled.
        folder: The model.
        device: ``cpu`` or ``cuda``.
        precision: Of the encoder.
        texts: The sample.
        num_documents: How many documents a worker will have to do.

    Raises:
        ValueError: The model gives no finite vector for a document of the sample.
    """
    from matryoshka.encode import Encoder

    if not texts:
        return False, ""
    sample = _sample(encoder.tokenise(list(texts), "document"), 4 * _BUDGETS[device][-1])
    seconds = encoder.compute(sample, "document").compute_seconds
    if seconds / sample.num_texts * num_documents < COMPILING_MAY_PAY_AFTER:
        return False, ""
    start = time.perf_counter()
    compiled = Encoder(folder, device, precision, encoder.tokens_per_step, is_compiled=True)
    start_seconds = time.perf_counter() - start
    if not compiled.is_compiled:
        return False, compiled.notice
    best = _best_seconds(lambda one: one.compute(sample, "document").compute_seconds, (encoder, compiled))
    return (best[encoder] - best[compiled]) / sample.num_texts * num_documents > start_seconds, ""


def _best_seconds(measure: Callable[[W], float], ways: Sequence[W]) -> dict[W, float]:
    """Returns the least that each way was measured to take; they take turns, so that a disturbance hits them all."""
    rounds = [[measure(way) for way in ways] for _ in range(_ROUNDS)]
    return dict(zip(ways, map(min, zip(*rounds, strict=True)), strict=True))


def _sample(tokens: Tokens, num_tokens: int) -> Tokens:
    """Returns about so many tokens: the first texts, or all of them several times."""
    tokens = Tokens.join([tokens] * max(num_tokens // max(int(tokens.lengths.sum()), 1), 1))
    count = max(int((tokens.lengths.cumsum() <= num_tokens).sum()), 1)
    lengths = tokens.lengths[:count]
    return Tokens(tokens.ids[: lengths.sum()], lengths, tokens.owners[:count], int(tokens.owners[count - 1]) + 1)

"""What this machine is good at, by small measurements: which precision, which size of step, how many operations a second."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from matryoshka.encode import TOKENS_PER_STEP, Encoder, Precision
from matryoshka.tokens import Tokens

_BF16_MUST_GAIN = 1.3
_BUDGETS = {"cpu": (1_024, 2_048, 4_096), "cuda": (16_384, 32_768, 65_536)}
_MATRIX_SIDE = {"cpu": 1_024, "cuda": 8_192}
_ROUNDS = 2
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a worker should run, and what it could reach at most.

    Attributes:
        precision: The faster one.
        tokens_per_step: The fastest budget.
        flops_per_second: Of a large matrix product in this precision: a worker's ceiling; None where it was not measured.
    """

    precision: Precision
    tokens_per_step: int
    flops_per_second: float | None = None


def calibrate(
    folder: Path, device: str, precision: Precision | None, tokens_per_step: int | None, texts: Sequence[str]
) -> Calibration:
    """Returns how to run a model on this machine; what is given is kept, what is None is measured.

    Args:
        folder: The model.
        device: ``cpu`` or ``cuda``.
        precision: See ``best_precision``.
        tokens_per_step: See ``best_budget``.
        texts: A sample of the documents.
    """
    precision = precision or best_precision(device)
    if tokens_per_step is None:
        try:
            tokens_per_step = best_budget(Encoder(folder, device, precision), device, texts)
        except ValueError:  # a document of the sample has no vector: its unit says so, with the document's name
            tokens_per_step = TOKENS_PER_STEP[device]
    return Calibration(precision, tokens_per_step, matrix_rate(device, precision))


def best_precision(device: str) -> Precision:
    """Returns ``bf16`` where a small measurement shows that it pays on this machine, else ``float32``.

    No list of processors decides: bf16 without hardware for it runs, several times slower.
    """
    seconds = {name: _product_seconds(device, dtype, 1024, 384, 1536, repeats=30) for name, dtype in _DTYPES.items()}
    return "bf16" if seconds["float32"] >= _BF16_MUST_GAIN * seconds["bf16"] else "float32"


def matrix_rate(device: str, precision: Precision, side: int | None = None) -> float:
    """Returns the floating-point operations per second of a large square matrix product."""
    side = side or _MATRIX_SIDE[device]
    return 2.0 * side**3 / _product_seconds(device, _DTYPES[precision], side, side, side, repeats=10)


def _product_seconds(device: str, dtype: torch.dtype, rows: int, inner: int, columns: int, repeats: int) -> float:
    left = torch.full((rows, inner), 0.01, dtype=dtype, device=device)
    right = torch.full((inner, columns), 0.01, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):  # the best of many: other work on the machine must not decide
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def best_budget(encoder: Encoder, device: str, texts: Sequence[str]) -> int:
    """Returns the tokens per step with which a sample of documents is encoded fastest; without any, the usual ones.

    Raises:
        ValueError: The model gives no finite vector for a document of the sample.
    """
    budgets = _BUDGETS[device]
    if not texts:
        return TOKENS_PER_STEP[device]
    sample = _sample(encoder.tokenise(list(texts), "document"), 4 * budgets[-1])
    seconds = dict.fromkeys(budgets, float("inf"))
    for _ in range(_ROUNDS):  # interleaved, so that a disturbance hits them all
        for budget in budgets:
            encoder.tokens_per_step = budget
            seconds[budget] = min(seconds[budget], encoder.compute(sample, "document").compute_seconds)
    return min(budgets, key=lambda budget: seconds[budget])


def _sample(tokens: Tokens, num_tokens: int) -> Tokens:
    """Returns the first texts that hold about so many tokens."""
    count = max(int((tokens.lengths.cumsum() <= num_tokens).sum()), 1)
    lengths = tokens.lengths[:count]
    return Tokens(tokens.ids[: lengths.sum()], lengths, tokens.owners[:count], int(tokens.owners[count - 1]) + 1)

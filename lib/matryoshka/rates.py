"""What a device reaches in each precision, by small measurements; and what suits it where nothing was measured.

Drivers import this room, and have others measure: torch, which takes a second, is imported by those that do.
"""

import time
from typing import Literal

Precision = Literal["bf16", "float32"]

# Tokens per step where nothing was measured. CPU: larger steps fall out of the caches.
TOKENS_PER_STEP = {"cpu": 2_048, "cuda": 65_536}

_PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
_BF16_MUST_GAIN = 1.3
_MATRIX_SIDE = {"cpu": 1_024, "cuda": 8_192}


def best_precision(device: str) -> Precision:
    """Returns ``bf16`` where a small measurement shows that it pays on this machine, else ``float32``.

    No list of processors decides: bf16 without hardware for it runs, several times slower.
    """
    seconds = {name: _product_seconds(device, name, 1024, 384, 1536, repeats=30) for name in _PRECISIONS}
    return "bf16" if seconds["float32"] >= _BF16_MUST_GAIN * seconds["bf16"] else "float32"


def matrix_rate(device: str, precision: Precision, side: int | None = None) -> float:
    """Returns the floating-point operations per second of a large square matrix product."""
    side = side or _MATRIX_SIDE[device]
    return 2.0 * side**3 / _product_seconds(device, precision, side, side, side, repeats=10)


def _product_seconds(device: str, precision: Precision, rows: int, inner: int, columns: int, repeats: int) -> float:
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.full((rows, inner), 0.01, dtype=dtype, device=device)
    right = torch.full((inner, columns), 0.01, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):  # the best of many: other work on the machine must not decide
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best

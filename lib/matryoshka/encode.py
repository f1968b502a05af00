"""Text to vectors: batches of like length under a token budget, normalised, float16.

Prompts are put before texts here and nowhere else.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from matryoshka import model

Role = Literal["query", "document"]
Precision = Literal["float32", "bf16"]

# Padded tokens per step. CPU: 2-4k measured best with MiniLM (larger batches fall out of the caches).
TOKENS_PER_STEP = {"cpu": 4_096, "cuda": 65_536}

_BF16_MUST_GAIN = 1.3


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of some texts, and what they cost.

    Attributes:
        vectors: Unit length, float16, in the order of the texts; [N, D].
        num_tokens: Real tokens, prompts and special tokens included.
        num_padded_tokens: Tokens that went through the model, padding included.
        num_truncated: Texts that were longer than the model's window.
    """

    vectors: npt.NDArray[np.float16]
    num_tokens: int
    num_padded_tokens: int
    num_truncated: int


def best_precision(device: str) -> Precision:
    """Returns ``bf16`` where a small measurement shows that it pays on this machine, else ``float32``.

    No list of processors decides: bf16 without hardware for it runs, several times slower.
    """
    seconds = {dtype: _matrix_seconds(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bf16" if seconds[torch.float32] >= _BF16_MUST_GAIN * seconds[torch.bfloat16] else "float32"


def _matrix_seconds(device: str, dtype: torch.dtype) -> float:
    left = torch.full((1024, 384), 0.01, dtype=dtype, device=device)
    right = torch.full((384, 1536), 0.01, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(30):  # the best of many: other work on the machine must not decide
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


class Encoder:
    """A loaded model that turns texts into vectors.

    Args:
        folder: A model folder.
        device: ``cpu`` or ``cuda``.
        precision: Of weights and activations; pooled vectors are normalised in float32 either way.
        tokens_per_step: Most padded tokens in one forward pass; by default what suits the device.
    """

    def __init__(self, folder: Path, device: str, precision: Precision, tokens_per_step: int | None = None) -> None:
        self._device = device
        self._tokens_per_step = tokens_per_step or TOKENS_PER_STEP[device]
        self._model = model.load(folder, device).eval()
        if precision == "bf16":
            self._model = self._model.to(torch.bfloat16)

    def encode(self, texts: list[str], role: Role) -> Encoded:
        """Returns the vectors of texts, with the model's prompt for queries or documents put before each.

        Raises:
            ValueError: A vector is not finite or has no length; ``args[1]`` holds the numbers of the texts.

        Shapes: vectors [N, D].
        """
        prompt = self._model.prompts.get(role) or ""
        tokenizer = self._model.tokenizer
        max_tokens = self._model.max_seq_length or tokenizer.model_max_length
        prompted = [prompt + text for text in texts] if prompt else texts
        tokens = tokenizer(prompted, truncation=True, max_length=max_tokens) if texts else {"input_ids": []}
        lengths = np.asarray([len(ids) for ids in tokens["input_ids"]], dtype=np.int64)
        num_truncated = sum(bool(encoding.overflowing) for encoding in getattr(tokens, "encodings", None) or ())
        extras = self._prompt_extras(prompt)
        vectors = np.zeros((len(texts), self._width), dtype=np.float16)
        num_padded = 0
        with torch.inference_mode():
            for rows in plan_steps(lengths, self._tokens_per_step):
                step = {name: [values[row] for row in rows] for name, values in tokens.items()}
                features = tokenizer.pad(step, return_tensors="pt").to(self._device)
                num_padded += features["input_ids"].numel()
                pooled = self._model({**features, **extras})["sentence_embedding"]
                vectors[rows] = torch.nn.functional.normalize(pooled.float(), dim=-1).half().cpu().numpy()
        _refuse_broken(vectors)
        return Encoded(vectors, int(lengths.sum()), num_padded, num_truncated)

    @property
    def _width(self) -> int:
        return int(self._model.get_embedding_dimension() or 0)

    def _prompt_extras(self, prompt: str) -> dict[str, int]:
        """Returns what the pooling needs where it leaves the prompt's tokens out (as Instructor models do)."""
        if not prompt:
            return {}
        length = self._model.preprocess([""], prompt=prompt).get("prompt_length")
        return {} if length is None else {"prompt_length": int(length)}


def plan_steps(lengths: npt.NDArray[np.int64], tokens_per_step: int) -> list[npt.NDArray[np.int64]]:
    """Returns which rows go through the model together: of like length, longest first, within the budget when padded.

    Longest first makes the first step the largest, so that memory runs out at once or never. A single text that is longer
    than the budget is a step of its own. Every row is in exactly one step.

    >>> [rows.tolist() for rows in plan_steps(np.array([3, 9, 2, 4]), tokens_per_step=9)]
    [[1], [3, 0], [2]]
    """
    order = np.argsort(-lengths, kind="stable")
    steps, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = min(start + max(tokens_per_step // longest, 1), len(order))
        steps.append(order[start:stop])
        start = stop
    return steps


def _refuse_broken(vectors: npt.NDArray[np.float16]) -> None:
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32)
    broken = np.flatnonzero(~(np.abs(squares - 1) < 0.01))
    if broken.size:
        raise ValueError("the model gave vectors that are not finite or have no length", broken.tolist())

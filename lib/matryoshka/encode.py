"""Token ids to vectors: packed steps under a token budget, normalised on the device, float16.

With the variable-length kernel, steps are queued on the device without waiting for any of them; the host waits once, for all
vectors of a call.
"""

import gc
import itertools
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from matryoshka import model
from matryoshka.packed import Attention, CannotPackError, PackedModel
from matryoshka.rates import TOKENS_PER_STEP, Precision
from matryoshka.storage import Place
from matryoshka.stream import Fetch, Stream, end_of_step
from matryoshka.tokens import Long, Role, Tokeniser, TokeniserPool, Tokens

_CHECK_LENGTHS = (130, 60, 33, 16, 12, 5)
_ROUNDING = 1e-5  # least difference of cosines that float32 itself explains
_TIMES_DTYPE = 4  # a packed step may differ from a padded one this many times as much as its dtype from float32


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of some texts, and what they cost.

    Attributes:
        vectors: Unit length, float16, in the order of the texts; [N, D].
        num_tokens: Real tokens, prompts and special tokens included.
        num_padded_tokens: Tokens that went through the model, padding included.
        num_truncated: Texts that were longer than the model's window and lost their end.
        num_cut_tokens: Tokens that they lost.
        num_split: Texts that were longer than the window and are the mean of several windows.
        num_flops: Floating-point operations of the matrix products that the real tokens need.
        tokens_per_step: The budget that held in the end: memory may have run out on the way.
        compute_seconds: From the first step to the last vector on the host.
    """

    vectors: npt.NDArray[np.float16]
    num_tokens: int
    num_padded_tokens: int
    num_truncated: int
    num_cut_tokens: int
    num_split: int
    num_flops: float
    tokens_per_step: int
    compute_seconds: float


def free_memory(device: str) -> None:
    """Gives back what encoders had that are not referred to any more, the device's memory too."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Encoder:
    """A loaded model that turns texts into vectors; several threads may use it, one of them computes at a time.

    Args:
        folder: A model folder.
        device: ``cpu`` or ``cuda``.
        precision: Of weights and activations; pooled vectors are normalised in float32 either way.
        tokens_per_step: Most tokens in one forward pass; by default what suits the device.
        long: What becomes of texts beyond the model's window: ``truncate``, or ``mean`` of overlapping windows.
        num_tokenisers: Processes that tokenise; with 0, the calling thread does.
        is_compiled: Whether to compile the model, which takes a while; it needs a C++ compiler and Python's headers.

    Attributes:
        notice: Why the model runs padded, or not compiled; empty where it runs as it should.
        is_compiled: Whether it does run compiled.
        tokens_per_step: The budget; it is halved when memory runs out.
    """

    def __init__(
        self,
        folder: Place,
        device: str,
        precision: Precision,
        tokens_per_step: int | None = None,
        long: Long = "truncate",
        num_tokenisers: int = 0,
        *,
        is_compiled: bool = False,
    ) -> None:
        self._device = device
        self.tokens_per_step = tokens_per_step or TOKENS_PER_STEP[device]
        self._model = model.load(folder, device).eval()
        self._width = int(self._model.get_embedding_dimension() or 0)
        self._window = int(self._model.max_seq_length or self._model.tokenizer.model_max_length)
        self._prompts = {role: text for role in get_args(Role) if (text := self._model.prompts.get(role))}
        cut = self._model.tokenizer.truncation_side
        tokeniser = Tokeniser(model.rust_tokenizer(self._model), self._window, self._prompts, long, cut)
        self._tokenise = TokeniserPool(tokeniser, num_tokenisers)
        # One thread computes for all: the allocator and the kernel caches hold their memory by thread.
        self._computing = ThreadPoolExecutor(1)
        self._flops_per_token, self._flops_per_square = _count_flops(self._model)
        self._extras = {role: model.prompt_extras(self._model, self._prompts.get(role)) for role in get_args(Role)}
        self._packed, self.is_compiled, self.notice = self._choose_path(precision, is_compiled)

    def tokenise(self, texts: list[str], role: Role) -> Tokens:
        """Returns the tokens of texts, with the model's prompt for queries or documents put before each."""
        return self._tokenise(texts, role)

    def encode(self, texts: list[str], role: Role) -> Encoded:
        """Returns the vectors of texts.

        Raises:
            ValueError: A vector is not finite or has no length; ``args[1]`` holds the numbers of the texts.

        Shapes: vectors [N, D].
        """
        return self.compute(self.tokenise(texts, role), role)

    def compute(self, tokens: Tokens, role: Role) -> Encoded:
        """Returns the vectors of tokenised texts.

        Raises:
            ValueError: As ``encode``.
            RuntimeError: A single document does not fit into the device's memory.
        """
        if not tokens.lengths.all():
            raise ValueError("texts without any token have no vector", tokens.owners[tokens.lengths == 0].tolist())
        order = np.argsort(-tokens.lengths, kind="stable")
        start, windows, num_padded = self._computing.submit(self._begin, tokens, order, role).result()
        vectors = self._on_host(windows)
        vectors[order] = vectors.copy()
        broken = _find_broken(vectors)
        if broken.size and self._packed:  # scores that overflow in one kernel may not in the other
            broken = broken[np.argsort(-tokens.lengths[broken], kind="stable")]
            _, again, _ = self._computing.submit(self._begin, tokens, broken, role, is_padded=True).result()
            vectors[broken] = self._on_host(again)
            broken = _find_broken(vectors)
        if broken.size:
            numbers = np.unique(tokens.owners[broken]).tolist()
            raise ValueError("the model gave vectors that are not finite or have no length", numbers)
        squares = float(np.square(tokens.lengths, dtype=np.float64).sum())
        return Encoded(
            _average(vectors, tokens),
            int(tokens.lengths.sum()),
            num_padded,
            tokens.num_truncated,
            tokens.num_cut_tokens,
            tokens.num_split,
            self._flops_per_token * float(tokens.lengths.sum()) + self._flops_per_square * squares,
            self.tokens_per_step,
            time.perf_counter() - start,
        )

    def peak_bytes(self) -> int:
        """Returns the most memory that was taken so far: of the GPU by this process, or all of this process on a CPU."""
        if torch.device(self._device).type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Ends the computing thread and the tokenising processes."""
        self._computing.shutdown()
        self._tokenise.close()

    def _begin(
        self, tokens: Tokens, order: npt.NDArray[np.int64], role: Role, *, is_padded: bool = False
    ) -> tuple[float, Tensor, int]:
        """Queues the steps of some windows when it is their turn; returns the time at which this began, and as ``_run``."""
        start = time.perf_counter()
        return start, *self._run(tokens, order, self._extras[role], is_padded=is_padded)

    def _run(
        self, tokens: Tokens, order: npt.NDArray[np.int64], extras: dict[str, int], *, is_padded: bool = False
    ) -> tuple[Tensor, int]:
        """Queues the steps of some windows; returns their unit vectors, in the order given, and the tokens of all steps."""
        stream = Stream.of(tokens.ids, tokens.lengths, order, self._packed.first_position if self._packed else 0, self._device)
        vectors = torch.zeros((len(order), self._width), dtype=torch.float16, device=self._device)
        is_padded = is_padded or self._packed is None
        start = num_padded = 0
        with torch.inference_mode():
            while start < len(order):
                stop = end_of_step(stream.lengths, start, self.tokens_per_step, is_padded=is_padded)
                step = stream.step(start, stop)
                try:
                    pooled = self._padded_step(step, extras) if is_padded else self._packed_step(step, extras)
                    vectors[start:stop] = torch.nn.functional.normalize(pooled.float(), dim=-1).half()
                    fits = True
                except torch.OutOfMemoryError:
                    fits = False  # what the step holds is free only after this block
                if not fits:
                    self._halve(step)
                    continue
                num_tokens = int(step.lengths.sum())
                by_longest = int(step.lengths[0]) * len(step.lengths)
                num_padded += by_longest if is_padded or not self._packed else self._packed.length_of(num_tokens)
                start = stop
        return vectors, num_padded

    def _halve(self, step: Stream) -> None:
        """Makes the next try of a step that did not fit half as large."""
        if len(step.lengths) == 1:
            raise RuntimeError(
                f"a document of {step.lengths[0]} tokens does not fit into the memory of the {self._device} device"
            )
        self.tokens_per_step = max(min(self.tokens_per_step, int(step.lengths.sum())) // 2, 1)
        torch.cuda.empty_cache()

    def _packed_step(self, step: Stream, extras: dict[str, int]) -> Tensor:
        assert self._packed is not None
        return self._packed(step.ids, step.positions, step.owners, step.bounds, step.lengths, extras)

    def _padded_step(self, step: Stream, extras: dict[str, int]) -> Tensor:
        lengths = torch.from_numpy(step.lengths).to(self._device)
        mask = torch.arange(int(step.lengths[0]), device=self._device) < lengths[:, None]  # [n, longest]
        ids = torch.full(mask.shape, self._model.tokenizer.pad_token_id or 0, device=self._device)
        ids[mask] = step.ids.long()
        pooled: Tensor = self._model({"input_ids": ids, "attention_mask": mask.long(), **extras})["sentence_embedding"]
        return pooled

    def _on_host(self, vectors: Tensor) -> npt.NDArray[np.float16]:
        """Returns vectors once they are computed; other threads may queue their own steps meanwhile."""
        return np.asarray(Fetch(vectors).get().numpy())

    def _choose_path(self, precision: Precision, is_compiled: bool) -> tuple[PackedModel | None, bool, str]:
        """Casts the model, and returns it packed if a few documents then have the vectors that they have when padded.

        Returns:
            The packed model, or None; whether it is compiled; and why, where it is less than it could be.
        """
        reference = self._check_vectors(None)
        if precision == "bf16":
            for parameter in self._model.parameters():  # no buffers: rotary frequencies must stay exact
                parameter.data = parameter.data.to(torch.bfloat16)
        tolerance = max(_ROUNDING, _TIMES_DTYPE * _difference(self._check_vectors(None), reference))
        has_kernel = self._device == "cuda" and precision == "bf16"
        kinds: tuple[Attention, ...] = ("varlen", "grouped") if has_kernel else ("grouped",)
        reasons: dict[tuple[Attention, bool], str] = {}
        for attention, compiled in itertools.product(kinds, (True, False) if is_compiled else (False,)):
            try:
                packed = PackedModel(self._model, attention, is_compiled=compiled)
                difference = _difference(self._check_vectors(packed), reference)
            except (CannotPackError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
                reasons[attention, compiled] = (str(error).splitlines() or [type(error).__name__])[0]
                continue
            if difference > tolerance:
                kind, gap = "compiled" if compiled else "packed", f"{difference:.1e} (explained: {tolerance:.1e})"
                reasons[attention, compiled] = f"{kind} vectors differ from padded ones by {gap}"
                continue
            notices = []
            if attention != kinds[0]:
                notices.append(f"no variable-length kernel, attention is grouped: {reasons[kinds[0], False]}")
            if compiled != is_compiled:
                notices.append(f"the model is not compiled: {reasons[attention, True]}")
            return packed, compiled, "; ".join(notices)
        return None, False, f"batches are padded: {reasons[kinds[-1], False]}"

    def _check_vectors(self, packed: PackedModel | None) -> npt.NDArray[np.float64]:
        """Returns vectors of a few documents of made-up tokens by one of the two paths."""
        lengths = np.minimum(_CHECK_LENGTHS, self._window)
        count = int(self._model.tokenizer.vocab_size)
        ids = np.random.default_rng(0).integers(count // 2, count, lengths.sum(), dtype=np.int32)
        tokens = Tokens(ids, lengths, np.arange(len(lengths)), len(lengths))
        self._packed = packed
        vectors, _ = self._run(tokens, np.arange(len(lengths)), {})
        return self._on_host(vectors).astype(np.float64)


def is_device_lost(error: RuntimeError) -> bool:
    """Returns whether an error leaves its process unable to use the device again, as most errors of CUDA itself do."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def _average(vectors: npt.NDArray[np.float16], tokens: Tokens) -> npt.NDArray[np.float16]:
    """Returns one unit vector per text: the mean of its windows, weighted by their tokens.

    Shapes: vectors [windows, D]; result [N, D].
    """
    if len(vectors) == tokens.num_texts:
        return vectors
    weighted = vectors.astype(np.float32) * tokens.lengths[:, None]
    sums = np.add.reduceat(weighted, np.searchsorted(tokens.owners, np.arange(tokens.num_texts)), axis=0)
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)).astype(np.float16)


def _find_broken(vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32)
    return np.flatnonzero(~(np.abs(squares - 1) < 0.01))


def _difference(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    """Returns the largest 1 - cosine of corresponding rows; infinite where one is not a number."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(np.nan_to_num(np.max(1 - (left * right).sum(axis=1) / norms), nan=np.inf))


def _count_flops(loaded: Any) -> tuple[float, float]:
    """Returns the operations of a model's matrix products: per token, and per square of a document's tokens."""
    parts = [part for name, part in loaded[0].named_modules() if isinstance(part, torch.nn.Linear) and "pooler" not in name]
    config = getattr(getattr(loaded[0], "auto_model", None), "config", None)
    heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads, 1)
    return 2.0 * sum(part.weight.numel() for part in parts), 4.0 * heads * width * layers

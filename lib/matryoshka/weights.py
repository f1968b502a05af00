"""How far the weights of a model moved while it was tuned, layer by layer, read from both models' files.

Files are read in blocks: neither model is ever in memory as a whole.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka import storage
from matryoshka.storage import Place

EMBEDDINGS, HEAD = "embeddings", "head"

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
_EMBEDDED = re.compile(r"embed|relative_attention_bias")
_UNUSED = re.compile(r"(?:^|\.)pooler\.")  # no vector depends on it, so it is never trained
_BLOCK_NUMBERS = 1 << 22  # 32 MB in float64


@dataclass(frozen=True, slots=True)
class Changes:
    """How far weights moved.

    Attributes:
        by_layer: The norm of the difference over the norm before: of ``embeddings``, ``layer 0`` and so on, and of the
            ``head``, where there is one. None where all weights were 0 before.
        left_out: Weights that only one of the models has, or that have another shape.
    """

    by_layer: Mapping[str, float | None]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor in an open safetensors file, read block by block."""

    file: Any
    key: str
    shape: tuple[int, ...]

    def blocks(self) -> Iterator[Any]:
        """Yields its values in float64, some rows at a time."""
        if not self.shape:
            yield self.file.get_tensor(self.key).double()
            return
        rows = max(_BLOCK_NUMBERS // max(int(np.prod(self.shape[1:])), 1), 1)
        values = self.file.get_slice(self.key)
        for start in range(0, self.shape[0], rows):
            yield values[start : start + rows].double()


def layer_of(name: str) -> str:
    """Returns the layer that a weight belongs to, by its name.

    >>> [layer_of(name) for name in ("embeddings.LayerNorm.bias", "encoder.layer.3.output.dense.weight", "2_Dense/linear.weight")]
    ['embeddings', 'layer 3', 'head']
    """
    found = _LAYER.search(name)
    if found and "/" not in name:
        return f"layer {found[1]}"
    return EMBEDDINGS if _EMBEDDED.search(name) else HEAD


def in_order(layers: Sequence[str]) -> list[str]:
    """Returns layers from the lowest to the highest.

    >>> in_order(["head", "layer 10", "layer 9", "embeddings"])
    ['embeddings', 'layer 9', 'layer 10', 'head']
    """
    ends = {EMBEDDINGS: -1, HEAD: len(layers) * 1_000}
    return sorted(layers, key=lambda name: ends[name] if name in ends else int(name.rpartition(" ")[2]))


def measure_changes(before: Place, after: Place) -> Changes:
    """Returns how far each layer's weights moved between two model folders.

    Raises:
        ValueError: A file is not safetensors, or the models have no weight in common.
    """
    with contextlib.ExitStack() as stack:
        old, new = (_open(storage.local(folder), stack) for folder in (before, after))
        names = _match(old, new)
        paired = {name: own for name, own in names.items() if old[own].shape == new[name].shape}
        if not paired:
            raise ValueError(f"{after}: has no weight in common with {before}. Compare a model with the one it was tuned from.")
        sums: dict[str, list[float]] = {}
        for name, own in paired.items():
            sums.setdefault(layer_of(name), []).extend(_squares(old[own], new[name]))
    left_out = {name for name in new if name not in paired} | (old.keys() - names.values())
    by_layer = {layer: _share(sum(own[::2]), sum(own[1::2])) for layer, own in sums.items()}
    return Changes({layer: by_layer[layer] for layer in in_order(list(by_layer))}, tuple(sorted(left_out)))


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Weight]:
    """Returns the floating-point weights of a model by name: those of modules after the transformer begin with their folder."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        place = path.parent.relative_to(folder).as_posix()
        try:
            file = stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError):
            raise ValueError(f"{path}: not a safetensors file. Save the model again.") from None
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            values = file.get_slice(key)
            if "F" in values.get_dtype() and not _UNUSED.search(key):
                found[key if place == "." else f"{place}/{key}"] = _Weight(file, key, tuple(values.get_shape()))
    return found


def _match(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name before of each weight: the same, or one of the two has more in front, as with ``bert.``."""
    more, less = _prefix(old, new), _prefix(new, old)
    bare = {name.removeprefix(more): name for name in old}
    return {name: bare[own] for name in new if (own := name.removeprefix(less)) in bare}


def _prefix(longer: Mapping[str, Any], shorter: Mapping[str, Any]) -> str:
    """Returns what some names of layers have in front that others do without."""
    name = next((name for name in shorter if layer_of(name) not in (EMBEDDINGS, HEAD)), "")
    return next((other.removesuffix(name) for other in longer if name and other.endswith(f".{name}")), "")


def _squares(old: _Weight, new: _Weight) -> tuple[float, float]:
    """Returns the sums of squares of the difference and of the old values."""
    changed = before = 0.0
    for old_block, new_block in zip(old.blocks(), new.blocks(), strict=True):
        changed += float((new_block - old_block).square().sum())
        before += float(old_block.square().sum())
    return changed, before


def _share(changed: float, before: float) -> float | None:
    return float(np.sqrt(changed / before)) if before else None

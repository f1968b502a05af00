"""A training run's curves for TensorBoard. The only room that knows it."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FOLDER = "tensorboard"


def check() -> None:
    """Checks that TensorBoard's files can be written.

    Raises:
        ValueError: The package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the tensorboard extra. Install it: pip install 'matryoshka[tensorboard]'.")


class Curves:
    """Draws the entries of a log while the block runs.

    Args:
        output: Folder whose ``tensorboard`` folder takes the event files; None: nothing is drawn.
    """

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self._writer: Any = None

    def __enter__(self) -> Self:
        if self._output:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._output / FOLDER), flush_secs=10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def add(self, entry: Mapping[str, float]) -> None:
        """Adds the figures of one entry at its step."""
        if self._writer:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name.replace("_", "/", 1), value, int(entry["step"]))

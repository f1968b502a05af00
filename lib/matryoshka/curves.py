"""A training run's curves for TensorBoard. The only room that knows it."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matryoshka import storage
from matryoshka.storage import Place

FOLDER = "tensorboard"


def check() -> None:
    """Checks that TensorBoard's files can be written.

    Raises:
        ValueError: The package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the tensorboard extra. Run pip install --editable '.[tensorboard]' in the clone.")


class Curves:
    """Draws the entries of a log while the block runs.

    Args:
        output: Folder whose ``tensorboard`` folder takes the event files, in a bucket when the block ends; None: nothing is
            drawn.
    """

    def __init__(self, output: Place | None) -> None:
        self._target = output / FOLDER if output else None
        self._stack = contextlib.ExitStack()
        self._writer: Any = None

    def __enter__(self) -> Self:
        if self._target:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder(self._target)), flush_secs=10)
            self._stack.callback(self._writer.close)
        return self

    def _folder(self, target: Place) -> Path:
        """Returns the folder that the event files are written to."""
        if isinstance(target, Path):
            return target
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=storage.TEMPORARY)))
        self._stack.callback(_upload, folder, target)
        return folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def add(self, entry: Mapping[str, float]) -> None:
        """Adds the figures of one entry at its step."""
        if self._writer:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name.replace("_", "/", 1), value, int(entry["step"]))


def _upload(folder: Path, target: Place) -> None:
    """Puts event files beside those of the runs before: each run's have names of their own."""
    for path in folder.iterdir():
        storage.publish_bytes(target / path.name, path.read_bytes())

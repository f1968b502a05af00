"""What a person or a log sees: progress, tables, one line per event. The only room that knows rich."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from matryoshka.config import without_secrets

logger = logging.getLogger("jobs")


class Listener(Protocol):
    """Hears how a run is getting on."""

    def stage_began(self, stage: str) -> None:
        """Hears of a stage of a pipeline."""

    def parts_done(self, stage: str, done: int, total: int, items: int, item: str, rate: float) -> None:
        """Hears how many parts of a stage are done, how many items of what kind they hold, and items a second."""

    def failed(self, error: str) -> None:
        """Hears of a part that failed."""


_listeners: list[Listener] = []


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Has a listener hear of everything that happens while the block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def say(text: str) -> None:
    """Prints one line for the person who ran the job."""
    Console(soft_wrap=True, highlight=False, emoji=False).print(text, markup=False)


def begin_stage(stage: str) -> None:
    """Says that a stage of a pipeline begins."""
    logger.info("event=begin stage=%s", stage)
    for listener in _listeners:
        listener.stage_began(stage)


def report_failure(stage: str, part: str, error: str) -> None:
    """Says that a part of a stage failed, and why; the run goes on."""
    error = without_secrets(error)
    say(f"{stage}: {part} failed: {error}")
    for listener in _listeners:
        listener.failed(f"{part}: {error}")


def complain(text: str) -> None:
    """Prints one line to standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(text, markup=False)


def show_table(title: str, rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = ()) -> None:
    """Prints a table whose first row is its header; ``text_columns`` are aligned left and may wrap."""
    table = Table(title=Text(title), title_justify="left")
    for column, name in enumerate(rows[0]):
        is_text = column in text_columns
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console().print(table)


class Counter:
    """Progress of a stage: a bar at a terminal, one ``key=value`` line per finished part everywhere else.

    Args:
        stage: Name of the stage.
        total: How many parts there are.
        item: What the parts hold, for the rate: ``documents``, ``pairs``.
    """

    def __init__(self, stage: str, total: int, item: str) -> None:
        self._stage, self._total, self._item = stage, total, item
        self._done = self._items = 0
        self._start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), transient=True) if sys.stderr.isatty() else None
        self._task = self._bar.add_task(stage, total=total, rate="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, num_items: int, num_parts: int = 1, **details: object) -> None:
        """Counts finished parts that hold ``num_items`` items together."""
        self._done += num_parts
        self._items += num_items
        rate = self._items / max(time.perf_counter() - self._start, 1e-9)
        for listener in _listeners:
            listener.parts_done(self._stage, self._done, self._total, self._items, self._item, rate)
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=num_parts, rate=f"{rate:,.0f} {self._item}/s")
        else:
            fields = " ".join(f"{key}={value}" for key, value in details.items())
            logger.info(
                "stage=%s done=%d total=%d %s=%d rate=%.1f %s",
                self._stage, self._done, self._total, self._item, self._items, rate, fields,
            )  # fmt: skip

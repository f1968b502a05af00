"""Interrupts a run at stated moments of its progress, in the driver's own thread: the run cannot hurry past them."""

from collections.abc import Callable, Mapping

import pytest

from jobs.terminal import Counter


def interrupt(monkeypatch: pytest.MonkeyPatch, actions: Mapping[int, Callable[[], None]]) -> dict[int, Callable[[], None]]:
    """Calls each action once that many parts of a stage are done; returns those that are still to come."""
    waiting, advance, done = dict(actions), Counter.advance, 0

    def counted(self: Counter, num_items: int, num_parts: int = 1, **details: object) -> None:
        nonlocal done
        advance(self, num_items, num_parts, **details)
        done += num_parts
        if action := waiting.pop(done, None):
            action()

    monkeypatch.setattr(Counter, "advance", counted)
    return waiting

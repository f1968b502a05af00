"""Where the time of a pipelined worker goes: every instant counts once, for what held the worker up."""

import contextlib
import threading
import time
from collections.abc import Iterator

PHASES = ("compute", "read", "write", "idle")


class Clock:
    """Counts the seconds of a worker whose phases overlap.

    An instant belongs to the first phase of ``PHASES`` that any thread is in: while something computes, nothing waits. When
    nothing computes, the worker waits for what is being read and tokenised; failing that, for what is being written; and
    otherwise for work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = dict.fromkeys(PHASES, 0)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block as a phase of the calling thread."""
        self._enter(name, 1)
        try:
            yield
        finally:
            self._enter(name, -1)

    def take(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last call."""
        with self._lock:
            self._settle()
            taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
            return taken

    def _enter(self, name: str, change: int) -> None:
        with self._lock:
            self._settle()
            self._running[name] += change

    def _settle(self) -> None:
        now = time.perf_counter()
        holding = next((name for name in PHASES if self._running[name]), "idle")
        self._seconds[holding] += now - self._since
        self._since = now

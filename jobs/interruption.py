"""SIGTERM: a scheduler cancels the task, or a spot machine is taken away. The run ends in order, and soon."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger("jobs")

PATIENCE_SECONDS = 25.0
"""After this long, a run that was told to end is ended as it stands; what is finished is on disk by then."""

TERMINATED = 143
"""The exit code of such a run, as a shell would say it: 128 and the number of the signal."""


_told, _lost = threading.Event(), threading.Event()


class TerminatedError(KeyboardInterrupt):
    """The run was told to end, by SIGTERM."""


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Has SIGTERM raise ``TerminatedError`` in the main thread for as long as the block runs, so that everything is closed."""
    _told.clear()
    _lost.clear()
    with kept_handler(signal.SIGINT), on_terminate(terminate):
        yield


def deafen() -> None:
    """Lets no signal disturb how a run ends, once it ends."""
    if is_main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def leave() -> None:
    """Ends the run, from any thread, and without a last word to its output: that is another run's by now."""
    _lost.set()
    os.kill(os.getpid(), signal.SIGTERM)


def is_lost() -> bool:
    """Returns whether the output is another run's by now: nothing may be written to it any more."""
    return _lost.is_set()


def is_told() -> bool:
    """Returns whether the run was told to end: where Ray waits, any signal becomes a plain ``KeyboardInterrupt``."""
    return _told.is_set()


def terminate() -> None:
    """Ends what runs in this thread; what takes too long to close is left as it is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hurry()
    raise TerminatedError


def hurry() -> None:
    """Has the process end by itself if it is still there when the patience of whoever sent SIGTERM may run out."""
    _told.set()
    timer = threading.Timer(PATIENCE_SECONDS, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    logger.warning("told to end %.0f s ago: leaving at once; what is finished is kept", PATIENCE_SECONDS)
    os._exit(TERMINATED)


@contextlib.contextmanager
def on_terminate(act: Callable[[], None]) -> Iterator[None]:
    """Has SIGTERM call a function for as long as the block runs, where this thread may decide on signals."""
    if not is_main_thread():
        yield
        return
    with kept_handler(signal.SIGTERM):
        signal.signal(signal.SIGTERM, lambda *_: act())
        yield


@contextlib.contextmanager
def kept_handler(number: signal.Signals) -> Iterator[None]:
    """Gives a signal the handler back that it had before the block."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if is_main_thread():
            signal.signal(number, before)


def is_main_thread() -> bool:
    """Returns whether this thread may decide on signals."""
    return threading.current_thread() is threading.main_thread()

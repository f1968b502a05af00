"""Processes that do one thing when asked, in memory of their own that can be measured."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

_PATIENCE_SECONDS = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Process:
    """A process that makes one object and calls its methods when asked; it begins at once and is idle in between.

    It starts without this process's thread settings, so that libraries take what they take by default.

    Args:
        name: For messages.
        make: A class whose object the process keeps, or a function whose result is its first answer.
        arguments: Of ``make``.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")  # a fork would copy memory that is not the peer's
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with environment(dict.fromkeys(_THREAD_VARIABLES)):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.close()  # tells the process to end
        self._process.join(0 if kind else _PATIENCE_SECONDS)
        self._process.kill()
        self._process.join()

    def ask(self, method: str) -> None:
        """Begins a call."""
        self._connection.send(method)

    def answer(self) -> Any:
        """Returns the result of what the process was made for, or asked for.

        Raises:
            RuntimeError: It failed, or the process was lost.
        """
        try:
            result = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process of {self._name} was lost. If memory ran out, give it less to do.") from None
        if isinstance(result, _Failure):
            raise RuntimeError(f"{self._name}: {result.text}")
        return result


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a process answers where a call failed."""

    text: str


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answers until the other side is gone; the keyboard is left to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        made = _try(make, *arguments)
        connection.send(made if isinstance(made, _Failure) or not isinstance(make, type) else None)
        while True:
            connection.send(_try(getattr(made, connection.recv())))


def _try(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:  # exporters fail in ways of their own
        return _Failure(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Sets environment variables, or takes away those that are None, while the block runs."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


def peak_bytes() -> dict[int, int]:
    """Returns the most memory that each process of this machine has held so far (its peak RSS), by process id."""
    return {pid: int(fields["VmHWM"].split()[0]) * 1024 for pid, fields in _processes().items() if "VmHWM" in fields}


def _processes() -> dict[int, dict[str, str]]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            lines = (line.partition(":") for line in path.read_text("utf-8", "replace").splitlines())
            found[int(path.parent.name)] = {name: value.strip() for name, _, value in lines}
    return found


def family_of(title: bytes) -> list[int]:
    """Returns the processes below this one with a title in their command line, and all below those, by process id."""
    parents = {pid: int(fields["PPid"]) for pid, fields in _processes().items()}

    def is_below(pid: int, roots: set[int]) -> bool:
        while pid and pid not in roots:
            pid = parents.get(pid, 0)
        return pid != 0

    def is_meant(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return title in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    roots = {pid for pid in parents if is_meant(pid) and is_below(pid, {os.getpid()})}
    return [pid for pid in parents if is_below(pid, roots)]

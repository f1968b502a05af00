"""Leases: one run at a time writes to an output. A lease that nobody renews runs out, and another run may take it.

A lease is a small file below the output, written conditionally: of two runs that want it at once, one gets it.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from matryoshka import shapes, storage
from matryoshka.storage import Place

NAME = storage.LEASE
TERM_SECONDS = 60.0
"""How long a lease lasts without being renewed. Clocks of machines that share an output may differ by less than that."""


class HeldError(RuntimeError):
    """Another run is writing to the output."""


class LostError(RuntimeError):
    """Another run has taken the lease, because it was not renewed in time."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease.

    Attributes:
        run: The run's key.
        host: Name of its machine.
        machine: What tells its machine (or container), as it is running now, from all others.
        pid: Of its process there.
        born: When that process began, so that a later one with the same number is not taken for it.
        token: Of this lease alone.
        since: When it was taken, in seconds since 1970.
        renewed: When it was last renewed, likewise.
        term: How long it lasts after that, in seconds.
    """

    run: str
    host: str
    machine: str
    pid: int
    born: str
    token: str
    since: float
    renewed: float
    term: float

    @classmethod
    def here(cls, run: str, term: float) -> Self:
        """Returns this process as a holder, from now on."""
        now = time.time()
        pid = os.getpid()
        return cls(run, socket.gethostname(), _machine(), pid, _born(pid), uuid.uuid4().hex[:12], now, now, term)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """Returns the holder that a lease names; None for what is no lease of this version, which keeps nobody out."""
        try:
            value = json.loads(data)
            shapes.check(value, {own.name: own.type for own in fields(cls)}, NAME)
            holder = cls(**value)
            _moment(holder.since)
        except (TypeError, ValueError, OverflowError, OSError, RecursionError):
            return None
        return holder

    def as_bytes(self) -> bytes:
        """Returns the lease."""
        return json.dumps(asdict(self), indent=1).encode()

    def is_alive(self, now: float) -> bool:
        """Returns whether the lease still counts: it is renewed, and its process, if that would be here, is here."""
        if self.machine == _machine() and _born(self.pid) != self.born:
            return False
        return now < self.renewed + self.term

    def __str__(self) -> str:
        """The holder, for a person."""
        since = _moment(self.since).isoformat(" ", "seconds")
        return f"run {self.run}, process {self.pid} on {self.host}, since {since}"


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _machine() -> str:
    """Returns what tells this machine, since it was started, and this container on it, from others; or nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - not a path
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Returns when a process of this machine began, in ticks, or nothing where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


class Lease:
    """The right to write to an output, for as long as it is renewed.

    Args:
        folder: The output.
        holder: This process.
    """

    def __init__(self, folder: Place, holder: Holder) -> None:
        self._path, self._holder = folder / NAME, holder

    @classmethod
    def take(cls, folder: Place, run: str, related: Iterable[Place] = (), term: float = TERM_SECONDS) -> Self:
        """Returns the lease on an output; that of a holder that is dead, or has not renewed it, is taken over.

        Args:
            folder: The output.
            run: Key of the run that wants it.
            related: Outputs that lie in this one, or that it lies in: nobody may hold these either.
            term: How long it lasts without being renewed, in seconds.

        Raises:
            HeldError: Another run holds it, or a related one.
        """
        holder = Holder.here(run, term)
        path = folder / NAME
        if not storage.create(path, holder.as_bytes()):
            seen = _read(path)
            _refuse(folder, seen)
            if seen is None or not storage.swap(path, holder.as_bytes(), seen):
                raise HeldError(f"{folder}: another run has just taken it. Wait until it ends, or pass another --output.")
        lease = cls(folder, holder)
        try:  # once the own lease stands: of two runs that begin at once, at least one sees the other
            for place in related:
                with contextlib.suppress(PermissionError, ValueError):  # what may not be read is nobody's business here
                    _refuse(place, _read(place / NAME))
        except BaseException:
            lease.release()
            raise
        return lease

    def renew(self) -> None:
        """Says that the holder is alive.

        Raises:
            LostError: Another run has taken the lease.
        """
        renewed = replace(self._holder, renewed=time.time())
        if not storage.swap(self._path, renewed.as_bytes(), self._holder.as_bytes()):
            there = self._own()  # an earlier renewal may have been written without anybody hearing of it
            if there is None or not storage.swap(self._path, renewed.as_bytes(), there):
                raise LostError(f"{self._path.parent}: another run has taken the lease, which was not renewed in time.")
        self._holder = renewed

    def release(self) -> None:
        """Gives the lease back, if it is still this one; if that cannot be done, it will run out."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            if self._own() is not None:
                storage.remove(self._path)

    def _own(self) -> bytes | None:
        """Returns the lease as it stands, if it is this one."""
        data = _read(self._path)
        holder = Holder.from_bytes(data) if data else None
        return data if holder and holder.token == self._holder.token else None


def is_held(folder: Place) -> bool:
    """Returns whether a run that is alive, as far as can be seen from here, holds the lease on an output."""
    lease = _read(folder / NAME)
    holder = Holder.from_bytes(lease) if lease else None
    return holder is not None and holder.is_alive(time.time())


def _read(path: Place) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _refuse(folder: Place, lease: bytes | None) -> None:
    holder = Holder.from_bytes(lease) if lease else None
    if holder and holder.is_alive(time.time()):
        raise HeldError(f"{folder}: another run is writing to it ({holder}). Wait until it ends, or pass another --output.")

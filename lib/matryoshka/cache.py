"""Copies of objects on this node's disk, which all its processes share: each there whole, all together within a limit.

An entry is in use for as long as a process that asked for it lives, and is then not removed. Beside each entry lies a file
with its size, whose lock says so: a shared one for those who use it, an exclusive one for who makes or removes it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER, LIMIT = "MATRYOSHKA_CACHE", "MATRYOSHKA_CACHE_GB"
"""Environment variables: where the copies lie, and how much room they may take."""

_LOCK, _MADE = ".lock", ".made-"
_DISK_SHARE = 0.8  # of what the disk has left, if no limit is given
_GB = 1e9

_held: dict[Path, int] = {}
_holding = threading.Lock()


def folder() -> Path:
    """Returns the folder of this node's copies, which belongs to this user alone.

    Raises:
        ValueError: Somebody else's folder is in its place.
    """
    path = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / f"matryoshka-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise ValueError(f"{path}: belongs to somebody else. Set {FOLDER} to a folder of your own.")
    return path


def limit(root: Path, num_used: int) -> int:
    """Returns the bytes that all copies together may take.

    Raises:
        ValueError: The limit that is set is no positive number.
    """
    text = os.environ.get(LIMIT)
    if text is None:
        return int(_DISK_SHARE * (shutil.disk_usage(root).free + num_used))
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"{LIMIT}: not a positive number of gigabytes (found '{text}'). Change it, or leave it out.")
    return int(found * _GB)


def hold(key: str, measure: Callable[[], int], make: Callable[[Path], None]) -> Path:
    """Returns the copy with a key, made if it is not there, and keeps it for as long as this process lives.

    Args:
        key: Changes with the content.
        measure: Returns the bytes that the copy takes.
        make: Makes it at a path.

    Raises:
        RuntimeError: There is no room for it beside what is in use.
    """
    root = folder()
    entry = root / key
    with _holding:  # one download at a time in a process: each is many requests at once
        if entry in _held and entry.exists():
            return entry
        while True:
            lock = _lock(root / f"{key}{_LOCK}", fcntl.LOCK_SH)
            if entry.exists():
                os.utime(lock)
                _held[entry] = lock
                return entry
            os.close(lock)
            _make(root, key, measure, make)


@contextlib.contextmanager
def borrowing() -> Iterator[None]:
    """Keeps what is asked for while the block runs no longer than that."""
    before = set(_held)
    try:
        yield
    finally:
        with _holding:
            for entry in set(_held) - before:
                os.close(_held.pop(entry))


def _lock(path: Path, kind: int) -> int:
    """Returns the locked file at a path: the one that is there when the lock is had."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _make(root: Path, key: str, measure: Callable[[], int], make: Callable[[Path], None]) -> None:
    """Makes an entry, unless another process has just done so."""
    entry, lock = root / key, _lock(root / f"{key}{_LOCK}", fcntl.LOCK_EX)
    temporary = root / f"{_MADE}{key}"
    try:
        if entry.exists():
            return
        num_bytes = measure()
        _make_room(root, num_bytes, lock)
        _remove(temporary)  # of a process that was killed
        make(temporary)
        temporary.rename(entry)
    except BaseException:
        _remove(temporary)
        os.truncate(lock, 0)
        raise
    finally:
        os.close(lock)


def _make_room(root: Path, num_bytes: int, lock: int) -> None:
    """Removes what was not used for longest until so many bytes fit, and reserves them in the entry's own lock."""
    room = _lock(root / _LOCK, fcntl.LOCK_EX)
    try:
        sizes = {path: _size_of(path) for path in root.glob(f"?*{_LOCK}")}
        most = limit(root, sum(sizes.values()))
        for path in sorted(sizes, key=lambda own: own.stat().st_mtime_ns):
            if sum(sizes.values()) + num_bytes <= most:
                break
            if _evict(path):
                del sizes[path]
        if sum(sizes.values()) + num_bytes > most:
            raise RuntimeError(
                f"{root}: no room for {num_bytes / _GB:.3g} GB beside what is in use ({sum(sizes.values()) / _GB:.3g} of"
                f" {most / _GB:.3g} GB). Raise {LIMIT}, or use fewer processes on this machine."
            )
        os.truncate(lock, 0)
        os.pwrite(lock, str(num_bytes).encode(), 0)
    finally:
        os.close(room)


def _size_of(path: Path) -> int:
    text = path.read_text("ascii")
    return int(text) if text.isdecimal() else 0


def _evict(lock_path: Path) -> bool:
    """Removes an entry that nobody uses, and returns whether it did."""
    descriptor = os.open(lock_path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entry = lock_path.with_name(lock_path.name.removesuffix(_LOCK))
        _remove(entry)
        _remove(entry.with_name(f"{_MADE}{entry.name}"))
        lock_path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

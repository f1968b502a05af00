"""Files that are either whole or not there, on disk or in a bucket: digests, atomic publishing, JSON.

A place is a path on a file system that every worker mounts, or one in a bucket; what only a real file can do goes through
``local``, and all that a stage writes for good through ``publish``.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, overload

from matryoshka import buckets, cache
from matryoshka.buckets import BucketPath, ObjectInfo, UPath

Place: TypeAlias = Path | UPath
ChangedError = buckets.ChangedError

TEMPORARY = ".partial-"
"""Begins the name of everything that is not finished; leftovers of killed writers are known by it."""

LEASE, STATUS = OF_THE_RUN = "lease.json", "status.json"
"""What a run says of itself in its output: there before the artifact, changing after it, and no part of it."""

ALTERED = "its bytes were altered (another SHA-256 than the receipt's)"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}")
_FILE = "file://"
_REQUESTS_AT_ONCE = 16


def place(text: str) -> Place:
    """Returns the place that a setting names: a path, ``file://``, or ``s3://bucket/folder`` (also ``gs://``).

    Raises:
        ValueError: It is a URL of another kind, or what its kind needs is not installed, or it holds a secret.
    """
    if text.startswith(f"{_FILE}/"):
        return Path(text.removeprefix(_FILE))
    beginning = _URL.match(text)
    if not beginning:
        return Path(text)
    if not beginning[0].endswith("://") or text.startswith(_FILE):
        raise ValueError(f"{beginning[0]}: not the beginning of a place. Write {beginning[0].partition(':')[0]}://, or a path.")
    return buckets.parse(text)


def is_local(place: Place) -> bool:
    """Returns whether a place is a path of the file system."""
    return isinstance(place, Path)


def _bucket(place: Place) -> BucketPath:
    assert isinstance(place, BucketPath), "places in buckets are made by place()"
    return place


def source(place: Place) -> Path | io.RawIOBase:
    """Returns what readers of tables take: the path itself, or an open file each read of which is one request."""
    return place if isinstance(place, Path) else _bucket(place).source()


def local(place: Place, digest: str | None = None) -> Path:
    """Returns a local path to read from: the place itself, or a copy of it on this node's disk, which stays while this
    process lives.

    Args:
        place: A file, or a folder with all that is in it, except what its run says of itself.
        digest: SHA-256 of the file, by which the copy is known, and checked when it is made; None: its tags are looked up.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A file's bytes are not those of the digest.
        ChangedError: They change meanwhile.
        RuntimeError: There is no room for it.
    """
    if isinstance(place, Path):
        return place
    own = _bucket(place)
    if digest:
        key = digest_json(["sha256", digest]) + own.suffix  # from a manifest: as it stands it is no name to be trusted
        return cache.hold(key, lambda: own.info_of().num_bytes, lambda target: _fetch(own, own.info_of(), target, digest))
    below = {name: info for name, info in buckets.listing(own).items() if name not in OF_THE_RUN}
    if not below:
        info = own.info_of()
        return cache.hold(_key(own, {"": info}) + own.suffix, lambda: info.num_bytes, lambda target: _fetch(own, info, target))
    num_bytes = sum(info.num_bytes for info in below.values())
    return cache.hold(_key(own, below), lambda: num_bytes, lambda target: buckets.download_all(own, below, target))


@contextlib.contextmanager
def borrowing() -> Iterator[None]:
    """Lets go at the end of the copies that ``local`` gave while the block ran: there may be more of them than there is room."""
    with cache.borrowing():
        yield


def _key(place: BucketPath, infos: Mapping[str, ObjectInfo]) -> str:
    return digest_json([str(place), [[name, info.tag, info.num_bytes] for name, info in infos.items()]])


def _fetch(place: BucketPath, info: ObjectInfo, target: Path, digest: str | None = None) -> None:
    buckets.download(place, info, target)
    if digest and digest_file(target) != digest:
        raise ValueError(f"{place}: {ALTERED}. Run the job that made it again with --replace.")


def names(folder: Place) -> list[str]:
    """Returns the path of every file below a folder, from there."""
    if isinstance(folder, Path):
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [*buckets.listing(_bucket(folder))]


def sizes(folder: Place) -> dict[str, int]:
    """Returns the bytes of every file below a folder, by its path there; of a bucket, one listing says so."""
    if isinstance(folder, Path):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: info.num_bytes for name, info in buckets.listing(_bucket(folder)).items()}


def stamps(root: Place, names: Sequence[str]) -> list[tuple[int, int | str] | None]:
    """Returns, for each file below a folder, its size and what changes with its bytes (time, or tag); None: not there."""
    if isinstance(root, Path):
        return [_stamp(root / name) for name in names]
    own = _bucket(root)
    if len(names) == 1:
        try:
            infos = {names[0]: (own / names[0]).info_of()}
        except FileNotFoundError:
            infos = {}
    else:
        infos = buckets.listing(own)
    return [(infos[name].num_bytes, infos[name].tag) if name in infos else None for name in names]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def digest_file(path: Place) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    if not isinstance(path, Path):
        return digest_of(buckets.blocks(_bucket(path)))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(parts: Iterable[bytes]) -> str:
    """Returns the SHA-256 of bytes that come in parts, in hex."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def digest_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, in hex: the same for equal values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_out_of_space(error: BaseException | None) -> bool:
    """Returns whether an error says that nothing more can be written."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def keep_apart(output: Place, *inputs: Place | None) -> None:
    """Checks that an output neither holds an input nor lies in one: making it could destroy, or later read, the other.

    Raises:
        ValueError: One lies in the other.
    """
    for path in (own for own in inputs if own is not None):
        both: list[Place] = [output.resolve(), path.resolve()]
        inner, outer = sorted(both, key=lambda place: -len(place.parts))
        if _lies_in(inner, outer) and (outer == output.resolve() or outer.is_dir()):
            raise ValueError(f"{output}: the output and the input {path} lie in each other. Pass another --output.")


def _lies_in(inner: Place, outer: Place) -> bool:
    return isinstance(inner, Path) == isinstance(outer, Path) and (inner == outer or outer in inner.parents)


def as_json(value: Any) -> Any:
    """Returns a value as it comes back from JSON: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def publish(path: Place, last: str | None = None) -> Iterator[Path]:
    """Yields a temporary path; what was written there appears at ``path`` at once, complete, or, after an error, not at all.

    The temporary path may become a file or a folder. It lies beside ``path``, so that the move is a rename on one disk; for a
    place in a bucket, on this node's temporary disk. A folder replaces a folder that is already there; in a bucket its files
    appear one by one, so it must have a name that nobody reads before a manifest tells of it, or before its ``last`` file is
    there, which comes after all others and goes first.
    """
    if not isinstance(path, Path):
        with scratch() as folder:
            yield folder / path.name
            buckets.upload(folder / path.name, _bucket(path), last)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.parent / _temporary(path.name) for _ in range(2))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if temporary.is_dir() and path.exists():
            _swap(temporary, path, old)
        else:
            temporary.replace(path)
        _sync(path.parent)
    finally:
        remove(temporary)


def _swap(new: Path, path: Path, old: Path) -> None:
    """Puts a folder in the place of another; if that fails, the other is back where it was."""
    path.replace(old)
    try:
        new.replace(path)
    except OSError:
        old.replace(path)
        raise
    remove(old)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk: a rename may otherwise outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(path: Place, target: Place) -> None:
    """Moves a file that ``publish`` made to another place on its disk, or in its store."""
    if isinstance(path, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        _sync(target.parent)
        return
    if isinstance(path, Path):
        buckets.upload(path, _bucket(target))
    else:
        buckets.copy(_bucket(path), _bucket(target))
    remove(path)


@contextlib.contextmanager
def scratch(near: Place | None = None) -> Iterator[Path]:
    """Yields an empty local folder, which is gone at the end: below another folder if that is local, else on the temporary disk.

    Only this process sees it; see ``workspace`` for one that all workers see.
    """
    if isinstance(near, Path):
        with workspace(near, "scratch") as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as name:
        yield Path(name)


@overload
def workspace(folder: Path, name: str) -> contextlib.AbstractContextManager[Path]: ...


@overload
def workspace(folder: Place, name: str) -> contextlib.AbstractContextManager[Place]: ...


def workspace(folder: Place, name: str) -> contextlib.AbstractContextManager[Place]:
    """Yields an empty folder below another, with a path that no other run has; both are gone at the end if nothing else came.

    What runs that were killed left under the same name is removed. It is where the other folder is, so that workers see it.
    """
    return _workspace(folder, name) if isinstance(folder, Path) else _workspace_in_bucket(_bucket(folder), name)


@contextlib.contextmanager
def _workspace_in_bucket(folder: BucketPath, name: str) -> Iterator[BucketPath]:
    for leftover in folder.glob(f"{TEMPORARY}*-{name}"):
        remove(leftover)
    path = folder / _temporary(name)
    try:
        yield path
    finally:
        remove(path)


@contextlib.contextmanager
def _workspace(folder: Path, name: str) -> Iterator[Path]:
    is_first = not folder.exists()
    for leftover in folder.glob(f"{TEMPORARY}*-{name}"):
        remove(leftover)
    path = folder / _temporary(name)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        remove(path)
        if is_first and not any(folder.iterdir()):
            folder.rmdir()


def publish_bytes(path: Place, data: bytes) -> None:
    """Writes a whole file atomically."""
    if not isinstance(path, Path):
        path.write_bytes(data)
        return
    with publish(path) as temporary:
        temporary.write_bytes(data)


def publish_json(path: Place, value: Any) -> None:
    """Writes a value as indented JSON, atomically.

    Raises:
        ValueError: A number in it is not finite: JSON has no word for that.
    """
    publish_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def publish_json_lines(path: Place, head: Mapping[str, Any], key: str, values: Iterable[Any]) -> None:
    """Writes a JSON object atomically: ``head``, then one more key that holds a list, with one of its values per line."""
    text = json.dumps(dict(head), indent=1, ensure_ascii=False).removesuffix("\n}")
    with publish(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f'{text},\n "{key}": [\n')
        for number, value in enumerate(values):
            file.write(",\n" * (number > 0) + json.dumps(value, ensure_ascii=False))
        file.write("\n ]\n}\n")


def read_json(path: Place) -> Any:
    """Returns the value of a JSON file.

    Raises:
        ValueError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}). Restore it, or make it anew.") from None


def read_all_json(paths: Sequence[Place]) -> list[Any]:
    """Returns the values of many JSON files, in order; in a bucket, many are asked for at once.

    Raises:
        ValueError: As ``read_json``.
    """
    if all(isinstance(path, Path) for path in paths):
        return [read_json(path) for path in paths]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, "json") as pool:
        return list(pool.map(read_json, paths))


def create(path: Place, data: bytes) -> bool:
    """Writes a whole file if there is none, and returns whether it did: of several that try at once, one does."""
    if not isinstance(path, Path):
        return buckets.create(_bucket(path), data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / _temporary(path.name)
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        os.link(temporary, path)
        _sync(path.parent)
    except FileExistsError:
        return False
    finally:
        remove(temporary)
    return True


def swap(path: Place, data: bytes, seen: bytes) -> bool:
    """Writes a whole file if it still holds the bytes that were seen, and returns whether it did."""
    if not isinstance(path, Path):
        return buckets.swap(_bucket(path), data, seen)
    while True:
        try:
            file = path.open("r+b")  # a lock on a network's file system needs a file that can be written to
        except FileNotFoundError:
            return False
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(path, file.fileno()):  # or another swap came first, and has put another file here
                if file.read() != seen:
                    return False
                publish_bytes(path, data)
                return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove(path: Place) -> None:
    """Removes a file or a whole folder, if it is there."""
    if not isinstance(path, Path):
        buckets.remove(_bucket(path))
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _temporary(name: str) -> str:
    """Returns a name that no other writer of something of this name has."""
    return f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}"


def remove_at_once(folder: Place) -> None:
    """Removes a folder, of which, on disk, nobody ever sees a part: a run that is killed leaves it whole, or a leftover."""
    if isinstance(folder, Path) and folder.is_dir():
        folder = folder.rename(folder.with_name(_temporary(folder.name)))
    remove(folder)


def remove_leftovers(folder: Place) -> None:
    """Removes what writers that were killed left under temporary names, anywhere below a folder that one run owns.

    In a bucket only workspaces have such names, and lie directly in the folder; uploads that were not finished are ended.
    """
    if not isinstance(folder, Path):
        buckets.remove_leftovers(_bucket(folder), TEMPORARY)
        return
    for leftover in sorted(folder.rglob(f"{TEMPORARY}*")):
        remove(leftover)


def check_writable(folder: Place) -> None:
    """Checks, for a place in a bucket, that objects can be put there and deleted, before anything is computed.

    Raises:
        ValueError: There is no such bucket, or it may not be written to.
        RuntimeError: The store does not answer.
    """
    if not isinstance(folder, Path):
        probe = folder / _temporary("probe")
        probe.write_bytes(b"")
        remove(probe)

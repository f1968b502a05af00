"""Places in a bucket: paths over fsspec that are read by ranges, written whole, and never answered from a cache of listings.

A folder in a bucket is a name that objects share. The only room that knows universal-pathlib.
"""

import fnmatch
import functools
import importlib
import importlib.util
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from upath import UPath
from upath.implementations.cloud import CloudPath

from matryoshka.stores import ConflictError

__all__ = [
    "BucketPath",
    "ChangedError",
    "ObjectInfo",
    "Ranges",
    "UPath",
    "blocks",
    "copy",
    "create",
    "download",
    "download_all",
    "listing",
    "parse",
    "read_range",
    "remove",
    "remove_leftovers",
    "swap",
    "upload",
]

_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
_VARIABLES = {"s3": ("AWS_",), "gs": ("GOOGLE_", "GCE_", "CLOUDSDK_", "NO_GCE_CHECK", "STORAGE_EMULATOR_HOST")}
"""How the variables begin by which the environment names credentials and server."""

_RANGE_BYTES, _RANGES_AT_ONCE, _FILES_AT_ONCE = 16 << 20, 4, 8
_BUFFER_BYTES = 4 << 20
_SECRET = re.compile(r"\?.*=")


class ChangedError(ValueError):
    """What is read is no longer what the run began with: the same command again begins with what is there now."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing has it: its size, and the tag that changes with its bytes (S3: ETag; Google: generation)."""

    num_bytes: int
    tag: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Self:
        """Returns what an entry of fsspec says."""
        return cls(int(info["size"]), str(info.get("ETag") or info.get("generation", "")))


def parse(text: str) -> "BucketPath":
    """Returns the place that a URL names.

    Raises:
        ValueError: Its kind is unknown, or not installed, it names no bucket, or it holds what may be a secret (which is not
            repeated).
    """
    scheme, _, rest = text.partition("://")
    bucket = rest.partition("/")[0]
    if scheme not in _EXTRAS:
        known = ", ".join(f"{name}://" for name in _EXTRAS)
        raise ValueError(f"{scheme}://: no such kind of storage (known: {known}, file://, and plain paths). Check the spelling.")
    if "@" in bucket or ":" in bucket or _SECRET.search(rest):
        raise ValueError(f"{scheme}://: the address holds a key or a query. Pass the bucket's name, and keys by the environment.")
    if not bucket:
        raise ValueError(f"{text}: no bucket. Write {scheme}://bucket/folder.")
    if importlib.util.find_spec(_EXTRAS[scheme]) is None:
        raise ValueError(f"{text}: {_EXTRAS[scheme]} is not installed. Run pip install --editable '.[{scheme}]' in the clone.")
    return BucketPath(text.rstrip("/") if rest.partition("/")[2] else text, protocol=scheme)


def _client(protocol: str) -> Any:
    """Returns the client of this process for what the environment names now."""
    settings = frozenset((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES[protocol]))
    return _connect(protocol, settings, os.getpid())


@functools.lru_cache(maxsize=8)
def _connect(protocol: str, _settings: frozenset[tuple[str, str]], _process: int) -> Any:
    return importlib.import_module(f"matryoshka.{protocol}").connect()


class BucketPath(CloudPath):
    """A path in a bucket; where ``pathlib`` has a method of the same name, it does the same."""

    __slots__ = ()

    def __new__(cls, *_arguments: Any, **_options: Any) -> Self:
        """Makes a path of this very class, which is registered nowhere."""
        return object.__new__(cls)

    @classmethod
    def _fs_factory(cls, _urlpath: str, protocol: str, _storage_options: Mapping[str, Any]) -> Any:
        return _client(protocol)

    def _info(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.fs.info(self.path)
        return found

    def info_of(self) -> ObjectInfo:
        """Returns size and tag of the object.

        Raises:
            FileNotFoundError: There is none.
        """
        info = self._info()
        if info["type"] == "directory":
            raise FileNotFoundError(2, os.strerror(2), str(self))
        return ObjectInfo.of(info)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there is an object of this name, or any below it."""
        return self.is_file(follow_symlinks=follow_symlinks) or self.is_dir(follow_symlinks=follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002 - as pathlib has it
        """Returns whether there is an object of this name."""
        try:
            return "/" in self.path.rstrip("/") and self._info()["type"] == "file"
        except FileNotFoundError:
            return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002 - as pathlib has it
        """Returns whether there is any object below this name."""
        return bool(self.fs.has_below(self.path))

    def is_symlink(self) -> bool:
        """Returns False: a bucket has no links."""
        return False

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there once something is in it."""

    def iterdir(self) -> Iterator[Self]:
        """Yields what is directly in the folder, in order.

        Raises:
            FileNotFoundError: Nothing is.
        """
        own = self.path.rstrip("/")
        found = {info["name"].rstrip("/") for info in self.fs.ls(own, detail=True)}  # a console's empty folder lists itself
        yield from (self / name.rpartition("/")[2] for name in sorted(found - {own}))

    def rglob(self, pattern: str, **_options: Any) -> Iterator[Self]:
        """Yields the objects and folders below, at any depth, whose name is like the pattern."""
        parts = [tuple(name.split("/")) for name in listing(self)]
        every = sorted({own[:depth] for own in parts for depth in range(1, len(own) + 1)})
        yield from (self.joinpath(*own) for own in every if fnmatch.fnmatchcase(own[-1], pattern))

    def glob(self, pattern: str, **options: Any) -> Iterator[Self]:
        """Yields the objects and folders below whose relative path is like the pattern."""
        if "/" in pattern or "**" in pattern:
            yield from sorted(super().glob(pattern, **options))
        elif self.is_dir():
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **_options: Any,
    ) -> IO[Any]:
        """Returns the object as a file to read from; what is written goes through ``storage.publish``.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is to be written to.
        """
        if set(mode) - set("rbt"):
            raise ValueError(f"{self}: cannot be opened for writing piece by piece. Write a local file, and publish it.")
        buffered = io.BufferedReader(self.source(), buffering if buffering > 1 else _BUFFER_BYTES)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    def source(self) -> "Ranges":
        """Returns the object as an unbuffered file, each read of which is one request."""
        return Ranges(self)

    def read_bytes(self) -> bytes:
        """Returns the object's bytes."""
        data: bytes = self.fs.read_whole(self.path)[0]
        return data

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:  # noqa: ARG002
        """Returns the object's text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """Writes the object, at once and whole."""
        self.fs.pipe_file(self.path, bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_options: Any, **_more: Any) -> int:
        """Writes the object, at once and whole."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object.

        Raises:
            FileNotFoundError: It is not there, unless that is no error.
        """
        if not missing_ok:
            self.info_of()
        self.fs.delete([self.path])


class Ranges(io.RawIOBase):
    """An object as a file: each read is one request for a range of it, as it was when it was opened.

    Args:
        place: Of the object.
    """

    def __init__(self, place: BucketPath) -> None:
        self._place, self._info, self._position = place, place.info_of(), 0

    @property
    def name(self) -> str:
        """Where the object is."""
        return str(self._place)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to another place, and returns it."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.num_bytes}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Returns the next bytes.

        Raises:
            ChangedError: The object has changed since it was opened.
        """
        most = max(self._info.num_bytes - self._position, 0)
        wanted = most if size is None or size < 0 else min(size, most)
        data = read_range(self._place, self._info, self._position, self._position + wanted)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        """Returns all that is left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as the object goes, and returns how far that was."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_range(place: BucketPath, info: ObjectInfo, start: int, stop: int) -> bytes:
    """Returns some bytes of an object that is still what it was.

    Raises:
        ChangedError: It has changed.
    """
    if start >= stop:
        return b""
    try:
        data: bytes = place.fs.read_range(place.path, start, stop, info.tag)
    except ConflictError:
        raise ChangedError(f"{place}: changed while it was read. Run the same command again.") from None
    return data


def blocks(place: BucketPath) -> Iterator[bytes]:
    """Yields an object's bytes, some megabytes at a time; the next ones are on their way meanwhile.

    Raises:
        FileNotFoundError: There is none.
    """
    info = place.info_of()
    starts = range(0, info.num_bytes, _RANGE_BYTES)
    with ThreadPoolExecutor(_RANGES_AT_ONCE, "ranges") as pool:
        for first in range(0, len(starts), _RANGES_AT_ONCE):
            now = starts[first : first + _RANGES_AT_ONCE]
            yield from pool.map(lambda start: read_range(place, info, start, min(start + _RANGE_BYTES, info.num_bytes)), now)


def listing(folder: BucketPath) -> dict[str, ObjectInfo]:
    """Returns size and tag of every object below a folder, by its path there, in order; an empty one for none."""
    prefix = folder.path.rstrip("/") + "/"
    found = folder.fs.find(folder.path.rstrip("/"), detail=True)
    names = sorted(name for name in found if name.startswith(prefix) and not name.endswith("/"))
    return {name.removeprefix(prefix): ObjectInfo.of(found[name]) for name in names}


def download(place: BucketPath, info: ObjectInfo, target: Path) -> None:
    """Copies an object to a local file.

    Raises:
        ChangedError: It is no longer what it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file, ThreadPoolExecutor(_RANGES_AT_ONCE, "download") as pool:
        file.truncate(info.num_bytes)

        def copy(start: int) -> None:
            os.pwrite(file.fileno(), read_range(place, info, start, min(start + _RANGE_BYTES, info.num_bytes)), start)

        for _ in pool.map(copy, range(0, info.num_bytes, _RANGE_BYTES)):
            pass
        os.fsync(file.fileno())


def download_all(folder: BucketPath, infos: Mapping[str, ObjectInfo], target: Path) -> None:
    """Copies objects below a folder to a local one."""
    with ThreadPoolExecutor(_FILES_AT_ONCE, "downloads") as pool:
        for _ in pool.map(lambda name: download(folder / name, infos[name], target / name), infos):
            pass


def upload(source: Path, place: BucketPath, last: str | None = None) -> None:
    """Copies a local file or folder to a place; after an error, nothing of it is there.

    An object appears at once and whole. A folder's come one after the other, ``last`` after all others; once all are there,
    what the folder held besides is deleted.
    """
    if not source.is_dir():
        place.fs.upload(str(source), place.path)
        return
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    old = set(listing(place))
    _discard(place, old & {last})
    try:
        with ThreadPoolExecutor(_FILES_AT_ONCE, "uploads") as pool:
            for part in ([name for name in names if name != last], [name for name in names if name == last]):
                for _ in pool.map(lambda name: place.fs.upload(str(source / name), (place / name).path), part):
                    pass
    except BaseException:
        _discard(place, set(names) - old)
        raise
    _discard(place, old - set(names))


def _discard(folder: BucketPath, names: Collection[str]) -> None:
    if names:
        folder.fs.delete([(folder / name).path for name in sorted(names)])


def remove(place: BucketPath) -> None:
    """Deletes an object, and all below a folder; nothing being there is no error."""
    below = [(f"{place.path.rstrip('/')}/{name}") for name in listing(place)]
    place.fs.delete([*below, *([place.path] if "/" in place.path.rstrip("/") else [])])


def remove_leftovers(folder: BucketPath, beginning: str) -> None:
    """Deletes what is in a folder under a name that begins so, and ends uploads that nobody will finish."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(beginning):
                remove(path)
    folder.fs.abort_uploads(f"{folder.path.rstrip('/')}/")


def copy(place: BucketPath, target: BucketPath) -> None:
    """Copies an object within the store."""
    place.fs.cp_file(place.path, target.path)


def create(place: BucketPath, data: bytes) -> bool:
    """Writes an object if there is none, and returns whether it did."""
    return bool(place.fs.put_if(place.path, data, None))


def swap(place: BucketPath, data: bytes, seen: bytes) -> bool:
    """Writes an object if it still holds these bytes, and returns whether it did."""
    try:
        there, tag = place.fs.read_whole(place.path)
    except FileNotFoundError:
        return False
    return there == seen and bool(place.fs.put_if(place.path, data, tag))

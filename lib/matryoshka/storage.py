"""Files that are either whole or not there: digests, atomic publishing, JSON.

Paths are local or on a file system that every worker mounts. All that a stage writes for good goes through ``publish``.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Place = Path

TEMPORARY = ".partial-"
"""Begins the name of everything that is not finished; leftovers of killed writers are known by it."""


def local_path(text: str) -> Path:
    """Returns the path that a setting names.

    Raises:
        ValueError: It is a URL: only local and mounted folders are supported.
    """
    if "://" in text:
        raise ValueError(f"{text}: only local and mounted folders are supported. Mount or copy it, and pass its path.")
    return Path(text)


def digest_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, in hex: the same for equal values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_out_of_space(error: BaseException | None) -> bool:
    """Returns whether an error says that nothing more can be written."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def keep_apart(output: Path, *inputs: Path | None) -> None:
    """Checks that an output neither holds an input nor lies in one: making it could destroy, or later read, the other.

    Raises:
        ValueError: One lies in the other.
    """
    for path in filter(None, inputs):
        inner, outer = sorted((output.resolve(), path.resolve()), key=lambda place: -len(place.parts))
        if inner.is_relative_to(outer) and (outer == output.resolve() or outer.is_dir()):
            raise ValueError(f"{output}: the output and the input {path} lie in each other. Pass another --output.")


def as_json(value: Any) -> Any:
    """Returns a value as it comes back from JSON: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what was written there appears at ``path`` at once, complete, or, after an error, not at all.

    The temporary path may become a file or a folder. It lies beside ``path``, so that the move is a rename on one disk. A
    folder replaces a folder that is already there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}" for _ in range(2))
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


def move(path: Path, target: Path) -> None:
    """Moves a file that ``publish`` made to another place on its disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    _sync(target.parent)


@contextlib.contextmanager
def workspace(folder: Path, name: str) -> Iterator[Path]:
    """Yields an empty folder below another, with a path that no other run has; both are gone at the end if nothing else came.

    What runs that were killed left under the same name is removed.
    """
    is_first = not folder.exists()
    for leftover in folder.glob(f"{TEMPORARY}*-{name}"):
        remove(leftover)
    path = folder / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        remove(path)
        if is_first and not any(folder.iterdir()):
            folder.rmdir()


def publish_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file atomically."""
    with publish(path) as temporary:
        temporary.write_bytes(data)


def publish_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically.

    Raises:
        ValueError: A number in it is not finite: JSON has no word for that.
    """
    publish_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def publish_json_lines(path: Path, head: Mapping[str, Any], key: str, values: Iterable[Any]) -> None:
    """Writes a JSON object atomically: ``head``, then one more key that holds a list, with one of its values per line."""
    text = json.dumps(dict(head), indent=1, ensure_ascii=False).removesuffix("\n}")
    with publish(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f'{text},\n "{key}": [\n')
        for number, value in enumerate(values):
            file.write(",\n" * (number > 0) + json.dumps(value, ensure_ascii=False))
        file.write("\n ]\n}\n")


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        ValueError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Restore it, or make it anew.") from None


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed left under temporary names, anywhere below a folder that one run owns."""
    for leftover in sorted(folder.rglob(f"{TEMPORARY}*")):
        remove(leftover)


def create(path: Place, data: bytes) -> bool:
    """Writes a file only if there is none, and returns whether there was none: of two that try at once, one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}"
    try:
        temporary.write_bytes(data)
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        remove(temporary)
    return True


def swap(path: Place, data: bytes, seen: bytes) -> bool:
    """Writes a file only if it still holds what was seen there, and returns whether it did: of two that try at once, one does."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not path.is_file() or path.read_bytes() != seen:
            return False
        publish_bytes(path, data)
        return True
    finally:
        os.close(folder)

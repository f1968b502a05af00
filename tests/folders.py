"""What a folder holds, seen without the library that wrote it: times, digests, vectors, manifests; and ways to damage it.

And the patience to watch it grow, and who is at work on it.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

PATIENCE_SECONDS = 120


def times(folder: Path) -> dict[str, int]:
    """Returns when each file below a folder was last written, in nanoseconds."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, str]:
    """Returns the digest of each file below a folder, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def vectors(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of each document's vector, by id, of an output of the embed job; no id may stand twice."""
    found: dict[str, bytes] = {}
    for path in sorted((folder / "units").glob("*.parquet")):
        table = pq.read_table(path)
        for name, vector in zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True):
            assert name not in found, f"{name} stands twice"
            found[name] = np.asarray(vector, dtype=np.float16).tobytes()
    return found


def indexed_ids(folder: Path) -> list[str]:
    """Returns all ids of an index but those of removed documents, sorted."""
    from matryoshka.indexing import IndexStore

    index = IndexStore.open(folder)
    parts = zip(index.open_ids(), index.shards, strict=True)
    return sorted(name for ids, shard in parts for name in np.delete(ids.to_pylist(), shard.read_removed()).tolist())


def manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of an artifact as it is on disk."""
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return value


def flip_byte(path: Path) -> None:
    """Alters one bit in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cuts the second half of a file off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def delete(path: Path) -> None:
    """Deletes a file."""
    path.unlink()


def count_units(folder: Path) -> int:
    """Returns how many units an output of the embed job has by now."""
    return len(list((folder / "units").glob("*.parquet"))) if (folder / "units").is_dir() else 0


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE_SECONDS, pause: float = 0.02) -> None:
    """Returns once a condition holds, or fails after some time, two minutes if it is not given."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


Damage = Callable[[Path], None]


def title_of(process: psutil.Process) -> str:
    """Returns what a process calls itself, or nothing if it has ended."""
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.Error:  # it ended while we looked
        return ""

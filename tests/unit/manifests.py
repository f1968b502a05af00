"""A small artifact, for tests of what claims and resumes one."""

from pathlib import Path

from matryoshka import storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt

IDENTITY = {"model": "m", "dims": (4, 2)}
MANIFEST = Manifest("embeddings", IDENTITY)


def finish(folder: Path, key: str, content: bytes = b"abcd") -> Receipt:
    path = folder / "units" / key
    storage.publish_bytes(path, content)
    return Receipt(key, 1, (FileRecord.of(folder, path),))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

"""Artifacts: folders that carry their own truth, and the chain of fingerprints that ties one to the next.

An artifact folder has a ``manifest.json`` with its kind, what it was made from, the settings that change its bytes, and a
receipt for every part. What is not in the manifest does not exist. While a stage runs, receipts of finished parts collect in
small journal files beside it, so that a run that was killed is taken up where it stood.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from matryoshka import leases, shapes, storage
from matryoshka.buckets import UPath
from matryoshka.shapes import ListOf, MapOf
from matryoshka.storage import Place

MANIFEST = "manifest.json"
FORMAT = 1

_JOURNAL = "journal"
_LEVELS = 3  # the deepest artifact of a pipeline lies three folders below its output
_SEGMENTS = "[0-9]*.json"
_FLUSH_SECONDS = 2.0
_OUTSIDE = "leads out of the artifact's folder"
_AGAIN = "Run the job that made it again with --replace."
_RESTORE = "Restore it, or make the artifact anew with --replace."

_FILE = {"path": str, "num_bytes": int, "digest": str}
_RECEIPT = {"key": str, "num_rows": int, "files": ListOf(_FILE), "details": MapOf()}
_MANIFEST = {
    "kind": str,
    "fingerprint": str | None,
    "is_complete": bool,
    **dict.fromkeys(("identity", "inputs", "facts"), MapOf()),
}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an artifact: its path below the folder, its size, and the SHA-256 of its bytes."""

    path: str
    num_bytes: int
    digest: str

    @classmethod
    def of(cls, folder: Place, path: Place) -> Self:
        """Returns the record of a file as it is now."""
        return cls.named(PurePosixPath(str(path)).relative_to(str(folder)).as_posix(), path)

    @classmethod
    def named(cls, name: str, file: Place) -> Self:
        """Returns the record of a file that will be at this path below its artifact once it is published."""
        return cls(name, file.stat().st_size, storage.digest_file(file))


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker hands back for one finished part: its key, rows and files, and what it cost (not fingerprinted)."""

    key: str
    num_rows: int
    files: tuple[FileRecord, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any, place: str) -> Self:
        """Returns the receipt that ``as_json`` described; ``place`` names where it stands.

        Raises:
            ValueError: It is none, or a path in it leads out of the folder.
        """
        shapes.check(value, _RECEIPT, place, _RESTORE)
        files = tuple(FileRecord(file["path"], file["num_bytes"], file["digest"]) for file in value["files"])
        outside = next((file.path for file in files if shapes.leads_out(file.path)), None)
        if outside is not None:
            raise ValueError(f"{place}: {outside!r:.80} leads out of the artifact's folder. {_RESTORE}")
        return cls(value["key"], value["num_rows"], files, value["details"])

    def as_json(self) -> dict[str, Any]:
        """Returns the receipt as a JSON value."""
        files = [{"path": file.path, "num_bytes": file.num_bytes, "digest": file.digest} for file in self.files]
        return {"key": self.key, "num_rows": self.num_rows, "files": files, "details": dict(self.details)}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The truth about one artifact folder.

    Attributes:
        kind: ``dataset``, ``negatives``, ``model``, ``embeddings``, ``index``, ``evaluation``, ``results``, ``export``,
            ``anatomy`` or ``run``.
        identity: What must stay the same for parts to be mixed: fingerprints of inputs, settings that change bytes.
        inputs: Fingerprints of inputs that may change from night to night, such as the corpus.
        facts: What later stages and people want to know; derived, so not fingerprinted.
        receipts: One for every part.
        is_complete: False while a stage is at work, or where it ended early; an index that is spared meanwhile stays True.
    """

    kind: str
    identity: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    receipts: tuple[Receipt, ...] = ()
    is_complete: bool = False

    @property
    def fingerprint(self) -> str:
        """Identity of the artifact's content, from which that of everything made from it derives."""
        parts = sorted(
            [receipt.key, str(receipt.num_rows), *(file.digest for file in receipt.files)] for receipt in self.receipts
        )
        return storage.digest_json([self.kind, FORMAT, dict(self.identity), dict(self.inputs), parts])

    @property
    def num_rows(self) -> int:
        """Rows of all parts together."""
        return sum(receipt.num_rows for receipt in self.receipts)

    def write(self, folder: Place, *parts: str) -> None:
        """Commits the manifest; a complete one supersedes the journal, and what no receipt names in the folders of parts.

        The journal goes last: while it is there, something is left to do.
        """
        self._publish(folder, self.fingerprint)
        for own in parts:
            remove_strangers(folder, own, self)
        storage.remove_at_once(folder / _JOURNAL)

    def amend(self, folder: Place, facts: Mapping[str, Any]) -> None:
        """Commits more facts about a finished artifact; what a later run has recorded, and not finished, stays."""
        dataclasses.replace(self, facts={**self.facts, **facts})._publish(folder, self.fingerprint)

    def _publish(self, folder: Place, fingerprint: str | None) -> None:
        """Writes the manifest with one receipt per line: readable, and quick with a hundred thousand of them."""
        head = {
            "kind": self.kind,
            "format": FORMAT,
            "fingerprint": fingerprint,
            "is_complete": self.is_complete,
            "identity": dict(self.identity),
            "inputs": dict(self.inputs),
            "facts": dict(self.facts),
        }
        storage.publish_json_lines(folder / MANIFEST, head, "receipts", (receipt.as_json() for receipt in self.receipts))


def read(folder: Place, kind: str | None = None) -> Manifest:
    """Returns the manifest of an artifact, finished or not.

    Raises:
        ValueError: There is none, it is of another kind or format, or it was altered by hand.
    """
    path = folder / MANIFEST
    if not path.is_file():
        made_by = f" Make it first with python -m jobs.{_MAKERS[kind]}." if kind in _MAKERS else " Check the path."
        raise ValueError(f"{folder}: no {kind or 'artifact'} here (no {MANIFEST}).{made_by}")
    value = _read_raw(path)
    if value["format"] != FORMAT:
        raise ValueError(f"{path}: format {value['format']!r:.40}, this version reads {FORMAT}. Make it anew with --replace.")
    shapes.check(value, _MANIFEST, str(path), _RESTORE)
    receipts = _receipts(value.get("receipts"), path)
    own = {name: value[name] for name in ("kind", "identity", "inputs", "facts", "is_complete")}
    manifest = Manifest(**own, receipts=receipts)
    if manifest.is_complete and manifest.fingerprint != value["fingerprint"]:
        raise ValueError(f"{path}: was altered (its fingerprint does not fit its content). Make it anew with --replace.")
    if kind and manifest.kind != kind:
        raise ValueError(f"{folder}: holds '{manifest.kind}', not '{kind}'. Pass the folder of the {kind}.")
    return manifest


def _receipts(values: Any, path: Place) -> tuple[Receipt, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{path}: no list of receipts. {_RESTORE}")
    return tuple(Receipt.from_json(value, f"{path}: receipt {number}") for number, value in enumerate(values))


def _read_raw(path: Place) -> dict[str, Any]:
    value: dict[str, Any] = storage.read_json(path)
    if shapes.find_fault(value, {"kind": str, "format": object, "fingerprint": object}):
        raise ValueError(f"{path}: not a manifest of this project. Pass another folder.")
    return value


_MAKERS = {
    "dataset": "prepare",
    "negatives": "mine",
    "model": "finetune",
    "embeddings": "embed",
    "index": "index",
    "export": "export",
    "evaluation": "evaluate",
    "anatomy": "explain",
}


def read_complete(folder: Place, kind: str) -> Manifest:
    """Returns the manifest of a finished artifact.

    Raises:
        ValueError: As ``read``, or the stage that makes it has not finished.
    """
    manifest = read(folder, kind)
    if not manifest.is_complete:
        raise ValueError(f"{folder}: not finished. Run python -m jobs.{_MAKERS[kind]} again; it does only what is missing.")
    return manifest


def is_artifact(path: Place) -> bool:
    """Returns whether a path is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def peek(folder: Place, kind: str | None = None) -> Manifest | None:
    """Returns the manifest of an artifact of this kind (or of any), finished or not, or None where none can be read."""
    try:
        return read(folder, kind)
    except ValueError:
        return None


def check_owner(folder: Place, kind: str) -> bool:
    """Returns whether an output folder holds an artifact of this kind, whatever its state; False where it is free.

    Raises:
        ValueError: The folder belongs to something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file. Pass another --output.")
    if not (folder / MANIFEST).is_file():
        if may_use(folder):
            return False
        raise ValueError(f"{folder}: holds files that are not an artifact of this project. Pass another --output.")
    found = _kind_of(folder)
    if found != kind:
        raise ValueError(f"{folder}: holds '{found}', not '{kind}'. Pass another --output.")
    return True


def may_use(folder: Place) -> bool:
    """Returns whether an output is free, or holds an artifact of this project or what is left of one."""
    if not folder.is_dir():
        return not folder.exists()
    return is_artifact(folder) or all(is_artifact(entry) or _is_unfinished(entry) for entry in folder.iterdir())


def find_related(folder: Place) -> Iterator[Place]:
    """Yields the outputs that may lie in an output, or that it may lie in: those of a pipeline and its stages."""
    parents: list[Place] = [*folder.resolve().parents]
    yield from (parent for parent in parents[:_LEVELS] if parent.name)  # none is the root of a disk, or a whole bucket
    yield from _find_nested(folder, _LEVELS)


def _find_nested(folder: Place, levels: int) -> Iterator[Place]:
    for entry in folder.iterdir() if levels and folder.is_dir() else ():
        if entry.is_dir() and any((entry / name).is_file() for name in (MANIFEST, leases.NAME)):
            yield entry
            yield from _find_nested(entry, levels - 1)


def claim(folder: Place, kind: str, identity: Mapping[str, Any], replace: bool, known: Manifest | None = None) -> Manifest | None:
    """Returns what an earlier run left in an output folder, or None where there is nothing to go on from.

    Nothing is written or removed: see ``begin``; in a bucket it is tried whether that can be done. ``replace`` gives up an
    artifact of the same kind and another identity; it never touches a folder that holds something else. ``known`` is what
    ``peek`` gave for this kind, if that was asked.

    Raises:
        ValueError: The folder belongs to something else, or to an artifact of another identity and ``replace`` is off.
    """
    manifest = known or _claimed(folder, kind, replace)
    if manifest is None or not manifest.is_complete:
        storage.check_writable(folder)
    if manifest is None:
        return None
    differing = _differences(manifest.identity, identity)
    if differing and not replace:
        raise ValueError(
            f"{folder}: was made with other inputs or settings ({differing}). Pass another --output, or --replace to discard it."
        )
    return None if differing else manifest


def _claimed(folder: Place, kind: str, replace: bool) -> Manifest | None:
    """Returns the manifest in an output folder, if there is one; one that cannot be read may be given up."""
    if not check_owner(folder, kind):
        return None
    try:
        return read(folder)
    except ValueError:
        if replace:
            return None
        raise


def _kind_of(folder: Place) -> str:
    try:
        return str(_read_raw(folder / MANIFEST)["kind"])
    except ValueError as error:
        raise ValueError(f"{error} (Pass another --output: this one is left alone.)") from None


def _is_unfinished(path: Place) -> bool:
    """Returns whether a path is something that a run may have left before it had a manifest."""
    return path.name.startswith(storage.TEMPORARY) or path.name in storage.OF_THE_RUN


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    former = {name: value for name, value in found.items() if name != "run_id"}  # which some earlier versions took for a part
    found, wanted = storage.as_json(former), storage.as_json(dict(wanted))
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    text = "; ".join(f"{key}: {_short(found.get(key))} there, {_short(wanted.get(key))} now" for key in keys)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be shown


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def begin(
    folder: Place, manifest: Manifest, previous: Manifest | None, work: Place | None = None, *, spares: bool = False
) -> None:
    """Takes an output folder into use, marked as unfinished; clears what no earlier run of this identity left.

    Artifacts in folders below this one are left alone: they have manifests of their own. So is ``work``, where this run has
    begun, and the folders of what the manifest has receipts for. Receipts of the earlier run stay in the manifest and in the
    journal, so that nothing finished is lost if this run is killed as well. A run that ``spares`` every file of a finished
    earlier one leaves its manifest too: the artifact can be read as it was until the next manifest is written.
    """
    if previous is None:
        known = peek(folder)
        if known:  # by it the folder stays known to be ours, and is known to be no longer whole
            receipts = (*known.receipts, *manifest.receipts)
            dataclasses.replace(known, receipts=receipts, is_complete=False)._publish(folder, None)
        kept = {PurePosixPath(file.path).parts[0] for receipt in manifest.receipts for file in receipt.files}
        for entry in folder.iterdir() if folder.is_dir() else ():
            if not is_artifact(entry) and entry.name not in (MANIFEST, *storage.OF_THE_RUN, *kept) and entry != work:
                storage.remove(entry)
    else:
        storage.remove_leftovers(folder)
        if spares and previous.is_complete:
            return
    receipts = previous.receipts if previous else manifest.receipts
    dataclasses.replace(manifest, receipts=receipts, is_complete=False)._publish(folder, None)


class Journal:
    """Receipts of finished parts, on disk within two seconds: a killed run loses at most the record of its last ones."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder / _JOURNAL
        self._pending: list[Receipt] = []
        self._flushed_at = time.monotonic()
        self._next = 1 + max((int(path.stem) for path in self._folder.glob(_SEGMENTS)), default=0)

    def add(self, receipt: Receipt) -> None:
        """Records a receipt."""
        self._pending.append(receipt)
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one more file of the journal, so that no file grows with the length of the run."""
        if self._pending:
            name = f"{self._next:08d}.json"
            storage.publish_json(self._folder / name, [receipt.as_json() for receipt in self._pending])
            self._next += 1
        self._pending = []
        self._flushed_at = time.monotonic()


def read_journal(folder: Place) -> list[Receipt]:
    """Returns the receipts that unfinished runs left, oldest first.

    Raises:
        ValueError: A file of the journal is not what a run leaves.
    """
    paths: list[Place] = sorted((folder / _JOURNAL).glob(_SEGMENTS))
    try:
        parts = zip(storage.read_all_json(paths), paths, strict=True)
        return [receipt for part, path in parts for receipt in _receipts(part, path)]
    except ValueError as error:
        fault = str(error).rpartition(". ")[0] or str(error)
        raise ValueError(f"{fault}. Remove {folder / _JOURNAL}: what a run had not finished is then done again.") from None


def finished_receipts(
    folder: Place, manifest: Manifest | None, keys: Iterable[str], *, compare_digests: bool = False
) -> dict[str, Receipt]:
    """Returns the receipts, among ``keys``, of parts that are done and whose files are as the receipts say.

    Sizes are always compared; digests cost a read of every file.
    """
    if manifest is None:
        return {}
    wanted, fault_of = set(keys), _finder(folder)
    known = [receipt for receipt in (*manifest.receipts, *read_journal(folder)) if receipt.key in wanted]

    def is_whole(receipt: Receipt) -> bool:
        return not any(fault_of(file, compare_digests) for file in receipt.files)

    if not compare_digests or isinstance(folder, Path):
        return {receipt.key: receipt for receipt in known if is_whole(receipt)}
    with ThreadPoolExecutor() as pool:
        return {receipt.key: receipt for receipt, whole in zip(known, pool.map(is_whole, known), strict=True) if whole}


def remove_strangers(folder: Place, parts: str, manifest: Manifest, keep: Collection[str] = ()) -> None:
    """Removes from the folder of parts what no receipt of a committed manifest names, such as units of removed input.

    Args:
        folder: Of the artifact.
        parts: Name of the folder in it.
        manifest: Of the artifact.
        keep: Names of more that stays.
    """
    named = {PurePosixPath(file.path).parts[1] for receipt in manifest.receipts for file in receipt.files}
    for path in (folder / parts).iterdir() if (folder / parts).is_dir() else ():
        if path.name not in named and path.name not in keep:
            storage.remove(path)


def find_faults(folder: Place, manifest: Manifest, only_sizes: Collection[str] = ()) -> list[str]:
    """Returns every way in which the files of an artifact differ from its receipts, one line each.

    Args:
        folder: Of the artifact.
        manifest: Of the artifact.
        only_sizes: Names of files whose digests are not looked at.
    """
    unfinished = [] if manifest.is_complete else [f"{folder}: not finished"]
    return [*unfinished, *(fault for _, fault in find_faulty(folder, manifest, only_sizes))]


def find_faulty(folder: Place, manifest: Manifest, only_sizes: Collection[str] = ()) -> list[tuple[Receipt, str]]:
    """Returns the receipts of an artifact from which files differ, each with what is wrong with a file; see ``find_faults``."""
    fault_of = _finder(folder)
    files = [(receipt, file) for receipt in manifest.receipts for file in receipt.files]
    with ThreadPoolExecutor() as pool:  # digests are computed without the interpreter's lock
        found = pool.map(lambda own: fault_of(own[1], PurePosixPath(own[1].path).name not in only_sizes), files)
        return [(receipt, fault) for (receipt, _), fault in zip(files, found, strict=True) if fault]


def _finder(folder: Place) -> Callable[[FileRecord, bool], str]:
    """Returns what finds the fault of a file, comparing digests or not; what all files have in common is looked up here."""
    if isinstance(folder, Path):
        root = os.path.realpath(folder)
        return lambda file, compare_digests: _fault(folder, file, compare_digests, root)
    there = storage.sizes(folder)
    return lambda file, compare_digests: _fault_in_bucket(folder, file, compare_digests, there.get(file.path))


def _fault(folder: Path, record: FileRecord, compare_digests: bool, root: str = "") -> str:
    """Returns what is wrong with a file, or nothing; ``root`` is the folder without symbolic links, where that is known."""
    path = os.path.join(folder, record.path)  # noqa: PTH118 - a hundred thousand times: pathlib takes longer than the disk
    if not os.path.realpath(path).startswith(f"{root or os.path.realpath(folder)}/"):
        return f"{path}: {_OUTSIDE}"
    status = os.stat(path) if os.path.isfile(path) else None  # noqa: PTH113, PTH116
    if not status:
        return f"{path}: missing"
    if status.st_size != record.num_bytes:
        return f"{path}: {status.st_size} bytes, the receipt says {record.num_bytes}"
    if compare_digests and storage.digest_file(Path(path)) != record.digest:
        return f"{path}: {storage.ALTERED}"
    return ""


def _fault_in_bucket(folder: UPath, record: FileRecord, compare_digests: bool, num_bytes: int | None) -> str:
    """Returns what is wrong with an object of so many bytes (None: not there), or nothing."""
    if shapes.leads_out(record.path):
        return f"{folder}/{record.path}: {_OUTSIDE}"
    if num_bytes is None:
        return f"{folder}/{record.path}: missing"
    if num_bytes != record.num_bytes:
        return f"{folder}/{record.path}: {num_bytes} bytes, the receipt says {record.num_bytes}"
    if compare_digests and storage.digest_file(folder / record.path) != record.digest:
        return f"{folder}/{record.path}: {storage.ALTERED}"
    return ""


def read_whole(folder: Place, kind: str) -> Manifest:
    """Returns the manifest of a finished artifact, every file of which is exactly what its receipt says: for small ones.

    Raises:
        ValueError: As ``read_complete``, or a file is missing, truncated or altered.
    """
    manifest = read_complete(folder, kind)
    faults = find_faults(folder, manifest)
    if faults:
        raise ValueError(f"{faults[0]}. {_AGAIN}")
    return manifest


def check_file(folder: Place, record: FileRecord) -> Path:
    """Returns a local path of a file that is exactly what its receipt says, for a reader about to parse it.

    Of an object in a bucket it is a copy on this node's disk; see ``read_file`` for what is read only once.

    Raises:
        ValueError: It is missing, truncated or altered.
    """
    if isinstance(folder, Path):
        fault = _fault(folder, record, compare_digests=True)
        if fault:
            raise ValueError(f"{fault}. {_AGAIN}")
        return folder / record.path
    return storage.local(_checked_place(folder, record), record.digest)


def read_file(folder: Place, record: FileRecord) -> Path | bytes:
    """Returns a file that is exactly what its receipt says: its path, or, from a bucket, its bytes, which need no disk.

    Raises:
        ValueError: As ``check_file``.
    """
    if isinstance(folder, Path):
        return check_file(folder, record)
    data: bytes = _checked_place(folder, record).read_bytes()
    if storage.digest_of([data]) != record.digest:
        raise ValueError(f"{folder}/{record.path}: {storage.ALTERED}. {_AGAIN}")
    return data


def _checked_place(folder: UPath, record: FileRecord) -> UPath:
    """Returns where an object is that is there, and in its artifact."""
    place = folder / record.path
    fault = _OUTSIDE if shapes.leads_out(record.path) else "" if place.is_file() else "missing"
    if fault:
        raise ValueError(f"{folder}/{record.path}: {fault}. {_AGAIN}")
    return place

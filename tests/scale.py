"""What a driver spends on a corpus of any size, without a model: ``python tests/scale.py FOLDER --units 100000``.

Plans, is killed half-way, resumes, commits, meets a changed file, and at last finds nothing to do, each time as
``python -m jobs.embed`` does around its workers. Unit files are empty; their receipts are like real ones. Prints, as JSON, the
seconds of each step, the peak of the resident memory (of one process that does all of it, so no less than that of each run), and
what each run found and left. The checks of the input are left out: they cost what reading the corpus costs.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.embed import Settings  # all that a driver imports, for the sake of its memory
from jobs.processes import peak_bytes
from matryoshka import artifacts, calibration, corpus, embedding
from matryoshka.artifacts import FileRecord, Journal, Manifest, Receipt
from matryoshka.corpus import Columns, Corpus
from matryoshka.model import ModelInfo
from matryoshka.units import InputFile, Unit, plan_units

_UNITS_PER_FILE, _UNIT_ROWS = 20, 50_000
_FLUSHES = 200
_INFO = ModelInfo(Path("/models/m"), "f" * 64, 384, 512, (384, 256, 128, 64, 32), is_tuned=True)
_COUNTS = dict.fromkeys(("num_tokens", "num_padded_tokens", "num_flops", "tokens_per_step"), 6_400_000)
_ZEROS = dict.fromkeys(("num_empty", "num_truncated", "num_cut_tokens", "num_split", "compute_seconds", "read_seconds"), 0)
_DETAILS = {**_COUNTS, **_ZEROS, "write_seconds": 0.012, "idle_seconds": 0.345, "seconds": 6.789}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, default=100_000)
    options = parser.parse_args()
    source = _make_corpus(options.units // _UNITS_PER_FILE)
    changed = dataclasses.replace(source, files=(dataclasses.replace(source.files[0], digest=_digest("new")), *source.files[1:]))
    _report("killed half-way", _drive(options.folder, source, options.units // 2))
    _report("resumed", _drive(options.folder, source, options.units))
    _report("a file changed", _drive(options.folder, changed, options.units))
    _report("nothing to do", _drive(options.folder, changed, options.units))


def _report(name: str, found: dict[str, Any]) -> None:
    found["total_seconds"] = round(sum(found["seconds"].values()), 2)
    found["peak_mib"] = peak_bytes()[os.getpid()] // 2**20
    sys.stdout.write(json.dumps({"run": name, **found}) + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _make_corpus(num_files: int) -> Corpus:
    names = [f"part-{number:05d}.parquet" for number in range(num_files)]
    files = tuple(InputFile(name, _digest(name), _UNITS_PER_FILE * _UNIT_ROWS) for name in names)
    return Corpus("/corpus", Columns(), files, 0, tuple((name, 400_000_000, 1_700_000_000_000_000_000) for name in names))


def _drive(folder: Path, source: Corpus, num_units: int) -> dict[str, Any]:
    """Does what a run does until so many units are finished; the run is killed if that is before the end."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 3)

    with step("peek"):
        known = artifacts.peek(folder, "embeddings")
    with step("recall the corpus"):
        corpus.recall(known.facts["corpus"] if known else corpus.remember(source))
    identity = embedding.make_identity(_INFO, source.columns, calibration.Choice("bf16", 65_536, is_compiled=False), _UNIT_ROWS)
    with step("claim"):
        previous = artifacts.claim(folder, "embeddings", identity, replace=False)
    with step("plan"):
        units = plan_units(source.files, _UNIT_ROWS)
    with step("resume"):
        finished = artifacts.finished_receipts(folder, previous, [unit.key for unit in units])
    todo = [unit for unit in units if unit.key not in finished]
    counts = {"num_units": len(units), "num_todo": len(todo)}
    if previous and previous.is_complete and not todo:
        return {"seconds": seconds, **counts}
    with step("begin"):
        manifest = embedding.make_manifest(source, _INFO, identity, {"settings": list(Settings.model_fields)})
        artifacts.begin(folder, manifest, previous)
    written = (folder / artifacts.MANIFEST).stat().st_mtime_ns
    todo = todo[: num_units - len(finished)]
    _make_files(folder, todo)
    with step("journal"):
        finished |= _journal(folder, todo)
    segments = sorted((folder / "journal").glob("*.json"), key=lambda path: path.stat().st_size)
    counts |= {"num_segments": len(segments), "largest_segment_bytes": segments[-1].stat().st_size}
    counts["is_manifest_rewritten"] = (folder / artifacts.MANIFEST).stat().st_mtime_ns != written
    if len(finished) == len(units):
        with step("commit"):
            _commit(folder, manifest, units, finished)
    counts["num_files"] = len(os.listdir(folder / embedding.UNITS))  # noqa: PTH208 - only their number
    return {"seconds": seconds, **counts}


def _make_files(folder: Path, units: Sequence[Unit]) -> None:
    (folder / embedding.UNITS).mkdir(parents=True, exist_ok=True)
    for unit in units:
        (folder / embedding.UNITS / f"{unit.key}.parquet").touch()


def _journal(folder: Path, units: Sequence[Unit]) -> dict[str, Receipt]:
    """Records the receipts of finished units, with as many flushes as a run of some minutes has."""
    journal, receipts = Journal(folder), {}
    for number, unit in enumerate(units):
        record = FileRecord(f"{embedding.UNITS}/{unit.key}.parquet", 0, _digest(""))
        receipts[unit.key] = Receipt(unit.key, unit.num_rows, (record,), {"slot": unit.slot, **_DETAILS})
        journal.add(receipts[unit.key])
        if number % (len(units) // _FLUSHES + 1) == 0:
            journal.flush()
    journal.flush()
    return receipts


def _commit(folder: Path, manifest: Manifest, units: Sequence[Unit], finished: dict[str, Receipt]) -> None:
    facts = {**manifest.facts, "last_run": embedding.summarise(finished.values(), 8, 3_600.0, None)}
    receipts = tuple(embedding.place(finished[unit.key], unit) for unit in units)
    manifest = dataclasses.replace(manifest, facts=facts, receipts=receipts, is_complete=True)
    manifest.write(folder)
    artifacts.remove_strangers(folder, embedding.UNITS, manifest)


if __name__ == "__main__":
    main()

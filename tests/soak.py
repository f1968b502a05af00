"""Nights under fire: ``python tests/soak.py --output FOLDER --minutes 30``, or ``make soak``.

Every night one file of documents is added to a corpus, one is changed and one removed, and the embed and index jobs bring
their outputs up to date, while something goes wrong every few seconds: a worker or the driver is killed, the driver is told to
end, a worker is frozen for a while, a second run is started on the same output. A job that did not end well is started again,
as a scheduler would; after every such end the index of the night before must answer. Some documents of the night before are
taken out of the index for good. After every night each document must be there once, with the vector that it had, and nothing
else; ``verify`` must find no fault. FOLDER/soak.json has what was done, and the memory of driver and workers.
"""

import argparse
import collections
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import texts

_LOOK_SECONDS = 0.5
_FROZEN_SECONDS = 10.0
_REMOVED_PER_NIGHT = 5
_MIB = 2**20
_HELD, _TERMINATED, _RETRY = 4, 143, 1
_FAULTS = ("kill a worker", "kill a worker", "kill the driver", "end the driver", "freeze a worker", "start a second run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument(
        "--corpus", type=Path, help="Parquet file with id and text to take documents from; none: they are made up"
    )
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--minutes", type=float, default=30.0, help="no night begins after this long")
    parser.add_argument("--fault-seconds", type=float, default=20.0, help="time between faults")
    parser.add_argument("--rows", type=int, default=4_000, help="documents that a night adds")
    parser.add_argument("--unit-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    soak = Soak(options)
    start = time.monotonic()
    while time.monotonic() < start + 60 * options.minutes and soak.night():
        pass
    soak.report(time.monotonic() - start)


def say(text: str) -> None:
    sys.stdout.write(f"soak: {text}\n")
    sys.stdout.flush()


class Nights:
    """A corpus that changes: each night adds a file, changes one and removes one."""

    def __init__(self, folder: Path, source: Path | None, num_rows: int, chance: random.Random) -> None:
        self._folder, self._num_rows, self._chance = folder, num_rows, chance
        self._batches = self._read(source) if source else self._make_up()
        self._number = 0

    def _read(self, source: Path) -> Iterator[pa.Table]:
        for batch in pq.ParquetFile(source).iter_batches(self._num_rows, columns=["id", "text"]):
            yield pa.Table.from_batches([batch])

    def _make_up(self) -> Iterator[pa.Table]:
        first = 0
        while True:
            yield pa.table(texts.documents(first, first + self._num_rows, num_words=40))
            first += self._num_rows

    def change(self) -> bool:
        """Brings the corpus to its next night, unless no document is left for it; the files appear whole."""
        added = next(self._batches, None)
        if added is None:
            return False
        there = sorted(self._folder.glob("*.parquet"))
        if len(there) > 3:
            there.pop(self._chance.randrange(len(there))).unlink()
            path = self._chance.choice(there)
            self._write(path, pq.read_table(path).slice(1))  # one document less
        self._number += 1
        self._write(self._folder / f"night-{self._number:04d}.parquet", added)
        return True

    def _write(self, path: Path, table: pa.Table) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def ids(self) -> list[str]:
        return sorted(
            name for path in self._folder.glob("*.parquet") for name in pq.read_table(path, columns=["id"])["id"].to_pylist()
        )


class Soak:
    """Runs the jobs of one night after another, and sees to it that things go wrong."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._chance = options, random.Random(options.seed)
        root: Path = options.output
        self._corpus, self._vectors, self._index = root / "corpus", root / "embeddings", root / "index"
        self._nights = Nights(self._corpus, options.corpus, options.rows, self._chance)
        self._known: dict[str, bytes] = {}
        self._removed: set[str] = set()
        self._removed_before: set[str] = set()
        self._faults: collections.Counter[str] = collections.Counter()
        self._ends: collections.Counter[int] = collections.Counter()
        self._memory: list[dict[str, Any]] = []
        self._num_nights = self._num_checked = 0
        self._next_fault = time.monotonic() + options.fault_seconds

    def night(self) -> bool:
        """Changes the corpus, brings the outputs up to date against all odds, and checks them; False: no document is left."""
        if not self._nights.change():
            return False
        self._removed_before = set(self._removed)
        embed = [
            "jobs.embed",
            "--corpus",
            str(self._corpus),
            "--model",
            self._options.model,
            "--unit-rows",
            str(self._options.unit_rows),
        ]
        self._until_done([*embed, "--precision", "float32", "--output", str(self._vectors)], self._vectors)
        index = ["jobs.index", "--embeddings", str(self._vectors), "--output", str(self._index), "--shards", "4"]
        self._until_done([*index, *self._removal()], self._index)
        self._check()
        self._num_nights += 1
        say(f"night {self._num_nights}: {len(self._known):,} documents, each once; faults so far: {self._faults.total()}")
        return True

    def _removal(self) -> list[str]:
        """Returns the options that take some documents of the night before out of the index."""
        self._removed |= set(self._chance.sample(sorted(self._known), min(_REMOVED_PER_NIGHT, len(self._known))))
        path = self._options.output / "remove.parquet"
        pq.write_table(pa.table({"id": sorted(self._removed - self._removed_before)}), path)
        return ["--remove", str(path)] if self._known else []

    def _until_done(self, arguments: list[str], output: Path) -> None:
        while (code := self._run(arguments, output)) != 0:
            self._ends[code] += 1
            if code not in (-signal.SIGKILL, -signal.SIGTERM, _TERMINATED, _RETRY):  # the second: before it had begun
                sys.exit(f"soak: {arguments[0]} ended with {code}, which no fault explains")
            if self._num_nights:
                before = sorted(self._known.keys() - self._removed_before)
                now = sorted(set(self._nights.ids()) - self._removed)
                assert folders.indexed_ids(self._index) in (before, now), "last night's index answers"

    def _run(self, arguments: list[str], output: Path) -> int:
        log = self._options.output / "log.txt"
        with log.open("ab") as sink:
            driver = psutil.Popen(
                [sys.executable, "-m", *arguments], stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True
            )
        family: list[psutil.Process] = []
        while driver.poll() is None:
            time.sleep(_LOOK_SECONDS)
            family = list(_family(driver)) or family
            workers = [process for process in family if _is_worker(process)]
            self._note(arguments[0], driver, workers)
            if time.monotonic() > self._next_fault and (output / "lease.json").is_file():
                self._do_harm(arguments, driver, workers)
                self._next_fault = time.monotonic() + self._options.fault_seconds
        for process in family:  # what a killed driver leaves of its Ray
            with contextlib.suppress(psutil.Error):
                process.kill()
        return int(driver.returncode)

    def _do_harm(self, arguments: list[str], driver: psutil.Popen, workers: list[psutil.Process]) -> None:
        fault = self._chance.choice(_FAULTS)
        if "worker" in fault and not workers:
            fault = "kill the driver"
        self._faults[fault] += 1
        with contextlib.suppress(psutil.NoSuchProcess):
            if fault == "kill a worker":
                self._chance.choice(workers).kill()
            elif fault == "freeze a worker":
                frozen = self._chance.choice(workers)
                frozen.suspend()
                time.sleep(_FROZEN_SECONDS)
                frozen.resume()
            elif fault == "kill the driver":
                driver.kill()
            elif fault == "end the driver":
                driver.terminate()
                driver.wait(30)
            elif driver.poll() is None:
                second = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
                if second.returncode != _HELD and driver.poll() is None:
                    sys.exit(f"soak: a second run on the same output ended with {second.returncode}: {second.stderr}")

    def _note(self, job: str, driver: psutil.Popen, workers: list[psutil.Process]) -> None:
        largest = max(map(_resident, workers), default=0.0)
        self._memory.append(
            {"job": job, "documents": len(self._known), "driver_mib": _resident(driver), "largest_worker_mib": largest}
        )

    def _check(self) -> None:
        ids, found = self._nights.ids(), folders.vectors(self._vectors)
        assert sorted(found) == ids, "the vectors are those of the corpus, each once"
        kept = [name for name in ids if name not in self._removed]
        assert folders.indexed_ids(self._index) == kept, "the index holds the documents of the corpus, each once"
        again = sorted(found.keys() & self._known.keys())
        before, now = (np.frombuffer(b"".join(own[name] for name in again), np.float16) for own in (self._known, found))
        assert np.allclose(before, now, atol=2e-3), "a document has the vector that it had, but for rounding in another step"
        self._known = found
        self._num_checked += len(ids)
        subprocess.run([sys.executable, "-m", "jobs.verify", str(self._options.output)], check=True, stdout=subprocess.DEVNULL)

    def report(self, seconds: float) -> None:
        """Writes and says what was done."""
        drivers = [row["driver_mib"] for row in self._memory if row["job"] == "jobs.embed"]
        workers = [row["largest_worker_mib"] for row in self._memory if row["job"] == "jobs.embed"]
        found = {
            "seconds": round(seconds),
            "nights": self._num_nights,
            "documents_checked": self._num_checked,
            "documents_removed": len(self._removed),
            "faults": dict(self._faults),
            "exit_codes": {str(code): count for code, count in self._ends.items()},
            "largest_driver_mib": round(max(drivers)),
            "largest_worker_mib": round(max(workers)),
        }
        (self._options.output / "soak.json").write_text(json.dumps({**found, "memory": self._memory}, indent=1))
        say(json.dumps(found))


def _family(driver: psutil.Popen) -> Iterator[psutil.Process]:
    try:
        yield from driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _is_worker(process: psutil.Process) -> bool:
    """Returns whether a process is one of Ray's that is at work."""
    try:
        title = " ".join(process.cmdline())
        return (
            title.startswith("ray::")
            and "IDLE" not in title
            and "Agent" not in title
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss / _MIB)
    except psutil.Error:
        return 0.0


if __name__ == "__main__":
    main()

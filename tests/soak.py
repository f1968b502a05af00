"""A long run that is killed at random moments: ``python tests/soak.py --corpus PATH --output FOLDER --kills 6``.

Starts ``python -m jobs.embed`` again and again, ends its driver or one of its encoder workers with SIGKILL at random
moments, and, once the command has succeeded, verifies the result: every document of the corpus once, every file as its receipt
says. FOLDER.soak.json has the resident memory of driver and workers against the units done. Any size of corpus will do.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq

_LOOK_SECONDS = 2.0
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--unit-rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=6, help="how many processes to end; drivers and workers in turn")
    parser.add_argument("--mean-seconds", type=float, default=120.0, help="mean time between kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    memory: list[dict[str, float]] = []
    kills: list[str] = []
    start = time.monotonic()
    while (code := _run_once(options, chance, kills, memory, start)) != 0:
        if code > 0:
            sys.exit(f"soak: the command failed by itself, with exit code {code}")
        say(f"the command ended with {code}; starting it again")
    seconds = time.monotonic() - start
    subprocess.run([sys.executable, "-m", "jobs.verify", str(options.output)], check=True)
    report = {"seconds": round(seconds), "kills": kills, **_count(options.output), "memory": memory}
    options.output.with_suffix(".soak.json").write_text(json.dumps(report, indent=1))
    assert report["ids"] == report["distinct_ids"] == report["manifest_rows"], report
    say(f"{report['ids']:,} documents, each once, in {seconds:,.0f} s with {len(kills)} kills")


def say(text: str) -> None:
    sys.stdout.write(f"soak: {text}\n")
    sys.stdout.flush()


def _run_once(
    options: argparse.Namespace, chance: random.Random, kills: list[str], memory: list[dict[str, float]], start: float
) -> int:
    """Runs the command until it ends, or until it is this driver's turn to be killed; returns its exit code."""
    command = [sys.executable, "-m", "jobs.embed", "--corpus", options.corpus, "--output", str(options.output)]
    command += ["--model", options.model, "--unit-rows", str(options.unit_rows)]
    driver = psutil.Popen(command, start_new_session=True)
    family: list[psutil.Process] = []
    next_kill = time.monotonic() + chance.expovariate(1 / options.mean_seconds)
    while driver.poll() is None:
        time.sleep(_LOOK_SECONDS)
        family = list(_family(driver)) or family
        workers = [process for process in family if _is_worker(process)]
        memory.append(_memory(driver, workers, options.output, start))
        if len(kills) < options.kills and workers and time.monotonic() > next_kill:
            victim = driver if len(kills) % 2 else chance.choice(workers)
            kills.append("driver" if victim is driver else "worker")
            say(f"kill {len(kills)}: {kills[-1]} {victim.pid} after {time.monotonic() - start:,.0f} s")
            victim.kill()
            next_kill = time.monotonic() + chance.expovariate(1 / options.mean_seconds)
    for process in family:  # what a killed driver leaves of its Ray
        if process.is_running():
            process.kill()
    return driver.returncode


def _family(driver: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "_EncoderActor" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _memory(driver: psutil.Process, workers: list[psutil.Process], output: Path, start: float) -> dict[str, float]:
    units = output / "units"
    return {
        "seconds": round(time.monotonic() - start),
        "units": len(list(units.glob("*.parquet"))) if units.is_dir() else 0,
        "driver_mib": round(_resident(driver)),
        "largest_worker_mib": round(max(map(_resident, workers), default=0)),
    }


def _resident(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / _MIB
    except psutil.Error:
        return 0.0


def _count(output: Path) -> dict[str, int]:
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    ids = [
        name for file in (output / "units").glob("*.parquet") for name in pq.read_table(file, columns=["id"])["id"].to_pylist()
    ]
    rows = sum(receipt["num_rows"] for receipt in manifest["receipts"])
    return {"ids": len(ids), "distinct_ids": len(set(ids)), "manifest_rows": rows}


if __name__ == "__main__":
    main()

"""What all benchmarks have in common: where the report goes, systems that take turns, and what a report says first."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.entry import describe_run
from jobs.processes import Process
from jobs.terminal import say
from matryoshka import storage
from matryoshka.config import JobSettings
from matryoshka.storage import Place

_ENOUGH_ROUNDS = 3


def choose_device(wanted: str | None) -> str:
    """Returns where to compute.

    Raises:
        ValueError: A GPU is wanted, and there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here. Pass --device cpu, or leave it out.")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def check_output(text: str, job: str = "benchmark") -> Place:
    """Returns where the report of a job goes, if a file can be there and is not something else's.

    Raises:
        ValueError: It is a folder, no JSON file, or a file that is no report of this job.
    """
    output = storage.place(text)
    if output.is_dir():
        raise ValueError(f"{output}: is a folder. Pass a file: --output {output / f'{job}.json'}.")
    if output.suffix != ".json":
        raise ValueError(f"{output}: the report is JSON. Pass --output {output.with_suffix('.json')}.")
    if output.exists():
        read_report(output, job)
    return output


@contextlib.contextmanager
def scratch(output: Place) -> Iterator[Path]:
    """Yields a folder that is gone at the end: beside the report, where that is on a disk."""
    beside = output.parent.resolve() if isinstance(output, Path) else None
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=storage.TEMPORARY, dir=beside) as folder:
        yield Path(folder)


def read_report(path: Place, job: str) -> dict[str, Any]:
    """Returns the report that a job wrote.

    Raises:
        ValueError: The file is missing, or something else.
    """
    report = storage.read_json(path)
    if not isinstance(report, dict) or report.get("job") != job:
        raise ValueError(f"{path}: holds something else than a {job}'s report. Pass another file.")
    return report


def take_turns(num_rounds: int, turns: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Has every system do the work in turn, round after round; returns what each gave in each round."""
    found: dict[str, list[Any]] = {name: [] for name in turns}
    for number in range(1, num_rounds + 1):
        seconds = {}
        for name, turn in turns.items():
            start = time.perf_counter()
            found[name].append(turn())
            seconds[name] = time.perf_counter() - start
        taken = ", ".join(f"{name} {own:.1f} s" for name, own in seconds.items())
        say(f"benchmark: round {number} of {num_rounds}: {taken}")
    return found


def ask_all(processes: Sequence[Process], method: str) -> list[Any]:
    """Returns the results of a call that all processes make at the same time."""
    for process in processes:
        process.ask(method)
    return [process.answer() for process in processes]


def begin_report(settings: JobSettings, device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Returns what a report says first: what was asked for, when, on which machine, and with which versions.

    Args:
        settings: Of the benchmark.
        device: Where it computes.
        packages: Further ones whose versions matter, where they are installed.
    """
    run_record = describe_run("benchmark", settings)
    versions = dict(run_record["versions"])
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        **run_record,
        "versions": versions,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": describe_hardware(device),
    }


def num_cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def free_bytes() -> int:
    """Returns how much memory this process can still take: of the machine, or of the group whose limit it is under."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
    free = next(int(fields[1]) * 1024 for fields in lines if fields[0] == "MemAvailable:")
    with contextlib.suppress(OSError, ValueError):  # no group, or one without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("utf-8")) for name in ("max", "current"))
        figures = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text("utf-8").splitlines())
        free = min(free, limit - used + int(figures["inactive_file"]))  # a cache that is given back
    return free


def describe_hardware(device: str) -> dict[str, Any]:
    """Returns what this process computes on."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": num_cores(),
        "gpu": _gpu_name() if device == "cuda" else None,
        "device": device,
    }


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def place_of(report: Mapping[str, Any]) -> str:
    """Returns the machine of a report in words."""
    hardware = report["hardware"]
    return str(hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}")


def caution(num_rounds: int) -> list[str]:
    """Returns a note where the rounds are too few for a median."""
    few = f"--rounds {num_rounds}: a median of fewer than {_ENOUGH_ROUNDS} says little"
    return [few] if num_rounds < _ENOUGH_ROUNDS else []

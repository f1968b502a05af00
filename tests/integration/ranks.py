"""Ranks of a gloo group outside Ray, to see what ``train_rank`` leaves in the memory of each process."""

import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from small_runs import Observer

from matryoshka import checkpoints, model, training
from matryoshka.training import Job

Found = dict[str, list[dict[str, Any]]]


def train_two(jobs: Mapping[str, Job], dies_at: Mapping[str, int] | None = None) -> Found:
    """Trains each job with two ranks, one job after the other.

    Args:
        jobs: By name.
        dies_at: Steps at which both ranks of a job die; see ``Observer``.

    Returns:
        By name, for each rank: ``digest`` (of its weights), ``entries`` (of the log), ``error`` (its words, or None).
    """
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_run_rank, args=(Path(meeting), jobs, dies_at or {}), nprocs=2)
        return {name: [torch.load(Path(meeting) / f"{name}-{rank}", weights_only=False) for rank in range(2)] for name in jobs}


def _run_rank(rank: int, meeting: Path, jobs: Mapping[str, Job], dies_at: Mapping[str, int]) -> None:
    # The trainer reads these, as under Ray Train; the ranks meet in a file, so that no port is needed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    model.quieten()
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=2)
    loaded: list[Any] = []
    load = model.load

    def load_and_remember(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    model.load = load_and_remember
    for name, job in jobs.items():
        watch, error = Observer(dies_at=dies_at.get(name)), None
        try:
            training.train_rank(job, watch)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        digest = checkpoints.digest_of(dict(loaded[-1].named_parameters()))
        torch.save({"digest": digest, "entries": watch.entries, "error": error}, meeting / f"{name}-{rank}")
    torch.distributed.destroy_process_group()


class _Killed(Observer):
    """Kills its process, with the signal that none survives."""

    def wants_checkpoint(self, step: int) -> bool:
        if step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def train_until_killed(job: Job, step: int) -> None:
    """Trains alone, until the process is killed before the step after ``step`` steps."""
    torch.set_num_threads(1)
    model.quieten()
    training.train_rank(job, _Killed(dies_at=step))

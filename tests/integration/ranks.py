"""Ranks of a gloo group outside Ray, to see what ``train_rank`` leaves in the memory of each process."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from small_runs import Observer

from matryoshka import checkpoints, model, training
from matryoshka.dev import DevEvaluator
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


def measure_two(base: Path, **named: Any) -> list[dict[str, float]]:
    """Returns the figures of a dev set that two ranks measure together, as each of them has them.

    Args:
        base: The model.
        named: Of ``DevEvaluator``, but for ``tokeniser`` and ``embed``.
    """
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_measure_rank, args=(Path(meeting), base, named), nprocs=2)
        return [torch.load(Path(meeting) / str(rank), weights_only=False) for rank in range(2)]


def _measure_rank(rank: int, meeting: Path, base: Path, named: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=2)
    torch.save(evaluator(base, **named).measure(), meeting / str(rank))
    torch.distributed.destroy_process_group()


def evaluator(base: Path, **named: Any) -> DevEvaluator:
    """Returns the evaluator of a model that embeds by its own padded forward."""
    from matryoshka.forward import TrainingForward, features_of

    network = model.load(base, "cpu").eval()
    TrainingForward(network, "float32")

    def embed(ids: Any, lengths: Any) -> torch.Tensor:
        with torch.no_grad():
            vectors: torch.Tensor = network(features_of(ids, lengths))["sentence_embedding"]
        return vectors

    return DevEvaluator(tokeniser=training.make_tokeniser(network, None), embed=embed, **named)

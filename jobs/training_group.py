"""The ranks of a training run as a Ray Train group, and what they report on the way."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster import Capacity
from jobs.terminal import Counter
from matryoshka import storage
from matryoshka.encode import Precision
from matryoshka.recipe import Recipe

_POLL_SECONDS = 1.0


class _Mailbox:
    """Carries log entries from rank 0 to the driver."""

    def __init__(self) -> None:
        self._entries: list[dict[str, float]] = []

    def put(self, entry: dict[str, float]) -> None:
        """Adds an entry."""
        self._entries.append(entry)

    def take(self) -> list[dict[str, float]]:
        """Returns what came since the last call."""
        entries, self._entries = self._entries, []
        return entries


@dataclass(frozen=True, slots=True)
class Group:
    """A number of ranks, one per GPU, or sharing the CPUs."""

    num_ranks: int
    capacity: Capacity

    def train(
        self, folder: Path, pairs: Mapping[str, Sequence[str]], recipe: Recipe, precision: Precision, output: Path
    ) -> float:
        """Trains from the model in ``folder``, moves the result into ``output``, and returns the seconds that training took.

        Raises:
            RuntimeError: A rank failed or was lost, or no model came out.
        """
        use_gpu = self.capacity.device == "cuda"
        cpus = 1 if use_gpu else max(self.capacity.num_cpus // self.num_ranks, 1)
        target = output / f"{storage.TEMPORARY}model"
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={
                "folder": folder,
                "pairs": ray.put(dict(pairs)),
                "recipe": recipe,
                "precision": precision,
                "target": target,
                "num_threads": cpus,
                "mailbox": mailbox,
            },
            scaling_config=ScalingConfig(
                num_workers=self.num_ranks, use_gpu=use_gpu, resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})}
            ),
            run_config=RunConfig(
                name="ray", storage_path=str(output / f"{storage.TEMPORARY}train"), failure_config=FailureConfig(max_failures=0)
            ),
        )
        start = time.perf_counter()
        try:
            with Counter("finetune", recipe.num_steps, "pairs") as counter, _Listening(mailbox, counter, recipe):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RuntimeError(f"finetune: training failed ({_cause(error)}). Mend the cause and run it again.") from error
        seconds = time.perf_counter() - start
        if not (target / "modules.json").is_file():
            raise RuntimeError(f"finetune: no model came out at {target}. Is {output} on a disk that all nodes mount?")
        for path in target.rglob("*.safetensors"):
            path.chmod(0o644)  # written for its owner only, but other users of the cluster load it
        for path in target.iterdir():
            path.rename(output / path.name)
        storage.remove_leftovers(output)
        return seconds


def _cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _Listening:
    """Counts a training run's steps while the block runs."""

    def __init__(self, mailbox: Any, counter: Counter, recipe: Recipe) -> None:
        self._mailbox, self._counter, self._recipe = mailbox, counter, recipe
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _listen(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(_POLL_SECONDS)
            for entry in ray.get(self._mailbox.take.remote()):
                steps = int(entry["step"]) - self._step
                self._step += steps
                self._counter.advance(steps * self._recipe.batch_size, num_parts=steps, **entry)


def _train_loop(config: dict[str, Any]) -> None:
    """Runs on every rank, inside the process group that Ray Train has set up."""
    import torch

    from matryoshka import model, training

    model.quieten()
    torch.set_num_threads(config["num_threads"])
    is_first = ray.train.get_context().get_world_rank() == 0
    training.train_rank(
        config["folder"],
        ray.get(config["pairs"]),
        config["recipe"],
        config["precision"],
        config["target"],
        config["mailbox"].put.remote if is_first else lambda _: None,
    )

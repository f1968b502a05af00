"""The ranks of a training run as a Ray Train group: begun again after a loss, heard on the way, warned before an end."""

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import ray
import ray.train
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs import interruption
from jobs.cluster import Capacity
from jobs.entry import HopelessError
from jobs.interruption import TerminatedError
from jobs.terminal import Counter, say
from matryoshka import storage
from matryoshka.recipe import Recipe

if TYPE_CHECKING:
    from matryoshka.training import Job

_POLL_SECONDS = 1.0
_FAREWELL_SECONDS = 15.0  # less than a run that was told to end may take altogether
_STEPS_PER_PREEMPTION_CHECK = 5  # every rank must ask as often, and all wait for each other

logger = logging.getLogger("jobs")

Listener = Callable[[Mapping[str, float]], None]


class _Mailbox:
    """Carries the log from rank 0 to the driver, and the wish for a checkpoint the other way."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []
        self._is_ending = False
        self._checkpoint = -1
        self._num_begun = 0
        self._error = ""

    def put(self, entry: dict[str, Any]) -> None:
        """Adds an entry of the log, or facts."""
        self._entries.append(entry)

    def take(self) -> list[dict[str, Any]]:
        """Returns what came since the last call."""
        entries, self._entries = self._entries, []
        return entries

    def begin(self) -> int:
        """Returns the number of a first rank that begins."""
        self._num_begun += 1
        return self._num_begun

    def is_last(self, number: int) -> bool:
        """Returns whether no first rank has begun since."""
        return number == self._num_begun

    def end(self) -> None:
        """Asks for a checkpoint: the run is about to end."""
        self._is_ending, self._checkpoint = True, -1

    def is_ending(self) -> bool:
        """Returns whether a checkpoint is asked for."""
        return self._is_ending

    def note_checkpoint(self, step: int) -> None:
        """Takes note of a checkpoint."""
        self._checkpoint = step

    def checkpoint(self) -> int:
        """Returns the step of the last checkpoint since the end was announced, or -1."""
        return self._checkpoint

    def fail(self, kind: str, text: str) -> None:
        """Takes note of an error that would come again; it need not be tried again."""
        self._error = self._error or f"{kind}:{text}"

    def error(self) -> str:
        """Returns the error's kind and text, or nothing."""
        return self._error


@dataclass(frozen=True, slots=True)
class Group:
    """A number of ranks, one per GPU, or sharing the CPUs.

    Attributes:
        num_ranks: How many.
        capacity: Of the cluster.
        attempts: How often a run is begun at most; it goes on from its last checkpoint.
    """

    num_ranks: int
    capacity: Capacity
    attempts: int

    @property
    def _cpus_per_rank(self) -> int:
        if self.capacity.device == "cuda":
            return 1
        return max(min(self.capacity.num_cpus // self.num_ranks, self.capacity.cpus_per_node), 1)

    @property
    def num_devices(self) -> int:
        """GPUs that are taken, or, where there are none, CPUs."""
        return self.num_ranks * self._cpus_per_rank

    def train(self, job: "Job", listener: Listener) -> float:
        """Trains, moves the model into the output, and returns the seconds that training took.

        Args:
            job: What to do.
            listener: Called with every entry of the log.

        Raises:
            ValueError: The recipe does not fit the model or the pairs.
            HopelessError: The loss is not finite.
            RuntimeError: Ranks were lost too often, or no model came out.
            KeyboardInterrupt: The process was told to end; a checkpoint is there to go on from.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lost only with the driver
        mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix=storage.TEMPORARY) as notes, _Listening(mailbox, job.recipe, listener):
                _fit(self._trainer(job, mailbox, notes))
        except ray.train.TrainingFailedError as error:
            _raise_own(mailbox)
            raise RuntimeError(
                f"finetune: training failed {self.attempts} times, last so: {_cause(error)}."
                " Checkpoints are kept. Mend the cause and run the same command again."
            ) from error
        _raise_own(mailbox)
        seconds = time.perf_counter() - start
        _adopt(job)
        return seconds

    def _trainer(self, job: "Job", mailbox: Any, notes: str) -> TorchTrainer:
        """Returns a trainer; what Ray Train writes down goes to a folder of this machine, as nobody reads it."""
        use_gpu = self.capacity.device == "cuda"
        cpus = self._cpus_per_rank
        return TorchTrainer(
            _train_loop,
            train_loop_config={"job": ray.put(job), "num_threads": cpus, "mailbox": mailbox},
            torch_config=_ByAddress(),
            scaling_config=ScalingConfig(
                num_workers=self.num_ranks,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
                placement_strategy="PACK",  # they wait for each other at every step
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=notes,
                failure_config=FailureConfig(max_failures=self.attempts - 1),
            ),
        )


def _raise_own(mailbox: Any) -> None:
    """Raises what the run said of itself, if it did."""
    told: str = ray.get(mailbox.error.remote())
    kind, _, text = told.partition(":")
    if text:
        raise ValueError(text) if kind == "ValueError" else HopelessError(text)


def _fit(trainer: TorchTrainer) -> None:
    """Runs a trainer; Ctrl-C, which Ray Train takes for itself and answers with an exit, is an interrupt as in other jobs."""
    with interruption.kept_handler(signal.SIGINT):
        try:
            trainer.fit()
        except SystemExit:
            raise KeyboardInterrupt from None


def _adopt(job: "Job") -> None:
    """Moves the model to where it belongs, and removes what only an unfinished run needs."""
    if not (job.target / "modules.json").is_file():
        raise RuntimeError(f"finetune: no model came out at {job.target}. Is {job.output} on a disk that all nodes mount?")
    for name in storage.names(job.target):
        storage.move(job.target / name, job.output / name)
    storage.remove_leftovers(job.output)


def _cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(failures.values()))
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    if isinstance(first, OutOfMemoryError):  # Ray says what happened first, and then, at length, how to set it
        return f"a machine ran out of memory: {lines[0].rstrip('.') if lines else ''}"
    return lines[-1].rstrip(".") if lines else type(first).__name__


class _Listening:
    """Counts a training run's steps while the block runs; told to end, it has a checkpoint written first."""

    def __init__(self, mailbox: Any, recipe: Recipe, listener: Listener) -> None:
        self._mailbox, self._recipe, self._listener = mailbox, recipe, listener
        self._step = 0
        self._counter = Counter("finetune", recipe.num_steps, "pairs")
        self._ended, self._told_to_end = threading.Event(), threading.Event()
        self._is_deaf, self._is_leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(self._counter)
        self._stack.enter_context(interruption.on_terminate(self._tell_to_end))
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._stack.close()
        if self._told_to_end.is_set() and kind is None:
            raise TerminatedError  # it was told as the last step ended

    def _listen(self) -> None:
        try:
            self._listen_on()
        except Exception:  # training goes on without its listener
            logger.warning("finetune: the log is no longer shown, but training goes on", exc_info=True)
            self._is_deaf.set()

    def _tell_to_end(self) -> None:
        """Answers SIGTERM: at first, the listener has a checkpoint written; when it has done so, or cannot, the run ends."""
        if self._is_deaf.is_set() or self._is_leaving.is_set() or interruption.is_lost():
            raise TerminatedError
        interruption.hurry()
        self._told_to_end.set()

    def _listen_on(self) -> None:
        is_last = is_asked = False
        while not is_last:
            is_last = self._ended.wait(_POLL_SECONDS)
            for entry in ray.get(self._mailbox.take.remote()):
                self._hear(entry)
            if self._told_to_end.is_set() and not is_asked:
                is_asked = True
                self._leave()

    def _hear(self, entry: Mapping[str, Any]) -> None:
        if "trainable" in entry:
            self._step = int(entry["first_step"])
            trained = ", ".join(f"{group} {count:,}" for group, count in entry["trainable"].items())
            begun = f"; going on after step {self._step}" if self._step else ""
            say(f"finetune: {entry['tokens_per_step']:,} tokens a step; trained numbers: {trained}{begun}")
            return
        self._listener(entry)
        if "loss" in entry and entry["step"] > self._step:  # after a loss, steps are made again
            steps, self._step = int(entry["step"]) - self._step, int(entry["step"])
            self._counter.advance(steps * self._recipe.batch_size, num_parts=steps, **entry)

    def _leave(self) -> None:
        """Waits for a last checkpoint, then interrupts the thread that trains."""
        ray.get(self._mailbox.end.remote())
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while (step := ray.get(self._mailbox.checkpoint.remote())) < 0 and time.monotonic() < deadline:
            if self._ended.wait(_POLL_SECONDS):
                return
        say(f"finetune: told to end; a checkpoint of step {step} is kept" if step >= 0 else "finetune: told to end")
        self._is_leaving.set()
        os.kill(os.getpid(), signal.SIGTERM)


class _Observer:
    """Of one rank, inside Ray Train."""

    def __init__(self, mailbox: Any, *, is_first: bool) -> None:
        self._mailbox, self._is_first = mailbox, is_first
        self._number = ray.get(mailbox.begin.remote()) if is_first else 0
        self._question = mailbox.is_ending.remote()
        self._is_answered = self._is_preempted = False

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Tells the driver."""
        self._mailbox.put.remote(dict(facts))

    def log(self, entry: Mapping[str, float]) -> None:
        """Sends an entry to the driver."""
        if self._is_first:
            self._mailbox.put.remote(dict(entry))

    def wants_checkpoint(self, step: int) -> bool:
        """Returns, once each, whether the run is told to end, and whether a node of it is about to be taken away."""
        return self._hears_of_end() | self._hears_of_preemption(step)

    def before_writing(self) -> None:
        """Waits for the driver's word, for ever on a machine that is cut off from it: Ray begins the run again elsewhere.

        Raises:
            RuntimeError: Ray has.
        """
        if not ray.get(self._mailbox.is_last.remote(self._number)):
            raise RuntimeError("this machine was given up for lost, and another has taken its place")

    def checkpointed(self, step: int) -> None:
        """Tells the driver."""
        self._mailbox.note_checkpoint.remote(step)

    def _hears_of_end(self) -> bool:
        ready, _ = ray.wait([self._question], timeout=0)
        if not ready or self._is_answered:
            return False
        self._is_answered = bool(ray.get(self._question))
        self._question = self._mailbox.is_ending.remote()
        return self._is_answered

    def _hears_of_preemption(self, step: int) -> bool:
        if step % _STEPS_PER_PREEMPTION_CHECK or self._is_preempted:
            return False
        self._is_preempted = ray.train.get_preemption_info() is not None
        return self._is_preempted


class _ByAddress(TorchConfig):
    """Has ranks find each other by the addresses that their machines have in the cluster."""

    @property
    def backend_cls(self) -> Any:
        """The one of torch, after the right interface was chosen."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Sets the process group up."""
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """Tells gloo where to listen: it would ask what the machine's own name stands for, which on many is loopback."""
    own = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    for name, addresses in psutil.net_if_addrs().items():
        if own in {address.address for address in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _train_loop(config: dict[str, Any]) -> None:
    """Runs on every rank, inside the process group that Ray Train has set up."""
    import torch

    from matryoshka import model, training

    mailbox = config["mailbox"]
    if ray.get(mailbox.error.remote()):
        return
    model.quieten()
    torch.set_num_threads(config["num_threads"])
    observer = _Observer(mailbox, is_first=ray.train.get_context().get_world_rank() == 0)
    try:
        training.train_rank(ray.get(config["job"]), observer)
    except (ValueError, training.TrainingError) as error:
        if not isinstance(error, storage.ChangedError) and not isinstance(error.__cause__, OSError):  # another try may help
            ray.get(mailbox.fail.remote("ValueError" if isinstance(error, ValueError) else "RuntimeError", str(error)))
        raise

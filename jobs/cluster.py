"""All Ray mechanics: connecting, actors, units bounded in flight, retries. Training has a room of its own."""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from matryoshka import embedding, encode, model
from matryoshka.artifacts import Receipt
from matryoshka.corpus import Corpus
from matryoshka.encode import Encoder, Precision, Role
from matryoshka.funnel import CallShards, Shard
from matryoshka.model import ModelInfo
from matryoshka.units import Unit

T = TypeVar("T")

_IN_FLIGHT_PER_WORKER = 2
_MAX_RESTARTS = 3
_TEXTS_PER_CALL = 1024


class Session:
    """A connection to Ray, and the encoder pool that stages of one run hand on to each other.

    The pool takes all CPUs or GPUs, so whatever else is to run on the cluster goes through here and ends the pool first.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._pool: Encoders | None = None

    def encoders(self, info: ModelInfo, precision: Precision, tokens_per_step: int, num_workers: int | None) -> "Encoders":
        """Returns a pool for this model: the one at hand, or a new one in its place."""
        device, wanted = capacity().device, check_workers(num_workers) or capacity().default_workers
        key = (info.fingerprint, precision, tokens_per_step, device, wanted)
        if self._pool is None or key != self._key:
            self.release()
            self._key, self._pool = key, Encoders(info, precision, tokens_per_step, device, wanted)
        return self._pool

    def release(self) -> None:
        """Ends the pool, so that its CPUs, GPUs and memory are free for something else."""
        if self._pool:
            self._pool.close()
        self._pool = None

    def choose_precision(self, wanted: str) -> Precision:
        """Returns the precision that was asked for, or for ``auto`` what a measurement on a worker says."""
        if wanted != "auto":
            return "bf16" if wanted == "bf16" else "float32"
        self.release()
        device = capacity().device
        measure = ray.remote(encode.best_precision).options(**worker_resources(device))
        return ray.get(measure.remote(device))

    def run_tasks(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yields the results of a function, called once per tuple of arguments, in the order given; few are in flight."""
        self.release()
        remote, limit = ray.remote(function), 2 * capacity().num_cpus
        window: deque[Any] = deque()
        for own in arguments:
            window.append(remote.remote(*own))
            if len(window) > limit:
                yield _get(window.popleft())
        while window:
            yield _get(window.popleft())

    @contextlib.contextmanager
    def shards(self, folders: Sequence[Path], num_workers: int | None) -> "Iterator[CallShards]":
        """Opens shards in actors, dealt out in turn, and yields the way to call them."""
        self.release()
        names = [str(folder.resolve()) for folder in folders]
        num_actors = min(check_workers(num_workers) or capacity().num_cpus, len(names))
        actors: list[Any] = [
            ray.remote(_ShardActor).options(num_cpus=1).remote(names[number::num_actors]) for number in range(num_actors)
        ]

        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
            references = [
                actors[number % num_actors].call.remote(name, method, own)
                for number, (name, own) in enumerate(zip(names, arguments, strict=True))
            ]
            try:
                return ray.get(references)
            except (RayTaskError, RayActorError) as error:
                raise RuntimeError(f"search: a shard could not be searched ({_last_line(error)}). Run it again.") from None

        try:
            yield call
        finally:
            for actor in actors:
                ray.kill(actor)


_session: Session | None = None


@contextlib.contextmanager
def connected() -> Iterator[Session]:
    """Connects to the cluster that RAY_ADDRESS names, or starts Ray on this machine, for as long as the block runs.

    A block inside another one uses the connection of the outer one.
    """
    global _session  # noqa: PLW0603 - one process has one connection to Ray
    if _session:
        yield _session
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "include_dashboard": False}
    ray.init(**options)
    _session = Session()
    try:
        yield _session
    except RayError as error:
        raise RuntimeError(f"Ray: {_last_line(error)} What is finished is kept. Run the same command again.") from error
    finally:
        _session.release()
        _session = None
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cluster has to give."""

    num_cpus: int
    num_gpus: int

    @property
    def device(self) -> str:
        """The device that work runs on: a cluster with any GPU uses its GPUs."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def default_workers(self) -> int:
        """One worker per GPU, or per CPU."""
        return self.num_gpus or self.num_cpus


def capacity() -> Capacity:
    """Returns what the connected cluster has to give."""
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Capacity(max(int(resources.get("CPU", 1)), 1), int(resources.get("GPU", 0)))


def check_workers(num_workers: int | None) -> int | None:
    """Returns the number of workers that was asked for, if this machine can have them; a cluster may grow to have them.

    Raises:
        ValueError: Ray runs on this machine only, and it has fewer GPUs or CPUs. They would be waited for in vain.
    """
    there = capacity().default_workers
    if num_workers and num_workers > there and not os.environ.get("RAY_ADDRESS"):
        kind = "GPUs" if capacity().num_gpus else "CPUs"
        raise ValueError(f"--workers {num_workers}: this machine has {there} {kind}. Pass at most {there}.")
    return num_workers


def worker_resources(device: str) -> dict[str, float]:
    """Returns what one worker takes: a GPU, or a CPU."""
    return {"num_cpus": 1, "num_gpus": 1} if device == "cuda" else {"num_cpus": 1}


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


class _EncoderActor:
    """Holds one loaded model."""

    def __init__(self, folder: str, device: str, precision: Precision, tokens_per_step: int) -> None:
        model.quieten()
        self._encoder = Encoder(Path(folder), device, precision, tokens_per_step)

    def ready(self) -> None:
        """Returns once the model is loaded."""

    def embed(self, source: Corpus, unit: Unit, folder: str) -> Receipt:
        """Embeds one unit."""
        return embedding.embed_unit(self._encoder, source, unit, Path(folder))

    def encode(self, texts: list[str], role: Role) -> npt.NDArray[np.float16]:
        """Returns the vectors of a few texts."""
        return self._encoder.encode(texts, role).vectors


class Encoders:
    """A pool of encoder actors; they start when there is first something to do.

    Args:
        info: The model.
        precision: See ``choose_precision``.
        tokens_per_step: See ``Encoder``.
        device: ``cpu`` or ``cuda``.
        num_workers: Most actors to start.
    """

    def __init__(self, info: ModelInfo, precision: Precision, tokens_per_step: int, device: str, num_workers: int) -> None:
        self._arguments = (str(info.folder), device, precision, tokens_per_step)
        self._options = {**worker_resources(device), "max_restarts": _MAX_RESTARTS, "max_task_retries": 0}
        self._num_workers = num_workers
        self._actors: list[Any] = []

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _started(self) -> list[Any]:
        if not self._actors:
            start = ray.remote(_EncoderActor).options(**self._options).remote
            actors: list[Any] = [start(*self._arguments) for _ in range(self._num_workers)]
            try:
                ray.get([actor.ready.remote() for actor in actors])
            except RayActorError as error:
                raise RuntimeError(f"encoder: no worker could load the model ({_last_line(error)}). Mend that first.") from None
            self._actors = actors
        return self._actors

    def embed(self, source: Corpus, todo: Sequence[Unit], folder: Path, attempts: int) -> "Iterator[Outcome[Receipt]]":
        """Yields the outcome of each unit as it is finished, or has failed every time."""
        calls = {unit.key: (source, unit, str(folder.resolve())) for unit in todo}
        return run_on_actors(self._started(), "embed", calls, attempts)

    def encode(self, texts: Sequence[str], role: Role) -> npt.NDArray[np.float16]:
        """Returns the vectors of texts, in their order.

        Shapes: [N, D].

        Raises:
            RuntimeError: A part failed every time.
        """
        parts = [list(texts[start : start + _TEXTS_PER_CALL]) for start in range(0, len(texts), _TEXTS_PER_CALL)]
        calls = {str(number): (part, role) for number, part in enumerate(parts)}
        results: dict[str, npt.NDArray[np.float16]] = {}
        for outcome in run_on_actors(self._started(), "encode", calls, attempts=2):
            if outcome.result is None:
                raise RuntimeError(f"encoder: texts could not be encoded ({outcome.error}).")
            results[outcome.key] = outcome.result
        return np.concatenate([results[key] for key in calls])


class _ShardActor:
    """Holds some open shards."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._shards = {folder: Shard.open(Path(folder)) for folder in folders}

    def call(self, folder: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Calls a method of one shard."""
        return getattr(self._shards[folder], method)(*arguments)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What became of one call: its result, or the last error after all attempts."""

    key: str
    result: T | None
    error: str = ""


def run_on_actors(
    actors: Sequence[Any], method: str, calls: Mapping[str, tuple[Any, ...]], attempts: int
) -> Iterator[Outcome[Any]]:
    """Calls a method once per entry, spread over actors, and yields outcomes in the order in which they are ready.

    Two calls are in flight per actor, so that none waits for the driver. A call that fails, or whose worker is lost, is
    tried again elsewhere; an actor that is lost for good gets no more calls.
    """
    waiting = deque((key, 1) for key in calls)
    idle = deque(actor for _ in range(_IN_FLIGHT_PER_WORKER) for actor in actors)
    running: dict[Any, tuple[Any, str, int]] = {}
    while waiting or running:
        while waiting and idle:
            actor, (key, attempt) = idle.popleft(), waiting.popleft()
            running[getattr(actor, method).remote(*calls[key])] = (actor, key, attempt)
        if not running:
            yield from (Outcome(key, None, "no worker is left") for key, _ in waiting)
            return
        (reference,), _ = ray.wait(list(running), num_returns=1)
        actor, key, attempt = running.pop(reference)
        try:
            yield Outcome(key, ray.get(reference))
        except (RayTaskError, RayActorError) as error:
            if attempt < attempts:
                waiting.append((key, attempt + 1))
            else:
                yield Outcome(key, None, _last_line(error))
            if isinstance(error, ActorDiedError):
                continue
        idle.append(actor)


def _last_line(error: Exception) -> str:
    """Returns the part of a Ray error that says what happened; the rest is Ray's own stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

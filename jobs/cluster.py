"""All Ray mechanics: connecting, actors, units bounded in flight, retries. Training has a room of its own.

Every worker imports this room: the model libraries, which take seconds, are imported by those that need them.
"""

import collections
import contextlib
import functools
import itertools
import logging
import math
import operator
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import jobs
import matryoshka
from jobs import interruption, measurement, object_store, placement
from jobs.placement import Machine
from jobs.terminal import say
from matryoshka import calibration, rates, storage
from matryoshka.artifacts import Receipt
from matryoshka.calibration import Calibration, Choice
from matryoshka.clock import Clock
from matryoshka.config import without_secrets
from matryoshka.corpus import Corpus
from matryoshka.funnel import CallShards, Shard, ShardFiles
from matryoshka.model import ModelInfo
from matryoshka.nested import Float32Array
from matryoshka.rates import TOKENS_PER_STEP, Precision
from matryoshka.storage import Place
from matryoshka.tokens import Long, Role
from matryoshka.units import Unit

if TYPE_CHECKING:
    from matryoshka.anatomy import Sample, Vectors
    from matryoshka.encode import Encoder

T = TypeVar("T")

logger = logging.getLogger("jobs")

_IN_FLIGHT_PER_WORKER = 3  # one is read and tokenised, one computed, one written
_LOSSES_IN_A_ROW = 10  # per worker: then it is not a unit's fault
_RETURN_SECONDS = 600.0  # how long to wait for a lost worker where there is no other
_PRESENT_SECONDS = 5.0  # within which a worker that has a place says so
_GATHER_SECONDS = 60.0  # how long the first worker waits for the others: machines may still be on their way
_TEXTS_PER_CALL = 1024
_SHARD_ATTEMPTS = 3
_MOST_CPUS_PER_GPU = 16


class Session:
    """A connection to Ray, and the encoder pool that stages of one run hand on to each other.

    The pool may take all CPUs or GPUs, so whatever else is to run on the cluster goes through here, and ends the pool first;
    on one machine without GPUs only if there is no room beside it.
    """

    def __init__(self) -> None:
        self._workers = EncoderWorkers()
        self._precision: Precision | None = None

    def encoders(
        self,
        info: ModelInfo,
        precision: Precision,
        tokens_per_step: int,
        num_workers: int | None,
        long: Long = "truncate",
        *,
        is_compiled: bool = False,
    ) -> "Encoders":
        """Returns the pool as one for this model."""
        there = capacity()
        num_wanted = check_workers(num_workers) or there.default_workers
        num_tokenisers = there.cpus_per_gpu - 1 if there.device == "cuda" else 0
        role = EncoderRole(
            info.fingerprint, str(info.folder), there.device, precision, tokens_per_step, long, num_tokenisers, is_compiled
        )
        return Encoders(self._workers, role, num_wanted)

    def encode_queries(
        self, info: ModelInfo, precision: Precision, texts: Sequence[str], num_workers: int | None
    ) -> npt.NDArray[np.float16]:
        """Returns the vectors of queries, by the pool for this model.

        Shapes: [Q, D].

        Raises:
            RuntimeError: A part failed every time.
        """
        return self.encoders(info, precision, TOKENS_PER_STEP[capacity().device], num_workers).encode(texts, "query")

    def release(self) -> None:
        """Ends the pool, so that its CPUs, GPUs and memory are free for something else."""
        self._workers.close()

    def _make_room(self, num_processes: int) -> None:
        """Ends the pool, unless so many processes of one CPU can run beside it: on one machine, which is lost with everything."""
        there = capacity()
        free = there.num_cpus - len(self._workers)
        if address():  # others may have taken some
            free = min(free, _free_cpus())
        if there.num_nodes > 1 or there.num_gpus or num_processes > free:
            self.release()

    def choose_precision(self, wanted: str) -> Precision:
        """Returns the precision that was asked for, or for ``auto`` what a measurement on a worker said once."""
        if wanted != "auto":
            return "bf16" if wanted == "bf16" else "float32"
        if self._precision is None:
            measured: Precision = self._on_worker(rates.best_precision, capacity().device)
            self._precision = measured
        return self._precision

    def calibrate(self, info: ModelInfo, choice: Choice, texts: Sequence[str], num_documents: int) -> Calibration:
        """Returns how a worker should run the model; see ``calibration.calibrate``."""
        return self._on_worker(calibration.calibrate, info.folder, capacity().device, choice, list(texts), num_documents)

    def describe_worker(self) -> dict[str, Any]:
        """Returns the hardware that a worker runs on; see ``measurement.describe_hardware``."""
        device = capacity().device
        if not address():  # workers are on this machine
            return measurement.describe_hardware(device)
        return self._on_worker(measurement.describe_hardware, device)

    def study(
        self, folders: Sequence[Place], sample: "Sample", num_documents: int, max_tokens: int
    ) -> "list[tuple[Vectors, dict[str, Float32Array]]]":
        """Returns what each model makes of a sample, each on a worker of its own; see ``hidden.study``."""
        precision, device = self.choose_precision("auto"), capacity().device
        calls = [(folder, device, precision, sample, num_documents, max_tokens) for folder in folders]
        return self._on_workers(_study, calls)

    def _on_worker(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._on_workers(function, [arguments])[0]

    def _on_workers(self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
        self._make_room(len(calls))
        # A process that was used once ends, and leaves the device's memory to the workers.
        options: dict[str, Any] = {**worker_resources(capacity()), "max_calls": 1}
        remote = ray.remote(**options)(function)
        return [_get(reference) for reference in [remote.remote(*arguments) for arguments in calls]]

    def run_tasks(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, are_short: bool = False
    ) -> Iterator[Any]:
        """Yields the results of a function, called once per tuple of arguments, in the order given; few are in flight.

        Args:
            function: What is called.
            arguments: Of each call.
            are_short: Whether all calls together take less time than to start encoders anew: then one free CPU is enough.
        """
        self._make_room(min(len(arguments), 1) if are_short else len(arguments))
        remote, limit = ray.remote(scheduling_strategy="SPREAD")(_lets_go(function)), 2 * capacity().num_cpus
        window: deque[Any] = deque()
        try:
            for own in arguments:
                window.append(remote.remote(*own))
                if len(window) > limit:
                    yield _get(window.popleft())
            while window:
                yield _get(window.popleft())
        finally:  # after an error, nothing goes on writing behind its caller's back
            for reference in window:
                ray.cancel(reference)
            if window:
                ray.wait(list(window), num_returns=len(window))

    @contextlib.contextmanager
    def shards(self, files: Sequence[ShardFiles], num_workers: int | None, device: str = "cpu") -> "Iterator[ShardActors]":
        """Opens shards on a device in actors, dealt out in turn, and yields the way to call them; a GPU has one actor."""
        most = capacity().num_gpus if device == "cuda" else capacity().num_cpus
        num_actors = min(check_workers(num_workers, device) or most, len(files))
        self._make_room(num_actors)
        actors = ShardActors([own.resolve() for own in files], num_actors, device)
        try:
            yield actors
        finally:
            actors.close()


def _study(*call: Any) -> Any:
    """Returns what ``hidden.study`` returns; the driver that hands this to a worker need not import what brings torch."""
    from matryoshka import hidden

    return hidden.study(*call)


def _lets_go(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that lets go of copies of objects in the end: its process lives on, and others may need the room."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with storage.borrowing():
            return function(*arguments)

    return call


_session: Session | None = None


def address() -> str:
    """Returns where the cluster is that jobs connect to; empty if each starts Ray on its own machine."""
    return os.environ.get("RAY_ADDRESS", "")


def check_alone() -> None:
    """Checks that no cluster is named.

    Raises:
        ValueError: One is.
    """
    if address():
        raise ValueError("RAY_ADDRESS is set, but systems are compared on this machine alone. Unset it.")


@contextlib.contextmanager
def connected() -> Iterator[Session]:
    """Connects to the cluster that RAY_ADDRESS names, or starts Ray on this machine, for as long as the block runs.

    A block inside another one uses the connection of the outer one.
    """
    global _session  # noqa: PLW0603 - one process has one connection to Ray
    if _session:
        yield _session
        return
    with interruption.kept_handler(signal.SIGTERM):  # Ray takes it for itself, and answers with an exit while it starts
        try:
            _connect()
        except SystemExit:
            raise interruption.TerminatedError from None
    _session = Session()
    try:
        with object_store.measured():
            yield _session
    except RayError as error:
        raise RuntimeError(f"Ray: {_last_line(error)} What is finished is kept. Run the same command again.") from error
    finally:
        _session.release()
        _session = None
        ray.shutdown()


def _connect() -> None:
    """Connects to Ray.

    Raises:
        RuntimeError: There is no cluster where RAY_ADDRESS says, or it does not let this process in.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not address():
        ray.init(**options, address="local", include_dashboard=False)
        return
    try:
        # Workers run this very code, whatever their machines have.
        ray.init(**options, runtime_env={"py_modules": [str(Path(own.__path__[0]).resolve()) for own in (jobs, matryoshka)]})
    except (RayError, ConnectionError) as error:
        raise RuntimeError(
            f"RAY_ADDRESS={address()}: no connection ({_last_line(error)})."
            " Check that the cluster is up, and pass its token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token."
        ) from None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cluster has to give.

    Attributes:
        num_cpus: On all nodes.
        num_gpus: On all nodes.
        cpus_per_gpu: CPUs that a worker with a GPU takes, its own and those that tokenise for it, so that every node has them.
        cpus_per_node: Of the smallest node that has any: what one worker can have wherever it is.
        num_nodes: How many there are.
    """

    num_cpus: int
    num_gpus: int
    cpus_per_gpu: int = 1
    cpus_per_node: int = 1
    num_nodes: int = 1

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
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    shares = [int(node.get("CPU", 1) // node["GPU"]) for node in nodes if node.get("GPU")]
    cpus_per_node = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    cpus_per_gpu = max(min([*shares, _MOST_CPUS_PER_GPU]), 1) if shares else 1
    num_cpus, num_gpus = max(int(resources.get("CPU", 1)), 1), int(resources.get("GPU", 0))
    return Capacity(num_cpus, num_gpus, cpus_per_gpu, cpus_per_node, len(nodes))


def _free_cpus() -> int:
    """Returns how many CPUs nobody has taken, as far as the cluster knows."""
    return int(ray.available_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


def check_device(device: str) -> None:
    """Checks that the cluster has a device.

    Raises:
        ValueError: It has not.
    """
    if device == "cuda" and not capacity().num_gpus:
        raise ValueError("--device cuda: the cluster has no GPU. Pass --device cpu.")


def check_workers(num_workers: int | None, device: str | None = None) -> int | None:
    """Returns the number of workers that was asked for, if this machine can have them; a cluster may grow to have them.

    Args:
        num_workers: As it was asked for.
        device: Of which each takes one; None: a GPU where there is one.

    Raises:
        ValueError: Ray runs on this machine only, and it has fewer GPUs or CPUs. They would be waited for in vain.
    """
    there = capacity()
    most, kind = (there.num_gpus, "GPUs") if (device or there.device) == "cuda" else (there.num_cpus, "CPUs")
    if num_workers and num_workers > most and not address():
        raise ValueError(f"--workers {num_workers}: this machine has {most} {kind}. Pass at most {most}.")
    return num_workers


def worker_resources(there: Capacity) -> dict[str, float]:
    """Returns what one worker takes: a GPU and its share of the CPUs, or a CPU."""
    return {"num_cpus": there.cpus_per_gpu, **({"num_gpus": 1} if there.num_gpus else {})}


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


@dataclass(frozen=True, slots=True)
class EncoderRole:
    """What an encoder actor is to be: which model it has, and how it runs it; see ``encode.Encoder``."""

    fingerprint: str
    folder: str
    device: str
    precision: Precision
    tokens_per_step: int
    long: Long
    num_tokenisers: int
    is_compiled: bool

    def load(self) -> "Encoder":
        """Returns the model, loaded."""
        from matryoshka.encode import Encoder

        place, own = storage.place(self.folder), (self.tokens_per_step, self.long, self.num_tokenisers)
        return Encoder(place, self.device, self.precision, *own, is_compiled=self.is_compiled)


class _EncoderActor:
    """Holds one loaded model, and takes another when a call is for that one; calls overlap.

    To start a process, and to import what loads models, takes longer than to load most of them.
    """

    def __init__(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this worker has one CPU, or processes that tokenise
        self._role: EncoderRole | None = None
        self._loaded: Encoder | None = None
        self._num_using, self._turn = 0, threading.Condition()
        self._clock = Clock()
        self._counters = {
            name: metrics.Counter(f"matryoshka_embed_{name}", description=f"Embedding: {text}.")
            for name, text in _METRICS.items()
        }
        self._memory = metrics.Gauge(
            "matryoshka_embed_memory_bytes", description="Embedding: most memory that a worker took, of its GPU if it has one."
        )

    @contextlib.contextmanager
    def _encoder(self, role: EncoderRole) -> "Iterator[Encoder]":
        """Yields the model of a role; if it is not the one at hand, it is loaded once nobody uses that any more."""
        from matryoshka import encode

        try:
            with self._turn:
                self._turn.wait_for(lambda: self._role == role or not self._num_using)
                encoder = self._take(role)
                self._num_using += 1
            try:
                yield encoder
            finally:
                with self._turn:
                    self._num_using -= 1
                    self._turn.notify_all()
        except RuntimeError as error:
            if encode.is_device_lost(error):
                os._exit(1)  # every later call would fail as well; Ray starts another process
            raise

    def _take(self, role: EncoderRole) -> "Encoder":
        from matryoshka import encode, model

        if self._loaded is None or self._role != role:
            model.quieten()
            before, self._loaded, self._role = self._loaded, None, None
            if before:  # two at once may not fit
                before.close()
                del before
                encode.free_memory(role.device)
            self._loaded, self._role = role.load(), role
            self._clock.take()  # to load it is no part of any unit
        return self._loaded

    def ready(self, role: EncoderRole) -> str:
        """Returns, once the model is loaded, why it runs padded or not compiled, or nothing."""
        with self._encoder(role) as encoder:
            return encoder.notice

    def embed(self, role: EncoderRole, source: Corpus, unit: Unit, folder: str) -> Receipt:
        """Embeds one unit."""
        from matryoshka import embedding

        with self._encoder(role) as encoder:
            receipt = embedding.embed_unit(encoder, source, unit, storage.place(folder), self._clock)
            self._memory.set(encoder.peak_bytes())
        counts = {**receipt.details, "num_units": 1, "num_documents": receipt.num_rows}
        for name, counter in self._counters.items():
            if counts[name]:
                counter.inc(counts[name])
        return receipt

    def encode(self, role: EncoderRole, texts: list[str], kind: Role) -> npt.NDArray[np.float16]:
        """Returns the vectors of a few texts."""
        with self._encoder(role) as encoder:
            return encoder.encode(texts, kind).vectors

    def count_tokens(self, role: EncoderRole, texts: list[str]) -> tuple[int, int]:
        """Returns how many tokens the model is given of some documents, and how many of these are longer than its window."""
        with self._encoder(role) as encoder:
            tokens = encoder.tokenise(texts, "document")
        return int(tokens.lengths.sum()), tokens.num_truncated + tokens.num_split


_METRICS = {
    "num_units": "units finished",
    "num_documents": "documents finished",
    "num_tokens": "tokens computed, without padding",
    "num_padded_tokens": "tokens computed, with padding",
    "num_truncated": "documents that were cut to the model's window",
    "compute_seconds": "seconds in which a worker computed",
    "read_seconds": "seconds in which a worker waited for documents and tokens",
    "write_seconds": "seconds in which a worker waited for the writer",
    "idle_seconds": "seconds in which a worker waited for work",
}


class EncoderWorkers:
    """Encoder actors; each starts when there is first something to do for it, and is then what it was last asked to be."""

    def __init__(self) -> None:
        self._actors: list[Any] = []
        self._role: EncoderRole | None = None
        self._num_ready = 0  # of the first ones, which have the model, or will when they have a place

    def __len__(self) -> int:
        return len(self._actors)

    def close(self) -> None:
        """Ends the actors."""
        self._resize(0)

    def _resize(self, num_workers: int) -> None:
        for actor in self._actors[num_workers:]:
            ray.kill(actor)
        del self._actors[num_workers:]
        self._num_ready = min(self._num_ready, num_workers)

    def start(self, role: EncoderRole, num_workers: int, num_calls: int | None) -> list[Any]:
        """Returns actors that are ready, as many as so many calls need: those that are there, and others that are started.

        Args:
            role: What they are to be.
            num_workers: How many there may be; those beyond are ended.
            num_calls: None: as many actors as there may be.

        Raises:
            RuntimeError: One cannot load the model.
        """
        # What was compiled stays with its process, and a device's memory with what was loaded first.
        if self._role and role != self._role and (role.device != self._role.device or role.is_compiled or self._role.is_compiled):
            self.close()
        self._resize(num_workers)
        if role != self._role:
            self._role, self._num_ready = role, 0
            self._leave_out_absent()
        num_wanted = num_workers if num_calls is None else min(num_calls, num_workers)
        if num_wanted > len(self._actors):
            self._add(num_wanted - len(self._actors))
        if num_wanted > self._num_ready:
            try:
                notices = self._gather(self._actors[self._num_ready : num_wanted], role)
            except BaseException:  # they would keep their CPUs for as long as anybody knows of them
                self.close()
                raise
            self._num_ready = num_wanted
            for notice in notices - {""}:
                say(notice)
        return self._actors[: self._num_ready]

    def _leave_out_absent(self) -> None:
        """Ends workers that have no place now, or none any more: the next calls may be few, and for just these."""
        calls = [actor.__ray_ready__.remote() for actor in self._actors]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=_PRESENT_SECONDS) if calls else ([], [])
        present = [call in answered and not _has_failed(call) for call in calls]
        for actor in itertools.compress(self._actors, map(operator.not_, present)):
            ray.kill(actor)
        self._actors = list(itertools.compress(self._actors, present))

    def _add(self, num_missing: int) -> None:
        # A worker that is lost comes back for as long as anything is to be done: see ``run_on_actors``.
        options = {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": _IN_FLIGHT_PER_WORKER}
        spread = {**worker_resources(capacity()), "scheduling_strategy": "SPREAD"}  # a machine that is lost costs few of them
        start = ray.remote(_EncoderActor).options(**options, **spread).remote
        self._actors += [start() for _ in range(num_missing)]

    def _gather(self, actors: Sequence[Any], role: EncoderRole) -> set[str]:
        """Waits until workers are ready, and returns their notices; those that have no place yet join the others later.

        Raises:
            RuntimeError: One cannot load the model.
        """
        calls = [_make_ready(actor, role) for actor in actors]
        if not self._num_ready:  # there is nobody else to begin
            ray.wait(calls)  # however long the first machine takes to come
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=_GATHER_SECONDS)
        if late:
            say(f"encoder: {len(late)} of {len(calls)} workers are not there yet; the others begin")
        try:
            return set(ray.get(ready))
        except RayError as error:
            raise RuntimeError(f"encoder: no worker could load the model ({_last_line(error)}). Mend that first.") from None


class Encoders:
    """A pool of encoder actors for one model.

    Args:
        workers: The actors, which may serve another model in between.
        role: What they are to be.
        num_workers: How many at most.
    """

    def __init__(self, workers: EncoderWorkers, role: EncoderRole, num_workers: int) -> None:
        self._workers, self._role, self._num_workers = workers, role, num_workers

    def start(self, num_calls: int | None = None) -> int:
        """Has workers load the model, as many as so many calls need, or all; returns how many, those on their way included."""
        return len(self._started(num_calls))

    def start_for_texts(self, num_texts: int) -> None:
        """Has as many workers load the model as so many texts need."""
        self._started(math.ceil(num_texts / _TEXTS_PER_CALL))

    def _started(self, num_calls: int | None) -> list[Any]:
        return self._workers.start(self._role, self._num_workers, num_calls)

    def embed(self, source: Corpus, todo: Sequence[Unit], folder: Place, attempts: int) -> "Iterator[Outcome[Receipt]]":
        """Yields the outcome of each unit as it is finished, or has failed every time."""
        shared = ray.put(source)  # once: a corpus of many files is large
        calls = {unit.key: (shared, unit, str(folder.resolve())) for unit in todo}
        return run_on_actors(self._started(len(calls)), self._role, "embed", calls, attempts)

    def encode(self, texts: Sequence[str], role: Role, texts_per_call: int = _TEXTS_PER_CALL) -> npt.NDArray[np.float16]:
        """Returns the vectors of texts, in their order.

        Shapes: [N, D].

        Raises:
            RuntimeError: A part failed every time.
        """
        parts = [list(texts[start : start + texts_per_call]) for start in range(0, len(texts), texts_per_call)]
        return np.concatenate(self._ask("encode", [(part, role) for part in parts]))

    def count_tokens(self, parts: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
        """Returns, for each list of documents, its tokens as the model is given them, and its documents beyond the window.

        Raises:
            RuntimeError: A part failed every time.
        """
        return self._ask("count_tokens", [(list(part),) for part in parts])

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Returns the results of calls that any worker may answer, in the order of the calls."""
        calls, results = {str(number): own for number, own in enumerate(arguments)}, {}
        for outcome in run_on_actors(self._started(len(calls)), self._role, method, calls, attempts=2):
            if outcome.result is None:
                raise RuntimeError(f"encoder: texts could not be encoded ({outcome.error}).")
            results[outcome.key] = outcome.result
        return [results[key] for key in calls]


def _has_failed(call: Any) -> bool:
    try:
        ray.get(call)
    except RayError:
        return True
    return False


def _make_ready(actor: Any, role: EncoderRole) -> Any:
    """Returns a reference that is ready once an encoder actor is there and has its model, however often it is lost before."""
    return actor.ready.options(max_task_retries=-1).remote(role)


class ShardsLostError(RuntimeError):
    """Some shards cannot be searched.

    Attributes:
        faults: What happened to each, by the name of its folder.
    """

    def __init__(self, faults: Mapping[str, str]) -> None:
        super().__init__(faults)  # as they are, so that the error can travel
        self.faults = dict(faults)

    def __str__(self) -> str:
        """The shards, each with what happened to it."""
        return "; ".join(f"shard {name}: {fault.rstrip('.')}" for name, fault in self.faults.items())


def _machines() -> list[Machine]:
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Machine(node["NodeID"], node["Resources"].get("memory", 0), int(node["Resources"].get("CPU", 0))) for node in nodes]


def _preferably(name: str) -> "NodeAffinitySchedulingStrategy | str":
    """Returns how to place an actor: on a machine for as long as it is there, or, without one, anywhere."""
    return NodeAffinitySchedulingStrategy(name, soft=True) if name else "SPREAD"


class _ShardActor:
    """Holds some shards, each opened when it is first called."""

    def __init__(self, files: Sequence[ShardFiles], device: str) -> None:
        self._files, self._device = files, device
        self._shards: dict[int, Shard] = {}

    def call(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        """Calls a method of one of them."""
        if number not in self._shards:
            try:
                self._shards[number] = Shard.open(self._files[number], self._device)
            except (OSError, ValueError, EOFError, RuntimeError) as error:  # the last: a GPU that is full, or FAISS without one
                raise ShardsLostError({self._files[number].key: str(error)}) from None
        return getattr(self._shards[number], method)(*arguments)


class ShardActors:
    """Shards in actors, dealt out in turn. A lost actor starts again and opens its shards again.

    Args:
        files: The shards.
        num_actors: How many actors hold them.
        device: Where they compute.
    """

    def __init__(self, files: Sequence[ShardFiles], num_actors: int, device: str = "cpu") -> None:
        options = {"num_cpus": 1, "num_gpus": int(device == "cuda"), "max_restarts": -1, "max_task_retries": 0}
        parts = [files[number::num_actors] for number in range(num_actors)]
        sizes = [sum(own.num_bytes for own in part) for part in parts]
        names = placement.place(sizes, _machines() if device == "cpu" else [])
        self._actors: list[Any] = [
            ray.remote(_ShardActor).options(**options, scheduling_strategy=_preferably(name)).remote(part, device)
            for name, part in zip(names, parts, strict=True)
        ]
        self._places = {own.key: divmod(number, num_actors) for number, own in enumerate(files)}

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def caller(self, files: Sequence[ShardFiles]) -> CallShards:
        """Returns a caller for some of the shards, in this order.

        It raises ``ShardsLostError`` with every shard that cannot be read, or whose actor is lost again and again.
        """
        names = [own.key for own in files]

        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
            return self._call(method, dict(zip(names, arguments, strict=True)))

        return call

    def _call(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> list[Any]:
        shared = {id(own): ray.put(own) for own in arguments.values()}  # what all shards are asked alike travels once
        references = {name: self._start(name, method, shared[id(own)]) for name, own in arguments.items()}
        results: dict[str, Any] = {}
        faults: dict[str, str] = {}
        suspects: dict[str, str] = {}
        for name, reference in references.items():
            try:
                results[name] = _get(reference)
            except ShardsLostError as error:
                faults |= error.faults
            except RayError as error:  # the actor was lost: killed, evicted for want of memory, or its node is gone
                suspects[name] = _last_line(error)
        gone: set[int] = set()
        for name, reason in suspects.items():  # one by one: a call that ends its worker costs no other shard anything
            try:
                results[name] = self._try_again(name, method, arguments[name], reason, gone)
            except ShardsLostError as error:
                faults |= error.faults
        if faults:
            raise ShardsLostError(faults)
        return [results[name] for name in arguments]

    def _try_again(self, name: str, method: str, arguments: tuple[Any, ...], reason: str, gone: set[int]) -> Any:
        """Returns the result of a call whose actor was lost, once it is back.

        Args:
            name: Of the shard.
            method: To call.
            arguments: Of the call.
            reason: Why the actor was lost.
            gone: Numbers of the actors that did not come back, which are not waited for again; this one may be added.

        Raises:
            ShardsLostError: It does not come back, or is lost every time.
        """
        _, number = self._places[name]
        for _ in range(_SHARD_ATTEMPTS - 1):
            if number in gone or not self._is_back(number):
                gone.add(number)
                break
            try:
                return _get(self._start(name, method, arguments))
            except RayError as again:
                reason = _last_line(again)
        raise ShardsLostError({name: f"its worker was lost ({reason})"})

    def _start(self, name: str, method: str, arguments: Any) -> Any:
        position, number = self._places[name]
        return self._actors[number].call.remote(position, method, arguments)

    def _is_back(self, number: int) -> bool:
        """Waits until an actor has started again, and returns whether it has."""
        ready = self._actors[number].__ray_ready__.options(max_task_retries=-1).remote()
        try:
            ray.get(ready, timeout=_RETURN_SECONDS)
        except RayError:  # lost for good, or not back in time
            return False
        return True


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What became of one call: its result, or the last error after all attempts, and whether the same call would fail again."""

    key: str
    result: T | None
    error: str = ""
    is_hopeless: bool = False


def run_on_actors(
    actors: Sequence[Any], role: EncoderRole, method: str, calls: Mapping[str, tuple[Any, ...]], attempts: int
) -> Iterator[Outcome[Any]]:
    """Calls a method once per entry, spread over encoder actors, and yields outcomes in the order in which they are ready.

    A few calls are in flight per actor, so that none waits for the driver. A call that fails is tried again, bad input
    (``ValueError``) excepted. A call whose worker was lost is a suspect: it is tried again with no other call beside it, so
    that a call that ends its worker costs no other call its attempts.

    Raises:
        OSError: The disk is full: no call would fare better.
        RuntimeError: Workers are lost again and again.
    """
    crew = _Crew(actors, role, method, calls)
    losses_in_a_row = 0
    while call := crew.next():
        key, number, is_alone, reference = call
        try:
            yield Outcome(key, ray.get(reference))
            losses_in_a_row = 0
        except RayTaskError as error:
            if storage.is_out_of_space(error.cause):
                raise error.cause from None  # every other unit would fail as well
            if isinstance(error.cause, ValueError):
                yield crew.give_up(key, str(error.cause), is_hopeless=not isinstance(error.cause, storage.ChangedError))
            elif crew.tries[key] >= attempts:
                yield crew.give_up(key, _last_line(error))
            else:
                crew.retry(key, error, crew.waiting)
        except RayError as error:  # the worker was lost: killed, evicted for want of memory, or its node is gone
            losses_in_a_row += crew.await_return(number)
            if losses_in_a_row > _LOSSES_IN_A_ROW * len(actors):
                raise RuntimeError(f"{method}: workers are lost again and again ({_last_line(error)}).") from None
            crew.tries[key] -= not is_alone  # with others beside it, it may be innocent
            if crew.tries[key] >= attempts:
                yield crew.give_up(key, f"its worker was lost: {_last_line(error)}")
            else:
                crew.retry(key, error, crew.suspects)
    yield from (crew.give_up(key, "no worker is left") for key in (*crew.suspects, *crew.waiting))


class _Crew:
    """Actors, the calls in flight on each, and those that wait.

    Attributes:
        waiting: Calls for any actor that has room.
        suspects: Calls whose worker was lost: each for an actor that has nothing else in flight.
        tries: How often each call was made.
    """

    def __init__(self, actors: Sequence[Any], role: EncoderRole, method: str, calls: Mapping[str, tuple[Any, ...]]) -> None:
        self._actors, self._role, self._method, self._calls = actors, role, method, calls
        # Each has its share where there are few: the first that is there would take them all.
        self._room = min(_IN_FLIGHT_PER_WORKER, math.ceil(len(calls) / max(len(actors), 1)))
        self._present = set[int]()
        self._running: dict[Any, tuple[str, int, int]] = {}
        self._returning = {
            _make_ready(actor, role): number for number, actor in enumerate(actors)
        }  # one may have been lost meanwhile
        self.waiting, self.suspects = deque(calls), deque[str]()
        self.tries: collections.Counter[str] = collections.Counter()
        self._retries, self._failures = (
            metrics.Counter(f"matryoshka_{name}", description=f"Calls of encoders {text}.", tag_keys=("call",))
            for name, text in (("retries", "that are made again"), ("failures", "that failed for good"))
        )

    def retry(self, key: str, error: RayError, queue: deque[str]) -> None:
        """Has a call that failed made again, and says so."""
        self._retries.inc(tags={"call": self._method})
        logger.info("event=retry call=%s part=%s reason=%r", self._method, key, without_secrets(_last_line(error)))
        queue.append(key)

    def give_up(self, key: str, reason: str, *, is_hopeless: bool = False) -> Outcome[Any]:
        """Returns the outcome of a call that failed for good."""
        self._failures.inc(tags={"call": self._method})
        return Outcome(key, None, reason, is_hopeless)

    def next(self) -> tuple[str, int, bool, Any] | None:
        """Makes the calls that there is room for, and returns one that has ended, or None where none is left to wait for.

        Returns its key, the number of its actor, whether it was alone there, and its result.
        """
        self._fill()
        while self._running or (self._returning and (self.waiting or self.suspects)):
            patience = None if self._running else _RETURN_SECONDS
            ended, _ = ray.wait([*self._running, *self._returning], num_returns=1, timeout=patience)
            if not ended:
                return None
            if ended[0] in self._running:
                key, number, room = self._running.pop(ended[0])
                return key, number, room > 1, ended[0]
            number = self._returning.pop(ended[0])
            with contextlib.suppress(RayError):  # lost for good
                ray.get(ended[0])
                self._present.add(number)
            self._fill()
        return None

    def await_return(self, number: int) -> bool:
        """Makes no calls to a lost actor until it is there again: they would fail at once. Returns whether this is news."""
        if number not in self._present:
            return False
        self._present.remove(number)
        self._returning[_make_ready(self._actors[number], self._role)] = number
        return True

    def _fill(self) -> None:
        load = dict.fromkeys(sorted(self._present), 0)
        for _, number, room in self._running.values():
            if number in load:
                load[number] += room
        for number in load:
            if self.suspects and not load[number]:
                load[number] = self._call(number, self.suspects.popleft(), _IN_FLIGHT_PER_WORKER)
        while self.waiting and load and min(load.values()) < self._room:
            number = min(load, key=load.__getitem__)
            load[number] += self._call(number, self.waiting.popleft(), 1)

    def _call(self, number: int, key: str, room: int) -> int:
        self.tries[key] += 1
        call = getattr(self._actors[number], self._method).remote(self._role, *self._calls[key])
        self._running[call] = (key, number, room)
        return room


def _last_line(error: Exception) -> str:
    """Returns the part of a Ray error that says what happened; the rest is Ray's own stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

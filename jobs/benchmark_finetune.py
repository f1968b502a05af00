"""Measures training against a plain sentence-transformers script, on the same pairs in the same order: losses can be compared.

Each system runs in a process of its own, which imports this module and whose memory is measured.
"""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import measurement
from jobs.measurement import ask_all
from jobs.processes import Process, environment, peak_bytes
from jobs.terminal import say, show_table
from matryoshka import storage
from matryoshka.recipe import Recipe
from matryoshka.storage import Place

if TYPE_CHECKING:
    from jobs.benchmark import Settings
    from matryoshka.model import ModelInfo
    from matryoshka.rates import Precision
    from matryoshka.training import Job

Pairs = Mapping[str, Sequence[str]]

_WARM_UP_STEPS = 3
_HELD_OUT_BATCHES = 4
_LAST_SHARE = 4  # the last loss is the mean over a quarter of the steps
_OURS, _ONE_DIM, _PLAIN, _AS_IT_COMES = "ours", "ours_full_dim_alone", "plain_trainer", "plain_trainer_as_it_comes"
_SYSTEMS = (_OURS, _PLAIN, _AS_IT_COMES, _ONE_DIM)
_UNTUNED = "untuned"


@dataclass(frozen=True, slots=True)
class _Work:
    """What every system has to do.

    Attributes:
        info: The model to start from.
        device: ``cpu`` or ``cuda``.
        precision: Of all systems.
        recipe: Its steps are some to warm up, those that are timed, and a last one whose beginning stops the clock.
        pairs: Of all steps, in the order in which they are trained on.
        held_out: Pairs that none is trained on.
        num_tokens: Of the pairs of the timed steps.
        folder: With the pairs; the models go there.
    """

    info: "ModelInfo"
    device: str
    precision: "Precision"
    recipe: Recipe
    pairs: Pairs
    held_out: Pairs
    num_tokens: int
    folder: Path

    @property
    def timed(self) -> range:
        """The steps whose time is taken, counted from 0."""
        return range(_WARM_UP_STEPS, self.recipe.num_steps - 1)

    @property
    def num_timed_pairs(self) -> int:
        """Pairs of these steps."""
        return len(self.timed) * self.recipe.batch_size

    def recipe_of(self, name: str) -> Recipe:
        """Returns the recipe of a system: a few differ in one thing."""
        if name == _ONE_DIM:
            return replace(self.recipe, dims=self.recipe.dims[:1])
        return replace(self.recipe, dropout=None) if name == _AS_IT_COMES else self.recipe

    def target_of(self, name: str) -> Path:
        """Returns where a system writes its model."""
        return self.folder / name / "model"

    @property
    def parts(self) -> Path:
        """Tokenised pairs."""
        return self.folder / "parts"

    @property
    def pair_file(self) -> Path:
        """The pairs themselves."""
        return self.folder / "pairs.parquet"


def measure(settings: "Settings", device: str, output: Place) -> dict[str, Any]:
    """Returns the report of all systems.

    Raises:
        ValueError: The pairs, the model or the options cannot be used.
    """
    from matryoshka import corpus, model

    model.quieten()
    num_ranks = _check_workers(settings, device)
    _, paths = corpus.find_files(settings.pairs or "")
    info = model.describe(settings.model)
    storage.keep_apart(output, info.folder, *paths)
    recipe = _make_recipe(settings, info)
    texts = _read_pairs(paths, settings, recipe)
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}))
        folder = stack.enter_context(measurement.scratch(output))
        work = _plan(settings, info, device, recipe, texts, folder)
        crews = {name: _start(stack, name, work, num_ranks) for name in _SYSTEMS}
        for process in (process for crew in crews.values() for process in crew):
            process.answer()
        turns = {name: functools.partial(ask_all, crew, "train") for name, crew in crews.items()}
        measured = measurement.take_turns(settings.rounds, turns)
        costs = {name: ask_all(crew, "costs") for name, crew in crews.items()}
        held_out = _held_out_losses(work, crews)
    systems = {name: _describe_system(work, name, measured[name], costs[name], held_out[name]) for name in crews}
    return _make_report(settings, work, systems, held_out[_UNTUNED])


def _check_workers(settings: "Settings", device: str) -> int:
    workers = settings.workers or 1
    if device == "cuda" and workers > 1:
        raise ValueError(f"--workers {workers}: on a GPU one process is measured, as the script is one. Leave it out.")
    if settings.batch_size % workers:
        raise ValueError(f"--batch-size {settings.batch_size} cannot be shared by {workers} workers. Pass a multiple of it.")
    return workers


def _make_recipe(settings: "Settings", info: "ModelInfo") -> Recipe:
    from matryoshka import nested

    dims = nested.check_dims(settings.dims or nested.default_dims(info.width), info.width, settings.model)
    num_steps = _WARM_UP_STEPS + settings.steps + 1
    return Recipe(
        dims,
        num_steps,
        settings.batch_size,
        settings.learning_rate,
        seed=settings.seed,
        max_tokens=settings.max_tokens,
        dropout=settings.dropout,
        checkpoint_steps=num_steps,  # so there is none
    )


def _read_pairs(paths: Sequence[Place], settings: "Settings", recipe: Recipe) -> dict[str, list[str]]:
    """Returns the first pairs of some files, as many as are needed, none with a text that stood before it.

    So no system has to keep copies apart or to leave them out, and all sum the same loss over the same batches.
    """
    from matryoshka import corpus
    from matryoshka.examples import key_of

    wanted = (recipe.num_steps + _HELD_OUT_BATCHES) * recipe.batch_size
    found: dict[str, list[str]] = {"query": [], "positive": []}
    seen: set[int] = set()
    batches = (batch for path in paths for batch in corpus.text_batches(path, tuple(found), ()))
    for query, positive in (row for batch in batches for row in zip(*(column.to_pylist() for column in batch), strict=True)):
        keys = {key_of(query or ""), key_of(positive or "")}
        if query and positive and len(keys) == 2 and seen.isdisjoint(keys):
            seen |= keys
            found["query"].append(query)
            found["positive"].append(positive)
        if len(found["query"]) == wanted:
            return found
    raise ValueError(
        f"{settings.pairs}: {len(found['query'])} pairs with texts of their own, but {recipe.num_steps} steps of"
        f" {recipe.batch_size} and a held-out part take {wanted}. Pass fewer --steps, or a smaller --batch-size."
    )


def _plan(
    settings: "Settings", info: "ModelInfo", device: str, recipe: Recipe, texts: Mapping[str, list[str]], folder: Path
) -> _Work:
    """Returns the work, its pairs tokenised for ours, and in the order of ours for the script."""
    from matryoshka import corpus, examples, model, rates, training
    from matryoshka.batches import BatchPlan

    shuffled = np.random.default_rng(recipe.seed).permutation(len(texts["query"]))
    num_pairs = recipe.num_steps * recipe.batch_size
    rows = {"trained": shuffled[:num_pairs], "held_out": shuffled[num_pairs:]}
    chosen = {part: {name: [own[row] for row in rows[part]] for name, own in texts.items()} for part in rows}
    ids = [str(number) for number in range(num_pairs)]
    order = np.concatenate(list(BatchPlan(num_pairs, recipe.batch_size, recipe.seed).batches(0, recipe.num_steps)))
    pairs = {name: [own[row] for row in order] for name, own in chosen["trained"].items()}
    precision = rates.best_precision(device) if settings.precision == "auto" else settings.precision
    work = _Work(info, device, precision, recipe, pairs, chosen["held_out"], 0, folder)
    corpus.write_rows(work.pair_file, {"query_id": ids, "document_id": ids, **chosen["trained"]})
    tokeniser = training.make_tokeniser(model.load(info.folder, "cpu"), recipe.max_tokens)
    examples.tokenise_part(work.pair_file, work.parts, tokeniser, 0)
    lengths = examples.Examples.open([work.parts], 0).lengths
    timed = slice(work.timed.start * recipe.batch_size, work.timed.stop * recipe.batch_size)
    return replace(work, num_tokens=int(lengths[order][timed].sum()))


def _start(stack: contextlib.ExitStack, name: str, work: _Work, num_ranks: int) -> list[Process]:
    """Returns the processes of a system, which begin to get ready."""
    if name in (_PLAIN, _AS_IT_COMES):
        return [stack.enter_context(Process(name, _Script, name, work))]
    work.target_of(name).parent.mkdir()
    return [stack.enter_context(Process(name, _Rank, name, work, rank, num_ranks)) for rank in range(num_ranks)]


@dataclass(slots=True)
class _Stopwatch:
    """Takes the time between the beginnings of two steps, when a GPU has nothing left to do; and notes the losses.

    It observes a run of ours.
    """

    steps: range
    device: str
    marks: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def take_step(self, step: int) -> None:
        """Is told of every step that begins."""
        if step in (self.steps.start, self.steps.stop):
            _wait_for(self.device)
            self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of the steps between the marks."""
        return self.marks[1] - self.marks[0]

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Takes no interest in what is to come."""

    def log(self, entry: Mapping[str, float]) -> None:
        """Takes an entry of the log."""
        self.losses.append(entry["loss"])

    def wants_checkpoint(self, step: int) -> bool:
        """Returns that it wants none."""
        self.take_step(step)
        return False

    def before_writing(self) -> None:
        """Lets it write: there is no other process."""

    def checkpointed(self, step: int) -> None:
        """Is not called, as there are none."""


class _Trained:
    """A system in its process: trains from the same weights, as often as it is asked to."""

    def __init__(self, name: str, work: _Work) -> None:
        from matryoshka import model

        model.quieten()
        self._name, self._work = name, work

    def train(self) -> tuple[float, list[float]]:
        """Trains from the beginning; returns the seconds of the timed steps, and the losses on the way."""
        stopwatch = _Stopwatch(self._work.timed, self._work.device)
        self._train(stopwatch)
        _release(self._work.device)
        return stopwatch.seconds, stopwatch.losses

    def _train(self, stopwatch: _Stopwatch) -> None:
        raise NotImplementedError

    def costs(self) -> dict[str, int]:
        """Returns what this process takes."""
        import torch

        on_gpu = torch.cuda.max_memory_allocated() if self._work.device == "cuda" else 0
        return {"peak_bytes": peak_bytes()[os.getpid()], "peak_gpu_bytes": on_gpu, "threads": torch.get_num_threads()}


class _Rank(_Trained):
    """One rank of ours; where there are several, they meet in a file, and share the processors."""

    def __init__(self, name: str, work: _Work, rank: int, num_ranks: int) -> None:
        import torch
        import torch.distributed

        super().__init__(name, work)
        num_threads = max(measurement.num_cores() // num_ranks, 1)
        torch.set_num_threads(num_threads)
        if num_ranks > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": 0}
            own["OMP_NUM_THREADS"] = num_threads  # else accelerate chooses, with a warning
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in own.items()}}
            meeting = f"file://{work.folder / name}/group"
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)

    def _train(self, stopwatch: _Stopwatch) -> None:
        from matryoshka import training

        training.train_rank(self._job(), stopwatch)

    def _job(self) -> "Job":
        from matryoshka.training import Job

        work, target = self._work, self._work.target_of(self._name)
        recipe = work.recipe_of(self._name)
        return Job(
            work.info.folder,
            (work.parts,),
            (work.pair_file,),
            recipe,
            work.precision,
            "benchmark",
            target.parent,
            target,
            work.device,
        )


class _Script(_Trained):
    """The plain script."""

    def _train(self, stopwatch: _Stopwatch) -> None:
        from matryoshka.plain_trainer import Script

        work = self._work
        script = Script(
            storage.local(work.info.folder), work.recipe_of(self._name), work.precision, in_order=self._name == _PLAIN
        )
        script.train(work.pairs, work.target_of(self._name), stopwatch.take_step, stopwatch.losses.append)


def _wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _release(device: str) -> None:
    """Gives a GPU's memory to the system whose turn is next."""
    if device == "cuda":
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()


def _held_out_losses(work: _Work, names: Iterable[str]) -> dict[str, float]:
    """Returns the loss of every system's model, and of the one that they started from, on pairs that none has seen."""
    from matryoshka.plain_trainer import held_out_loss

    folders = {_UNTUNED: storage.local(work.info.folder), **{name: work.target_of(name) for name in names}}
    return {name: held_out_loss(folder, work.device, work.recipe, work.held_out) for name, folder in folders.items()}


def _describe_system(
    work: _Work, name: str, turns: Sequence[Any], costs: Sequence[Mapping[str, int]], held_out: float
) -> dict[str, Any]:
    """Returns how a system ran, how fast, what it took, and what it learned.

    Args:
        work: What it did.
        name: Of the system.
        turns: Of each round, what each of its processes gave; they step together.
        costs: Of each of its processes.
        held_out: Loss of its model.
    """
    recipe = work.recipe_of(name)
    seconds = [max(own for own, _ in turn) for turn in turns]
    losses = turns[-1][0][1]
    median = statistics.median(seconds)
    return {
        "pairs_per_second": work.num_timed_pairs / median,
        "tokens_per_second": work.num_tokens / median,
        "median_seconds": median,
        "seconds": seconds,
        "losses": losses,
        "last_loss": statistics.fmean(losses[-max(len(losses) // _LAST_SHARE, 1) :]),
        "held_out_loss": held_out,
        "peak_bytes": sum(own["peak_bytes"] for own in costs),
        "peak_gpu_bytes": sum(own["peak_gpu_bytes"] for own in costs) or None,
        "dims": recipe.dims,
        "dropout": "the model's own" if recipe.dropout is None else recipe.dropout,
        "processes": len(costs),
        "threads": costs[0]["threads"],
    }


_NOTES = (
    "ours: tokenised beforehand, packed; plain_trainer: a script with sentence-transformers' trainer, tokenised and padded on the"
    " way; the same pairs in the same batches, the same loss, precision, optimiser, learning rates and dropout",
    "plain_trainer_as_it_comes: the script with the model's own dropout, the trainer's own schedule, and its own order of the"
    " same pairs from the sampler that keeps copies apart",
    "ratios: pairs per second of ours over those of the peer, from medians; higher is better",
    "matryoshka_overhead: pairs per second of ours with the full dim alone over those with all dims",
    f"the first {_WARM_UP_STEPS} steps and the last are in no time; nor is loading, tokenising ours beforehand, and saving",
    "last_loss: mean over the last quarter of the steps, as trained: before each step, on its own batch, with dropout if any",
    f"held_out_loss: over all dims, on {_HELD_OUT_BATCHES} batches that none is trained on, in float32, without dropout, by the"
    " same code for all",
    "no text occurs twice in the pairs, so that nothing has to be masked or kept apart",
    "peak_bytes: the largest RSS of each process, added up; peak_gpu_bytes: what torch had allocated at most",
)


def _make_report(
    settings: "Settings", work: _Work, systems: Mapping[str, Mapping[str, Any]], untuned_loss: float
) -> dict[str, Any]:
    rates = {name: system["pairs_per_second"] for name, system in systems.items()}
    ratios = {name: rates[_OURS] / rate for name, rate in rates.items() if name in (_PLAIN, _AS_IT_COMES)}
    if _ONE_DIM in rates:
        ratios["matryoshka_overhead"] = rates[_ONE_DIM] / rates[_OURS]
    return {
        **measurement.begin_report(settings, work.device, ("accelerate", "datasets")),
        "model": {"name": settings.model, "fingerprint": work.info.fingerprint, "held_out_loss": untuned_loss},
        "precision": work.precision,
        "pairs": {
            "num_steps": work.recipe.num_steps,
            "num_timed_steps": len(work.timed),
            "batch_size": work.recipe.batch_size,
            "num_timed_tokens": work.num_tokens,
            "num_held_out": len(work.held_out["query"]),
        },
        "notes": [*_NOTES, *measurement.caution(settings.rounds)],
        "systems": systems,
        "ratios": ratios,
    }


def show(report: Mapping[str, Any]) -> None:
    """Prints what was measured."""
    speeds = [["system", "pairs/s", "ours is", "memory", "how"]]
    losses = [["system", "last loss", "held-out loss", "dropout"]]
    for name, system in report["systems"].items():
        ratio = f"{report['ratios'][name]:.2f} x" if name in report["ratios"] else ""
        memory = f"{(system['peak_gpu_bytes'] or system['peak_bytes']) / 1e9:.2f} GB"
        how = f"{len(system['dims'])} dims, {system['processes']} x {system['threads']} threads"
        speeds.append([name, f"{system['pairs_per_second']:,.1f}", ratio, memory, how])
        losses.append([name, f"{system['last_loss']:.4f}", f"{system['held_out_loss']:.4f}", str(system["dropout"])])
    pairs = report["pairs"]
    say(
        f"{pairs['num_timed_steps']} steps of {pairs['batch_size']} pairs, {pairs['num_timed_tokens']:,} tokens,"
        f" {report['precision']}, {measurement.place_of(report)}"
    )
    show_table("speed", speeds, text_columns=(4,))
    show_table("losses", losses, text_columns=(3,))
    if "matryoshka_overhead" in report["ratios"]:
        say(f"benchmark: all dims take {report['ratios']['matryoshka_overhead'] - 1:+.1%} time over the full one alone")
    say(f"benchmark: before training the held-out loss was {report['model']['held_out_loss']:.4f}")

"""Measures the embed path against other software: text to vectors.

Each peer runs in a process of its own, which imports this module and whose memory is measured. So what peers do not need, such
as Ray, is imported within functions.
"""

import contextlib
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jobs import measurement
from jobs.measurement import ask_all
from jobs.processes import Process, environment, family_of, peak_bytes
from jobs.terminal import say, show_table
from matryoshka import storage
from matryoshka.storage import Place

if TYPE_CHECKING:
    from jobs.benchmark import Settings
    from jobs.cluster import Session
    from matryoshka.artifacts import Receipt
    from matryoshka.calibration import Calibration
    from matryoshka.corpus import Corpus
    from matryoshka.model import ModelInfo
    from matryoshka.peers import Setup
    from matryoshka.units import Unit

Vectors = npt.NDArray[np.floating[Any]]
_Measured = Mapping[str, Sequence[Any]]  # (seconds, vectors) of each round by system, and the engines' rates

_UNITS_PER_WORKER = 4
_MOST_UNIT_ROWS = 20_000  # the embed job's own
_SAMPLE_TEXTS = 1_000
_MANY_DOCUMENTS = 10_000_000  # what is compared is the rate of a long run, so what ours prepares for one is prepared
_COMPARED = 512  # documents whose vectors are held against the reference, which also warm a peer up
_CEILING_SECONDS = 2.0
_FORWARD, _CEILING = "forward", "ceiling"


def measure(settings: "Settings", device: str, output: Place) -> dict[str, Any]:
    """Returns the report of all systems.

    Raises:
        ValueError: The corpus or the model cannot be used, or a cluster is named.
    """
    from jobs import cluster
    from matryoshka import corpus, model

    cluster.check_alone()
    source = corpus.inspect(settings.corpus or "", corpus.Columns(settings.id_column, settings.text_column))
    info = model.describe(settings.model)
    storage.keep_apart(output, info.folder, *(source.path_of(file.name) for file in source.files))
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}))
        session = stack.enter_context(cluster.connected())
        scratch = stack.enter_context(measurement.scratch(output))
        work = _plan(settings, source, info, device)
        ours = _Ours(session, work, settings, scratch)
        setups, not_run = _prepare_peers(work, scratch)
        peers = {name: stack.enter_context(Process(name, _PeerRun, setup, work.all_texts)) for name, setup in setups.items()}
        crew = [stack.enter_context(Process("the forward pass", _Engine, *arguments)) for arguments in ours.engines()]
        for process in [*peers.values(), *crew]:
            process.answer()
        ours.warm_up()
        measured = measurement.take_turns(settings.rounds, _turns(ours, peers, crew))
        systems = _describe_systems(work, ours, setups, peers, measured)
    return _make_report(settings, work, systems, measured, ours.num_flops, not_run)


@dataclass(frozen=True, slots=True)
class _Work:
    """What every system has to do: the documents, and how they are cut for ours."""

    source: "Corpus"
    info: "ModelInfo"
    device: str
    num_workers: int
    units: "list[Unit]"
    texts: list[list[str]]

    @property
    def all_texts(self) -> list[str]:
        """The documents in one list, in the order of the corpus."""
        return [text for texts in self.texts for text in texts]


def _plan(settings: "Settings", source: "Corpus", info: "ModelInfo", device: str) -> _Work:
    """Returns the first rows of a corpus, in at least four units per worker."""
    from jobs import cluster
    from matryoshka.units import plan_units

    if cluster.capacity().device != device:
        raise RuntimeError(f"Ray was started for {cluster.capacity().device}, torch computes on {device}.")
    default = 1 if device == "cuda" else cluster.capacity().num_cpus  # the peers have one GPU as well
    num_workers = cluster.check_workers(settings.workers) or default
    files, missing = [], settings.documents
    for file in source.files:
        files.append(dataclasses.replace(file, num_rows=min(file.num_rows, missing)))
        missing -= files[-1].num_rows
    num_rows = settings.documents - missing
    unit_rows = min(num_rows // (_UNITS_PER_WORKER * num_workers), _MOST_UNIT_ROWS)
    units = plan_units(files, max(unit_rows, 1))
    texts = [source.read(unit)[1] for unit in units]
    if not any(texts):
        raise ValueError(f"{settings.corpus}: no text in the first {num_rows} rows. Pass a larger --documents.")
    return _Work(source, info, device, num_workers, units, texts)


class _Ours:
    """This project's embed path: Parquet files in, Parquet files out, over Ray."""

    def __init__(self, session: "Session", work: _Work, settings: "Settings", scratch: Path) -> None:
        from matryoshka.calibration import Choice

        self._work, self._scratch = work, scratch
        choice = Choice(
            None if settings.precision == "auto" else settings.precision,
            None,
            None if settings.compile == "auto" else settings.compile == "on",
        )
        self.how = session.calibrate(work.info, choice, work.all_texts[:_SAMPLE_TEXTS], _MANY_DOCUMENTS)
        self._pool = session.encoders(
            work.info, self.how.precision, self.how.tokens_per_step, work.num_workers, is_compiled=self.how.is_compiled
        )
        self.start_seconds = 0.0
        self._receipts: dict[str, Receipt] = {}

    def engines(self) -> list[tuple[Any, ...]]:
        """Returns the arguments of one ``_Engine`` per worker, with its share of the documents."""
        common = (self._work.info.folder, self._work.device, self.how)
        return [(*common, self._work.texts[first :: self._work.num_workers]) for first in range(self._work.num_workers)]

    def warm_up(self) -> None:
        """Starts the workers, which takes them ``start_seconds``, and has each of them embed one unit."""
        start = time.perf_counter()
        self._pool.start()
        self.start_seconds = time.perf_counter() - start
        self._embed(self._work.units[: self._work.num_workers])

    def encode(self) -> tuple[float, Vectors]:
        """Embeds all documents; returns the seconds that it took, and the vectors of the first of them, from disk.

        Shapes: vectors [N, D].
        """
        from matryoshka import vectors

        start = time.perf_counter()
        folder = self._embed(self._work.units)
        seconds = time.perf_counter() - start
        parts, num_read = [], 0
        for unit in self._work.units:
            if num_read < _COMPARED:
                parts.append(vectors.read_unit(folder / self._receipts[unit.key].files[0].path)[1].copy())
                num_read += len(parts[-1])
        storage.remove(folder)
        return seconds, np.concatenate(parts)[:_COMPARED]

    def _embed(self, units: "list[Unit]") -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        titles = {unit.key: unit.title for unit in units}
        for outcome in self._pool.embed(self._work.source, units, folder, attempts=1):
            if outcome.result is None:
                raise RuntimeError(f"{titles[outcome.key]} could not be embedded ({outcome.error}).")
            self._receipts[outcome.key] = outcome.result
        return folder

    @property
    def num_tokens(self) -> int:
        """Real tokens of all documents: what the model's tokenizer gives, cut to its window."""
        return sum(receipt.details["num_tokens"] for receipt in self._receipts.values())

    @property
    def num_flops(self) -> float:
        """Operations of the matrix products that these tokens need."""
        return sum((receipt.details["num_flops"] for receipt in self._receipts.values()), 0.0)


def _prepare_peers(work: _Work, scratch: Path) -> "tuple[dict[str, Setup], dict[str, str]]":
    """Returns how each peer runs, and why the others do not."""
    from matryoshka.peers import PEERS, prepare, why_not

    setups = {"default": prepare("default", storage.local(work.info.folder), work.device, [], scratch)}  # nothing to measure
    not_run = {name: reason for name in PEERS if (reason := why_not(name, work.device))}
    for name in [name for name in PEERS if name not in (*setups, *not_run)]:
        say(f"benchmark: preparing {name}")
        folder = scratch / name
        folder.mkdir()
        try:
            with Process(name, prepare, name, storage.local(work.info.folder), work.device, work.all_texts, folder) as process:
                setups[name] = process.answer()
        except RuntimeError as error:
            if not PEERS[name].packages:
                raise
            not_run[name] = f"could not be prepared ({str(error).splitlines()[0]})"
    return setups, not_run


class _PeerRun:
    """A peer in its process, with its documents in memory, warmed up."""

    def __init__(self, setup: "Setup", texts: list[str]) -> None:
        from matryoshka import model
        from matryoshka.peers import PeerEncoder

        model.quieten()
        self._encoder, self._texts = PeerEncoder(setup), texts
        self._encoder.encode(texts[:_COMPARED])

    def encode(self) -> tuple[float, Vectors]:
        """Encodes all documents; returns the seconds that it took, and the vectors of the first of them.

        Shapes: vectors [N, D].
        """
        start = time.perf_counter()
        vectors = self._encoder.encode(self._texts)
        return time.perf_counter() - start, vectors[:_COMPARED].copy()

    def costs(self) -> dict[str, int]:
        """Returns what this process takes."""
        return {"peak_bytes": peak_bytes()[os.getpid()], "processes": 1, "threads": self._encoder.num_threads}


class _Engine:
    """What one of our workers does without reading, tokenising and writing; and how fast its processor multiplies."""

    def __init__(self, folder: Path, device: str, how: "Calibration", texts: list[list[str]]) -> None:
        import torch

        from matryoshka import model
        from matryoshka.encode import Encoder

        model.quieten()
        torch.set_num_threads(1)  # as Ray does for its workers
        self._device, self._precision = device, how.precision
        self._encoder = Encoder(folder, device, how.precision, how.tokens_per_step, is_compiled=how.is_compiled)
        self._tokens = [self._encoder.tokenise(part, "document") for part in texts if part]
        self.tokens_per_second()

    def tokens_per_second(self) -> float:
        """Returns the real tokens of all its documents over the seconds that computing their vectors takes."""
        start = time.perf_counter()
        num_tokens = sum(self._encoder.compute(tokens, "document").num_tokens for tokens in self._tokens)
        return num_tokens / (time.perf_counter() - start)

    def flops_per_second(self) -> float:
        """Returns the rate of a large matrix product, measured for so long that all processes measure together."""
        from matryoshka import rates as machine

        rates: list[float] = []
        start = time.perf_counter()
        while not rates or time.perf_counter() - start < _CEILING_SECONDS:
            rates.append(machine.matrix_rate(self._device, self._precision))
        return statistics.median(rates)


def _turns(ours: _Ours, peers: Mapping[str, Process], crew: Sequence[Process]) -> dict[str, Callable[[], Any]]:
    """Returns what is done in each round: every system's work, then the rates of all engines together."""
    return {
        "ours": ours.encode,
        **{name: functools.partial(_encode, process) for name, process in peers.items()},
        _FORWARD: lambda: sum(ask_all(crew, "tokens_per_second")),
        _CEILING: lambda: sum(ask_all(crew, "flops_per_second")),
    }


def _encode(peer: Process) -> tuple[float, Vectors]:
    turn: tuple[float, Vectors] = ask_all([peer], "encode")[0]
    return turn


def _describe_systems(
    work: _Work, ours: _Ours, setups: "Mapping[str, Setup]", peers: Mapping[str, Process], measured: _Measured
) -> dict[str, dict[str, Any]]:
    """Returns, for each system, how it ran, how fast, what it took, and how near its vectors are to float32."""
    peaks = peak_bytes()
    pids = family_of(b"_EncoderActor")
    own_how = {
        "precision": ours.how.precision,
        "tokens_per_step": ours.how.tokens_per_step,
        "is_compiled": ours.how.is_compiled,
        "start_seconds": ours.start_seconds,
    }
    own_costs = {"peak_bytes": sum(peaks.get(pid, 0) for pid in pids), "processes": len(pids), "threads": 1}
    facts: dict[str, dict[str, Any]] = {"ours": {**own_how, **own_costs}}
    for name, process in peers.items():
        how = {"precision": setups[name].precision, "batch_size": setups[name].batch_size}
        facts[name] = {**how, **ask_all([process], "costs")[0]}
    num_documents, num_tokens = len(work.all_texts), ours.num_tokens
    systems = {}
    reference = measured["default"][-1][1]
    for name, own in facts.items():
        seconds = [turn[0] for turn in measured[name]]
        median = statistics.median(seconds)
        cosines = _cosines(measured[name][-1][1], reference)
        systems[name] = {
            "documents_per_second": num_documents / median,
            "tokens_per_second": num_tokens / median,
            "median_seconds": median,
            "seconds": seconds,
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
            **own,
        }
    return systems


def _cosines(left: Vectors, right: Vectors) -> npt.NDArray[np.float64]:
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / norms)


def _make_report(
    settings: "Settings",
    work: _Work,
    systems: Mapping[str, Mapping[str, Any]],
    measured: _Measured,
    num_flops: float,
    not_run: Mapping[str, str],
) -> dict[str, Any]:
    from matryoshka.peers import PEERS

    ours = systems["ours"]
    ratios = {
        name: ours["documents_per_second"] / system["documents_per_second"] for name, system in systems.items() if name != "ours"
    }
    forward = statistics.median(measured[_FORWARD])
    ceiling = statistics.median(measured[_CEILING])
    ratios["ceiling_share"] = num_flops / ours["median_seconds"] / ceiling
    ratios["pipeline_share"] = ours["tokens_per_second"] / forward
    packages = [package for peer in PEERS.values() for package in peer.packages]
    return {
        **measurement.begin_report(settings, work.device, packages),
        "model": {"name": settings.model, "fingerprint": work.info.fingerprint},
        "documents": {
            "corpus": work.source.fingerprint,
            "num_documents": len(work.all_texts),
            "num_tokens": round(ours["tokens_per_second"] * ours["median_seconds"]),
            "num_units": len(work.units),
        },
        "notes": [*_NOTES, *measurement.caution(settings.rounds)],
        "systems": systems,
        "not_run": not_run,
        "ratios": ratios,
        "forward": {"tokens_per_second": forward, "rounds": measured[_FORWARD]},
        "ceiling": {"flops_per_second": ceiling, "rounds": measured[_CEILING]},
    }


_NOTES = (
    "ours: text in Parquet files to float16 vectors in Parquet files, synced to disk; peers: text in memory to a NumPy array",
    "ratios: documents per second of ours over those of the peer, from medians; higher is better",
    f"cosines: to sentence-transformers in float32 (default), on the first {_COMPARED} documents",
    "tokens: those of the model's tokenizer, cut to its window; padding does not count",
    "peak_bytes: the largest RSS of each process that does the work, added up; pages that processes share count in each",
    "start_seconds: until our workers were ready, compilers' caches warm; in no rate, as the peers' loading is in none",
    "tuned: sentence-transformers in the best precision and batch size, not compiled; ours is compiled where that pays",
    "forward: our encoders on texts that are tokenised already, as many processes as workers, all at once",
    "ceiling: large matrix products in our precision, as many processes as workers, all at once",
)


def show(report: Mapping[str, Any]) -> None:
    """Prints what was measured, and says what was not."""
    speeds = [["system", "documents/s", "tokens/s", "ours is", "memory"]]
    vectors = [["system", "cosine: mean", "least", "how"]]
    for name, system in report["systems"].items():
        ratio = f"{report['ratios'][name]:.2f} x" if name in report["ratios"] else ""
        rates = (f"{system['documents_per_second']:,.0f}", f"{system['tokens_per_second']:,.0f}")
        speeds.append([name, *rates, ratio, f"{system['peak_bytes'] / 1e9:.2f} GB"])
        vectors.append([name, f"{system['cosine_mean']:.5f}", f"{system['cosine_min']:.5f}", _describe_setup(system)])
    documents, ratios = report["documents"], report["ratios"]
    say(f"{documents['num_documents']:,} documents, {documents['num_tokens']:,} tokens, {measurement.place_of(report)}")
    show_table("speed", speeds)
    show_table("vectors against float32", vectors, text_columns=(3,))
    say(
        f"benchmark: ours reaches {ratios['pipeline_share']:.0%} of the rate of its forward pass alone,"
        f" and {ratios['ceiling_share']:.0%} of that of large matrix products"
    )
    for name, reason in report["not_run"].items():
        say(f"benchmark: {name} was not measured: {reason}")


def _describe_setup(system: Mapping[str, Any]) -> str:
    step = f"batch {system['batch_size']}" if "batch_size" in system else f"{system['tokens_per_step']:,} tokens a step"
    compiled = ", compiled" if system.get("is_compiled") else ""
    return f"{system['precision']}{compiled}, {step}, {system['processes']} x {system['threads']} threads"

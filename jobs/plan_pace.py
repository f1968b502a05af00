"""What a plan looks at: a sample of the corpus, and how fast a worker is."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import cluster, embed, measurement
from jobs.cluster import Encoders, Session
from matryoshka import corpus, storage
from matryoshka.calibration import COMPILING_MAY_PAY_AFTER, Calibration, Choice
from matryoshka.corpus import Corpus
from matryoshka.estimates import Pace, Part, Size, size_up
from matryoshka.model import ModelInfo
from matryoshka.rates import TOKENS_PER_STEP
from matryoshka.units import plan_units, sample_units

if TYPE_CHECKING:
    from jobs.plan import Settings

_PLACES, _PLACE_ROWS = 32, 128  # of the sample
_FIRST_TEXTS = 32  # per worker, to find out how many more can be done
_MEASURED_SECONDS = (0.0, 1.0, 6.0)  # the last of these counts
_CALLS_PER_WORKER = 4
_CALIBRATE_SECONDS = 12.0  # where it is not measured: MiniLM on a core with AMX, 2026-11-26


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of a corpus: rows and texts of each place, and the bytes of an id's text, on average."""

    num_rows: list[int]
    texts: list[list[str]]
    id_bytes: float

    @classmethod
    def read(cls, source: Corpus) -> "Sample":
        """Returns the rows at places all over a corpus.

        Raises:
            ValueError: No text is there.
        """
        units = sample_units(source.files, _PLACES, _PLACE_ROWS)
        found = [corpus.read_documents(source.path_of(unit.name), source.columns, unit.start, unit.stop) for unit in units]
        sizes = [len(name.encode()) for ids, _ in found for name in ids]
        if not sizes:
            looked_at = sum(unit.num_rows for unit in units)
            raise ValueError(f"{source.root}: no text in {looked_at} of {source.num_rows} rows. Check --text-column.")
        return cls([unit.num_rows for unit in units], [texts for _, texts in found], sum(sizes) / len(sizes))

    def shuffled(self) -> list[str]:
        """Returns all texts in an order of no meaning: a file may be sorted by length."""
        texts = list(itertools.chain.from_iterable(self.texts))
        return [texts[number] for number in np.random.default_rng(0).permutation(len(texts))]

    def count(self, pool: Encoders) -> list[Part]:
        """Returns what the model is given of each place."""
        counts = pool.count_tokens(self.texts)
        return [Part(rows, len(texts), *own) for rows, texts, own in zip(self.num_rows, self.texts, counts, strict=True)]


@dataclass(frozen=True, slots=True)
class Extent:
    """What is known of a corpus before any text is looked at: rows, bytes of its files, and units."""

    num_rows: int
    num_bytes: float
    num_units: int

    @classmethod
    def of(cls, source: Corpus, num_rows: int | None, unit_rows: int) -> "Extent":
        """Returns the extent of a corpus, or of one with so many rows like its own.

        Whether that would be many files like these or a few large ones, nobody knows: its units are taken to be full.
        """
        num_bytes = sum(size for _, size, _ in source.stamps)
        if num_rows is None:
            return cls(source.num_rows, num_bytes, len(plan_units(source.files, unit_rows)))
        return cls(num_rows, num_bytes * num_rows / source.num_rows, -(-num_rows // unit_rows))


@dataclass(frozen=True, slots=True)
class Known:
    """How fast a worker is, as somebody says.

    Attributes:
        per_second: Tokens, or documents.
        is_tokens: Which of them.
        source: Who says it.
        is_compiled: Whether the model was compiled for it.
    """

    per_second: float
    is_tokens: bool
    source: str
    is_compiled: bool = False


def find_known(settings: "Settings", info: ModelInfo, hardware: Mapping[str, Any], notes: list[str]) -> Known | None:
    """Returns how fast a worker is, if that was given; what is wrong with a benchmark is added to ``notes``.

    Raises:
        ValueError: What is to be a benchmark's report is none.
    """
    if settings.tokens_per_second:
        return Known(settings.tokens_per_second, True, "given")
    if settings.documents_per_second:
        return Known(settings.documents_per_second, False, "given")
    if not settings.benchmark:
        return None
    path = storage.place(settings.benchmark)
    found = measurement.read_report(path, "benchmark")
    try:
        ours, place = found["systems"]["ours"], found["hardware"]
        num_workers = found["settings"]["workers"] or (1 if place["device"] == "cuda" else place["cores"])
        known = Known(ours["tokens_per_second"] / num_workers, True, f"{path} of {found['date']}", ours["is_compiled"])
        differing = [name for name in ("device", "gpu", "cpu") if place[name] != hardware[name]]
        reasons = [f"its {name} is {place[name]}, here it is {hardware[name]}" for name in differing]
        reasons += ["it is of another model"] if found["model"]["fingerprint"] != info.fingerprint else []
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a report of benchmark encode. Pass one, or leave --benchmark out.") from None
    if reasons:
        notes.append(f"{path} was not used ({'; '.join(reasons)}): the pace was measured now")
    return None if reasons else known


def find_size_and_pace(
    settings: "Settings",
    session: Session,
    info: ModelInfo,
    sample: Sample,
    known: Known | None,
    extent: Extent,
    num_workers: int,
) -> tuple[Size, Pace]:
    """Returns how large a corpus is for a model, and how fast a worker is: as is known, or measured on as many as there are."""
    there, texts, start = cluster.capacity(), sample.shuffled(), time.perf_counter()
    num_started = 1 if known else min(num_workers, there.default_workers)
    if known:
        best, calibrate_seconds = Calibration("float32", TOKENS_PER_STEP[there.device]), _CALIBRATE_SECONDS
    else:
        best = embed.calibrate(session, info, _choice(settings), extent.num_rows, num_workers, lambda: texts[: embed.SAMPLE_ROWS])
        calibrate_seconds = time.perf_counter() - start
    pool = session.encoders(info, best.precision, best.tokens_per_step, num_started, settings.long, is_compiled=best.is_compiled)
    start = time.perf_counter()
    pool.start()
    load_seconds = time.perf_counter() - start
    size = size_up(sample.count(pool), extent.num_rows, extent.num_bytes, extent.num_units)
    if known:
        per_document = 1.0 if known.is_tokens else size.tokens.value / size.documents.value
        return size, Pace(known.per_second * per_document, known.source, known.is_compiled, 0.0, calibrate_seconds, load_seconds)
    per_second = _measure(pool, texts, num_started) / num_started
    source = f"measured now, {num_started} at once, {best.precision}{', compiled' if best.is_compiled else ''}"
    return size, Pace(per_second, source, best.is_compiled, 0.0, calibrate_seconds, load_seconds)


def _choice(settings: "Settings") -> Choice:
    precision = None if settings.precision == "auto" else settings.precision
    return Choice(precision, None, None if settings.compile == "auto" else settings.compile == "on")


def is_too_short(pace: Pace, seconds: float) -> bool:
    """Returns whether a pace is that of a compiled model, and a worker has too little to do for one."""
    return pace.is_compiled and seconds < COMPILING_MAY_PAY_AFTER


def _measure(pool: Encoders, texts: Sequence[str], num_workers: int) -> float:
    """Returns the tokens per second of all workers together, on as many texts as they do in some seconds."""
    rate = taken = 0.0
    own: list[str] = []
    for seconds in _MEASURED_SECONDS:
        count = num_workers * max(math.ceil(rate * seconds), _FIRST_TEXTS)
        own = list(itertools.islice(itertools.cycle(texts), count))
        start = time.perf_counter()
        pool.encode(own, "document", -(-count // (_CALLS_PER_WORKER * num_workers)))
        taken = time.perf_counter() - start
        rate = count / num_workers / taken
    return pool.count_tokens([own])[0][0] / taken

"""What a corpus costs before anything is spent on it: arithmetic over a sample of it, a pace, and measured constants."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A driver's own work, by tests/scale.py with 20,000 and 100,000 units (seconds of a core of an Intel Xeon, 2026-11-26): its
# libraries take 650 MiB; a unit takes 2.7 KB in a first run, and 4.5 KB where a finished run is taken up again.
_DRIVER_BYTES = 700e6
_UNIT_BYTES, _UNIT_MANIFEST_BYTES = 4_500.0, 600.0
_PLAN_SECONDS, _RECORD_SECONDS, _READ_SECONDS = 4e-6, 64e-6, 72e-6  # a unit: planned, recorded and committed, read again
_FLUSH_SECONDS = 2.0  # between two files of the journal
_EXERCISED_UNITS, _EXERCISED_SHARDS = 100_000, 16

# corpus.inspect, in seconds of a core (same machine and day): 9 ns a byte of posts in zstd, 15 of long answers; and for 1,000,000
# posts 0.3 s to sort hashes of ids, and 0.16 s to read ids, once for every so many rows.
_CHECK_SECONDS_PER_BYTE, _SORT_SECONDS, _HASH_SECONDS, _HASHED_AT_ONCE = 12e-9, 0.3e-6, 0.16e-6, 2**25

# Building indexes of 60,000 to 1,000,000 x 384 or 1,024 vectors, dense and in lists (a core of an Intel Xeon with AMX, all cores
# at work, 2026-11-27): from what is read and written, what is read to learn from, and what is multiplied for lists.
_BUILD_SECONDS_PER_BYTE, _SHARD_SECONDS = 4e-9, 0.2
_SAMPLE_SECONDS_PER_BYTE, _TRAIN_SECONDS = 1.5e-9, 1.5
_LIST_FLOPS_PER_SECOND, _CLUSTERING_PASSES = 150e9, 10

SECONDS = "seconds"
"""Begins the names of figures that are times."""

_QUANTILE = 1.96
_HOUR, _GB = 3_600.0, 1e9
_SECONDS_OF_CHANCE = 10.0  # by which two equal runs differ on a busy machine, were it only in starting


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and where it lies with a confidence of 95%."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Interval":
        """Returns the estimate of a multiple."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, offset: float) -> "Interval":
        """Returns the estimate of a sum with something known."""
        return Interval(self.value + offset, self.low + offset, self.high + offset)


@dataclass(frozen=True, slots=True)
class Part:
    """One place of a corpus that a sample looked at.

    Attributes:
        num_rows: Rows, those without text included.
        num_documents: Rows with text.
        num_tokens: What the model is given of them: cut to its window, special tokens included.
        num_long: Documents beyond the window.
    """

    num_rows: int
    num_documents: int
    num_tokens: int
    num_long: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """How large a corpus is for a model.

    Attributes:
        num_rows: Rows, those without text included.
        num_bytes: Of its files.
        num_units: Of work.
        num_sampled: Rows that were looked at.
        documents: Rows with text.
        tokens: That the model is given.
        long_share: Of the documents, those beyond the model's window.
    """

    num_rows: int
    num_bytes: float
    num_units: int
    num_sampled: int
    documents: Interval
    tokens: Interval
    long_share: float

    @property
    def num_empty(self) -> float:
        """Rows without text."""
        return self.num_rows - self.documents.value


def size_up(parts: Sequence[Part], num_rows: int, num_bytes: float, num_units: int) -> Size:
    """Returns the size of a corpus, given a sample of it.

    Raises:
        ValueError: There is no text in the sample, or it is too small to speak for the corpus.
    """
    num_sampled, num_documents = (sum(getattr(part, name) for part in parts) for name in ("num_rows", "num_documents"))
    if not num_documents:
        raise ValueError(f"corpus: no text in the sample ({num_sampled} of {num_rows} rows). Check --text-column.")
    if num_sampled < num_rows and len(parts) < 2:
        raise ValueError(f"corpus: a sample of {num_sampled} row cannot speak for {num_rows}. Pass a corpus with more rows.")
    documents, tokens = (
        estimate_total([(part.num_rows, float(getattr(part, name))) for part in parts], num_rows)
        for name in ("num_documents", "num_tokens")
    )
    long_share = sum(part.num_long for part in parts) / num_documents
    return Size(num_rows, num_bytes, num_units, num_sampled, documents, tokens, long_share)


def estimate_total(parts: Sequence[tuple[int, float]], num_rows: int) -> Interval:
    """Returns the total over all rows, given (rows, amount) of some places among them; of all rows, it is exact.

    Documents at one place are alike, so that places are the sample, not rows: the ratio estimator for clusters.

    Source: Cochran 1977, Sampling Techniques, 3rd edition, section 9A.1 (clusters of unequal size, ratio to size).

    >>> estimate_total([(2, 10.0), (2, 30.0)], 4)
    Interval(value=40.0, low=40.0, high=40.0)
    """
    seen = sum(rows for rows, _ in parts)
    mean = sum(amount for _, amount in parts) / seen
    if seen >= num_rows:
        return Interval(mean * num_rows, mean * num_rows, mean * num_rows)
    degrees = len(parts) - 1
    squares = sum((amount - mean * rows) ** 2 for rows, amount in parts)
    error = math.sqrt(squares * len(parts) / degrees * (1 - seen / num_rows)) / seen
    reach = _student(degrees) * error
    return Interval(mean * num_rows, max(mean - reach, 0.0) * num_rows, (mean + reach) * num_rows)


def _student(degrees: int) -> float:
    """Returns the quantile of Student's distribution that leaves 2.5% above it; 3% too low at 2 degrees, exact at many.

    Source: Abramowitz and Stegun 1964, equation 26.7.5.
    """
    normal = _QUANTILE
    first = (normal**3 + normal) / 4
    second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    third = (3 * normal**7 + 19 * normal**5 + 17 * normal**3 - 15 * normal) / 384
    return normal + first / degrees + second / degrees**2 + third / degrees**3


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast one worker is, and what a run spends before its first unit.

    Attributes:
        tokens_per_second: Of one worker, while as many others work as will.
        source: Where this is known from.
        is_compiled: Whether the model was compiled for it.
        connect_seconds: Until the cluster can be asked.
        calibrate_seconds: For choosing how to run.
        load_seconds: Until all workers, which start together, have their models.
    """

    tokens_per_second: float
    source: str
    is_compiled: bool = False
    connect_seconds: float = 0.0
    calibrate_seconds: float = 0.0
    load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Embedding:
    """What embedding takes.

    Attributes:
        num_workers: How many there are.
        work_seconds: Of all workers together, at the work itself.
        check_seconds: Reading the corpus through, before a worker is taken.
        start_seconds: From there to the first unit.
        embed_seconds: From there to the last one.
        commit_seconds: The driver's own work on plan, receipts and manifest.
        wall_seconds: All of these.
        held_hours: Workers times the hours that they are held.
    """

    num_workers: int
    work_seconds: Interval
    check_seconds: float
    start_seconds: float
    embed_seconds: Interval
    commit_seconds: float
    wall_seconds: Interval
    held_hours: Interval


def estimate_embedding(size: Size, pace: Pace, num_workers: int) -> Embedding:
    """Returns what embedding a corpus takes.

    Units are about equally large, so that a run has as many waves of them as the most loaded worker has units.

    """
    work = size.tokens.times(1 / pace.tokens_per_second)
    embed = work.times(-(-size.num_units // num_workers) / size.num_units)
    check = check_seconds(size)
    start = pace.connect_seconds + pace.calibrate_seconds + pace.load_seconds
    commit = size.num_units * (_PLAN_SECONDS + _RECORD_SECONDS)
    held = embed.plus(pace.load_seconds).times(num_workers / _HOUR)
    return Embedding(num_workers, work, check, start, embed, commit, embed.plus(check + start + commit), held)


def check_seconds(size: Size) -> float:
    """Returns the seconds of a core in which a driver checks a corpus: texts are read once, ids once for every 2**25 rows."""
    num_passes = -(-size.num_rows // _HASHED_AT_ONCE)
    return size.num_bytes * _CHECK_SECONDS_PER_BYTE + size.num_rows * (_SORT_SECONDS + _HASH_SECONDS * num_passes)


def workers_within(size: Size, pace: Pace, seconds: float) -> int | None:
    """Returns the fewest workers that embed a corpus in so many seconds, or None where one unit alone takes longer."""
    unit_seconds = size.tokens.value / size.num_units / pace.tokens_per_second
    num_waves = math.floor((seconds - pace.load_seconds) / unit_seconds)
    return -(-size.num_units // num_waves) if num_waves > 0 else None


@dataclass(frozen=True, slots=True)
class Shards:
    """What an index weighs.

    Attributes:
        num_shards: Each is held by a process.
        coarse_bytes: Of one document in the coarse index.
        vector_bytes: Of one full vector.
        id_bytes: Of one id.
        num_lists: Into which documents are put; 0: there are none.
        dim: Of coarse vectors.
        num_sampled: Documents that lists are learned from, at most.
    """

    num_shards: int
    coarse_bytes: float
    vector_bytes: float
    id_bytes: float
    num_lists: int = 0
    dim: int = 0
    num_sampled: int = 0

    @property
    def num_bytes(self) -> float:
        """Of one document on disk."""
        return self.coarse_bytes + self.vector_bytes + self.id_bytes


@dataclass(frozen=True, slots=True)
class Index:
    """What building and holding an index takes; shards are built side by side.

    Attributes:
        num_shards: How many there are.
        work_seconds: Of all processes together.
        wall_seconds: With as many processes as workers.
        num_bytes: On disk.
        shard_documents: In one shard.
        shard_memory_bytes: What a process that holds a shard must have in memory: coarse index and ids.
        shard_mapped_bytes: What it maps from disk and reads in part: full vectors.
    """

    num_shards: int
    work_seconds: float
    wall_seconds: float
    num_bytes: float
    shard_documents: int
    shard_memory_bytes: float
    shard_mapped_bytes: float


def estimate_index(num_documents: float, embedding_bytes: float, shards: Shards, num_workers: int) -> Index:
    """Returns what building and holding an index takes.

    Args:
        num_documents: In all shards.
        embedding_bytes: Of one document in the embeddings.
        shards: What they weigh.
        num_workers: Processes that build them.
    """
    moved = _BUILD_SECONDS_PER_BYTE * (embedding_bytes + shards.num_bytes)
    compared = 2.0 * shards.num_lists * shards.dim / _LIST_FLOPS_PER_SECOND
    work = num_documents * (moved + compared) + shards.num_shards * _SHARD_SECONDS
    read = _SAMPLE_SECONDS_PER_BYTE * num_documents * embedding_bytes
    clustered = _CLUSTERING_PASSES * min(shards.num_sampled, num_documents) * compared
    train = _TRAIN_SECONDS + read + clustered if shards.coarse_bytes else 0.0
    waves = -(-shards.num_shards // num_workers)
    held = math.ceil(num_documents / shards.num_shards)
    return Index(
        shards.num_shards,
        work + train,
        train + work / shards.num_shards * waves,
        num_documents * shards.num_bytes,
        held,
        held * (shards.coarse_bytes + shards.id_bytes),
        held * shards.vector_bytes,
    )


def bytes_by_dim(dims: Sequence[int], id_bytes: float) -> dict[int, dict[str, float]]:
    """Returns what a document takes at each resolution: full vectors on disk, coarse ones in memory, its id each time.

    >>> bytes_by_dim([64], 16.0)[64]
    {'float16': 144.0, 'int8': 80.0, 'dense': 144.0, 'codes': 32.0}
    """
    kinds = {"float16": 2.0, "int8": 1.0, "dense": 2.0, "codes": 0.25}  # dense: bfloat16; codes: 4 bits for two dims
    return {dim: {name: dim * own + id_bytes for name, own in kinds.items()} for dim in dims}


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver of a run keeps and does, which grows with the number of units.

    Attributes:
        memory_bytes: At its peak.
        manifest_bytes: On disk.
        num_segments: Files of the journal.
        own_seconds: In all, while workers work.
        resume_seconds: Until a second run knows what is done.
    """

    memory_bytes: float
    manifest_bytes: float
    num_segments: int
    own_seconds: float
    resume_seconds: float


def estimate_driver(num_units: int, embed_seconds: float) -> Driver:
    """Returns what so many units ask of the driver of a run that takes so many seconds."""
    return Driver(
        _DRIVER_BYTES + num_units * _UNIT_BYTES,
        num_units * _UNIT_MANIFEST_BYTES,
        min(math.ceil(embed_seconds / _FLUSH_SECONDS), num_units),
        num_units * (_PLAN_SECONDS + _RECORD_SECONDS),
        num_units * (_PLAN_SECONDS + _READ_SECONDS),
    )


@dataclass(frozen=True, slots=True)
class Means:
    """What a run may take.

    Attributes:
        num_workers: How many embed and build.
        workers_per_node: How many fit on a node.
        node_memory_bytes: Of a node.
        within_seconds: In which embedding is to be done.
        price_per_hour: Of a worker; None: nobody asks.
    """

    num_workers: int
    workers_per_node: int
    node_memory_bytes: float
    within_seconds: float
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """What it would take to be done in time, and to answer questions; None: no number of nodes would do.

    Attributes:
        num_workers: That embed in time.
        num_nodes: For them.
        num_shard_nodes: Whose memory holds coarse indexes and ids, while vectors are read from disk.
        num_memory_nodes: Whose memory holds all of the index.
    """

    num_workers: int | None
    num_nodes: int | None
    num_shard_nodes: int | None
    num_memory_nodes: int | None


def find_needs(size: Size, pace: Pace, index: Index, means: Means) -> Needs:
    """Returns what it would take."""
    workers = workers_within(size, pace, means.within_seconds)
    held = (index.shard_memory_bytes, index.shard_memory_bytes + index.shard_mapped_bytes)
    per_node = [math.floor(means.node_memory_bytes / num_bytes) for num_bytes in held]
    nodes = [-(-index.num_shards // count) if count else None for count in per_node]
    return Needs(workers, workers and -(-workers // means.workers_per_node), *nodes)


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that a run could break on.

    Attributes:
        name: What it is.
        needed: How much of it the run takes.
        most: How much there is.
        unit: Of both.
    """

    name: str
    needed: float
    most: float
    unit: str

    @property
    def share(self) -> float:
        """What of it is taken; above 1, the run breaks."""
        return self.needed / self.most


def find_limits(size: Size, pace: Pace, index: Index, driver: Driver, means: Means) -> tuple[Limit, ...]:
    """Returns what a run could break on if it is to be done in time, what is nearest to breaking first."""
    hours, room = means.within_seconds / _HOUR, means.node_memory_bytes / _GB
    unit_hours = size.tokens.value / size.num_units / pace.tokens_per_second / _HOUR
    per_second = size.num_units / means.within_seconds
    limits = (
        Limit("check of the corpus, by the driver alone", check_seconds(size) / _HOUR, hours, "h"),
        Limit("one unit, which one worker does", unit_hours, hours, "h"),
        Limit("memory of the driver", driver.memory_bytes / _GB, room, "GB"),
        Limit("memory of a process that holds a shard", index.shard_memory_bytes / _GB, room, "GB"),
        Limit("units that one driver records", per_second, 1 / (_PLAN_SECONDS + _RECORD_SECONDS), "a second"),
        Limit("units of one run, as far as was tried", size.num_units, _EXERCISED_UNITS, ""),
        Limit("shards of one index, as far as was tried", index.num_shards, _EXERCISED_SHARDS, ""),
    )
    return tuple(sorted(limits, key=lambda limit: -limit.share))


@dataclass(frozen=True, slots=True)
class Estimate:
    """All of a plan. ``price`` is that of embedding and of building the index."""

    size: Size
    pace: Pace
    means: Means
    shards: Shards
    embedding_bytes: float
    embedding: Embedding
    index: Index
    driver: Driver
    needs: Needs
    limits: tuple[Limit, ...]
    price: Interval | None

    def comparable(self) -> dict[str, dict[str, float]]:
        """Returns the figures that an artifact has in the end, by its kind."""
        documents = self.size.documents.value
        return {
            "embeddings": {
                "documents": documents,
                "tokens": self.size.tokens.value,
                "units": self.size.num_units,
                "bytes": documents * self.embedding_bytes,
                f"{SECONDS} of work": self.embedding.work_seconds.value,
                f"{SECONDS} in all": self.embedding.wall_seconds.value,
            },
            "index": {
                "documents": documents,
                "shards": self.index.num_shards,
                "bytes": self.index.num_bytes,
                f"{SECONDS} of work": self.index.work_seconds,
            },
        }


def make_estimate(size: Size, pace: Pace, shards: Shards, embedding_bytes: float, means: Means) -> Estimate:
    """Returns a plan.

    Args:
        size: Of the corpus.
        pace: Of a worker.
        shards: Of the index.
        embedding_bytes: Of one document in the embeddings.
        means: What may be taken.
    """
    embedding = estimate_embedding(size, pace, means.num_workers)
    index = estimate_index(size.documents.value, embedding_bytes, shards, means.num_workers)
    driver = estimate_driver(size.num_units, embedding.embed_seconds.value)
    hours = embedding.held_hours.plus(means.num_workers * index.wall_seconds / _HOUR)
    return Estimate(
        size,
        pace,
        means,
        shards,
        embedding_bytes,
        embedding,
        index,
        driver,
        find_needs(size, pace, index, means),
        find_limits(size, pace, index, driver, means),
        None if means.price_per_hour is None else hours.times(means.price_per_hour),
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a plan beside what it came to."""

    name: str
    estimated: float
    taken: float

    @property
    def error(self) -> float:
        """By how much the estimate is off, as a share of what was taken."""
        return (self.estimated - self.taken) / self.taken if self.taken else float(self.estimated != 0)

    def is_within(self, tolerance: float) -> bool:
        """Returns whether the estimate is near enough; seconds may also be off by ten, which is chance."""
        is_chance = self.name.startswith(SECONDS) and abs(self.estimated - self.taken) <= _SECONDS_OF_CHANCE
        return is_chance or abs(self.error) <= tolerance


def compare(estimated: Mapping[str, float], taken: Mapping[str, float]) -> list[Line]:
    """Returns what was estimated beside what was taken, for what both know of."""
    return [Line(name, value, taken[name]) for name, value in estimated.items() if name in taken]

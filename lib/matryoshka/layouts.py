"""What an index is made of where nothing else is asked for: a rule over the number of documents, memory and device.

Everything here is arithmetic; ``choose`` is the rule, and its numbers come from measurements that the README shows.
"""

import math
from dataclasses import dataclass

from matryoshka import index, nested
from matryoshka.indexing import DENSE_INDEX, NO_INDEX, Layout, Storage
from matryoshka.nested import FunnelPlan, Step
from matryoshka.spaces import Kind

# Up to so many documents every one is compared with every query, by a prefix: a coarse index would save less than it costs.
_SCANNED = {"cpu": 20_000, "cuda": 10_000_000}
_COMPARED = 2_000_000  # up to so many in a shard, all are compared; beyond, only those in the nearest lists
# Of the exact top 10, half the width holds .996 in a shortlist of 50, a third .943, and a prefix of half the width .950
# (250,000 posts, MiniLM tuned on another domain).
_LEARNED_SHARE, _LEARNED_STEP = 2, 8
_DOCUMENTS_PER_DIM = 50  # fewer, and a learned space is that of the sample
_LISTS_PER_ROOT, _LISTS_PER_PROBE = 4, 4
_LEAST_FOR_CODES = 1_000  # codebooks of fewer documents are those of the sample
_SHORTLIST, _DENSE_SHORTLIST, _KEPT = 200, 60, 50  # codes lose what coarse vectors keep
_BYTES = {"float16": 2, "int8": 1}
_DENSE_BYTES, _ROW_BYTES = 2, 4
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Given:
    """What there is to index, and where it will be searched.

    Attributes:
        num_documents: In all shards.
        num_shards: Each is held by a process of its own.
        dims: The resolutions of the model, widest first.
        has_queries: Whether there are queries to learn a projection from.
        id_bytes: Of one id, on average.
        device: ``cpu`` or ``cuda``.
        has_bf16: Whether products in bf16 are faster there than in float32.
        memory_bytes: Of a process that holds a shard; None: there is no limit.
    """

    num_documents: int
    num_shards: int
    dims: tuple[int, ...]
    has_queries: bool = False
    id_bytes: float = 16.0
    device: str = "cpu"
    has_bf16: bool = False
    memory_bytes: float | None = None

    @property
    def width(self) -> int:
        """D."""
        return self.dims[0]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for; None: to be chosen."""

    space: Kind | None = None
    dim: int | None = None
    factory: str | None = None
    storage: Storage | None = None
    plan: FunnelPlan | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, the funnel to search it with, what it weighs, and why it is this one.

    Attributes:
        layout: What shards are made of.
        plan: The funnel.
        coarse_bytes: Of one document in the coarse index.
        vector_bytes: Of one full vector.
        id_bytes: Of one id.
        reasons: One for every part that was chosen.
    """

    layout: Layout
    plan: FunnelPlan
    coarse_bytes: float
    vector_bytes: float
    id_bytes: float
    reasons: tuple[str, ...]

    @property
    def num_bytes(self) -> float:
        """Of one document in all."""
        return self.coarse_bytes + self.vector_bytes + self.id_bytes

    def describe(self) -> str:
        """Returns the layout on one line, for people."""
        own = self.layout
        coarse = f"{own.factory} on {own.dim} dims ({own.space})" if own.has_index else "no coarse index"
        return f"{coarse}, vectors as {own.storage}, funnel {self.plan.describe()}"

    def weigh(self, num_documents: int) -> str:
        """Returns the estimated sizes on one line, for people."""
        parts = f"coarse index {self.coarse_bytes:.0f}, vector {self.vector_bytes:.0f}, id {self.id_bytes:.0f}"
        return f"about {self.num_bytes:.0f} bytes per document ({parts}), {num_documents * self.num_bytes / _GB:.2g} GB in all"


def choose(given: Given, wanted: Wanted) -> Choice:
    """Returns the layout for what is given, with everything that was asked for as it was asked for.

    Raises:
        ValueError: Coarse index and ids alone do not fit the memory of a process that holds a shard.

    >>> choose(Given(5_000, 1, (384, 128, 64)), Wanted()).describe()
    'no coarse index, vectors as float16, funnel 64d keep 200 > 384d keep 100'
    >>> choose(Given(250_000, 1, (384, 128, 64), has_bf16=True), Wanted()).describe()
    'dense on 192 dims (rotation), vectors as float16, funnel 192d keep 60 > 384d keep 50'
    """
    reasons: list[str] = []
    scanned = _is_scanned(given, wanted, reasons)
    space: Kind = "prefix" if scanned else wanted.space or _space(given, reasons)
    dim = given.width if scanned else _dim(given, wanted, space)
    factory = NO_INDEX if scanned else wanted.factory or _factory(given, dim, reasons)
    coarse_bytes = 0.0 if scanned else _coarse_bytes(Layout(space, dim, factory))
    num_held = -(-given.num_documents // given.num_shards)
    _check_memory(given, num_held, coarse_bytes)
    stored = wanted.storage or _storage(given, num_held, coarse_bytes, reasons)
    layout = Layout(space, dim, factory, stored)
    plan = wanted.plan or (nested.default_plan(given.dims) if scanned else _plan(given.width, layout))
    return Choice(layout, plan, coarse_bytes, _BYTES[stored] * given.width, given.id_bytes, tuple(reasons))


def _is_scanned(given: Given, wanted: Wanted, reasons: list[str]) -> bool:
    if wanted.factory is not None:
        return wanted.factory == NO_INDEX
    is_few = given.num_documents <= _SCANNED[given.device]
    needs_index = wanted.space not in (None, "prefix") or given.has_queries or wanted.dim or _has_parameters(wanted.plan)
    if needs_index or not is_few:
        return False
    num_held = -(-given.num_documents // given.num_shards)
    fits = given.memory_bytes is None or num_held * (given.width + given.id_bytes) <= given.memory_bytes
    if fits or given.num_documents < _DOCUMENTS_PER_DIM * given.width:
        reasons.append(f"{given.num_documents} documents are few enough on {given.device} to compare a prefix of every one")
        return True
    reasons.append("vectors do not fit the memory limit, so that comparing a prefix of every one would read the disk")
    return False


def _has_parameters(plan: FunnelPlan | None) -> bool:
    return bool(plan and plan.shortlist.parameters)


def _space(given: Given, reasons: list[str]) -> Kind:
    if given.has_queries:
        reasons.append("there are queries to learn a projection from")
        return "projection"
    if given.num_documents < _DOCUMENTS_PER_DIM * _learned_dim(given.width):
        reasons.append("there are too few documents to learn a rotation from, so the space is the prefix")
        return "prefix"
    reasons.append("a rotation holds more of full scores than a prefix of the same width, and what tuning taught the prefix too")
    return "rotation"


def _learned_dim(width: int) -> int:
    return max(width // _LEARNED_SHARE // _LEARNED_STEP * _LEARNED_STEP, min(width, _LEARNED_STEP))


def _dim(given: Given, wanted: Wanted, space: Kind) -> int:
    if wanted.dim or wanted.plan:
        return wanted.dim or (wanted.plan.shortlist.dim if wanted.plan else given.width)
    return nested.default_plan(given.dims).shortlist.dim if space == "prefix" else min(_learned_dim(given.width), given.width)


def _factory(given: Given, dim: int, reasons: list[str]) -> str:
    if given.num_documents <= _SCANNED["cpu"] and given.memory_bytes is None:
        reasons.append(f"{given.num_documents} documents are few enough to keep coarse vectors as they are")
        return "Flat"
    if given.num_documents < _LEAST_FOR_CODES:
        return "Flat"
    codes = f"PQ{dim // 2 if dim % 2 == 0 else dim}x4fs"
    num_held = -(-given.num_documents // given.num_shards)
    if num_held <= _COMPARED and given.has_bf16 and given.memory_bytes is None:
        reasons.append(f"products in bf16 are fast here, so all {num_held} coarse vectors of a shard are compared")
        return DENSE_INDEX
    if num_held <= _COMPARED:
        reasons.append(f"4-bit codes of all {num_held} documents of a shard are scanned: lists of them would miss some")
        return codes
    num_lists = round(_LISTS_PER_ROOT * math.sqrt(given.num_documents))
    reasons.append(f"of {given.num_documents} documents only those in the nearest of {num_lists} lists are looked at")
    return f"IVF{num_lists},{codes}"


def _coarse_bytes(layout: Layout) -> float:
    """Returns how many bytes one more document takes in the coarse index."""
    if layout.has_faiss:
        return index.bytes_per_document(layout.factory, layout.dim)
    return _DENSE_BYTES * layout.dim + (_ROW_BYTES if layout.num_lists else 0)


def _plan(width: int, layout: Layout) -> FunnelPlan:
    # How many lists of dense vectors are enough is for tuning to find: until then all are looked into.
    lists = layout.num_lists if layout.has_faiss else 0
    parameters = (("nprobe", max(lists // _LISTS_PER_PROBE, 1)),) if lists else ()
    if layout.dim >= width:
        return FunnelPlan((Step(width, _SHORTLIST, parameters),))
    keep = _SHORTLIST if layout.has_faiss else _DENSE_SHORTLIST
    return FunnelPlan((Step(layout.dim, keep, parameters), Step(width, _KEPT)))


def _check_memory(given: Given, num_held: int, coarse_bytes: float) -> None:
    """Refuses a limit that what must be in memory exceeds; full vectors need not be.

    Raises:
        ValueError: It does.
    """
    needed = num_held * (coarse_bytes + given.id_bytes)
    if given.memory_bytes is not None and needed > given.memory_bytes:
        num_shards = math.ceil(given.num_documents * (coarse_bytes + given.id_bytes) / given.memory_bytes)
        raise ValueError(
            f"--memory-limit {given.memory_bytes / _GB:g}: coarse index and ids of a shard take {needed / _GB:.2g} GB. Pass"
            f" --shards {num_shards} or more, or a smaller --coarse-index."
        )


def _storage(given: Given, num_held: int, coarse_bytes: float, reasons: list[str]) -> Storage:
    if given.memory_bytes is None:
        return "float16"
    room = given.memory_bytes / num_held - coarse_bytes - given.id_bytes
    if room >= _BYTES["float16"] * given.width:
        return "float16"
    fits = room >= _BYTES["int8"] * given.width
    reasons.append(
        "vectors as float16 do not fit the memory limit"
        + ("" if fits else "; as int8 neither, so those that are reranked are read from disk")
    )
    return "int8"

"""The index stage's work: which units make which shard, and one shard of it."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from matryoshka import artifacts, conditions, corpus, filters, funnel, spaces, storage, units, vectors
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.filters import COLUMNS, Kinds, Origin
from matryoshka.funnel import COARSE, IDS, VECTORS, CallShards, Searcher, Shard, ShardFiles
from matryoshka.index import CoarseIndex, check_parameters, is_trained
from matryoshka.nested import FunnelPlan
from matryoshka.spaces import Kind, Space
from matryoshka.units import Unit
from matryoshka.vectors import EmbeddingStore, Float16Array

SHARDS, TRAINED, SPACE = "shards", "trained", "space.npz"
NO_INDEX = "none"

Storage = Literal["float16", "int8"]

_DTYPES = {"float16": np.float16, "int8": np.int8}


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to build: its key (which changes with its content), the embedding files that it covers, and their origin."""

    key: str
    store: Path
    files: tuple[FileRecord, ...]
    num_rows: int
    origin: Origin | None = None


def plan_shards(store: EmbeddingStore, num_shards: int, previous: Mapping[str, int]) -> tuple[dict[str, int], list[ShardPlan]]:
    """Returns the shard of every slot of the corpus, and what each shard that has documents is made of.

    Args:
        store: The embeddings.
        num_shards: For a first build.
        previous: The slots of an earlier build, so that only shards whose units changed get another key.

    Raises:
        ValueError: Two units claim one place in the corpus.
    """
    receipts = {str(receipt.details["slot"]): receipt for receipt in store.manifest.receipts}
    if len(receipts) != len(store.manifest.receipts):
        raise ValueError(f"{store.folder}: two units have one place in the corpus. Run python -m jobs.embed with --replace.")
    slots = units.assign_shards({slot: receipt.num_rows for slot, receipt in receipts.items()}, num_shards, previous)
    plans = []
    for shard in sorted(set(slots.values())):
        own = [receipts[slot] for slot in slots if slots[slot] == shard and receipts[slot].num_rows]
        if own:
            content = storage.digest_json([[receipt.key, receipt.files[0].digest] for receipt in own])
            files, num_rows = tuple(receipt.files[0] for receipt in own), sum(receipt.num_rows for receipt in own)
            plans.append(ShardPlan(f"{shard:05d}-{content[:16]}", store.folder.absolute(), files, num_rows))
    return slots, plans


def find_origins(plans: Sequence[ShardPlan], store: EmbeddingStore, kinds: Kinds) -> list[ShardPlan]:
    """Returns the plans with the places where the columns that shards are to keep come from."""
    source = corpus.recall(store.manifest.facts["corpus"])
    digests = {file.name: file.digest for file in source.files}
    receipts = {receipt.files[0].path: receipt for receipt in store.manifest.receipts}
    found = []
    for plan in plans:
        slots = [(receipts[file.path].key, str(receipts[file.path].details["slot"])) for file in plan.files]
        own = [Unit.of(key, slot, digests[slot.rpartition(":")[0]]) for key, slot in slots]
        origin = Origin(source.columns, kinds, tuple((source.path_of(unit.name), unit) for unit in own))
        found.append(dataclasses.replace(plan, origin=origin))
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """What an index is made of.

    Attributes:
        space: Kind of the coarse space.
        dim: Of coarse vectors.
        factory: FAISS factory string of the coarse indexes; ``NO_INDEX``: none, every search compares all documents.
        storage: How full vectors are kept; int8 takes half the room, and has 254 steps up to a vector's largest component.
    """

    space: Kind
    dim: int
    factory: str
    storage: Storage = "float16"

    @property
    def has_index(self) -> bool:
        """Whether shards have a coarse index."""
        return self.factory != NO_INDEX


def needs_training(layout: Layout) -> bool:
    """Returns whether shards share something that is learned from documents."""
    return layout.space != "prefix" or (layout.has_index and not is_trained(layout.factory, layout.dim))


def train(store: EmbeddingStore, layout: Layout, queries: Float16Array | None, num_sampled: int, folder: Path) -> Receipt:
    """Learns what all shards share from a sample of documents, drawn evenly from all units; publishes and returns its receipt.

    Args:
        store: The embeddings.
        layout: What to learn.
        queries: Vectors of real queries, for a projection.
        num_sampled: Documents to learn from, at most.
        folder: Of the index.

    Raises:
        ValueError: An embedding file is not what its receipt says, or there are too few documents to learn from.
    """
    start = time.perf_counter()
    sample = _sample(store, num_sampled)
    space = spaces.learn(layout.space, layout.dim, sample, queries)
    index = CoarseIndex.train(space.documents(sample), layout.factory)
    target = folder / TRAINED
    with storage.publish(target) as temporary:
        temporary.mkdir()
        space.write(temporary / SPACE)
        index.write(temporary / COARSE)
    files = tuple(FileRecord.of(folder, target / name) for name in (SPACE, COARSE))
    return Receipt(TRAINED, 0, files, {"num_sampled": len(sample), "seconds": round(time.perf_counter() - start, 3)})


def _sample(store: EmbeddingStore, num_sampled: int) -> Float16Array:
    """Returns the vectors at even distances in the store's order."""
    num_rows = store.manifest.num_rows
    wanted = np.unique(np.linspace(0, num_rows - 1, min(num_sampled, num_rows)).astype(np.int64))
    parts, start = [], 0
    for _, block in store.blocks():
        own = wanted[(wanted >= start) & (wanted < start + len(block))] - start
        parts.append(block[own])
        start += len(block)
    return np.concatenate(parts)


def build_shard(plan: ShardPlan, layout: Layout, folder: Path) -> Receipt:
    """Builds one shard, publishes its folder, and returns its receipt; memory holds one unit and the coarse index.

    Raises:
        ValueError: An embedding file is missing or not what its receipt says, or the corpus is not what it was made from.
    """
    start = time.perf_counter()
    space, index = open_trained(folder, layout)
    target = folder / SHARDS / plan.key
    all_ids, done = [], 0
    columns: list[pa.Table] = []
    with storage.publish(target) as temporary:
        temporary.mkdir()
        stored: Any = None
        for position, file in enumerate(plan.files):
            ids, block = vectors.read_unit(artifacts.check_file(plan.store, file))
            if stored is None:
                shape = (plan.num_rows, block.shape[1])
                stored = np.lib.format.open_memmap(temporary / VECTORS, "w+", _DTYPES[layout.storage], shape)
            stored[done : done + len(block)] = pack(block, layout.storage)
            if index:
                index.add(space.documents(block))
            if plan.origin:
                columns.append(filters.read_columns(plan.origin, position, ids))
            all_ids.append(ids)
            done += len(block)
        stored.flush()
        vectors.write_ids(temporary / IDS, all_ids)
        if columns:
            filters.write_columns(temporary / COLUMNS, columns)
        if index:
            index.write(temporary / COARSE)
    names = [*([COARSE] if index else []), VECTORS, IDS, *([COLUMNS] if columns else [])]
    files = tuple(FileRecord.of(folder, target / name) for name in names)
    return Receipt(plan.key, done, files, {"seconds": round(time.perf_counter() - start, 3)})


def open_trained(folder: Path, layout: Layout) -> tuple[Space, CoarseIndex | None]:
    """Returns the coarse space of an index, and an empty coarse index; what needs no training is made here."""
    if not (folder / TRAINED).is_dir():
        space = Space("prefix", layout.dim)
        return space, CoarseIndex.train(np.empty((0, layout.dim), np.float32), layout.factory) if layout.has_index else None
    return Space.read(folder / TRAINED / SPACE), CoarseIndex.read(folder / TRAINED / COARSE).copy()


def pack(block: Float16Array, storage_kind: Storage) -> npt.NDArray[Any]:
    """Returns vectors as they are stored; int8 has the direction only, since vectors are brought to unit length when used.

    Shapes: block [N, D] -> [N, D].
    """
    if storage_kind == "float16":
        return block
    wide = block.astype(np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    packed: npt.NDArray[np.int8] = np.rint(np.divide(127 * wide, largest, out=np.zeros_like(wide), where=largest > 0)).astype(
        np.int8
    )
    return packed


@dataclass(frozen=True, slots=True)
class IndexStore:
    """A finished index artifact.

    Attributes:
        folder: Of the artifact.
        manifest: Its own.
        missing: Keys of shards that are left out.

    >>> import tempfile
    >>> made = tempfile.TemporaryDirectory()
    >>> folder = Path(made.name)
    >>> vectors.write_unit(folder / "unit.parquet", ["a", "b", "c"], np.eye(3, 8, dtype=np.float16))
    >>> plan = ShardPlan("0-abc", folder, (FileRecord.of(folder, folder / "unit.parquet"),), 3)
    >>> receipt = build_shard(plan, Layout("prefix", 4, "Flat"), folder / "index")
    >>> identity = {"model": "m", "space": "prefix", "dim": 4, "coarse_index": "Flat", "storage": "float16"}
    >>> facts = {"width": 8, "plan": ["4:2", "8:2"]}
    >>> Manifest("index", identity, facts=facts, receipts=(receipt,), is_complete=True).write(folder / "index")
    >>> searcher = IndexStore.open(folder / "index").searcher()
    >>> searcher.search(np.array([[0, 1, 0.5, 0, 0, 0, 0, 0]]), num_results=2).ids.tolist()
    [['b', 'c']]
    >>> made.cleanup()
    """

    folder: Path
    manifest: Manifest
    missing: frozenset[str] = frozenset()

    @classmethod
    def open(cls, folder: Path) -> "IndexStore":
        """Returns the index in a folder.

        Raises:
            ValueError: There is none, it is not finished, or a shard is missing, truncated or altered.
        """
        manifest = artifacts.read_complete(folder, "index")
        faults = artifacts.find_faults(folder, manifest)
        if faults:
            raise ValueError(f"{faults[0]}. Build the index anew: python -m jobs.index with --replace.")
        return cls(folder, manifest)

    @classmethod
    def open_partial(cls, folder: Path) -> tuple["IndexStore", dict[str, str]]:
        """Returns the index without the shards that cannot be read, and what is wrong with each of these.

        Raises:
            ValueError: There is no index, it is not finished, or what all shards share cannot be read.
        """
        manifest = artifacts.read_complete(folder, "index")
        parts = {receipt.key: dataclasses.replace(manifest, receipts=(receipt,)) for receipt in manifest.receipts}
        faults = {key: found[0] for key, part in parts.items() if (found := artifacts.find_faults(folder, part))}
        if TRAINED in faults:
            raise ValueError(f"{faults[TRAINED]}. Build the index anew: python -m jobs.index with --replace.")
        return cls(folder, manifest).without(faults), faults

    def without(self, keys: Collection[str]) -> "IndexStore":
        """Returns the index with more of its shards left out.

        Raises:
            ValueError: None is left.
        """
        rest = dataclasses.replace(self, missing=self.missing | set(keys))
        if not rest.shards:
            raise ValueError(f"{self.folder}: none of its {len(rest.missing)} shards can be searched. Build the index anew.")
        return rest

    @property
    def coverage(self) -> float:
        """The share of the index's documents that is in shards which are not left out."""
        return sum(receipt.num_rows for receipt in self._parts) / max(self.manifest.num_rows, 1)

    @property
    def _parts(self) -> list[Receipt]:
        """The receipts of shards that are not left out."""
        return [receipt for receipt in self.manifest.receipts if receipt.key not in {TRAINED, *self.missing}]

    @property
    def layout(self) -> Layout:
        """What the index is made of."""
        identity = self.manifest.identity
        return Layout(identity["space"], int(identity["dim"]), identity["coarse_index"], identity["storage"])

    @property
    def plan(self) -> FunnelPlan:
        """The funnel that the index is searched with if nothing else is said."""
        return FunnelPlan.parse(self.manifest.facts["plan"])

    @property
    def width(self) -> int:
        """D, the dims of a full vector."""
        return int(self.manifest.facts["width"])

    @property
    def shards(self) -> list[ShardFiles]:
        """Where each shard is, in order."""
        return [ShardFiles(self.folder / SHARDS / receipt.key) for receipt in self._parts]

    @property
    def filter_columns(self) -> Kinds:
        """What conditions can ask for, and what it is."""
        kinds: Kinds = self.manifest.facts.get("filter_columns", {})
        return kinds

    def check_where(self, where: str | None) -> None:
        """Checks that a search can be restricted by a condition.

        Raises:
            ValueError: It is not a condition, or the index has not kept its columns.
        """
        if where is not None:
            filters.check(conditions.parse(where), self.filter_columns)

    def open_ids(self) -> list[pa.Array]:
        """Returns the ids of every shard, mapped from disk."""
        return [vectors.open_ids(shard.folder / IDS) for shard in self.shards]

    def searcher(self, plan: FunnelPlan | None = None, call: CallShards | None = None) -> Searcher:
        """Returns a searcher over all shards.

        Args:
            plan: Another funnel than the index's own.
            call: How to reach the shards; by default they are opened in this process.

        Raises:
            ValueError: The plan does not fit the index.
        """
        plan = plan or self.plan
        self.check_plan(plan)
        space, index = open_trained(self.folder, self.layout)
        return Searcher(
            call or funnel.call_locally([Shard.open(files) for files in self.shards]),
            self.open_ids(),
            plan,
            space if index else None,
        )

    def check_plan(self, plan: FunnelPlan) -> None:
        """Checks that the index can be searched with a plan.

        Raises:
            ValueError: The plan does not fit the index.
        """
        layout = self.layout
        if plan.steps[-1].dim > self.width:
            raise ValueError(f"{self.folder}: vectors have {self.width} dims, the plan is {plan.describe()}. Change the plan.")
        if plan.shortlist.parameters:
            if not layout.has_index or plan.shortlist.dim != layout.dim:
                raise ValueError(
                    f"{self.folder}: the plan {plan.describe()} has parameters of a coarse index, which this index has for"
                    f" {layout.dim if layout.has_index else 'no'} dims. Change the plan."
                )
            check_parameters(layout.factory, layout.dim, dict(plan.shortlist.parameters))

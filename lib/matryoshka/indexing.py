"""The index stage's work: which units make which shard, and one shard of it."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from matryoshka import artifacts, funnel, nested, spaces, storage, units, vectors
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.funnel import COARSE, IDS, VECTORS, CallShards, Searcher, Shard, ShardFiles
from matryoshka.index import CoarseIndex, check_parameters, is_trained
from matryoshka.nested import FunnelPlan
from matryoshka.spaces import Kind, Space
from matryoshka.vectors import EmbeddingStore, Float16Array

SHARDS, TRAINED, SPACE = "shards", "trained", "space.npz"
NO_INDEX = "none"

Storage = Literal["float16", "int8"]
Quality = Literal["fast", "balanced", "high", "exact"]

_DTYPES = {"float16": np.float16, "int8": np.int8}


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to build: its key (which changes with its content), and the embedding files that it covers."""

    key: str
    store: Path
    files: tuple[FileRecord, ...]
    num_rows: int


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
        ValueError: An embedding file is missing or not what its receipt says.
    """
    start = time.perf_counter()
    space, index = open_trained(folder, layout)
    target = folder / SHARDS / plan.key
    all_ids, done = [], 0
    with storage.publish(target) as temporary:
        temporary.mkdir()
        stored: Any = None
        for file in plan.files:
            ids, block = vectors.read_unit(artifacts.check_file(plan.store, file))
            if stored is None:
                shape = (plan.num_rows, block.shape[1])
                stored = np.lib.format.open_memmap(temporary / VECTORS, "w+", _DTYPES[layout.storage], shape)
            stored[done : done + len(block)] = pack(block, layout.storage)
            if index:
                index.add(space.documents(block))
            all_ids.append(ids)
            done += len(block)
        stored.flush()
        vectors.write_ids(temporary / IDS, all_ids)
        if index:
            index.write(temporary / COARSE)
    names = (COARSE, VECTORS, IDS) if index else (VECTORS, IDS)
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
    """A finished index artifact."""

    folder: Path
    manifest: Manifest

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

    @property
    def layout(self) -> Layout:
        """What the index is made of."""
        identity = self.manifest.identity
        return Layout(identity["space"], int(identity["dim"]), identity["coarse_index"], identity["storage"])

    @property
    def tuned(self) -> Mapping[str, Any] | None:
        """What the tune job found for the index; None: it was not tuned."""
        found: Mapping[str, Any] | None = self.manifest.facts.get("tuned")
        return found

    @property
    def is_tuning_current(self) -> bool:
        """Whether the tuning is of the documents that are in the index now."""
        return self.tuned is not None and self.tuned["embeddings"] == self.manifest.inputs["embeddings"]

    @property
    def plan(self) -> FunnelPlan:
        """The funnel that the index is searched with if nothing else is said: the balanced one, if it was tuned."""
        return self.plan_for(None)

    def plan_for(self, quality: Quality | None) -> FunnelPlan:
        """Returns the funnel of a named quality, as the tune job found it; exact search needs no tuning.

        Args:
            quality: None: the one for those who do not choose.

        Raises:
            ValueError: The index was not tuned, or its coarse index leaves no way to search exactly.
        """
        if quality is None:
            return FunnelPlan.parse(self.tuned["plans"]["balanced"]["plan"] if self.tuned else self.manifest.facts["plan"])
        if quality == "exact":
            if self.layout.factory not in (NO_INDEX, "Flat") and self.layout.dim == self.width:
                reason = f"every search at {self.width} dims goes through its {self.layout.factory} index"
                raise ValueError(f"{self.folder}: cannot be searched exactly, {reason}. Build it with fewer coarse dims.")
            return nested.exact_plan(self.width)
        if not self.tuned:
            raise ValueError(
                f"{self.folder}: not tuned, so it has no plan named '{quality}'. Run python -m jobs.tune --index {self.folder}."
            )
        return FunnelPlan.parse(self.tuned["plans"][quality]["plan"])

    @property
    def dims(self) -> tuple[int, ...]:
        """The resolutions of the model that made the vectors, widest first."""
        return tuple(self.manifest.facts["dims"])

    @property
    def width(self) -> int:
        """D, the dims of a full vector."""
        return int(self.manifest.facts["width"])

    @property
    def shards(self) -> list[ShardFiles]:
        """Where each shard is, in order."""
        return [ShardFiles(self.folder / SHARDS / receipt.key) for receipt in self.manifest.receipts if receipt.key != TRAINED]

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

    def keep_tuning(self, tuned: Mapping[str, Any]) -> None:
        """Stores what the tune job found with the index, whose fingerprint and shards stay as they are.

        Raises:
            RuntimeError: The index is no longer the one that was opened.
        """
        manifest = artifacts.read(self.folder, "index")
        if manifest.fingerprint != self.manifest.fingerprint or not manifest.is_complete:
            raise RuntimeError(f"{self.folder}: was built anew while it was tuned. Run python -m jobs.tune again.")
        dataclasses.replace(manifest, facts={**manifest.facts, "tuned": dict(tuned)}).write(self.folder)


def tuning_of(previous: Manifest | None, plan: FunnelPlan) -> dict[str, Any]:
    """Returns the facts about tuning that a build hands on: all, unless it was asked for another plan than before."""
    facts = previous.facts if previous else {}
    return {"tuned": facts["tuned"]} if "tuned" in facts and facts["plan"] == plan.parts else {}

"""The index stage's work: which units make which shard, and one shard of it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from matryoshka import artifacts, funnel, storage, units, vectors
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.funnel import COARSE, IDS, VECTORS, CallShards, Searcher, Shard
from matryoshka.index import CoarseIndex
from matryoshka.nested import FunnelPlan, shrink
from matryoshka.vectors import EmbeddingStore

SHARDS = "shards"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to build: its key (which changes with its content), and the embedding files that it covers."""

    key: str
    store: Path
    files: tuple[FileRecord, ...]


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
            files = tuple(receipt.files[0] for receipt in own)
            plans.append(ShardPlan(f"{shard:05d}-{content[:16]}", store.folder.absolute(), files))
    return slots, plans


def build_shard(plan: ShardPlan, coarse_dim: int, factory: str, folder: Path) -> Receipt:
    """Builds one shard, publishes its folder, and returns its receipt.

    Raises:
        ValueError: An embedding file is missing or not what its receipt says.
    """
    start = time.perf_counter()
    parts = [vectors.read_unit(artifacts.check_file(plan.store, file)) for file in plan.files]
    full = np.concatenate([part for _, part in parts])
    target = folder / SHARDS / plan.key
    with storage.publish(target) as temporary:
        temporary.mkdir()
        CoarseIndex.build(shrink(full[:, :coarse_dim], coarse_dim), factory).write(temporary / COARSE)
        np.save(temporary / VECTORS, full, allow_pickle=False)
        vectors.write_ids(temporary / IDS, [ids for ids, _ in parts])
    files = tuple(FileRecord.of(folder, target / name) for name in (COARSE, VECTORS, IDS))
    return Receipt(plan.key, len(full), files, {"seconds": round(time.perf_counter() - start, 3)})


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
    def plan(self) -> FunnelPlan:
        """The funnel that the index was built for."""
        return FunnelPlan.parse(self.manifest.identity["plan"])

    @property
    def shard_folders(self) -> list[Path]:
        """Where each shard is, in order."""
        return [self.folder / SHARDS / receipt.key for receipt in self.manifest.receipts]

    def open_ids(self) -> list[pa.Array]:
        """Returns the ids of every shard, mapped from disk."""
        return [vectors.open_ids(folder / IDS) for folder in self.shard_folders]

    def searcher(self, plan: FunnelPlan | None = None, call: CallShards | None = None) -> Searcher:
        """Returns a searcher over all shards.

        Args:
            plan: Another funnel than the index's own; its shortlist must be of the dim that the index was built for.
            call: How to reach the shards; by default they are opened in this process.

        Raises:
            ValueError: The plan does not fit the index.
        """
        plan = plan or self.plan
        self.check_plan(plan)
        shards = call or funnel.call_locally([Shard.open(path) for path in self.shard_folders])
        return Searcher(shards, self.open_ids(), plan)

    def check_plan(self, plan: FunnelPlan) -> None:
        """Checks that the index can be searched with a plan.

        Raises:
            ValueError: The plan does not fit the index.
        """
        width = int(self.manifest.facts["width"])
        if plan.shortlist.dim != self.plan.shortlist.dim or plan.steps[-1].dim > width:
            raise ValueError(
                f"{self.folder}: was built for a shortlist of {self.plan.shortlist.dim} of {width} dims, the plan is"
                f" {plan.describe()}. Change the plan, or build another index."
            )

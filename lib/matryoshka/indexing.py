"""The index stage's work: which units make which shard, and one shard of it."""

import dataclasses
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from matryoshka import (
    artifacts,
    conditions,
    corpus,
    filters,
    funnel,
    nested,
    removals,
    shapes,
    spaces,
    storage,
    units,
    vectors,
)
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.filters import COLUMNS, Kinds, Origin
from matryoshka.funnel import COARSE, DENSE, IDS, LISTS, VECTORS, CallShards, Searcher, Shard, ShardFiles
from matryoshka.index import (
    CoarseIndex,
    check_factory,
    check_gpu_shortlist,
    check_parameters,
    count_lists,
    is_trained,
    threads,
    train_centroids,
)
from matryoshka.nested import Float32Array, FunnelPlan, shrink
from matryoshka.removals import REMOVED
from matryoshka.shapes import ListOf, MapOf
from matryoshka.spaces import Kind, Space
from matryoshka.storage import Place
from matryoshka.topk import IntArray
from matryoshka.units import Unit
from matryoshka.vectors import ArrayWriter, EmbeddingStore, Float16Array

if TYPE_CHECKING:
    from matryoshka.lists import CoarseLists
    from matryoshka.products import CoarseVectors

SHARDS, TRAINED, SPACE, CENTROIDS = "shards", "trained", "space.npz", "centroids.npy"
PLAIN, PLAIN_IDS = "index.faiss", "ids.parquet"
NO_INDEX, DENSE_INDEX = "none", "dense"
TUNED = "tuned"
UPDATE = "update"

_OUTGROWN = 4  # a training serves until there are so many times the documents that it was made for
_LOSS_DOCUMENTS, _LOSS_QUERIES, _LOSS_RESULTS = 20_000, 200, 10

Storage = Literal["float16", "int8"]
Quality = Literal["fast", "balanced", "high", "exact"]

_READ_AHEAD = 2  # units
_EXPONENT = np.uint16(0x7C00)  # the bits of float16 that are all set in what is not finite
_SPACE_DOCUMENTS = 50_000  # whose second moment a space is learned from; of four times as many, recall is the same

_ANEW = "Build the index anew: python -m jobs.index with --replace."
_PLAN = {"plan": ListOf(str)}
_UPDATE = {"inputs": MapOf(str), "slots": MapOf(int)}
_DETAILS = {"num_documents?": int, "num_left_out?": int}
_POINT = {**_PLAN, "queries_per_second": float, **dict.fromkeys(("confirmed", "low", "high"), object)}
_TUNED = {
    "measure": str, "embeddings": str, "frontier": ListOf(_POINT), "plans": dict.fromkeys(("fast", "balanced", "high"), _PLAN)
}  # fmt: skip
_LAYOUT = {
    "space": frozenset(get_args(Kind)), "dim": int, "coarse_index": str, "storage": frozenset(get_args(Storage))
}  # fmt: skip
_FACTS = {
    **_PLAN, "width": int, "dims": ListOf(int), "slots?": MapOf(int), "tuned?": _TUNED, "model?": str, "precision?": str,
    "filter_columns?": MapOf(frozenset(get_args(filters.Kind))),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to build: its key (which changes with its content), the embedding files that it covers, and their origin."""

    key: str
    store: Place
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


def note_update(manifest: Manifest) -> Receipt:
    """Returns what the journal has of a run that begins: what it indexes, and where each unit is to be."""
    return Receipt(UPDATE, 0, (), {"inputs": dict(manifest.inputs), "slots": manifest.facts["slots"]})


def _last_update(folder: Place, journal: Sequence[Receipt]) -> dict[str, Any] | None:
    """Returns what the last run that began noted.

    Raises:
        ValueError: It is not what a run leaves.
    """
    found = next((receipt.details for receipt in reversed(journal) if receipt.key == UPDATE), None)
    if found is not None:
        shapes.check(found, _UPDATE, f"{folder}: the journal", f"Remove {folder / 'journal'}.")
    return None if found is None else dict(found)


def known_slots(folder: Place, previous: Manifest | None, journal: Sequence[Receipt]) -> dict[str, int]:
    """Returns the shard of each slot of an index, and of those that a later run, which did not finish, found a place for.

    Raises:
        ValueError: The journal is not what a run leaves.
    """
    begun = _last_update(folder, journal)
    return {**(begun["slots"] if begun else {}), **previous.facts["slots"]} if previous else {}


def has_update(folder: Place, manifest: Manifest) -> bool:
    """Returns whether a run has begun to index something else than a finished index has, or to remove more, and not finished.

    Raises:
        ValueError: The journal cannot be read.
    """
    journal = artifacts.read_journal(folder)
    begun, listed = _last_update(folder, journal), removals.longest_list([*manifest.receipts, *journal])
    is_other = begun is not None and begun["inputs"] != dict(manifest.inputs)
    return manifest.is_complete and (is_other or listed != removals.longest_list(manifest.receipts))


def find_origins(plans: Sequence[ShardPlan], store: EmbeddingStore, kinds: Kinds) -> list[ShardPlan]:
    """Returns the plans with the places where the columns that shards are to keep come from."""
    source = corpus.recall(store.manifest.facts.get("corpus"))
    digests = {file.name: file.digest for file in source.files}
    receipts = {receipt.files[0].path: receipt for receipt in store.manifest.receipts}
    found = []
    for plan in plans:
        slots = [(receipts[file.path].key, str(receipts[file.path].details["slot"])) for file in plan.files]
        own = [Unit.of(key, slot, digests[slot.rpartition(":")[0]]) for key, slot in slots]
        stamps = {unit.name: source.stamp_of(unit.name) for unit in own}
        origin = Origin(source.columns, kinds, tuple((source.path_of(unit.name), unit) for unit in own), stamps)
        found.append(dataclasses.replace(plan, origin=origin))
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """What an index is made of.

    Attributes:
        space: Kind of the coarse space.
        dim: Of coarse vectors.
        factory: FAISS factory string of the coarse indexes; ``DENSE_INDEX``: coarse vectors as bfloat16, all compared by matrix
            products, or, after ``IVF`` and a number of lists, those in the lists that a query looks into; ``NO_INDEX``: none,
            every search compares full vectors.
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

    @property
    def has_faiss(self) -> bool:
        """Whether it is one of FAISS."""
        return self.has_index and self.factory.rpartition(",")[2] != DENSE_INDEX

    @property
    def num_lists(self) -> int:
        """Into how many lists documents are put; 0: there are none."""
        return count_lists(self.factory)

    @property
    def has_dense_lists(self) -> bool:
        """Whether these lists are of dense vectors."""
        return self.has_index and not self.has_faiss and self.factory != DENSE_INDEX

    @property
    def coarse_names(self) -> tuple[str, ...]:
        """The files of a shard's coarse index."""
        if not self.has_index:
            return ()
        return (COARSE,) if self.has_faiss else (DENSE, LISTS) if self.has_dense_lists else (DENSE,)

    @property
    def trained_names(self) -> tuple[str, ...]:
        """The files of what shards share, where anything is learned."""
        return (SPACE, *([COARSE] if self.has_faiss else [CENTROIDS] if self.has_dense_lists else []))


def needs_training(layout: Layout) -> bool:
    """Returns whether shards share something that is learned from documents."""
    is_learned = layout.has_dense_lists or (layout.has_faiss and not is_trained(layout.factory, layout.dim))
    return layout.has_index and (layout.space != "prefix" or is_learned)


def check_layout(layout: Layout, plan: FunnelPlan, num_documents: int) -> None:
    """Checks that an index of this layout can be learned from so many documents, and searched with a plan.

    Raises:
        ValueError: There are too few documents, FAISS has no such index, or the plan has parameters that it does not have.
    """
    if not layout.num_lists and not layout.has_faiss and plan.shortlist.parameters:
        raise ValueError(f"plan: {plan.describe()} has parameters of a coarse index, and there is none. Leave them out.")
    if not layout.has_index:
        return
    if layout.has_dense_lists:
        _check_lists(layout.factory, num_documents)
    if layout.space != "prefix" and num_documents < layout.dim:
        raise ValueError(f"--space {layout.space}: {num_documents} documents, too few for {layout.dim} dims. Choose prefix.")
    if layout.has_faiss:
        check_factory(layout.factory, layout.dim, num_documents)
    if plan.shortlist.dim == layout.dim:
        _check_parameters(layout, plan)


def _check_lists(factory: str, num_documents: int) -> None:
    """Checks that documents can be put into lists of dense vectors.

    Raises:
        ValueError: There are too few, or it is not clear what is meant.
    """
    num_lists = count_lists(factory)
    if factory != f"IVF{num_lists},{DENSE_INDEX}" or not num_lists:
        raise ValueError(f"--coarse-index {factory}: is no index. Write for example {DENSE_INDEX} or IVF2000,{DENSE_INDEX}.")
    if num_documents < num_lists:
        few = f"needs {num_lists} documents to learn from, and there are {num_documents}"
        raise ValueError(f"--coarse-index {factory}: {few}. Choose fewer lists, or {DENSE_INDEX}.")


def _check_parameters(layout: Layout, plan: FunnelPlan) -> None:
    """Checks that the coarse index has the parameters of a plan that begins with it.

    Raises:
        ValueError: It has not.
    """
    own = dict(plan.shortlist.parameters)
    if layout.has_faiss:
        check_parameters(layout.factory, layout.dim, own)
    elif own.keys() - ({"nprobe"} if layout.num_lists else ()):
        raise ValueError(f"plan: {plan.describe()}: an index of kind {layout.factory} has other parameters. Leave them out.")


def finished(
    folder: Place, previous: Manifest | None, plans: Sequence[ShardPlan], num_documents: int, *, replace: bool
) -> dict[str, Receipt]:
    """Returns the receipts of what earlier runs finished: training, shards of this very training, tombstones.

    What shards share is small, and decides whether shards can be searched together: its bytes are always compared.

    Args:
        folder: Of the index.
        previous: Its manifest, if there is something to go on from.
        plans: The shards that there are to be.
        num_documents: In all.
        replace: Whether altered shards, and a training that the corpus has outgrown, are given up.
    """
    trained = artifacts.finished_receipts(folder, previous, [TRAINED], compare_digests=True)
    if replace and TRAINED in trained and outgrown(trained[TRAINED], num_documents):
        trained = {}
    training = training_of(trained.get(TRAINED))
    marks = [f"{REMOVED}/{plan.key}" for plan in plans]
    found = artifacts.finished_receipts(folder, previous, [*(plan.key for plan in plans), *marks], compare_digests=replace)
    shards = {key: receipt for key, receipt in found.items() if key in marks or receipt.details.get("training") == training}
    return {**trained, **shards}


def train(
    store: EmbeddingStore,
    layout: Layout,
    queries: Float16Array | None,
    num_sampled: int,
    folder: Place,
    num_threads: int = 1,
) -> Receipt:
    """Learns what all shards share from a sample of documents, drawn evenly from all units; publishes and returns its receipt.

    Args:
        store: The embeddings.
        layout: What to learn.
        queries: Vectors of real queries, for a projection.
        num_sampled: Documents to learn from, at most.
        folder: Of the index.
        num_threads: That FAISS learns with.

    Raises:
        ValueError: An embedding file is not what its receipt says, a vector is not finite, or there are too few documents to
            learn from.
    """
    start = time.perf_counter()
    is_index_learned = layout.has_faiss or layout.has_dense_lists
    sample = _sample(store, num_sampled if is_index_learned else min(num_sampled, _SPACE_DOCUMENTS))
    space = spaces.learn(layout.space, layout.dim, sample[:: -(-len(sample) // _SPACE_DOCUMENTS)], queries)
    coarse = space.documents(sample) if is_index_learned else None
    with storage.publish(folder / TRAINED) as temporary:
        temporary.mkdir()
        space.write(temporary / SPACE)
        with threads(num_threads):
            if coarse is not None and layout.has_faiss:
                CoarseIndex.train(coarse, layout.factory).write(temporary / COARSE)
            elif coarse is not None:
                np.save(temporary / CENTROIDS, train_centroids(coarse, layout.num_lists), allow_pickle=False)
        files = tuple(FileRecord.named(f"{TRAINED}/{name}", temporary / name) for name in layout.trained_names)
    details = {
        "num_sampled": len(sample),
        "num_documents": store.manifest.num_rows,
        "num_queries": 0 if queries is None else len(queries),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return Receipt(TRAINED, 0, files, details)


def outgrown(training: Receipt, num_documents: int) -> bool:
    """Returns whether there are now many more documents than what shards share was learned from."""
    return num_documents > _OUTGROWN * int(training.details["num_documents"])


def _sample(store: EmbeddingStore, num_sampled: int) -> Float16Array:
    """Returns the vectors at even distances in the store's order; units without one of them are not read."""
    num_rows = store.manifest.num_rows
    wanted = np.unique(np.linspace(0, num_rows - 1, min(num_sampled, num_rows)).astype(np.int64))
    files, rows, start = [], {}, 0
    for receipt in store.manifest.receipts:
        own = wanted[(wanted >= start) & (wanted < start + receipt.num_rows)] - start
        if own.size:
            files.append(receipt.files[0])
            rows[receipt.files[0].path] = own
        start += receipt.num_rows
    return np.concatenate([unit.block for unit in _read_units(store.folder, files, rows)])


@dataclass(frozen=True, slots=True)
class _ReadUnit:
    """One embedding file, or some of its rows.

    Shapes: block [N, D], coarse [N, dim] (None where there is no coarse space).
    """

    ids: pa.Array
    block: Float16Array
    coarse: Float32Array | None


def _read_units(
    store: Place, files: Sequence[FileRecord], rows: Mapping[str, IntArray] | None = None, space: Space | None = None
) -> Iterator[_ReadUnit]:
    """Yields each embedding file, all or some rows of it; the next ones are read, checked and mapped to a space meanwhile.

    Raises:
        ValueError: A file is not what its receipt says, or a vector is not finite.
    """
    with ThreadPoolExecutor(_READ_AHEAD, "units") as pool:
        coming = deque(pool.submit(_read_unit, store, file, rows, space) for file in files[:_READ_AHEAD])
        for number in range(len(files)):
            following = files[number + _READ_AHEAD : number + _READ_AHEAD + 1]
            coming.extend(pool.submit(_read_unit, store, file, rows, space) for file in following)
            yield coming.popleft().result()


def _read_unit(store: Place, file: FileRecord, rows: Mapping[str, IntArray] | None, space: Space | None) -> _ReadUnit:
    ids, block = vectors.read_checked(store, file)
    if rows is not None:
        ids, block = ids.take(pa.array(rows[file.path])), block[rows[file.path]]
    _refuse_infinite(store / file.path, ids, block)
    return _ReadUnit(ids, block, space.documents(block) if space else None)


def measure_loss(store: EmbeddingStore, layout: Layout) -> dict[str, float]:
    """Returns what storing full vectors costs: the mean error of a score, and the share of the exact top 10 that stays in it.

    Both on a sample, drawn evenly from all units, of which some ask and all answer but for the one that asks.
    """
    sample = _sample(store, _LOSS_DOCUMENTS)
    asking = np.unique(np.linspace(0, len(sample) - 1, min(_LOSS_QUERIES, len(sample))).astype(np.int64))
    width = sample.shape[1]
    queries = shrink(sample[asking], width)
    exact, stored = (queries @ shrink(own, width).T for own in (sample, pack(sample, layout.storage)))
    error = float(np.abs(exact - stored).mean())
    num_results = min(_LOSS_RESULTS, len(sample) - 1)
    for scores in (exact, stored):
        scores[np.arange(len(asking)), asking] = -np.inf
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :num_results] for scores in (exact, stored)]
    kept = sum(len(np.intersect1d(*pair)) for pair in zip(*best, strict=True)) / max(num_results * len(asking), 1)
    return {
        "mean_score_error": round(error, 7),
        "top_10_kept": round(kept, 4) if num_results else 1.0,
        "num_documents": len(sample),
        "num_queries": len(asking),
    }


def build_shard(
    plan: ShardPlan, layout: Layout, folder: Place, training: Receipt | None = None, listed: Receipt | None = None
) -> Receipt:
    """Builds one shard, publishes its folder, and returns its receipt; memory holds the coarse index, and four units at most.

    Args:
        plan: What it is made of.
        layout: Of the index.
        folder: Of the index.
        training: Receipt of what shards share; the shard's names it, so that shards of two trainings are never taken together.
        listed: Receipt of the documents to leave out.

    Raises:
        ValueError: An embedding file, what was trained, or the corpus is not what it was, or a vector is not finite.
    """
    start = time.perf_counter()
    space, index = open_trained(folder, layout, training)
    kept = _kept_rows(plan, removals.open_list(folder, listed)) if listed else None
    num_rows = plan.num_rows if kept is None else sum(map(len, kept.values()))
    all_ids: list[pa.Array] = []
    columns: list[pa.Table] = []
    with storage.publish(folder / SHARDS / plan.key) as temporary:
        temporary.mkdir()
        with ArrayWriter(temporary / VECTORS, num_rows) as full:
            for position, unit in enumerate(_read_units(plan.store, plan.files, kept, space if index else None)):
                full.append(pack(unit.block, layout.storage))
                if index and unit.coarse is not None:
                    index.add(unit.coarse)
                if plan.origin:
                    columns.append(filters.read_columns(plan.origin, position, unit.ids))
                all_ids.append(unit.ids)
        vectors.write_ids(temporary / IDS, all_ids)
        if columns:
            filters.write_columns(temporary / COLUMNS, columns)
        if index:
            index.write(*(temporary / name for name in layout.coarse_names))
        below = f"{SHARDS}/{plan.key}"
        names = [*layout.coarse_names, IDS, *([COLUMNS] if columns else [])]
        files = tuple(FileRecord.named(f"{below}/{name}", temporary / name) for name in names)
        files = (*files, FileRecord(f"{below}/{VECTORS}", full.num_bytes, full.digest))
    details = {
        "num_left_out": plan.num_rows - num_rows,
        "training": training_of(training),
        "list": listed.files[0].digest if listed else None,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return Receipt(plan.key, num_rows, files, details)


def _kept_rows(plan: ShardPlan, removed: pa.Array) -> dict[str, IntArray]:
    """Returns the rows of each embedding file that go into a shard."""
    ids = {file.path: vectors.read_ids(plan.store / file.path) for file in plan.files}
    return {path: np.delete(np.arange(len(own)), removals.find(own, removed)) for path, own in ids.items()}


def _refuse_infinite(path: Place, ids: pa.Array, block: Float16Array) -> None:
    """Refuses vectors that a coarse index would silently never find.

    Raises:
        ValueError: One is not finite.
    """
    wrong = np.flatnonzero(((block.view(np.uint16) & _EXPONENT) == _EXPONENT).any(axis=1))  # numpy itself looks at each alone
    if wrong.size:
        raise ValueError(f"{path}: {wrong.size} vectors are not finite (first: '{ids[int(wrong[0])]}'). Embed it again.")


def training_of(training: Receipt | None) -> str | None:
    """Returns what tells one training from another: its bytes."""
    return storage.digest_json([file.digest for file in training.files]) if training else None


def open_trained(
    folder: Place, layout: Layout, training: Receipt | None
) -> "tuple[Space, CoarseIndex | CoarseLists | CoarseVectors | None]":
    """Returns the coarse space of an index, and an empty coarse index; what needs no training is made here.

    Raises:
        ValueError: What was trained is missing or not what its receipt says.
    """
    from matryoshka.lists import CoarseLists
    from matryoshka.products import CoarseVectors

    space = open_space(folder, layout, training)
    if layout.has_dense_lists:
        assert training
        return space, CoarseLists(np.load(_check_trained(folder, training, CENTROIDS), allow_pickle=False))
    if not layout.has_faiss:
        return space, CoarseVectors() if layout.has_index else None
    if training is None:
        return space, CoarseIndex.train(np.empty((0, layout.dim), np.float32), layout.factory)
    return space, CoarseIndex.read(_check_trained(folder, training, COARSE)).copy()


def open_space(folder: Place, layout: Layout, training: Receipt | None) -> Space:
    """Returns the coarse space of an index.

    Raises:
        ValueError: Its file is missing or not what the receipt says.
    """
    return Space.read(_check_trained(folder, training, SPACE)) if training else Space("prefix", layout.dim)


def _check_trained(folder: Place, training: Receipt, name: str) -> Path:
    return artifacts.check_file(folder, next(file for file in training.files if PurePosixPath(file.path).name == name))


def export_keys(index: "IndexStore", plan: FunnelPlan) -> list[str]:
    """Returns the key of each shard's export, which changes with anything that the export is made of."""
    shards, keys = shard_receipts(index.manifest), []
    tombstones = {receipt.key: receipt for receipt in index.manifest.receipts if receipt.num_rows < 0}
    for shard in shards:
        own = [shard, *filter(None, [index.training, tombstones.get(removals.key_of(shard))])]
        content = [[file.digest for file in receipt.files] for receipt in own]
        keys.append(f"{shard.key}-{storage.digest_json([content, str(plan.shortlist)])[:16]}")
    return keys


def export_shard(index: "IndexStore", number: int, plan: FunnelPlan, folder: Place, key: str) -> Receipt:
    """Writes one shard as a plain FAISS index that searches with the shortlist of a plan and reranks at full width.

    Row for row, the ids stand in a Parquet file beside it. Removed documents are not among them. Memory holds the vectors of
    the shard as float32.
    """
    from matryoshka import products

    shard, layout = index.shards[number], index.layout
    removed = shard.read_removed()
    stored = np.load(shard.path(VECTORS), mmap_mode="r", allow_pickle=False)
    full = shrink(np.delete(stored, removed, axis=0) if len(removed) else stored, stored.shape[1])
    ids = vectors.open_ids(shard.path(IDS))
    space, coarse = open_trained(index.folder, layout, index.training)
    if coarse is None or plan.shortlist.dim != layout.dim:  # the plan scans a prefix
        space, coarse = Space("prefix", plan.shortlist.dim), CoarseIndex.build(shrink(full, plan.shortlist.dim), "Flat")
    elif not isinstance(coarse, CoarseIndex):
        rows = np.load(shard.path(LISTS), allow_pickle=False)["rows"] if layout.has_dense_lists else None
        coarse = CoarseIndex.build(np.delete(products.read_coarse(shard.path(DENSE), rows), removed, axis=0), "SQbf16")
    elif len(removed):
        coarse.add(space.documents(full))
    else:
        coarse = CoarseIndex.read(shard.path(COARSE))
    with storage.publish(folder / SHARDS / key) as temporary:
        temporary.mkdir()
        coarse.write_plain(temporary / PLAIN, full, space.query_map, plan.shortlist)
        vectors.write_id_table(temporary / PLAIN_IDS, ids.take(pa.array(np.delete(np.arange(len(ids)), removed))))
        files = tuple(FileRecord.named(f"{SHARDS}/{key}/{name}", temporary / name) for name in (PLAIN, PLAIN_IDS))
    return Receipt(key, len(full), files)


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


def count_missing(manifest: Manifest) -> int:
    """Returns how many documents of the embeddings an index leaves out: on disk, or by tombstones."""
    left_out = sum(int(receipt.details.get("num_left_out", 0)) for receipt in shard_receipts(manifest))
    return left_out - sum(min(receipt.num_rows, 0) for receipt in manifest.receipts)


def layout_of(manifest: Manifest) -> Layout | None:
    """Returns what an index is made of, finished or not; None where it was made before there was a choice.

    Raises:
        ValueError: The manifest does not say.
    """
    identity = manifest.identity
    if "space" not in identity:
        return None
    shapes.check(identity, _LAYOUT, "manifest of the index", _ANEW)
    return Layout(identity["space"], identity["dim"], identity["coarse_index"], identity["storage"])


def shard_receipts(manifest: Manifest) -> list[Receipt]:
    """Returns the receipts of an index's shards: not those of what they share, of removed documents and of tombstones."""
    return [receipt for receipt in manifest.receipts if receipt.key.partition("/")[0] not in (TRAINED, REMOVED)]


def _checked_later(folder: Place, manifest: Manifest) -> set[str]:
    """Returns the names of files whose digests are not looked at when an index is opened."""
    if isinstance(folder, Path):
        return {VECTORS}
    return {PurePosixPath(file.path).name for receipt in manifest.receipts for file in receipt.files}


def _read(folder: Place) -> Manifest:
    """Returns the manifest of a finished index that says all that a search relies on.

    Raises:
        ValueError: It does not, or there is none.
    """
    manifest, place = artifacts.read_complete(folder, "index"), f"{folder / artifacts.MANIFEST}"
    layout = layout_of(manifest)
    if layout is None:
        raise ValueError(f"{folder}: was made by an earlier version, and is laid out otherwise. {_ANEW}")
    shapes.check(manifest.facts, _FACTS, place, _ANEW)
    width = manifest.facts["width"]
    if not all(1 <= dim <= width for dim in (layout.dim, *manifest.facts["dims"])):
        raise ValueError(f"{place}: has dims that vectors of {width} dims do not have. {_ANEW}")
    tuned = manifest.facts.get(TUNED, {"plans": {}})["plans"].values()
    for parts in (manifest.facts["plan"], *(own["plan"] for own in tuned)):
        try:
            FunnelPlan.parse(parts)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    for receipt in manifest.receipts:
        _check_receipt(receipt, layout, place)
    return manifest


def _check_receipt(receipt: Receipt, layout: Layout, place: str) -> None:
    """Checks that a receipt of an index names the files that its readers will look for, and no others; and what it counts.

    Raises:
        ValueError: It does not.
    """
    shapes.check(receipt.details, _DETAILS, f"{place}: the receipt '{receipt.key}'", _ANEW)
    kind, found = receipt.key.partition("/")[0], {file.path for file in receipt.files}
    if kind == TRAINED:
        needed, folder = set(layout.trained_names), TRAINED
    elif kind == REMOVED:
        needed, folder = {Path(path).name for path in found} or {IDS}, REMOVED
    else:
        needed, folder = {*layout.coarse_names, VECTORS, IDS}, f"{SHARDS}/{receipt.key}"
    if not {f"{folder}/{name}" for name in needed} <= found or any(Path(path).parent != Path(folder) for path in found):
        raise ValueError(f"{place}: the receipt '{receipt.key}' does not name the files of its part. {_ANEW}")


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
    >>> facts = {"width": 8, "dims": [8], "plan": ["4:2", "8:2"]}
    >>> Manifest("index", identity, facts=facts, receipts=(receipt,), is_complete=True).write(folder / "index")
    >>> searcher = IndexStore.open(folder / "index").searcher()
    >>> searcher.search(np.array([[0, 1, 0.5, 0, 0, 0, 0, 0]]), num_results=2).ids.tolist()
    [['b', 'c']]
    >>> made.cleanup()
    """

    folder: Place
    manifest: Manifest
    missing: frozenset[str] = frozenset()

    @classmethod
    def open(cls, folder: Place) -> "IndexStore":
        """Returns the index in a folder.

        All files must have their sizes, and those that are parsed their digests, ids included. Full vectors are most of an
        index, are numbers and nothing else, and are mostly never looked at: reading them all to open an index of a hundred
        shards would take minutes. ``python -m jobs.verify`` does. In a bucket nothing is read yet: digests, those of vectors
        too, are checked when a node fetches a file.

        Raises:
            ValueError: There is none, it is not finished, or a file of it is missing, truncated or, but for vectors, altered.
        """
        manifest = _read(folder)
        faults = artifacts.find_faults(folder, manifest, only_sizes=_checked_later(folder, manifest))
        if faults:
            raise ValueError(f"{faults[0]}. {_ANEW}")
        return cls(folder, manifest)

    @classmethod
    def open_partial(cls, folder: Place) -> tuple["IndexStore", dict[str, str]]:
        """Returns the index without the shards that cannot be read, and what is wrong with each of these.

        Files are looked at as by ``open``. A shard whose tombstones cannot be read would find what was removed.

        Raises:
            ValueError: There is no index, it is not finished, what all shards share cannot be read, or no shard can.
        """
        manifest = _read(folder)
        names = {removals.key_of(receipt): receipt.key for receipt in shard_receipts(manifest)}
        faults: dict[str, str] = {}
        for receipt, fault in artifacts.find_faulty(folder, manifest, only_sizes=_checked_later(folder, manifest)):
            faults.setdefault(names.get(receipt.key, receipt.key), fault)
        for shared in faults.keys() - set(names.values()):
            raise ValueError(f"{faults[shared]}. {_ANEW}")
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
    def num_documents_of(self) -> dict[str, int]:
        """Documents of every shard that may be found, by its key, those of shards that are left out included."""
        gone = {receipt.key: receipt.num_rows for receipt in self.manifest.receipts if receipt.num_rows < 0}
        return {own.key: own.num_rows + gone.get(removals.key_of(own), 0) for own in shard_receipts(self.manifest)}

    @property
    def coverage(self) -> float:
        """The share of the index's documents that is in shards which are not left out."""
        counts = self.num_documents_of
        return sum(count for key, count in counts.items() if key not in self.missing) / max(sum(counts.values()), 1)

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

    @property
    def layout(self) -> Layout:
        """What the index is made of."""
        layout = layout_of(self.manifest)
        assert layout is not None
        return layout

    @property
    def tuned(self) -> Mapping[str, Any] | None:
        """What the tune job found for the index; None: it was not tuned."""
        found: Mapping[str, Any] | None = self.manifest.facts.get(TUNED)
        return found

    @property
    def frontier(self) -> dict[str, Any] | None:
        """The plans that no other beats, as the tune job found them, and the one that searches use; None: it was not tuned."""
        if not self.tuned:
            return None
        names = {tuple(own["plan"]): name for name, own in self.tuned["plans"].items()}
        points = [
            {
                "plan": ",".join(one["plan"]), "name": names.get(tuple(one["plan"])), "quality": one["confirmed"],
                "low": one["low"], "high": one["high"], "microseconds": round(1e6 / max(one["queries_per_second"], 1e-9), 2),
            }
            for one in self.tuned["frontier"]
        ]  # fmt: skip
        return {"measure": self.tuned["measure"], "chosen": ",".join(self.plan.parts), "points": points}

    @property
    def is_tuning_current(self) -> bool:
        """Whether the tuning is of the documents that are in the index now."""
        return self.tuned is not None and self.tuned["embeddings"] == self.manifest.inputs.get("embeddings")

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
        buried = {receipt.key: receipt.files[0] for receipt in self.manifest.receipts if receipt.num_rows < 0}
        own = [receipt for receipt in shard_receipts(self.manifest) if receipt.key not in self.missing]
        return [ShardFiles(self.folder, receipt.key, receipt.files, buried.get(removals.key_of(receipt))) for receipt in own]

    @property
    def training(self) -> Receipt | None:
        """Receipt of what shards share, where something is learned."""
        return next((receipt for receipt in self.manifest.receipts if receipt.key == TRAINED), None)

    def open_ids(self) -> list[pa.Array]:
        """Returns the ids of every shard, mapped from disk."""
        return [vectors.open_ids(shard.path(IDS)) for shard in self.shards]

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
        space = open_space(self.folder, self.layout, self.training) if self.layout.has_index else None
        return Searcher(
            call or funnel.call_locally([Shard.open(files) for files in self.shards]),
            self.open_ids(),
            plan,
            space,
        )

    def check_plan(self, plan: FunnelPlan, device: str = "cpu") -> None:
        """Checks that the index can be searched with a plan on a device.

        Raises:
            ValueError: The plan does not fit the index, or the device.
        """
        layout = self.layout
        if device == "cuda" and layout.has_faiss and plan.shortlist.dim == layout.dim:
            check_gpu_shortlist(layout.factory, layout.dim, funnel.num_fetched_for(plan.shortlist.keep))
        if plan.steps[-1].dim > self.width:
            raise ValueError(f"{self.folder}: vectors have {self.width} dims, the plan is {plan.describe()}. Change the plan.")
        if plan.shortlist.parameters:
            has_parameters = layout.has_faiss or layout.has_dense_lists
            if not has_parameters or plan.shortlist.dim != layout.dim:
                raise ValueError(
                    f"{self.folder}: the plan {plan.describe()} has parameters of a coarse index, which this index has for"
                    f" {layout.dim if has_parameters else 'no'} dims. Change the plan."
                )
            _check_parameters(layout, plan)

    def keep_tuning(self, tuned: Mapping[str, Any]) -> None:
        """Stores what the tune job found with the index, whose fingerprint and shards stay as they are.

        Raises:
            RuntimeError: The index is no longer the one that was opened.
        """
        manifest = artifacts.read(self.folder, "index")
        if manifest.fingerprint != self.manifest.fingerprint or not manifest.is_complete:
            raise RuntimeError(f"{self.folder}: was built anew while it was tuned. Run python -m jobs.tune again.")
        manifest.amend(self.folder, {TUNED: dict(tuned)})


def tuning_of(previous: Manifest | None, plan: FunnelPlan) -> dict[str, Any]:
    """Returns the facts about tuning that a build hands on: all, unless it was asked for another plan than before."""
    facts = previous.facts if previous else {}
    return {TUNED: facts[TUNED]} if TUNED in facts and facts["plan"] == plan.parts else {}

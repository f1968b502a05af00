import dataclasses
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from matryoshka import artifacts, indexing, removals, storage, verification
from matryoshka.artifacts import Manifest, Receipt
from matryoshka.funnel import COARSE, IDS, VECTORS, Shard
from matryoshka.indexing import SHARDS, SPACE, TRAINED, IndexStore, Layout
from matryoshka.nested import FunnelPlan, shrink
from matryoshka.spaces import Kind
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]
MakeIndex = Callable[..., IndexStore]


@pytest.fixture
def parts(random_vectors: Make) -> dict[str, tuple[list[str], np.ndarray]]:
    return {f"{n}.parquet:0": ([f"d{n}-{i}" for i in range(5)], random_vectors(5, 8, n)) for n in range(6)}


FAULTS = ("missing", "bytes, the receipt says", "its bytes were altered")


def keys(plans: list[indexing.ShardPlan]) -> dict[str, str]:
    return dict(plan.key.split("-") for plan in plans)


def test_shards_cover_every_document_once(make_store: MakeStore, make_index: MakeIndex, parts: dict):
    index = make_index(make_store(parts), num_shards=4)
    ids = [name for shard in index.open_ids() for name in shard.to_pylist()]
    assert sorted(ids) == sorted(name for names, _ in parts.values() for name in names)
    assert [Shard.open(files).num_documents for files in index.shards] == [len(shard) for shard in index.open_ids()]


def test_only_shards_whose_units_changed_get_another_key(make_store: MakeStore, random_vectors: Make, parts: dict):
    slots, before = indexing.plan_shards(make_store(parts), 3, {})
    changed = {**parts, "3.parquet:0": (["new"], random_vectors(1, 8, 99))}
    slots_now, after = indexing.plan_shards(make_store(changed, "changed"), 3, slots)
    touched = f"{slots['3.parquet:0']:05d}"
    assert slots_now == slots
    assert {shard for shard in keys(before) if keys(before)[shard] != keys(after)[shard]} == {touched}


def test_a_new_unit_touches_one_shard_and_a_removed_one_only_its_own(make_store: MakeStore, random_vectors: Make, parts: dict):
    slots, before = indexing.plan_shards(make_store(parts), 3, {})
    # Receipts are numbered by place in this store, so the new unit comes last.
    _, more = indexing.plan_shards(make_store({**parts, "9.parquet:0": (["new"], random_vectors(1, 8, 9))}, "more"), 3, slots)
    assert sum(keys(before)[shard] != keys(more)[shard] for shard in keys(before)) == 1
    fewer = dict(list(parts.items())[:-1])
    _, less = indexing.plan_shards(make_store(fewer, "fewer"), 3, slots)
    assert {shard for shard in keys(before) if keys(before)[shard] != keys(less)[shard]} == {f"{slots['5.parquet:0']:05d}"}


def test_a_shard_without_documents_is_not_built(make_store: MakeStore, random_vectors: Make):
    store = make_store({"a:0": (["x"], random_vectors(1, 8)), "b:0": ([], random_vectors(0, 8))})
    slots, plans = indexing.plan_shards(store, 2, {})
    assert slots == {"a:0": 0, "b:0": 1}
    assert [len(plan.files) for plan in plans] == [1]


def test_building_a_shard_twice_gives_the_same_bytes(tmp_path: Path, make_store: MakeStore, parts: dict):
    _, (plan, *_) = indexing.plan_shards(make_store(parts), 3, {})
    first, again = (indexing.build_shard(plan, Layout("prefix", 4, "Flat"), tmp_path / name).files for name in ("one", "two"))
    assert first == again
    assert {Path(file.path).name for file in first} == {COARSE, VECTORS, IDS}


def test_the_index_finds_each_document_by_its_own_vector(make_store: MakeStore, make_index: MakeIndex, parts: dict):
    searcher = make_index(make_store(parts), num_shards=3).searcher()
    for names, block in parts.values():
        assert searcher.search(block, 1).ids[:, 0].tolist() == names


def test_shards_that_are_rebuilt_leave_nothing_but_themselves(make_store: MakeStore, make_index: MakeIndex, parts: dict):
    store = make_store(parts)
    for _ in range(2):
        index = make_index(store)
    assert sorted(path.name for path in (index.folder / SHARDS).iterdir()) == sorted(files.folder.name for files in index.shards)
    assert not list(index.folder.rglob(f"{storage.TEMPORARY}*"))


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name in (COARSE, VECTORS, IDS) for fault in FAULTS if (name, fault) != (VECTORS, FAULTS[-1])],
)
def test_an_index_with_a_missing_truncated_or_altered_file_is_not_opened(
    make_store: MakeStore, make_index: MakeIndex, parts: dict, name: str, fault: str
):
    index = make_index(make_store(parts))
    path = index.shards[1].folder / name
    data = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes(data[:-1] if "receipt" in fault else bytes([*data[:-1], data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name}: .*{fault}.*Build the index anew: python -m jobs\.index with --replace"):
        IndexStore.open(index.folder)


def test_a_shortlist_that_faiss_cannot_make_on_a_gpu_is_refused(make_store: MakeStore, make_index: MakeIndex, parts: dict):
    index = make_index(make_store(parts))
    plan = FunnelPlan.parse(["4:2040", "8:3"])
    index.check_plan(plan, "cpu")
    with pytest.raises(
        ValueError, match=r"for which 2295 are fetched, and FAISS gives at most 2048 on a GPU\. Choose a shorter one"
    ):
        index.check_plan(plan, "cuda")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (["4:5", "9:3"], r"vectors have 8 dims, the plan is 4d keep 5 > 9d keep 3\. Change the plan"),
        (["4:5:nprobe=3", "8:3"], r"kind Flat has no parameter 'nprobe'\. Leave it out"),
        (["2:5:nprobe=3", "8:3"], r"has parameters of a coarse index, which this index has for 4 dims\. Change the plan"),
    ],
)
def test_a_plan_that_does_not_fit_the_index_is_refused(
    make_store: MakeStore, make_index: MakeIndex, parts: dict, plan: list[str], message: str
):
    index = make_index(make_store(parts))
    with pytest.raises(ValueError, match=message):
        index.searcher(FunnelPlan.parse(plan))


def test_a_plan_that_starts_at_other_dims_than_the_coarse_index_scans_them(
    make_store: MakeStore, make_index: MakeIndex, parts: dict, random_vectors: Make
):
    index, queries = make_index(make_store(parts)), random_vectors(4, 8, 50)
    assert index.plan == FunnelPlan.parse(["4:5", "8:3"])
    names = [name for own, _ in parts.values() for name in own]
    full = np.concatenate([block for _, block in parts.values()]).astype(np.float64)
    for plan, dim in ((["8:3"], 8), (["2:30", "8:3"], 8), (["5:4"], 5)):
        scores = queries[:, :dim].astype(np.float64) @ (full[:, :dim] / np.linalg.norm(full[:, :dim], axis=1)[:, None]).T
        expected = np.asarray(names)[np.argsort(-scores, axis=1)[:, :3]]
        assert index.searcher(FunnelPlan.parse(plan)).search(queries, 3).ids.tolist() == expected.tolist()


def test_an_index_of_an_earlier_version_is_refused(make_store: MakeStore, make_index: MakeIndex, parts: dict):
    index = make_index(make_store(parts))
    identity = {"model": "m", "plan": ["4:5"], "coarse_index": "Flat", "shards": None}
    dataclasses.replace(index.manifest, identity=identity).write(index.folder)
    with pytest.raises(ValueError, match=r"was made by an earlier version, and is laid out otherwise\. Build the index anew"):
        IndexStore.open(index.folder)


def test_altered_vectors_are_opened_and_left_to_verify_to_find(make_store: MakeStore, make_index: MakeIndex, parts: dict):
    index = make_index(make_store(parts))
    path = index.shards[1].folder / VECTORS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    IndexStore.open(index.folder)
    assert [line.partition(": ")[::2] for line in verification.verify(index.folder)[1]] == [
        (str(path), "its bytes were altered (another SHA-256 than the receipt's)")
    ]


ROTATION = Layout("rotation", 4, "Flat")


def test_what_is_learned_is_learned_from_documents_at_even_distances_in_all_units(make_store: MakeStore, tmp_path: Path):
    blocks = [np.eye(8, dtype=np.float16)[[unit] * 50] for unit in range(4)]
    store = make_store({f"{unit}:0": ([f"{unit}-{n}" for n in range(50)], block) for unit, block in enumerate(blocks)})
    receipt = indexing.train(store, ROTATION, None, 40, tmp_path / "index")
    assert {"num_sampled": 40, "num_documents": 200, "num_queries": 0}.items() <= receipt.details.items()
    # Ten documents of each unit: the four directions have equal energy, and the space holds them all.
    space = indexing.open_space(tmp_path / "index", ROTATION, receipt)
    np.testing.assert_allclose(np.linalg.norm(space.documents(np.eye(8)), axis=1), [1] * 4 + [0] * 4, atol=1e-5)


@pytest.mark.parametrize("factor", [4, 5])
def test_a_training_is_outgrown_by_more_than_four_times_the_documents(
    make_store: MakeStore, tmp_path: Path, parts: dict, factor: int
):
    receipt = indexing.train(make_store(parts), ROTATION, None, 99, tmp_path)
    assert indexing.outgrown(receipt, factor * 30) == (factor > 4)


@pytest.fixture
def two_trainings(make_store: MakeStore, tmp_path: Path, parts: dict) -> tuple[Path, Manifest, list, dict[str, Receipt]]:
    """A folder in which one run had built all shards, and another had trained anew and built one when it was killed."""
    store, folder = make_store(parts), tmp_path / "index"
    slots, plans = indexing.plan_shards(store, 3, {})
    manifest, journal = Manifest("index", {}, facts={"slots": slots}), artifacts.Journal(folder)
    manifest.write(folder)
    last = {}
    for sample, num_built in ((30, 3), (9, 1)):
        training = indexing.train(store, ROTATION, None, sample, folder)
        for receipt in (training, *(indexing.build_shard(plan, ROTATION, folder, training) for plan in plans[:num_built])):
            journal.add(receipt)
            last[receipt.key] = receipt
    journal.flush()
    return folder, manifest, plans, last


def test_shards_of_another_training_are_never_taken_up(two_trainings: tuple):
    folder, manifest, plans, last = two_trainings
    found = indexing.finished(folder, manifest, plans, 30, replace=False)
    assert found == {key: last[key] for key in (TRAINED, plans[0].key)}


def test_without_the_training_no_shard_is_taken_up(two_trainings: tuple):
    folder, manifest, plans, _ = two_trainings
    (folder / TRAINED / SPACE).unlink()
    assert indexing.finished(folder, manifest, plans, 30, replace=False) == {}


def test_an_altered_training_of_the_same_size_is_none(two_trainings: tuple):
    folder, manifest, plans, _ = two_trainings
    data = (folder / TRAINED / SPACE).read_bytes()
    (folder / TRAINED / SPACE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert indexing.finished(folder, manifest, plans, 30, replace=False) == {}


def test_an_outgrown_training_is_kept_until_replace(two_trainings: tuple):
    folder, manifest, plans, _ = two_trainings
    assert TRAINED in indexing.finished(folder, manifest, plans, 1000, replace=False)
    assert TRAINED in indexing.finished(folder, manifest, plans, 120, replace=True)
    assert indexing.finished(folder, manifest, plans, 121, replace=True) == {}


def test_a_shard_is_not_built_with_an_altered_training(two_trainings: tuple):
    folder, _, plans, last = two_trainings
    path = folder / TRAINED / COARSE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"coarse\.faiss: its bytes were altered"):
        indexing.build_shard(plans[1], ROTATION, folder, last[TRAINED])


@pytest.mark.parametrize("space", ["rotation", "projection"])
@pytest.mark.parametrize("factory", ["Flat", "PQ4x4fs", "IVF2,PQ4x4fs", "IVF40,dense:nprobe=1"])
def test_learned_spaces_and_kinds_search_sharded_as_unsharded(
    make_store: MakeStore, make_index: MakeIndex, random_vectors: Make, space: Kind, factory: str
):
    parts = {f"{n}:0": ([f"d{n}-{i}" for i in range(9)], random_vectors(9, 16, n)) for n in range(6)}
    factory, _, parameters = factory.partition(":")
    store, layout, queries = make_store(parts), Layout(space, 8, factory), random_vectors(20, 16, 99)
    plan = [f"8:12:{parameters}".rstrip(":"), "16:5"]
    found = [
        make_index(store, num_shards, f"index-{num_shards}", layout, plan, queries).searcher().search(queries, 5).ids
        for num_shards in (1, 3)
    ]
    assert found[0].tolist() == found[1].tolist()


@pytest.mark.parametrize("factory", ["Flat", "dense", "IVF4,dense"])
def test_the_same_vectors_make_the_same_bytes(make_store: MakeStore, make_index: MakeIndex, random_vectors: Make, factory: str):
    parts = {f"{n}:0": ([f"d{n}-{i}" for i in range(30)], random_vectors(30, 16, n)) for n in range(6)}
    store, layout = make_store(parts), Layout("rotation", 8, factory)
    first, second = (make_index(store, 2, name, layout, ["8:12", "16:5"]) for name in ("first", "second"))
    assert first.manifest.fingerprint == second.manifest.fingerprint


REMOVED_IDS = ["d0-1", "d3-0", "d3-1", "d3-2", "d3-3", "d3-4", "nobody"]


@pytest.mark.parametrize("layout", [Layout("prefix", 4, "Flat"), Layout("prefix", 4, "IVF2,dense")], ids=str)
def test_documents_that_are_removed_are_gone_from_results_and_counts_and_then_from_disk(
    make_store: MakeStore, make_index: MakeIndex, parts: dict, random_vectors: Make, layout: Layout
):
    store, queries = make_store(parts), random_vectors(7, 8, 77)
    marked = make_index(store, 3, "index", layout, removed=REMOVED_IDS)
    assert marked.manifest.num_rows == 24
    assert indexing.count_missing(marked.manifest) == 6
    assert verification.verify(marked.folder)[1] == []
    found = marked.searcher().search(queries, 30).ids
    _, plans = indexing.plan_shards(store, 3, {})
    listed = removals.longest_list(marked.manifest.receipts)
    receipts = [indexing.build_shard(plan, layout, marked.folder, marked.training, listed) for plan in plans]
    manifest = dataclasses.replace(marked.manifest, receipts=(*filter(None, [marked.training]), *receipts, listed))
    manifest.write(marked.folder)
    rebuilt = IndexStore.open(marked.folder)
    assert (rebuilt.manifest.num_rows, indexing.count_missing(rebuilt.manifest)) == (24, 6)
    assert [len(ids) for ids in rebuilt.open_ids()] == [receipt.num_rows for receipt in receipts]
    assert verification.verify(rebuilt.folder)[1] == []
    assert set(found[0]) == {name for names, _ in parts.values() for name in names} - set(REMOVED_IDS)
    assert rebuilt.searcher().search(queries, 30).ids.tolist() == found.tolist()
    assert len({manifest.fingerprint, marked.manifest.fingerprint, make_index(store, 3, "all", layout).manifest.fingerprint}) == 3


@pytest.mark.parametrize("layout", [Layout("prefix", 4, "Flat"), Layout("prefix", 4, "IVF2,dense")], ids=str)
def test_a_shard_of_which_every_document_is_removed_is_empty_and_finds_nothing(
    make_store: MakeStore, make_index: MakeIndex, parts: dict, random_vectors: Make, layout: Layout
):
    store = make_store(dict(list(parts.items())[:1]))
    marked = make_index(store, 1, "index", layout, removed=parts["0.parquet:0"][0])

    def finds_nothing(index: IndexStore) -> bool:
        plans = (index.plan, FunnelPlan.parse(["8:3"]))
        found = [index.searcher(own).search(random_vectors(2, 8), 3).ids.shape for own in plans]
        return (index.manifest.num_rows, found) == (0, [(2, 0)] * 2)

    assert finds_nothing(marked)
    _, (plan,) = indexing.plan_shards(store, 1, {})
    listed = removals.longest_list(marked.manifest.receipts)
    receipt = indexing.build_shard(plan, layout, marked.folder, marked.training, listed)
    receipts = (*filter(None, [marked.training]), receipt, listed)
    dataclasses.replace(marked.manifest, receipts=receipts).write(marked.folder)
    assert finds_nothing(IndexStore.open(marked.folder))
    assert verification.verify(marked.folder)[1] == []


def test_what_int8_loses_is_measured_as_brute_force_measures_it(make_store: MakeStore, random_vectors: Make):
    full = random_vectors(300, 16)
    store = make_store({"a:0": ([f"a{n}" for n in range(200)], full[:200]), "b:0": ([f"b{n}" for n in range(100)], full[200:])})
    loss = indexing.measure_loss(store, Layout("prefix", 4, "Flat", "int8"))
    assert (loss["num_documents"], loss["num_queries"]) == (300, 200)
    unit = full.astype(np.float64) / np.linalg.norm(full.astype(np.float64), axis=1, keepdims=True)
    steps = np.abs(unit).max(axis=1, keepdims=True) / 127
    rounded = np.rint(unit / steps)
    rounded /= np.linalg.norm(rounded, axis=1, keepdims=True)
    rows = np.unique(np.linspace(0, 299, 200).astype(int))
    exact, stored = unit[rows] @ unit.T, unit[rows] @ rounded.T
    assert loss["mean_score_error"] == pytest.approx(np.abs(exact - stored).mean(), abs=1e-6)
    for scores in (exact, stored):
        scores[np.arange(200), rows] = -2
    tops = [np.argsort(-scores, axis=1)[:, :10] for scores in (exact, stored)]
    kept = np.mean([len(set(one) & set(two)) / 10 for one, two in zip(*tops, strict=True)])
    assert loss["top_10_kept"] == pytest.approx(kept, abs=2e-3)  # one of 2,000 places may go the other way in float32
    assert indexing.measure_loss(store, Layout("prefix", 4, "Flat"))["top_10_kept"] == 1.0


def test_a_single_document_loses_nothing(make_store: MakeStore, random_vectors: Make):
    store = make_store({"a:0": (["a"], random_vectors(1, 16))})
    assert indexing.measure_loss(store, Layout("prefix", 4, "Flat", "int8"))["top_10_kept"] == 1.0


def export(index: IndexStore, folder: Path, plan: FunnelPlan) -> list[tuple[str, list[str], int]]:
    """Exports all shards; returns the file, the ids and the documents of each."""
    keys = indexing.export_keys(index, plan)
    receipts = [indexing.export_shard(index, number, plan, folder, key) for number, key in enumerate(keys)]
    found = []
    for receipt in receipts:
        plain, ids = (folder / file.path for file in receipt.files)
        found.append((str(plain), pq.read_table(ids)["id"].to_pylist(), receipt.num_rows))
    return found


EXPORTED = {
    "prefix, flat": (Layout("prefix", 8, "Flat"), ["8:40", "24:20"]),
    "prefix, graph": (Layout("prefix", 8, "HNSW16"), ["8:40", "24:20"]),
    "prefix, codes": (Layout("prefix", 8, "PQ4x4fs"), ["8:60", "24:20"]),
    "rotation, codes in lists": (Layout("rotation", 8, "IVF4,PQ4x4fs"), ["8:60:nprobe=3", "24:20"]),
    "projection, flat": (Layout("projection", 8, "Flat"), ["8:40", "24:20"]),
    "projection, codes, int8": (Layout("projection", 8, "SQ8", "int8"), ["8:40", "24:20"]),
    "a scan": (Layout("prefix", 24, indexing.NO_INDEX), ["6:40", "24:20"]),
    "a scan beside a coarse index": (Layout("rotation", 8, "Flat"), ["12:40", "24:20"]),
    "rotation, dense": (Layout("rotation", 8, indexing.DENSE_INDEX), ["8:60", "24:20"]),
    "rotation, dense vectors in lists": (Layout("rotation", 8, "IVF4,dense"), ["8:60", "24:20"]),
    "projection, dense, int8": (Layout("projection", 8, indexing.DENSE_INDEX, "int8"), ["8:60", "24:20"]),
    "one step": (Layout("prefix", 24, indexing.NO_INDEX), ["24:20"]),
}


@pytest.mark.parametrize("removed", [(), [f"a{n}" for n in range(0, 200, 3)]], ids=["all", "some removed"])
@pytest.mark.parametrize("case", EXPORTED)
def test_an_exported_file_gives_what_the_funnel_gives_without_code_of_this_project(
    tmp_path: Path, make_store: MakeStore, make_index: MakeIndex, random_vectors: Make, case: str, removed: list[str]
):
    layout, parts = EXPORTED[case]
    if removed and layout.factory.startswith("HNSW"):
        pytest.skip("a graph without the removed documents is another graph")
    plan, queries = FunnelPlan.parse(parts), random_vectors(25, 24, 9)
    store = make_store({"a:0": ([f"a{n}" for n in range(200)], random_vectors(200, 24))})
    index = make_index(store, 1, "index", layout, parts, queries, removed)
    ((path, ids, num_rows),) = export(index, tmp_path / "export", plan)
    scores, rows = faiss.read_index(path).search(shrink(queries, 24), 10)
    assert num_rows == len(ids) == index.manifest.num_rows
    expected = index.searcher().search(queries, 10)
    last = tied_with_the_last(index, queries)
    for number, found in enumerate(rows):
        # The funnel keeps all documents that tie with the last of the shortlist; FAISS keeps some of them.
        plain, own = (
            [name for name in names if name not in last[number]] for names in ([ids[row] for row in found], expected.ids[number])
        )
        assert min(len(plain), len(own)) >= 8
        assert all(one == two for one, two in zip(plain, own, strict=False))
    same = np.asarray(ids, dtype=object)[rows] == expected.ids
    assert same.mean() > 0.9
    np.testing.assert_allclose(scores[same], expected.scores[same], atol=1e-6)


def tied_with_the_last(index: IndexStore, queries: np.ndarray) -> list[set[str]]:
    """Returns, for each query, the documents at the edge of the shortlist."""
    if index.plan.shortlist.dim != index.layout.dim or not index.layout.has_index:
        return [set()] * len(queries)
    space = indexing.open_space(index.folder, index.layout, index.training)
    scores, rows = Shard.open(index.shards[0]).shortlist(space.queries(queries), index.plan.shortlist)
    last = np.where(rows >= 0, scores, np.inf).min(axis=1, keepdims=True)
    names = np.asarray(index.open_ids()[0].to_pylist(), dtype=object)
    return [set(names[own[edge]]) for own, edge in zip(rows, (scores <= last + 1e-5) & (rows >= 0), strict=True)]


def test_an_export_has_another_key_for_anything_that_it_is_made_of(
    make_store: MakeStore, make_index: MakeIndex, parts: dict, random_vectors: Make
):
    plan = FunnelPlan.parse(["4:5", "8:3"])
    changed = {**parts, "5.parquet:0": (["x"], random_vectors(1, 8, 55))}
    indexes = [
        make_index(make_store(parts), 1),
        make_index(make_store(parts), 1, "removed", removed=["d0-1"]),
        make_index(make_store(parts), 1, "learned", ROTATION),
        make_index(make_store(changed, "changed"), 1, "changed-index"),
    ]
    keys = [indexing.export_keys(index, plan)[0] for index in indexes]
    assert len({*keys, indexing.export_keys(indexes[0], FunnelPlan.parse(["4:6", "8:3"]))[0]}) == 5
    assert indexing.export_keys(make_index(make_store(parts), 1, "again"), plan) == keys[:1]

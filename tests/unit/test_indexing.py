from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from matryoshka import indexing, storage
from matryoshka.funnel import COARSE, IDS, VECTORS, Shard
from matryoshka.indexing import SHARDS, IndexStore, Layout
from matryoshka.nested import FunnelPlan
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]
MakeIndex = Callable[..., IndexStore]


@pytest.fixture
def parts(random_vectors: Make) -> dict[str, tuple[list[str], np.ndarray]]:
    return {f"{n}.parquet:0": ([f"d{n}-{i}" for i in range(5)], random_vectors(5, 8, n)) for n in range(6)}


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
    assert [Path(file.path).name for file in first] == [COARSE, VECTORS, IDS]


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


@pytest.mark.parametrize("name", [COARSE, VECTORS, IDS])
@pytest.mark.parametrize("fault", ["missing", "bytes, the receipt says", "its bytes were altered"])
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

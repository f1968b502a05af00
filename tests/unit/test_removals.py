from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import removals
from matryoshka.artifacts import Manifest
from matryoshka.indexing import IndexStore
from matryoshka.removals import Removed
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
names = st.lists(st.text(min_size=1, max_size=3), max_size=20)


def write(path: Path, columns: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


@given(names, names)
def test_the_rows_that_are_found_are_those_whose_id_is_wanted(ids: list[str], wanted: list[str]):
    rows = removals.find(pa.array(ids, pa.large_string()), pa.array(wanted, pa.string()))
    assert rows.tolist() == [row for row, name in enumerate(ids) if name in wanted]


def test_ids_are_read_from_all_files_each_once_and_numbers_are_ids_too(tmp_path: Path):
    write(tmp_path / "ids" / "a.parquet", {"id": ["b", "a", "b"]})
    write(tmp_path / "ids" / "b.parquet", {"id": [7, 8]})
    assert removals.read(str(tmp_path / "ids"), "id").to_pylist() == ["7", "8", "a", "b"]


BAD = {
    "no column": ({"name": ["a"]}, r"ids\.parquet: no column 'id' \(found: 'name'\)\. Pass --id-column"),
    "no id": ({"id": ["a", None]}, r"ids\.parquet: column 'id', row 1: no id\. Give every row one"),
    "fractions": ({"id": [0.5]}, r"ids\.parquet: column 'id' is double, not text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_ids_that_cannot_be_used_is_named(tmp_path: Path, case: str):
    columns, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        removals.read(write(tmp_path / "ids.parquet", columns), "id")


def test_no_file_of_ids_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no Parquet files here"):
        removals.read(str(tmp_path), "id")


@given(names, names)
def test_the_list_only_grows_and_counts_what_it_grew_by(
    tmp_path_factory: pytest.TempPathFactory, first: list[str], more: list[str]
):
    folder = tmp_path_factory.mktemp("index")
    before = removals.remember(folder, pa.array(sorted(set(first)), pa.large_string()))
    manifest = Manifest("index", {}, receipts=(before,))
    removed = Removed.open(folder, manifest, [], pa.array(more, pa.large_string()))
    assert removed.ids.to_pylist() == sorted({*first, *more})
    assert removed.num_added == len({*more} - {*first})
    assert removed.listed == before
    after = removals.remember(folder, removed.ids)
    assert (after.files == before.files) == (not removed.num_added)
    assert removals.open_list(folder, before).to_pylist() == sorted(set(first))  # a run that is killed now has lost nothing


@pytest.mark.parametrize("is_later_in_journal", [True, False])
def test_the_longest_list_counts_wherever_killed_runs_left_it(tmp_path: Path, is_later_in_journal: bool):
    old, new = (removals.remember(tmp_path, pa.array(ids, pa.large_string())) for ids in (["a"], ["a", "b"]))
    committed, recorded = (old, new) if is_later_in_journal else (new, old)
    removed = Removed.open(tmp_path, Manifest("index", {}, receipts=(committed,)), [recorded], removals.none())
    assert removed == Removed(new, pa.array(["a", "b"], pa.large_string()), 0)
    assert removed.remember(tmp_path) == new


def test_a_list_that_was_altered_is_refused(tmp_path: Path):
    listed = removals.remember(tmp_path, pa.array(["a"], pa.large_string()))
    path = tmp_path / listed.files[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"\.arrow: its bytes were altered .*\. Restore it, or index into another --output"):
        Removed.open(tmp_path, Manifest("index", {}, receipts=(listed,)), [], removals.none())


def test_lists_count_by_their_names_where_no_manifest_can_be_read(tmp_path: Path):
    assert Removed.open(tmp_path, None, [], removals.none()) == Removed(None, removals.none(), 0)
    first, _ = (removals.remember(tmp_path, pa.array(ids, pa.large_string())) for ids in (["a"], ["a", "b"]))
    removed = Removed.open(tmp_path, None, [], pa.array(["e"], pa.large_string()))
    assert removed == Removed(None, pa.array(["a", "b", "e"], pa.large_string()), 3)
    listed = removed.remember(tmp_path)
    assert listed
    assert removals.open_list(tmp_path, listed) == removed.ids
    manifest = Manifest("index", {}, receipts=(first,))  # of a run that was killed before it could record the list
    assert Removed.open(tmp_path, manifest, [], removals.none()) == Removed(first, removed.ids, 2)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data.replace(b"b", b"\xff"), lambda _: b""])
def test_a_list_that_is_damaged_is_refused_where_no_manifest_says_that_it_does_not_count(
    tmp_path: Path, damage: Callable[[bytes], bytes]
):
    first, second = (removals.remember(tmp_path, pa.array(ids, pa.large_string())) for ids in (["a"], ["a", "b"]))
    path = tmp_path / second.files[0].path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"\.arrow: its bytes were altered\. Restore it, or index into another --output"):
        Removed.open(tmp_path, None, [], removals.none())
    assert Removed.open(tmp_path, Manifest("index", {}, receipts=(first,)), [], removals.none()).num_added == 0


def test_ids_of_no_document_are_told_apart(make_store: Callable[..., EmbeddingStore], random_vectors: Make):
    store = make_store({"a:0": (["x", "y"], random_vectors(2, 8)), "b:0": (["z"], random_vectors(1, 8))})
    assert removals.unknown(store, pa.array(["a", "y", "z", "zz"], pa.large_string())) == ["a", "zz"]
    assert removals.unknown(store, removals.none()) == []


def test_tombstones_are_good_for_one_list_and_one_build_of_the_shard(
    make_store: Callable[..., EmbeddingStore], make_index: Callable[..., IndexStore], random_vectors: Make
):
    store = make_store({"a:0": (["x", "y"], random_vectors(2, 8)), "b:0": (["z"], random_vectors(1, 8))})
    index = make_index(store, 2, removed=["y"])
    first, second, listed, *buried = index.manifest.receipts
    finished = {receipt.key: receipt for receipt in buried}
    longer = removals.remember(index.folder, pa.array(["x", "y"], pa.large_string()))
    assert [removals.is_clean(shard, listed, finished) for shard in (first, second)] == [True, True]
    assert [removals.is_clean(shard, longer, finished) for shard in (first, second)] == [False, False]
    assert not removals.is_clean(first, listed, {})
    swapped = {removals.key_of(first): buried[1]}
    assert not removals.is_clean(first, listed, swapped)
    assert [receipt.num_rows for receipt in buried] == [-1, 0]

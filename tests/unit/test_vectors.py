from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import vectors
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]


@given(count=st.integers(0, 40), width=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)  # writes files
def test_a_unit_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, random_vectors: Make, count: int, width: int, seed: int
):
    path = tmp_path_factory.mktemp("unit") / "u.parquet"
    names, block = [f"d\u00e4{number}" for number in range(count)], random_vectors(count, width, seed)
    vectors.write_unit(path, names, block)
    ids, found = vectors.read_unit(path)
    assert ids.to_pylist() == names
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, block)


def test_a_unit_is_plain_parquet_for_any_tool(tmp_path: Path, random_vectors: Make):
    block = random_vectors(2, 8)
    vectors.write_unit(tmp_path / "u.parquet", ["a", "b"], np.asfortranarray(block))
    table = pq.read_table(tmp_path / "u.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float16(), nullable=False), 8)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float16), block)


@pytest.mark.parametrize("fault", ["missing", "garbage", "other columns", "lists of any length"])
def test_a_file_that_is_no_unit_is_named(tmp_path: Path, fault: str):
    path = tmp_path / "u.parquet"
    if fault == "garbage":
        path.write_bytes(b"x" * 100)
    elif fault == "other columns":
        pq.write_table(pa.table({"id": ["a"]}), path)
    elif fault == "lists of any length":
        pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0]]}), path)
    with pytest.raises(ValueError, match=r"u\.parquet: not a file of embeddings \(.*\)\. Run python -m jobs\.embed again"):
        vectors.read_unit(path)


def test_a_store_yields_its_units_in_order(make_store: Callable[..., EmbeddingStore], random_vectors: Make):
    parts = {
        "a:0": (["x", "y"], random_vectors(2, 8, 1)),
        "b:0": ([], random_vectors(0, 8)),
        "a:2": (["z"], random_vectors(1, 8, 2)),
    }
    store = make_store(parts)
    assert (store.width, store.dims) == (8, (8, 4))
    assert [ids.to_pylist() for ids, _ in store.blocks()] == [["x", "y"], [], ["z"]]
    for (_, found), (_, block) in zip(store.blocks(), parts.values(), strict=True):
        np.testing.assert_array_equal(found, block)


def test_a_folder_without_store_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no embeddings here .*python -m jobs\.embed"):
        EmbeddingStore.open(tmp_path)


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=5), min_size=1, max_size=4), st.data())
@settings(max_examples=30, deadline=None)  # writes files
def test_ids_come_back_in_order_and_are_taken_by_row(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]], data: st.DataObject
):
    path = tmp_path_factory.mktemp("ids") / "ids.arrow"
    vectors.write_ids(path, [pa.array(part, pa.string()) for part in parts])
    every_id = [name for part in parts for name in part]
    ids = vectors.open_ids(path)
    assert ids.to_pylist() == every_id
    rows = data.draw(st.lists(st.integers(0, len(every_id) - 1), max_size=9)) if every_id else []
    assert vectors.take(ids, np.array(rows, dtype=np.int64)).tolist() == [every_id[row] for row in rows]


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 4)])
def test_vectors_that_anybody_wrote_are_read_from_all_files(tmp_path: Path, kind: pa.DataType):
    rows = np.arange(12, dtype=np.float16).reshape(3, 4)
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        pq.write_table(pa.table({"embedding": pa.array([list(row) for row in part], kind)}), tmp_path / f"{name}.parquet")
    found = vectors.read_embeddings([tmp_path / "a.parquet", tmp_path / "b.parquet"], 4)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, rows)


BAD_EMBEDDINGS = {
    "no column": (pa.table({"vector": [[1.0]]}), r"no vectors in column 'embedding' \(.*\)\. Pass another file"),
    "numbers": (pa.table({"embedding": [1.0]}), r"no vectors in column 'embedding'"),
    "texts": (pa.table({"embedding": [["a", "b"]]}), r"no vectors in column 'embedding'"),
    "another width": (pa.table({"embedding": [[1.0, 2.0], [1.0]]}), r"do not have 2 numbers each\. Use the index's own model"),
    "no vector": (pa.table({"embedding": [[1.0, 2.0], None]}), r"do not have 2 numbers each"),
    "not finite": (pa.table({"embedding": [[1.0, 2.0], [1.0, np.inf]]}), r"row 1: not finite\. Check the model"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_files_without_usable_vectors_are_named(tmp_path: Path, case: str):
    table, message = BAD_EMBEDDINGS[case]
    pq.write_table(table, tmp_path / "queries.parquet")
    with pytest.raises(ValueError, match=rf"queries\.parquet: .*{message}"):
        vectors.read_embeddings([tmp_path / "queries.parquet"], 2)


def test_ids_of_a_unit_are_read_without_its_vectors(tmp_path: Path):
    vectors.write_unit(tmp_path / "unit.parquet", ["a", "bcd"], np.eye(2, dtype=np.float16))
    assert vectors.read_ids(tmp_path / "unit.parquet").to_pylist() == ["a", "bcd"]
    (tmp_path / "unit.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unit\.parquet: not a file of embeddings .*Run python -m jobs\.embed again"):
        vectors.read_ids(tmp_path / "unit.parquet")


def test_the_bytes_of_an_id_are_its_own_and_its_end(make_store):
    store = make_store({"a:0": ([], np.zeros((0, 4), np.float16)), "b:0": (["abc", "é"], np.eye(2, 4, dtype=np.float16))})
    assert vectors.mean_id_bytes(store) == 8 + 2.5

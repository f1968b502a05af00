"""Parquet, CSV, JSONL, TSV and BEIR that were damaged or hold something else: read, or refused in a sentence."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from mutations import byte_mutants, bytes_of, changes, obeys, run

from matryoshka import beir, corpus, filters, queries, sources, sts, vectors
from matryoshka.corpus import Columns
from matryoshka.sources import Column
from matryoshka.units import plan_units

COLUMNS = [Column("query"), Column("id", "id"), Column("negatives", "texts")]
WIDTH = 8


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def use_corpus(path: Path) -> None:
    source = obeys(lambda: corpus.inspect(str(path.parent), Columns()))
    if source:
        assert source.num_rows == len(corpus.read_texts(source)[0]) + source.num_empty
        for unit in plan_units(source.files, 4):
            corpus.read_unit(source.path_of(unit.name), source.columns, unit)
        corpus.find_texts(source, ["d1", "x"])
        list(corpus.find_rows(source, pa.array(["d1"], pa.large_string())))
        obeys(lambda: filters.find_kinds(source, ["year"]))


def use_rows(path: Path) -> None:
    obeys(lambda: [list(sources.read(part, COLUMNS)) for part in sources.plan_slices([path], COLUMNS)])
    obeys(lambda: list(corpus.read_ids([path])))
    obeys(lambda: list(corpus.read_rows(path, 3)))
    obeys(lambda: corpus.count_rows(path))


def use_vectors(path: Path) -> None:
    obeys(lambda: queries.inspect_vectors(str(path.parent), "id", "embedding", WIDTH, 4))
    obeys(lambda: vectors.read_unit(path))
    obeys(lambda: vectors.read_ids(path))
    obeys(lambda: vectors.read_embeddings([path], WIDTH))


def in_place(path: Path, use: Callable[[Path], None]) -> Callable[[bytes], None]:
    path.parent.mkdir(exist_ok=True)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        use(path)
        assert bytes_of(path.parent) == {path.name: data}

    return check


TEXTS = pa.table({"id": [f"d{i}" for i in range(12)], "text": [f"text {i}" * (i % 3) for i in range(12)], "year": range(12)})
ROWS = pa.table({"id": ["a", "b", "c"], "query": ["x", "y", "z"], "negatives": [["p"], None, ["q", "r"]]})


@pytest.mark.parametrize(
    "options", [{}, {"row_group_size": 5, "compression": "zstd", "use_dictionary": False}], ids=["plain", "groups"]
)
def test_a_damaged_corpus_is_read_or_refused(tmp_path: Path, options: dict[str, Any]):
    run(350, byte_mutants(parquet(TEXTS, **options)), in_place(tmp_path / "in" / "part.parquet", use_corpus))


def test_damaged_rows_are_read_or_refused(tmp_path: Path):
    run(350, byte_mutants(parquet(ROWS)), in_place(tmp_path / "in" / "part.parquet", use_rows))


def test_damaged_vectors_are_read_or_refused(tmp_path: Path):
    path = tmp_path / "unit.parquet"
    vectors.write_unit(path, ["a", "b", "c"], np.eye(3, WIDTH, dtype=np.float16))
    run(350, byte_mutants(path.read_bytes()), in_place(tmp_path / "in" / "part.parquet", use_vectors))


KINDS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(),
    pa.float64(), pa.decimal128(10, 2), pa.date32(), pa.timestamp("ns", "UTC"), pa.duration("s"), pa.list_(pa.string()),
    pa.list_(pa.list_(pa.string())), pa.large_list(pa.float32()), pa.list_(pa.float16(), WIDTH), pa.list_(pa.float64(), 2),
    pa.list_(pa.int32()), pa.list_(pa.null()), pa.struct([("a", pa.string())]), pa.map_(pa.string(), pa.string()),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.int64()), pa.dictionary(pa.int8(), pa.large_string()),
    pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.struct([]),
]  # fmt: skip
VALUES: list[Any] = [
    None,
    "",
    "x",
    "d1",
    1,
    0,
    -5,
    0.5,
    True,
    [],
    ["x"],
    [1.0] * WIDTH,
    [float("nan")] * WIDTH,
    [0.0, 1.0],
    {"a": "x"},
    b"\xff",
]


def fitting(kind: pa.DataType) -> list[Any]:
    found = []
    for value in VALUES:
        try:
            found.append(pa.array([value], kind)[0].as_py())
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
    return found


def odd_tables(*names: str) -> st.SearchStrategy[bytes]:
    """Returns a strategy of files with columns of any types, whose names are sometimes wrong, or there twice."""
    known = [(kind, fitting(kind)) for kind in KINDS]

    def make(seed: int) -> bytes:
        chance = random.Random(seed)
        num_rows = chance.randrange(5)
        chosen = [chance.choice(known) for _ in names]
        arrays = [pa.array(chance.choices(values, k=num_rows), kind) for kind, values in chosen]
        own = [chance.choice([name, name, name, name, "x", names[0]]) for name in names]
        try:
            return parquet(pa.Table.from_arrays(arrays, own))
        except (pa.ArrowException, ValueError):  # what no file can hold
            return b""

    return st.integers(0, 2**32).map(make)


@pytest.mark.parametrize(
    ("names", "use"),
    [(("id", "text", "year"), use_corpus), (("query", "id", "negatives"), use_rows), (("id", "embedding"), use_vectors)],
)
def test_a_file_of_any_types_is_read_or_refused(tmp_path: Path, names: tuple[str, ...], use: Callable[[Path], None]):
    run(300, odd_tables(*names), in_place(tmp_path / "in" / "part.parquet", use))


CSV = b'id,query,negatives\n1,"two ""or""\nmore",a\n2,x,\n3,\xc3\xa4,"b,c"\n'
LINES = [
    {"id": 1, "query": "x", "negatives": ["a", "b"]},
    {"id": "2", "query": None},
    {"id": "3", "query": "z", "negatives": "c"},
]


def lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_a_damaged_csv_file_is_read_or_refused(tmp_path: Path):
    run(300, byte_mutants(CSV), in_place(tmp_path / "in" / "rows.csv", use_rows))


def test_a_damaged_jsonl_file_is_read_or_refused(tmp_path: Path):
    mutants = st.one_of(
        changes(LINES).map(lambda own: lines(own) if isinstance(own, list) else lines([own])), byte_mutants(lines(LINES))
    )
    run(350, mutants, in_place(tmp_path / "in" / "rows.jsonl", use_rows))


SCORED = b"main\tf\t2012\t1\t2.5\tA man\tA woman\nmain\tf\t2012\t2\t0.0\tOne\tTwo\n"


@pytest.mark.parametrize("data", [SCORED, b"score,sentence1,sentence2\n1,a,b\n2,c,d\n"], ids=["tabs", "commas"])
def test_a_damaged_file_of_scored_pairs_is_read_or_refused(tmp_path: Path, data: bytes):
    run(150, byte_mutants(data), in_place(tmp_path / "in" / "pairs.csv", lambda path: obeys(lambda: sts.read(path))))


DOCUMENTS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": 2, "text": "second"}]
ASKED = [{"_id": "q1", "text": "which?"}, {"_id": "q2", "text": "who?"}]
JUDGED = b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\t2\t1\n"


def test_a_damaged_beir_folder_is_read_or_refused(tmp_path: Path):
    folder = tmp_path / "beir"
    (folder / beir.QRELS).mkdir(parents=True)
    parts = st.tuples(
        changes(DOCUMENTS).map(lambda own: lines(own if isinstance(own, list) else [own])),
        st.one_of(st.just(lines(ASKED)), byte_mutants(lines(ASKED))),
        st.one_of(st.just(JUDGED), byte_mutants(JUDGED)),
    )

    def check(data: tuple[bytes, bytes, bytes]) -> None:
        for name, own in zip((beir.CORPUS, beir.QUERIES, f"{beir.QRELS}/test.tsv"), data, strict=True):
            (folder / name).write_bytes(own)
        before = bytes_of(folder)
        obeys(lambda: beir.find_splits(folder))
        obeys(lambda: list(corpus.read_json_lines(folder / beir.CORPUS, ("_id", "text", "title"))))
        obeys(lambda: list(corpus.read_json_lines(folder / beir.QUERIES, ("_id", "text"))))
        obeys(lambda: list(corpus.read_qrels(folder / beir.QRELS / "test.tsv")))
        assert bytes_of(folder) == before

    run(400, parts, check)


def test_names_of_columns_that_are_not_utf_8_are_refused(tmp_path: Path):
    data = parquet(pa.table({"id": ["a"], "embedding": pa.array([[1.0]], pa.list_(pa.float32()))}))
    (tmp_path / "part.parquet").write_bytes(data.replace(b"embedding", b"embedd\xff\xffg"))
    with pytest.raises(ValueError, match=r"part\.parquet: not a readable Parquet file"):
        corpus.open_parquet(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"part\.parquet: not a file of embeddings"):
        vectors.read_unit(tmp_path / "part.parquet")
    (tmp_path / "rows.csv").write_bytes(CSV.replace(b"query", b"quer\xff"))
    with pytest.raises(ValueError, match=r"rows\.csv: not readable as CSV in UTF-8"):
        sources.plan_slices([tmp_path / "rows.csv"], COLUMNS)

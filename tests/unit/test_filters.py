import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import corpus, filters
from matryoshka.conditions import parse
from matryoshka.corpus import Columns
from matryoshka.filters import Origin
from matryoshka.units import plan_units

texts = st.text("abé%_ '", max_size=3)
integers = st.integers(-3, 3) | st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, -(2**63)])
numbers = st.sampled_from([-1.5, 0.0, 0.5, 2.0, 9007199254740992.0, 1e30, -1e30])
VALUES = {"t": texts, "i": integers, "f": numbers, "b": st.booleans()}
CONSTANTS = {**VALUES, "i": integers | numbers, "f": numbers | st.integers(-3, 3)}
rows = st.lists(st.tuples(*(st.none() | own for own in VALUES.values())), min_size=1, max_size=12)


def quote(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value).upper()


@st.composite
def leaves(draw: st.DrawFn) -> str:
    column = draw(st.sampled_from(list(VALUES)))
    constant = CONSTANTS[column].map(quote)
    negation = draw(st.sampled_from(["", "NOT "]))
    forms = ["compare", "mirror", "in", "between", "null", *(["like"] if column == "t" else [])]
    match draw(st.sampled_from(forms)):
        case "compare":
            return f"{column} {draw(st.sampled_from(['=', '<>', '!=', '<', '<=', '>', '>=']))} {draw(constant)}"
        case "mirror":
            return f"{draw(constant)} {draw(st.sampled_from(['=', '<>', '<', '<=', '>', '>=']))} {column}"
        case "in":
            return f"{column} {negation}IN ({', '.join(draw(st.lists(constant, min_size=1, max_size=4)))})"
        case "between":
            return f"{column} {negation}BETWEEN {draw(constant)} AND {draw(constant)}"
        case "like":
            return f"{column} {negation}LIKE {draw(constant)}"
    return f"{column} IS {negation}NULL"


terms = st.recursive(
    leaves(),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(lambda own: f"({' '.join(own)})")
        | inner.map(lambda own: f"NOT {own}")
    ),
    max_leaves=5,
)


def table_of(found: Sequence[tuple[Any, ...]], *, is_encoded: bool) -> pa.RecordBatch:
    columns = dict(zip(VALUES, zip(*found, strict=True), strict=True))
    text = pa.array(columns["t"], pa.large_string())
    kinds = {"i": pa.int64(), "f": pa.float64(), "b": pa.bool_()}
    rest = {name: pa.array(columns[name], kind) for name, kind in kinds.items()}
    return pa.record_batch({"t": text.dictionary_encode() if is_encoded else text, **rest})


@given(rows, terms, st.booleans())
@settings(max_examples=300)
def test_a_condition_holds_where_sqlite_says_so(found: list[tuple[Any, ...]], where: str, is_encoded: bool):
    with sqlite3.connect(":memory:") as database:
        database.execute("PRAGMA case_sensitive_like = ON")
        database.execute("CREATE TABLE documents (t TEXT, i INTEGER, f REAL, b INTEGER)")
        database.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", found)
        expected = [bool(value) for (value,) in database.execute(f"SELECT ({where}) FROM documents ORDER BY rowid")]
    assert filters.select(table_of(found, is_encoded=is_encoded), parse(where)).tolist() == expected


def test_columns_of_every_kind_are_kept_as_they_are_and_mapped_from_disk(tmp_path: Path):
    columns = {
        "id": ["d0", "d1", "d2", "d3"],
        "text": ["a", " ", "c", "d"],
        "subreddit": pa.array(["x", "x", None, "x"]).dictionary_encode(),
        "name": ["n0", "n1", "n2", "n3"],
        "year": pa.array([2020, 2021, None, 2023], pa.uint16()),
        "share": pa.array([0.5, 1.0, None, 2.0], pa.float32()),
        "open": [True, None, False, True],
        "day": pa.array([0, 1, None, 3], pa.date32()),
        "made": pa.array([0, 1, None, 86_400_000_000_000], pa.timestamp("ns", "Europe/Paris")),
    }
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    source = corpus.inspect(str(tmp_path), Columns())
    kinds = filters.find_kinds(source, list(columns)[2:])
    assert kinds == {
        "subreddit": "text", "name": "text", "year": "integer", "share": "number", "open": "boolean", "day": "date",
        "made": "time",
    }  # fmt: skip
    units = tuple((tmp_path / unit.name, unit) for unit in plan_units(source.files, 2))
    ids = [pa.array(["d0"]), pa.array(["d2", "d3"])]  # d1 has no text
    parts = [filters.read_columns(Origin(source.columns, kinds, units), number, own) for number, own in enumerate(ids)]
    filters.write_columns(tmp_path / "columns.arrow", parts)
    stored = filters.open_columns(tmp_path / "columns.arrow")
    kept = pa.table(columns).take([0, 2, 3])
    assert [stored.column(name).to_pylist() for name in ("subreddit", "name", "year", "share", "open", "day")] == [
        kept.column(name).to_pylist() for name in ("subreddit", "name", "year", "share", "open", "day")
    ]
    assert [pa.types.is_dictionary(stored.schema.field(name).type) for name in ("subreddit", "name")] == [True, False]
    for where in ("made >= '1970-01-02'", "day = '1970-01-04'", "share = 2", "NOT year < 2023", "name > 'n2'"):
        assert filters.select(stored, parse(where)).tolist() == [False, False, True], where


def test_texts_that_repeat_are_stored_once_each(tmp_path: Path):
    filters.write_columns(tmp_path / "columns.arrow", [pa.table({"a": pa.array(["x", None, "y", "x"] * 9, pa.large_string())})])
    column = filters.open_columns(tmp_path / "columns.arrow").column("a")
    assert column.dictionary.to_pylist() == ["x", "y"]
    assert column.to_pylist() == ["x", None, "y", "x"] * 9


BAD_CONDITIONS = {
    "x = 1": r"no column 'x' \(the index has 't', 'i', 'f', 'b', 'd'\)\. Name another, or build the index with --filter-columns",
    "t = 1": r"column 't' is text, and 1 is not\. Compare it with a text, such as 'python'",
    "i = 'a'": r"column 'i' is integer, and 'a' is not\. Compare it with a number",
    f"f < 1{'0' * 309}": r"column 'f' is number, and 10+ is not\. Compare it with a number, such as 0\.5",
    f"f IN (0.5, -1{'0' * 309})": r"column 'f' is number, and -10+ is not\. Compare it with a number",
    "f IN (1, TRUE)": r"column 'f' is number, and True is not",
    "b = 1": r"column 'b' is boolean, and 1 is not\. Compare it with TRUE or FALSE",
    "d > '2024-13-01'": r"column 'd' is date, and '2024-13-01' is not\. Compare it with a date, such as '2024-12-31'",
    "NOT (t = 'a' OR i LIKE '%')": r"column 'i' is integer, and LIKE compares texts",
}


LARGE = {
    "f < 100000000000000000000": [True, False, True],
    "f = 100000000000000000000": [False, True, False],
    "f IN (100000000000000000000, 3)": [False, True, False],
    "f >= 9007199254740993": [False, True, False],
    "f NOT IN (9007199254740993, 0.5)": [False, True, True],
}


@pytest.mark.parametrize("where", LARGE)
def test_whole_numbers_of_any_size_compare_with_floats(where: str):
    columns = pa.record_batch({"f": [0.5, 1e20, -1.0, None]})
    assert filters.select(columns, parse(where)).tolist() == [*LARGE[where], False]


@pytest.mark.parametrize("where", BAD_CONDITIONS)
def test_a_condition_that_does_not_fit_the_columns_is_refused(where: str):
    kinds: filters.Kinds = {"t": "text", "i": "integer", "f": "number", "b": "boolean", "d": "date"}
    with pytest.raises(ValueError, match=f"^--where: {BAD_CONDITIONS[where]}"):
        filters.check(parse(where), kinds)


def test_without_columns_no_condition_can_be_asked():
    with pytest.raises(ValueError, match=r"no column 'a' \(the index keeps none\)\. .* build the index with --filter-columns"):
        filters.select(None, parse("a = 1"))


BAD_COLUMNS = {
    "no such column": (
        ["other"],
        r"a\.parquet: no one column 'other' \(found: 'id', 'text', 'list', 'mixed'\)\. Change",
    ),
    "a list": (["list"], r"a\.parquet: column 'list' is list<.*>, which cannot be compared\. Take it out of --filter-columns"),
    "another kind in another file": (["mixed"], r"b\.parquet: column 'mixed' is text, in other files integer\. Make them the"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_columns_that_cannot_be_kept_are_refused(tmp_path: Path, case: str):
    names, message = BAD_COLUMNS[case]
    for name, mixed in (("a", 1), ("b", "x")):
        columns = {"id": [name], "text": ["x"], "list": [[1]], "mixed": [mixed]}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=message):
        filters.find_kinds(corpus.inspect(str(tmp_path), Columns()), names)


def test_a_corpus_that_changed_since_it_was_embedded_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"id": ["a"], "text": ["x"], "year": [1]}), tmp_path / "a.parquet")
    source = corpus.inspect(str(tmp_path), Columns())
    (unit,) = plan_units(source.files, 10)
    origin = Origin(source.columns, {"year": "integer"}, ((tmp_path / "a.parquet", unit),))
    pq.write_table(pa.table({"id": ["a"], "text": ["x"], "year": [2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: is gone, or changed since it was embedded\. Run python -m jobs\.embed"):
        filters.read_columns(origin, 0, pa.array(["a"]))


def test_a_whole_number_too_large_to_keep_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"id": ["a"], "text": ["x"], "n": pa.array([2**63], pa.uint64())}), tmp_path / "a.parquet")
    source = corpus.inspect(str(tmp_path), Columns())
    origin = Origin(source.columns, {"n": "integer"}, ((tmp_path / "a.parquet", plan_units(source.files, 10)[0]),))
    with pytest.raises(ValueError, match=r"a\.parquet: a value of a filter column cannot be kept .*Change --filter-columns"):
        filters.read_columns(origin, 0, pa.array(["a"]))

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka import sources
from matryoshka.sources import Column

COLUMNS = [Column("query"), Column("id", "id"), Column("negatives", "texts")]


def read(path: Path, columns: list[Column]) -> list[list[Any]]:
    return [values for part in sources.plan_slices([path], columns) for _, values in sources.read(part, columns)]


def test_all_formats_give_the_same_rows(tmp_path: Path):
    rows = {"query": ["one", 'two "or"\nmore', "", "\u00e4"], "id": ["1", "2", "3", "4"], "negatives": ["a", "b,c", "", "d"]}
    texts.write_parquet(tmp_path / "p.parquet", rows)
    lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)), "utf-8-sig")
    quoted = ['"' + '","'.join(value.replace('"', '""') for value in line.values()) + '"' for line in lines]
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["query,id,negatives", *quoted]).encode())
    found = [read(tmp_path / f"p{suffix}", COLUMNS) for suffix in sources.SUFFIXES]
    assert found[0] == found[1] == found[2]
    assert found[0][1] == ['two "or"\nmore', "2", ["b,c"]]
    assert found[0][2] == ["", "3", []]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2)])
def test_texts_may_be_lists_of_any_arrow_kind(tmp_path: Path, kind: pa.DataType):
    path = texts.write_parquet(tmp_path / "p.parquet", {"negatives": pa.array([["a", "b"], None, ["c", None]], kind)})
    assert read(path, [COLUMNS[2]]) == [[["a", "b"]], [[]], [["c"]]]


def test_json_texts_may_be_one_or_several_and_ids_numbers(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"query": "a", "id": 7, "negatives": ["x", "y"]}\n{"id": "b", "negatives": "z"}\n')
    assert read(tmp_path / "p.jsonl", COLUMNS) == [["a", "7", ["x", "y"]], ["", "b", ["z"]]]


def test_a_key_may_be_missing_in_the_first_line(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"query": "a", "id": 7}\n{"query": "b", "id": "x", "negatives": "z"}\n')
    assert read(tmp_path / "p.jsonl", COLUMNS) == [["a", "7", []], ["b", "x", ["z"]]]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9))
def test_slices_of_a_file_have_every_row_once_under_its_place(tmp_path: Path, num_rows: int, in_slice: int, in_group: int):
    path = texts.write_parquet(tmp_path / "p.parquet", {"query": [f"q{n}" for n in range(num_rows)]}, row_group_size=in_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_SLICE_ROWS", in_slice)
        parts = sources.plan_slices([path, path], COLUMNS[:1])
    found = [row for part in parts for row in sources.read(part, COLUMNS[:1])]
    expected = [(sources.place_of(number, row), [f"q{row}"]) for number in range(2) for row in range(num_rows)]
    assert found == expected


def test_a_place_is_told_as_file_and_row():
    files = ["a.parquet", "b.csv", "c.jsonl"]
    place = [sources.place_of(number, 5) for number in range(3)]
    assert sources.describe_places(files, place[0], place[2]) == "a.parquet: row 5 and c.jsonl: line 5"
    assert sources.describe_places(files, place[1], place[1] + 2) == "b.csv: row 5 and row 7"
    assert sources.describe_places(files, place[1], place[1]) == "b.csv: row 5"


def test_long_csv_files_are_read_in_blocks_and_rows_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 200)
    rows = [f'"text\n{number}",{number}' for number in range(100)]
    (tmp_path / "p.csv").write_text("\n".join(["query,id", *rows]))
    (part,) = sources.plan_slices([tmp_path / "p.csv"], COLUMNS[:2])
    found = list(sources.read(part, COLUMNS[:2]))
    assert found == [(sources.place_of(0, number + 2), [f"text\n{number}", str(number)]) for number in range(100)]


FAULTS: dict[str, tuple[bytes, str]] = {
    "p.csv: too many fields": (b"query,id,negatives\na,b,c\nd,e,f,g\n",
                               r"p\.csv: not readable as CSV in UTF-8 \(.*Row #3: Expected 3 columns, got 4.*header is row 1"),
    "p.csv: too few fields": (b"query,id,negatives\na\n", r"p\.csv: not readable .*Row #2: Expected 3 columns, got 1"),
    "p.csv: not UTF-8": (b"query,id,negatives\na,b,c\n\xff,b,c\n", r"p\.csv: not readable as CSV in UTF-8 \(.*Row #3.*UTF8"),
    "p.csv: empty": (b"", r"p\.csv: not readable as CSV .*Empty CSV file"),
    "p.csv: no column": (b"query,key,negatives\na,b,c\n", r"p\.csv: no column 'id' \(found: 'query', 'key', 'negatives'\)"),
    "p.csv: column twice": (b"query,id,negatives,id\na,b,c,d\n", r"p\.csv: column 'id' is there more than once"),
    "p.jsonl: no column": (b'{"text": "a"}\n', r"p\.jsonl: no column 'query' \(found: 'text'\)"),
    "p.jsonl: empty": (b"", r"p\.jsonl: no column 'query' \(found: none\)"),
    "p.jsonl: damaged": (b'{"query": "a", "id": 1, "negatives": []}\n{"q', r"p\.jsonl: line 2 is not JSON \(.*\)\. Mend"),
    "p.jsonl: a list": (b'{"query": "a", "id": 1, "negatives": []}\n[1]\n', r"p\.jsonl: line 2 is not a JSON object\. Mend"),
    "p.jsonl: number for text": (b'{"query": 7, "id": 1, "negatives": []}',
                                 r"p\.jsonl: line 1: 'query' is not text \(found: int 7\)\. Mend it, or take it out"),
    "p.jsonl: false for text": (b'{"query": false, "id": 1, "negatives": []}', r"line 1: 'query' is not text \(found: bool"),
    "p.jsonl: half a surrogate": (b'{"query": "\\ud800", "id": 1, "negatives": []}', r"line 1: 'query' is not text"),
    "p.jsonl: negatives of a wrong type": (b'{"query": "a", "id": 1, "negatives": [1]}',
                                           r"line 1: 'negatives' is not a text or a list of texts \(found: list \[1\]\)"),
    "p.jsonl: negatives that are a mapping": (b'{"query": "a", "id": 1, "negatives": {"b": 1}}', r"line 1: 'negatives' is not"),
    "p.jsonl: not UTF-8": (b'{"query": "\xff"}\n', r"p\.jsonl: not UTF-8"),
    "p.txt": (b"query\n", r"p\.txt: neither Parquet, CSV nor JSONL\. Name it \*\.parquet"),
    "p.parquet": (b"query,id\n", r"p\.parquet: not a readable Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_file_is_named_with_its_place(tmp_path: Path, fault: str):
    content, message = FAULTS[fault]
    path = tmp_path / fault.partition(":")[0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path, COLUMNS)


@pytest.mark.parametrize("values", [[1], [[1]], [{"a": "b"}]])
def test_parquet_negatives_of_a_wrong_type_are_named(tmp_path: Path, values: list[Any]):
    path = texts.write_parquet(tmp_path / "p.parquet", {"negatives": values})
    with pytest.raises(
        ValueError, match=r"p\.parquet: column 'negatives' is .*, not text\. Convert it to string, or name another"
    ):
        sources.plan_slices([path], [COLUMNS[2]])

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matryoshka import corpus, storage
from matryoshka.corpus import Columns
from matryoshka.units import plan_units

NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\x00\0\0\0\x02\0\0\0\x04\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
)


def write(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_good(folder: Path) -> Path:
    write(folder / "a.parquet", id=["a", "b"], text=["x", "y"])
    return folder / "a.parquet"


def write_copy(folder: Path) -> None:
    shutil.copy(write_good(folder), folder / "b.parquet")


def truncate(folder: Path) -> None:
    path = write_good(folder)
    path.write_bytes(path.read_bytes()[:-20])


def damage_the_middle(folder: Path) -> None:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"id": [f"d{n}" for n in range(999)], "text": ["x"] * 999}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)


def write_twice_named_column(folder: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["x"])], names=["id", "id", "text"])
    pq.write_table(table, folder / "a.parquet")


def write_seven_twice(folder: Path) -> None:
    write(folder / "a.parquet", id=[7], text=["x"])
    write(folder / "b.parquet", id=["7"], text=["y"])


NULL_ID_LATE = ["d"] + [f"d{number}" for number in range(20_000)] + [None]
FAULTS = {
    "nothing there": (lambda f: (f / "notes.txt").touch(), r"no Parquet files here\. Pass a folder with"),
    "missing column": (lambda f: write(f / "a.parquet", id=["a"], body=["x"]),
                       r"a\.parquet: no column 'text' \(found: 'id', 'body'\)\. Pass --text-column"),
    "missing id column": (lambda f: write(f / "a.parquet", _id=["a"], text=["x"]),
                          r"a\.parquet: no column 'id' \(found: '_id', 'text'\)\. Pass --id-column"),
    "text of wrong type": (lambda f: write(f / "a.parquet", id=["a"], text=[1.5]),
                           r"a\.parquet: column 'text' is double, not text\. Convert it"),
    "whole numbers for text": (lambda f: write(f / "a.parquet", id=[1], text=[2]),
                               r"a\.parquet: column 'text' is int64, not text\. Convert it"),
    "nested text": (lambda f: write(f / "a.parquet", id=["a"], text=[["x"]]),
                    r"a\.parquet: column 'text' is list.*, not text\. Convert it"),
    "bytes for text": (lambda f: write(f / "a.parquet", id=["a"], text=[b"x"]),
                       r"a\.parquet: column 'text' is binary, not text\. Convert it"),
    "no rows": (lambda f: write(f / "a.parquet", id=pa.array([], pa.string()), text=pa.array([], pa.string())),
                r"no row with text \(rows: 0\)\. Check --text-column"),
    "all blank": (lambda f: write(f / "a.parquet", id=["a", "b"], text=["", None]),
                  r"no row with text \(rows: 2\)\. Check --text-column"),
    "null id": (lambda f: write(f / "a.parquet", id=["a", None], text=["x", "y"]),
                r"a\.parquet: column 'id', row 1: no id\. Give every document an id"),
    "null id in a later batch": (lambda f: write(f / "a.parquet", id=NULL_ID_LATE, text=["x"] * 20_002),
                                 r"a\.parquet: column 'id', row 20001: no id"),
    # Everywhere else an empty id stands for 'no document'.
    "empty id": (lambda f: write(f / "a.parquet", id=["a", ""], text=["x", "y"]), r"a\.parquet: column 'id', row 1: no id"),
    "id twice in a file": (lambda f: write(f / "a.parquet", id=["a", "b", "a"], text=["x", "y", "z"]),
                           r"a\.parquet: 1 ids stand more than once \(first: 'a'\)\. Give each document its own"),
    "id in two files": (lambda f: (write_good(f), write(f / "b.parquet", id=["c", "b"], text=["z", "z"])),
                        r"a\.parquet, .*b\.parquet: 1 ids stand more than once \(first: 'b'\)"),
    "number and text as one id": (write_seven_twice, r"a\.parquet, .*b\.parquet: 1 ids stand more than once \(first: '7'\)"),
    "copied file": (write_copy, r"b\.parquet: is a copy of .*a\.parquet.*Take one of them out"),
    "truncated": (truncate, r"a\.parquet: not a readable Parquet file \(.*\)\. Write it again, or take it out"),
    "no bytes": (lambda f: (f / "a.parquet").touch(), r"a\.parquet: not a readable Parquet file"),
    "garbage": (lambda f: (f / "a.parquet").write_bytes(b"id,text\n1,x\n" * 99), r"a\.parquet: not a readable Parquet file"),
    "damaged pages": (damage_the_middle, r"a\.parquet: damaged after row 0 \(.*\)\. Write it again"),
    "text not UTF-8": (lambda f: write(f / "a.parquet", id=["a", "b"], text=NOT_UTF8),
                       r"a\.parquet: column 'text', row 1: not UTF-8\. Convert the file"),
    "id not UTF-8": (lambda f: write(f / "a.parquet", id=NOT_UTF8, text=["x", "y"]),
                     r"a\.parquet: column 'id', row 1: not UTF-8"),
    "column twice": (write_twice_named_column, r"a\.parquet: .*'id'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_corpus_is_named_with_its_place_and_a_remedy(tmp_path: Path, fault: str):
    make, message = FAULTS[fault]
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        corpus.inspect(str(tmp_path), Columns())


def test_one_bad_file_among_good_ones_is_named(tmp_path: Path):
    write_good(tmp_path)
    write(tmp_path / "bad.parquet", id=["c"])
    with pytest.raises(ValueError, match=r"bad\.parquet: no column 'text'"):
        corpus.inspect(str(tmp_path), Columns())


@pytest.mark.parametrize("location", ["nowhere", "nowhere.parquet", "no*where/*.parquet"])
def test_a_location_with_nothing_is_named(tmp_path: Path, location: str):
    with pytest.raises(ValueError, match=r"no Parquet files here.*[Pp]ass "):
        corpus.find_files(str(tmp_path / location))


@pytest.mark.parametrize("location", ["nowhere", "nowhere.parquet", "no*where/*.parquet"])
def test_a_location_in_a_bucket_with_nothing_is_named(bucket: str, location: str):
    with pytest.raises(ValueError, match=r"s3://.*: no Parquet files here.*[Pp]ass "):
        corpus.find_files(f"{bucket}/{location}")


def test_a_file_that_changed_after_the_plan_is_refused(tmp_path: Path):
    path = write_good(tmp_path)
    (unit,) = plan_units(corpus.inspect(str(path), Columns()).files, 10)
    write(path, id=["a", "b"], text=["x", "changed"])
    with pytest.raises(storage.ChangedError, match=r"a\.parquet: changed since this run began\. Run the same command again"):
        corpus.read_unit(path, Columns(), unit)


def test_a_file_that_changes_while_it_is_read_is_told_from_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_good(tmp_path)
    (unit,) = plan_units(corpus.inspect(str(path), Columns()).files, 10)
    read = corpus.read_documents

    def read_late(*arguments: Any) -> Any:
        path.write_bytes(b"half of the next file")
        return read(*arguments)

    monkeypatch.setattr(corpus, "read_documents", read_late)
    with pytest.raises(storage.ChangedError, match=r"a\.parquet: changed since this run began"):
        corpus.read_unit(path, Columns(), unit)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"gone\.parquet: not a readable Parquet file"):
        corpus.open_parquet(tmp_path / "gone.parquet")

import itertools
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import corpus
from matryoshka.corpus import Columns
from matryoshka.units import plan_units

COLUMNS = Columns()
BLANK = [None, "", " ", "\t\n", "\u00a0"]
texts = st.lists(st.sampled_from([*BLANK, "one", " two ", "gr\u00f6\u00dfe"]), min_size=1, max_size=30)


def write(path: Path, ids: list[object], values: list[str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_rows(path, {"id": ids, "text": values})
    return path


def write_two_files(folder: Path) -> Path:
    write(folder / "b.parquet", ["b0", "b1"], ["text", " "])
    write(folder / "a" / "0.parquet", ["a0", "a1", "a2"], [None, "text of a1", "text of a2"])
    return folder


@given(values=texts, unit_rows=st.integers(1, 8))
@settings(max_examples=30, deadline=None)  # writes files
def test_units_together_hold_every_row_with_text_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, values: list[str | None], unit_rows: int
):
    rows = [(f"d{number}", text) for number, text in enumerate([*values, "last"])]
    path = write(tmp_path_factory.mktemp("corpus") / "c.parquet", *map(list, zip(*rows, strict=True)))
    source = corpus.inspect(str(path), COLUMNS)
    read = [corpus.read_unit(path, COLUMNS, unit) for unit in plan_units(source.files, unit_rows)]
    kept = [(name, text) for name, text in rows if text not in BLANK]
    assert [row for ids, found in read for row in zip(ids, found, strict=True)] == kept
    assert source.num_rows == len(rows)
    assert source.num_empty == len(rows) - len(kept)


def test_units_may_begin_and_end_anywhere_in_a_large_file(tmp_path: Path):
    count = 40_000  # several batches of reading, several row groups
    path = tmp_path / "large.parquet"
    table = pa.table({"text": [f"text {number}" for number in range(count)], "id": range(count)})
    pq.write_table(table, path, row_group_size=7_000)
    units = plan_units(corpus.inspect(str(path), COLUMNS).files, unit_rows=11_000)
    read = [corpus.read_unit(path, COLUMNS, unit) for unit in units]
    assert [name for ids, _ in read for name in ids] == [str(number) for number in range(count)]
    assert all(text == f"text {name}" for ids, found in read for name, text in zip(ids, found, strict=True))


def test_a_survey_counts_the_rows_that_an_inspection_counts(tmp_path: Path):
    write_two_files(tmp_path)
    surveyed, inspected = corpus.survey(str(tmp_path), COLUMNS), corpus.inspect(str(tmp_path), COLUMNS)
    assert [(file.name, file.num_rows) for file in surveyed.files] == [(file.name, file.num_rows) for file in inspected.files]
    assert surveyed.stamps == inspected.stamps


def test_a_survey_refuses_files_that_cannot_be_embedded(tmp_path: Path):
    corpus.write_rows(tmp_path / "a.parquet", {"id": ["a"], "body": ["x"]})
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'.*Pass --text-column"):
        corpus.survey(str(tmp_path), COLUMNS)
    corpus.write_rows(tmp_path / "a.parquet", {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    with pytest.raises(ValueError, match=r"no row with text \(rows: 0\)"):
        corpus.survey(str(tmp_path), COLUMNS)


def test_files_come_in_one_order_named_below_their_folder(tmp_path: Path):
    source = corpus.inspect(str(write_two_files(tmp_path)), COLUMNS)
    assert [(file.name, file.num_rows) for file in source.files] == [("a/0.parquet", 3), ("b.parquet", 2)]
    assert source.num_empty == 2
    assert corpus.read_texts(source) == (["a1", "a2", "b0"], ["text of a1", "text of a2", "text"])


def test_a_folder_a_pattern_and_a_file_find_the_same(tmp_path: Path):
    path = write(tmp_path / "corpus" / "a.parquet", ["1"], ["x"])
    write(tmp_path / "corpus" / "_metadata.parquet", ["2"], ["y"])
    write(tmp_path / "corpus" / ".partial-1-b.parquet", ["3"], ["z"])
    write(tmp_path / "corpus" / ".cache" / "c.parquet", ["4"], ["z"])
    found = [corpus.find_files(str(place)) for place in (tmp_path / "corpus", tmp_path / "corpus" / "[a]*.parquet", path)]
    assert found == [((tmp_path / "corpus").resolve(), [path.resolve()])] * 3


def test_a_folder_of_links_is_a_corpus(tmp_path: Path):
    # So does the Hugging Face cache keep data sets: snapshots/<revision>/x.parquet -> ../../blobs/<hash>.
    blob = write(tmp_path / "blobs" / "0123", ["a"], ["text"])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x.parquet").symlink_to(blob)
    for place in ("snapshot", "snapshot/x.parquet", "snapshot/*.parquet"):
        source = corpus.inspect(str(tmp_path / place), COLUMNS)
        assert [file.name for file in source.files] == ["x.parquet"]
        assert corpus.read_texts(source) == (["a"], ["text"])


def test_a_folder_whose_name_ends_like_a_file_is_looked_into(tmp_path: Path):
    write(tmp_path / "written-by-spark.parquet" / "part-0.parquet", ["a"], ["text"])
    assert [file.name for file in corpus.inspect(str(tmp_path), COLUMNS).files] == ["written-by-spark.parquet/part-0.parquet"]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(["1", "2"], pa.large_string()),
        pa.array(["1", "2"], pa.string_view()),
        pa.array(["1", "2"]).dictionary_encode(),
        pa.array([1, 2], pa.uint8()),
        pa.array([1, 2]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type)[:20],
)
def test_ids_of_any_text_or_integer_type_are_read_as_text(tmp_path: Path, ids: pa.Array):
    pq.write_table(pa.table({"id": ids, "text": ["x", "y"]}), tmp_path / "c.parquet")
    assert corpus.read_texts(corpus.inspect(str(tmp_path), COLUMNS))[0] == ["1", "2"]


def test_other_column_names_and_one_column_for_both_are_read(tmp_path: Path):
    corpus.write_rows(tmp_path / "c.parquet", {"doc.id": ["1"], "body": ["x"], "id": ["no"], "other": [1.5]})
    assert corpus.read_texts(corpus.inspect(str(tmp_path), Columns("doc.id", "body"))) == (["1"], ["x"])
    assert corpus.read_texts(corpus.inspect(str(tmp_path), Columns("body", "body"))) == (["x"], ["x"])


def test_a_file_without_rows_beside_others_is_no_fault(tmp_path: Path):
    write_two_files(tmp_path)
    for name in ("empty-1.parquet", "empty-2.parquet"):
        pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / name)
    assert corpus.inspect(str(tmp_path), COLUMNS).num_rows == 5


def test_the_fingerprint_is_that_of_names_bytes_and_columns(tmp_path: Path):
    source = corpus.inspect(str(write_two_files(tmp_path / "one")), COLUMNS)
    assert corpus.inspect(str(write_two_files(tmp_path / "two")), COLUMNS).fingerprint == source.fingerprint
    (tmp_path / "two" / "b.parquet").rename(tmp_path / "two" / "c.parquet")
    renamed = corpus.inspect(str(tmp_path / "two"), COLUMNS)
    other_columns = corpus.inspect(str(tmp_path / "one"), Columns("id", "id"))
    write(tmp_path / "one" / "b.parquet", ["b0", "b1"], ["text", "!"])
    changed = corpus.inspect(str(tmp_path / "one"), COLUMNS)
    assert len({corpus.fingerprint for corpus in (source, renamed, other_columns, changed)}) == 4


def test_a_corpus_that_did_not_change_is_recalled_without_reading_it(tmp_path: Path):
    source = corpus.inspect(str(write_two_files(tmp_path)), COLUMNS)
    known = corpus.remember(source)
    assert corpus.recall(known) == source
    path = tmp_path / "b.parquet"
    times = path.stat()
    path.write_bytes(b"x" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert corpus.inspect(str(tmp_path), COLUMNS, known) == source


def test_a_corpus_with_a_changed_new_or_removed_file_is_read_again(tmp_path: Path):
    known = corpus.remember(corpus.inspect(str(write_two_files(tmp_path)), COLUMNS))
    write(tmp_path / "b.parquet", ["b0", "b1"], ["text", "no longer blank"])
    assert corpus.inspect(str(tmp_path), COLUMNS, known).num_empty == 1
    write(tmp_path / "c.parquet", ["c0"], ["text"])
    assert corpus.inspect(str(tmp_path), COLUMNS, known).num_rows == 6
    (tmp_path / "b.parquet").unlink()
    assert corpus.inspect(str(tmp_path), COLUMNS, known).num_rows == 4
    assert corpus.inspect(str(tmp_path), Columns("id", "id"), known).num_empty == 0


def test_a_corpus_is_unchanged_until_a_file_is_written_again_or_removed(tmp_path: Path):
    before, after = (corpus.inspect(str(write_two_files(tmp_path / name)), COLUMNS) for name in ("one", "two"))
    assert corpus.is_unchanged(before)
    assert corpus.is_unchanged(after)
    write(tmp_path / "one" / "b.parquet", ["b0", "b1"], ["text", "no longer blank"])
    (tmp_path / "two" / "b.parquet").unlink()
    assert not corpus.is_unchanged(before)
    assert not corpus.is_unchanged(after)


def test_a_file_that_changes_while_it_is_read_is_read_again_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, digest_file = write(tmp_path / "c.parquet", ["a"], ["text"]), corpus.storage.digest_file

    def digest_and_change(found: Path) -> str:
        digest = digest_file(found)
        write(path, ["a", "b"], ["text", "new"])
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(corpus.storage, "digest_file", digest_and_change)
        torn = corpus.inspect(str(tmp_path), COLUMNS)
    assert not corpus.is_unchanged(torn)
    assert corpus.inspect(str(tmp_path), COLUMNS, corpus.remember(torn)).files[0].digest == digest_file(path)


def test_texts_are_found_by_id_as_far_as_they_are_there(tmp_path: Path):
    source = corpus.inspect(str(write_two_files(tmp_path)), COLUMNS)
    assert corpus.find_texts(source, ["b0", "a2", "gone", "b0"]) == {"a2": "text of a2", "b0": "text"}
    assert corpus.find_texts(source, []) == {}


def test_columns_are_read_as_text_with_nulls_kept(tmp_path: Path):
    path = write(tmp_path / "c.parquet", [3, 4], ["x", None])
    (batch,) = corpus.text_batches(path, ["text", "id"], ["id"])
    assert batch.to_pydict() == {"text": ["x", None], "id": ["3", "4"]}


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_how_rows_were_cut_into_batches_leaves_no_trace_in_the_file(sizes: list[int]):
    rows = pa.table({"id": [f"d{n}" for n in range(sum(sizes))]}, corpus.schema({"id": str}))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_BATCH_ROWS", 4)
        for name, cuts in (("cut", sizes), ("whole", [sum(sizes)])):
            with corpus.RowWriter(Path(folder, name), {"id": str}) as writer:
                for start, size in zip(itertools.accumulate(cuts, initial=0), cuts, strict=False):
                    writer.add_batch(rows.slice(start, size).combine_chunks().to_batches()[0])
        assert pq.read_table(Path(folder, "cut")).equals(rows)
        assert Path(folder, "cut").read_bytes() == Path(folder, "whole").read_bytes()


def test_what_lies_behind_the_last_wanted_row_is_not_read(tmp_path: Path):
    path = write(tmp_path / "a.parquet", list(range(60_000)), [os.urandom(25).hex() for _ in range(60_000)])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) * 3 // 4 : len(damaged) * 3 // 4 + 5_000] = bytes(5_000)
    path.write_bytes(damaged)
    assert sum(batch.num_rows for batch in corpus.text_batches(path, ["text"], (), 0, 100)) == 100
    with pytest.raises(ValueError, match="damaged after row"):
        list(corpus.text_batches(path, ["text"], ()))

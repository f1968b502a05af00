from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matryoshka import corpus, results
from matryoshka.corpus import Columns

NAMES = pa.array(["a", "b é", "c"], pa.large_string())
SCORES = np.array([[0.5, 0.25], [0.125, -np.inf]], np.float32)
DOCUMENTS = np.array([[2, 0], [1, -1]])


def rows(first: int, coverage: float | None = None) -> results.Rows:
    ids = pa.array([f"q{first}", f"q{first + 1}"], pa.large_string())
    return results.to_rows(ids, SCORES, DOCUMENTS, lambda own: NAMES.take(pa.array(own)), coverage)


def test_results_are_written_part_by_part_into_both_files(tmp_path: Path):
    receipt = results.write_results(tmp_path, iter([rows(0), rows(2)]))
    assert receipt.num_rows == 6
    assert pq.read_table(tmp_path / results.PARQUET).to_pylist()[3:] == [
        {"query_id": "q2", "rank": 1, "document_id": "c", "score": 0.5},
        {"query_id": "q2", "rank": 2, "document_id": "a", "score": 0.25},
        {"query_id": "q3", "rank": 1, "document_id": "b é", "score": 0.125},
    ]
    lines = (tmp_path / results.TREC).read_text("utf-8").splitlines()
    assert lines[:3] == ["q0 Q0 c 1 0.5 matryoshka", "q0 Q0 a 2 0.25 matryoshka", "q1 Q0 b é 1 0.125 matryoshka"]


def test_results_that_end_in_an_error_leave_no_file(tmp_path: Path):
    def broken():
        yield rows(0)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        results.write_results(tmp_path, broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_empty", [False, True])
def test_each_result_gets_the_text_of_its_document(tmp_path: Path, is_empty: bool):
    pq.write_table(pa.table({"id": ["c", "a", "b é", "d"], "text": ["C", "A", "B", "D"]}), tmp_path / "corpus.parquet")
    source = corpus.inspect(str(tmp_path / "corpus.parquet"), Columns())
    found = [rows(0, 0.5).slice(0, 0 if is_empty else None), rows(2, 0.5).slice(0, 0 if is_empty else None)]
    results.write_results(tmp_path / "out", results.with_texts(iter(found), source, tmp_path))
    table = pq.read_table(tmp_path / "out" / results.PARQUET)
    assert table.column_names == ["query_id", "rank", "document_id", "score", "coverage", "text"]
    assert table.column("text").to_pylist() == ([] if is_empty else ["C", "A", "B", "C", "A", "B"])


def test_queries_without_results_are_written_as_no_rows(tmp_path: Path):
    nothing = results.to_rows(NAMES, np.empty((3, 0), np.float32), np.empty((3, 0), np.int64), lambda _: NAMES.slice(0, 0))
    assert results.write_results(tmp_path, iter([nothing])).num_rows == 0
    assert (tmp_path / results.TREC).read_bytes() == b""

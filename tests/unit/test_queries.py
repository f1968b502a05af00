from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matryoshka import queries
from matryoshka.units import plan_units

WIDTH = 3
VECTORS = np.array([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0], [0.0, 0.0, 0.25]])
KINDS = [
    pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16()), pa.list_(pa.float32(), WIDTH)
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("unit_rows", [2, 100])
def test_vectors_are_read_in_parts_from_lists_of_any_kind(tmp_path: Path, kind: pa.DataType, unit_rows: int):
    columns = {"number": [7, 8, 9], "v": pa.array([own.astype(np.float16) for own in VECTORS], kind)}
    pq.write_table(pa.table(columns), tmp_path / "q.parquet", row_group_size=2)
    source = queries.inspect_vectors(str(tmp_path), "number", "v", WIDTH, unit_rows)
    parts = [queries.read_vectors(source, unit, WIDTH) for unit in plan_units(source.files, unit_rows)]
    assert [name for ids, _ in parts for name in ids.to_pylist()] == ["7", "8", "9"]
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in parts]), VECTORS.astype(np.float32))
    assert {vectors.dtype for _, vectors in parts} == {np.dtype(np.float32)}


def test_another_column_of_vectors_is_another_source(tmp_path: Path):
    pq.write_table(pa.table({"id": ["a"], "v": [[1.0]], "w": [[2.0]]}), tmp_path / "q.parquet")
    prints = {queries.inspect_vectors(str(tmp_path), "id", name, 1, 10).fingerprint for name in ("v", "w")}
    assert len(prints) == 2


GOOD, ADVICE = [1.0, 0.0, 0.0], r"Make them with the index's own model"
BAD: dict[str, tuple[Any, str]] = {
    "of another width": ([GOOD, [1.0]], rf"1 vectors are not of the index's 3 dims \(first: query 'q1'; 1 found\)\. {ADVICE}"),
    "missing": ([GOOD, None], r"1 vectors are not of the index's 3 dims \(first: query 'q1'; 0 found\)"),
    "not a number": ([[0.0, 1.0, float("nan")], GOOD], rf"1 vectors are not finite \(first: query 'q0'\)\. {ADVICE}"),
    "too large": ([GOOD, [1e300] * 3], r"1 vectors are not finite \(first: query 'q1'\)"),
    "partly missing": ([[1.0, None, 0.0], GOOD], r"1 vectors are not finite \(first: query 'q0'\)"),
    "zero": ([GOOD, [0.0] * 3], r"1 vectors are of length 0 \(first: query 'q1'\)"),
    "texts": (["a", "b"], r"column 'embedding' is string, not lists of floating-point numbers\. Name another column"),
    "whole numbers": ([[1], [2]], r"column 'embedding' is list<.*int64>, not lists of floating-point numbers"),
    "in no row": ([], r"no queries \(0 rows\)\. Pass files with queries"),
    "in another column": (None, r"no column 'embedding' \(found: 'id'\)\. Pass --vector-column with the right name"),
}


@pytest.mark.parametrize("case", BAD)
def test_vectors_are_refused_that_are(tmp_path: Path, case: str):
    given, message = BAD[case]
    columns = {"id": [f"q{row}" for row in range(2 if given is None else len(given))], "embedding": given}
    pq.write_table(pa.table({name: own for name, own in columns.items() if own is not None}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=rf"q\.parquet: .*{message}"):
        queries.inspect_vectors(str(tmp_path / "q.parquet"), "id", "embedding", WIDTH, 10)

"""Rankings as files: TREC's run format, for any tool, and what every query got of every system, in Parquet."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from matryoshka import results, storage
from matryoshka.artifacts import FileRecord
from matryoshka.metrics import FloatArray
from matryoshka.nested import Float32Array
from matryoshka.rankings import Names, Rankings
from matryoshka.storage import Place

FOLDER, PER_QUERY = "runs", "per_query.parquet"

_TOP = 10
_UNUSABLE = re.compile(r"[^\w.+-]")
_COLUMNS = ("query_id", "system", "dim", "top")


@dataclass(frozen=True, slots=True)
class Series:
    """What one system got on every judged query, at one dim.

    Attributes:
        system: Its name.
        dim: None where there is none, as of words.
        values: Of each measure.
        top: The ids of the first ten documents of each query.

    Shapes: values [Q] each.
    """

    system: str
    dim: int | None
    values: Mapping[str, FloatArray]
    top: Sequence[Sequence[str]]

    @property
    def label(self) -> str:
        """The system with its dim, as files are named.

        >>> Series("tuned", 64, {}, []).label
        'tuned-64'
        """
        return self.system if self.dim is None else f"{self.system}-{self.dim}"


def first_documents(rankings: Rankings, names: Names, asked: npt.NDArray[np.int64], num_judged: int) -> list[list[str]]:
    """Returns the ids of the first documents of each judged query; of those that were not asked, none."""
    top = [names[row[row >= 0]].tolist() for row in rankings.documents[asked, :_TOP]]
    return [*top, *([[]] * (num_judged - len(asked)))]


def write_trec(folder: Place, label: str, query_ids: Sequence[str], rankings: Rankings, names: Names) -> FileRecord:
    """Writes rankings as a TREC run below a folder.

    Tools order a run by score, and equal scores as they like; so among equals, each is written a last bit below the one
    before it.
    """
    name = f"{FOLDER}/{_UNUSABLE.sub('_', label)}.trec"
    rows = results.to_rows(
        pa.array(query_ids, pa.large_string()),
        without_ties(rankings.scores),
        rankings.documents,
        lambda documents: pa.array(names[documents], pa.large_string()),
    )
    with storage.publish(folder / name) as temporary:
        temporary.write_bytes(results.trec_lines(rows))
        return FileRecord.named(name, temporary)


def without_ties(scores: Float32Array) -> Float32Array:
    """Returns scores that go down with every place, by the last bit where they did not.

    Shapes: scores [Q, K], best first.

    >>> without_ties(np.array([[0.5, 0.5, 0.5, 0.25]], np.float32)).tolist()
    [[0.5, 0.4999999701976776, 0.4999999403953552, 0.25]]
    """
    fallen = scores.copy()
    for place in range(1, scores.shape[1]):
        below = np.nextafter(fallen[:, place - 1], np.float32(-np.inf))
        np.minimum(scores[:, place], below, out=fallen[:, place])
    return fallen


def write_series(folder: Place, query_ids: Sequence[str], series: Iterable[Series]) -> FileRecord:
    """Writes what every query got, one row for each system, dim and query."""
    tables = [_to_table(query_ids, own) for own in series]
    with storage.publish(folder / PER_QUERY) as temporary:
        pq.write_table(pa.concat_tables(tables, promote_options="default"), temporary, compression="zstd")
        return FileRecord.named(PER_QUERY, temporary)


def _to_table(query_ids: Sequence[str], series: Series) -> pa.Table:
    num_queries = len(query_ids)
    columns: dict[str, Any] = {
        "query_id": pa.array(query_ids, pa.large_string()),
        "system": pa.array([series.system] * num_queries),
        "dim": pa.array([series.dim] * num_queries, pa.int32()),
        "top": pa.array(series.top, pa.list_(pa.large_string())),
    }
    return pa.table(columns | {name: pa.array(own) for name, own in series.values.items()})


def find_series(folder: Place) -> Place:
    """Returns where an evaluation keeps what every query got.

    Raises:
        ValueError: It has no such file: it is of an earlier version, or of similarity.
    """
    path = folder / PER_QUERY
    if not path.is_file():
        raise ValueError(f"{folder}: says nothing of single queries (no {PER_QUERY}). Evaluate anew, with --replace.")
    return path


def read_series(folder: Place) -> tuple[list[str], list[Series]]:
    """Returns (ids of the judged queries, what each system got).

    Raises:
        ValueError: As ``find_series``.
    """
    table = pq.read_table(storage.local(find_series(folder)))
    systems, dims = table.column("system").to_pylist(), table.column("dim").to_pylist()
    starts = [row for row in range(len(dims)) if row == 0 or (systems[row], dims[row]) != (systems[row - 1], dims[row - 1])]
    metrics = [name for name in table.column_names if name not in _COLUMNS]
    series = []
    for start, stop in zip(starts, [*starts[1:], len(dims)], strict=True):
        part = table.slice(start, stop - start)
        values = {name: part.column(name).to_numpy() for name in metrics if not part.column(name).null_count}
        series.append(Series(systems[start], dims[start], values, part.column("top").to_pylist()))
    return table.slice(0, starts[1] if len(starts) > 1 else len(dims)).column("query_id").to_pylist(), series

"""Queries that come as vectors: a column of lists in Parquet files, every one checked before anything is asked."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from matryoshka import corpus
from matryoshka.corpus import Columns, Corpus
from matryoshka.nested import Float32Array
from matryoshka.storage import Place
from matryoshka.topk import IntArray
from matryoshka.units import Unit, plan_units


def inspect_vectors(location: str, id_column: str, vector_column: str, width: int, unit_rows: int) -> Corpus:
    """Returns a checked source of queries, whose text column is the one with the vectors.

    Args:
        location: A folder, a glob pattern, or a file.
        id_column: Column with the query's id.
        vector_column: Column with the query's vector, a list of numbers.
        width: D of the index.
        unit_rows: Most rows in memory at a time.

    Raises:
        ValueError: Anything is wrong with the files, an id, or a vector; the query is named.
    """
    _, paths = corpus.find_files(location)
    if not any(map(corpus.count_rows, paths)):
        raise ValueError(f"{location}: no queries (0 rows). Pass files with queries.")
    source = corpus.inspect(location, Columns(id_column, id_column))
    source = dataclasses.replace(source, columns=Columns(id_column, vector_column))
    for unit in plan_units(source.files, unit_rows):
        read_vectors(source, unit, width)
    return source


def read_vectors(source: Corpus, unit: Unit, width: int) -> tuple[pa.Array, Float32Array]:
    """Returns (ids, vectors) of the queries of one unit.

    Shapes: ids [Q], vectors [Q, D].

    Raises:
        ValueError: A vector is missing, of another width, not finite, or zero.
    """
    path, columns = source.path_of(unit.name), source.columns
    table = corpus.read_columns(path, unit, [columns.id, columns.text], source.stamp_of(unit.name))
    ids = pc.cast(table.column(columns.id), pa.large_string()).combine_chunks()
    lists = table.column(columns.text).combine_chunks()
    _check_type(path, columns.text, lists.type)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    _refuse(path, columns.text, ids, lengths != width, f"not of the index's {width} dims", lengths)
    numbers = lists.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused
        vectors: Float32Array = numbers.astype(np.float32).reshape(-1, width)
    _refuse(path, columns.text, ids, ~np.isfinite(vectors).all(axis=1), "not finite")
    _refuse(path, columns.text, ids, ~vectors.any(axis=1), "of length 0")
    return ids, vectors


def _check_type(path: Place, column: str, own: pa.DataType) -> None:
    kinds = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    if not any(is_kind(own) for is_kind in kinds) or not pa.types.is_floating(own.value_type):
        raise ValueError(f"{path}: column '{column}' is {own}, not lists of floating-point numbers. Name another column.")


def _refuse(path: Place, column: str, ids: pa.Array, is_wrong: Any, fault: str, lengths: IntArray | None = None) -> None:
    wrong = np.flatnonzero(is_wrong)
    if wrong.size:
        first = int(wrong[0])
        found = f"; {int(lengths[first])} found" if lengths is not None else ""
        raise ValueError(
            f"{path}: column '{column}': {wrong.size} vectors are {fault} (first: query {ids[first].as_py()!r}{found})."
            " Make them with the index's own model."
        )

"""Columns of documents that a search can be restricted by: kept with each shard, and asked with conditions.

Conditions have SQL's logic: what compares with a missing value is neither true nor false, and is not found either way. Texts
compare by the code points of their characters, times are in UTC.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from matryoshka import corpus, storage
from matryoshka.conditions import (
    Absence,
    Comparison,
    Condition,
    Constant,
    Junction,
    Likeness,
    Membership,
    Negation,
    Operator,
    Term,
    leaves,
)
from matryoshka.corpus import Columns, Corpus
from matryoshka.storage import Place
from matryoshka.units import Unit

COLUMNS = "columns.arrow"

Kind = Literal["text", "integer", "number", "boolean", "date", "time"]
Kinds = Mapping[str, Kind]
Mask = npt.NDArray[np.bool_]

_STORED: dict[Kind, pa.DataType] = {
    "text": pa.large_string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "time": pa.timestamp("us"),
}
_COMPARED: dict[Kind, tuple[type, ...]] = {
    "text": (str,), "integer": (int, float), "number": (int, float), "boolean": (bool,), "date": (str,), "time": (str,)
}  # fmt: skip
_IN_WORDS: dict[Kind, str] = {
    "text": "a text, such as 'python'",
    "integer": "a number, such as 2020",
    "number": "a number, such as 0.5",
    "boolean": "TRUE or FALSE",
    "date": "a date, such as '2024-12-31'",
    "time": "a time in UTC, such as '2024-12-31 23:59:00'",
}
_COMPARE = {
    "=": pc.equal, "<>": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal
}  # fmt: skip
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the columns of a shard's documents come from.

    Attributes:
        columns: Names of the corpus's own columns.
        kinds: Of the columns to keep.
        units: File and rows for each of the shard's files of embeddings.
        stamps: ETags by which files in a bucket are known, by name; see ``corpus.is_as_planned``.
    """

    columns: Columns
    kinds: Kinds
    units: tuple[tuple[Place, Unit], ...]
    stamps: Mapping[str, str | None] = field(default_factory=dict)


def find_kinds(source: Corpus, names: Sequence[str]) -> dict[str, Kind]:
    """Returns what the columns of a corpus hold.

    Raises:
        ValueError: A column is not in every file, holds what no condition can compare, or something else in another file.
    """
    kinds: dict[str, Kind] = {}
    for path in (source.path_of(file.name) for file in source.files if names):
        schema = corpus.open_parquet(path).schema_arrow
        for name in names:
            if schema.names.count(name) != 1:
                found = ", ".join(f"'{own}'" for own in schema.names)
                raise ValueError(f"{path}: no one column '{name}' (found: {found}). Change --filter-columns.")
            kind = _kind_of(schema.field(name).type)
            if not kind:
                reason = f"column '{name}' is {schema.field(name).type}, which cannot be compared"
                raise ValueError(f"{path}: {reason}. Take it out of --filter-columns.")
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(f"{path}: column '{name}' is {kind}, in other files {kinds[name]}. Make them the same.")
    return kinds


def _kind_of(own: pa.DataType) -> Kind | None:
    value = own.value_type if pa.types.is_dictionary(own) else own
    tests: dict[Kind, tuple[Any, ...]] = {
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "integer": (pa.types.is_integer,),
        "number": (pa.types.is_floating,),
        "boolean": (pa.types.is_boolean,),
        "date": (pa.types.is_date,),
        "time": (pa.types.is_timestamp,),
    }
    return next((kind for kind, holds in tests.items() if any(test(value) for test in holds)), None)


def read_columns(origin: Origin, position: int, ids: pa.Array) -> pa.Table:
    """Returns the columns of the documents of one of a shard's units, in the order of their ids.

    Raises:
        ValueError: The file changed since it was embedded, or a value is out of range.
    """
    path, unit = origin.units[position]
    try:
        table = corpus.read_columns(path, unit, [origin.columns.id, *origin.kinds], origin.stamps.get(unit.name))
    except storage.ChangedError:
        raise ValueError(f"{path}: is gone, or changed since it was embedded. Run python -m jobs.embed again.") from None
    table = table.take(pc.index_in(ids, pc.cast(table.column(origin.columns.id), ids.type)))  # rows without text have no vector
    try:
        arrays = [pc.cast(table.column(name), _STORED[kind], safe=kind == "integer") for name, kind in origin.kinds.items()]
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: a value of a filter column cannot be kept ({error}). Change --filter-columns.") from None
    return pa.table(arrays, names=list(origin.kinds))


def write_columns(path: Path, parts: Sequence[pa.Table]) -> None:
    """Writes the columns of a shard as an Arrow file that ``open_columns`` can map into memory.

    Texts that repeat are stored once each: with as many different ones as half of the rows, that takes no less room.
    """
    table = pa.concat_tables(parts)
    arrays = [_encode(_one_array(column)) for column in table.columns]
    batch = pa.record_batch(arrays, names=table.column_names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _encode(array: pa.Array) -> pa.Array:
    if not pa.types.is_large_string(array.type):
        return array
    encoded = array.dictionary_encode()
    return encoded if 2 * len(encoded.dictionary) <= len(encoded) else array


def open_columns(path: Path) -> pa.RecordBatch:
    """Returns columns that stay on disk until they are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def check(condition: Condition, kinds: Kinds) -> None:
    """Checks that a condition can be asked of such columns.

    Raises:
        ValueError: It names a column that is not there, or compares one with something of another kind.
    """
    for leaf in leaves(condition.term):
        if leaf.column not in kinds:
            there = f"has {', '.join(map(repr, kinds))}" if kinds else "keeps none"
            raise ValueError(
                f"--where: no column '{leaf.column}' (the index {there}). Name another, or build the index with --filter-columns."
            )
        kind = kinds[leaf.column]
        if isinstance(leaf, Likeness) and kind != "text":
            raise ValueError(f"--where: column '{leaf.column}' is {kind}, and LIKE compares texts. Use another comparison.")
        for value in _constants(leaf):
            _check_value(leaf.column, kind, value)


def _constants(leaf: Comparison | Membership | Likeness | Absence) -> tuple[Constant, ...]:
    if isinstance(leaf, Comparison):
        return (leaf.value,)
    return leaf.values if isinstance(leaf, Membership) else ()


def _check_value(column: str, kind: Kind, value: Constant) -> None:
    is_fit = isinstance(value, _COMPARED[kind]) and (isinstance(value, bool) == (kind == "boolean"))
    if is_fit and kind == "number":
        is_fit = abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    if is_fit and kind in ("date", "time"):
        try:
            pa.scalar(value).cast(_STORED[kind])
        except pa.ArrowInvalid:
            is_fit = False
    if not is_fit:
        raise ValueError(f"--where: column '{column}' is {kind}, and {value!r} is not. Compare it with {_IN_WORDS[kind]}.")


def select(columns: pa.RecordBatch | None, condition: Condition) -> Mask:
    """Returns which documents a condition holds for.

    Raises:
        ValueError: As ``check``.

    >>> from matryoshka.conditions import parse
    >>> years = pa.record_batch({"year": pa.array([2019, 2024, None])})
    >>> select(years, parse("NOT year < 2020")).tolist()
    [False, True, False]
    """
    schema = columns.schema if columns is not None else pa.schema([])
    check(condition, {field.name: kind for field in schema if (kind := _kind_of(field.type))})
    mask: Mask = pc.fill_null(_evaluate(condition.term, columns), False).to_numpy(zero_copy_only=False)
    return mask


def _evaluate(term: Term, columns: pa.RecordBatch) -> pa.Array:
    """Returns true, false or null for every document."""
    if isinstance(term, Negation):
        return pc.invert(_evaluate(term.term, columns))
    if isinstance(term, Junction):
        join = pc.and_kleene if term.kind == "and" else pc.or_kleene
        result, *others = (_evaluate(part, columns) for part in term.terms)
        for other in others:
            result = join(result, other)
        return result
    column = columns.column(term.column)
    if isinstance(term, Absence):
        return pc.is_null(column)
    if not pa.types.is_dictionary(column.type):
        return _compare(term, column)
    return _compare(term, column.dictionary).take(column.indices)  # each text is looked at once


def _compare(leaf: Comparison | Membership | Likeness, values: pa.Array) -> pa.Array:
    if isinstance(leaf, Likeness):
        return pc.match_like(values, leaf.pattern)
    if isinstance(leaf, Comparison):
        return _compare_one(values, leaf.operator, leaf.value)
    is_whole = pa.types.is_integer(values.type)
    wanted = [value for value in leaf.values if not is_whole or _is_integer(value)]
    is_in = pc.is_in(values, pa.array([_as_stored(value, values.type) for value in wanted]).cast(values.type))
    return pc.if_else(pc.is_valid(values), is_in, None)


def _as_stored(constant: Constant, own: pa.DataType) -> Constant:
    """Returns a number as a column of this type has it: Arrow takes no large whole number for a float."""
    if pa.types.is_integer(own):
        return int(constant)
    return float(constant) if pa.types.is_floating(own) else constant


def _is_integer(constant: Constant) -> bool:
    """Returns whether a number can stand in a column of whole numbers."""
    assert not isinstance(constant, str)
    return -_LARGEST - 1 <= constant <= _LARGEST and math.floor(constant) == constant


def _compare_one(values: pa.Array, operator: Operator, constant: Constant) -> pa.Array:
    if not pa.types.is_integer(values.type):
        return _COMPARE[operator](values, pa.scalar(_as_stored(constant, values.type)).cast(values.type))
    # As floats, large whole numbers would be rounded; so a constant between two of them moves to the one below.
    assert not isinstance(constant, str)
    if not -_LARGEST - 1 <= constant <= _LARGEST:
        is_true = operator == "<>" or operator.startswith("<" if constant > 0 else ">")
        return pc.if_else(pc.is_valid(values), is_true, None)
    whole = math.floor(constant)
    if whole != constant:
        if operator in ("=", "<>"):
            return pc.if_else(pc.is_valid(values), operator == "<>", None)
        operator = "<=" if operator.startswith("<") else ">"
    return _COMPARE[operator](values, pa.scalar(whole, pa.int64()))

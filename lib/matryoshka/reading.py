"""A report as it is read back from its JSON, any part of which may be missing, and the tables that are made of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

VARIANT = "+"
"""Stands between a model and the way in which it is searched, in the name of a system."""

_HEADLINES = ("nDCG@10", "Spearman")
USUAL = ("base", "tuned")


@dataclass(frozen=True, slots=True)
class Column:
    """Name of a table's column, and the format of its numbers; none: it holds text."""

    title: str
    form: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows to be sorted and taken away; a cell is text, a number, or None where nothing was measured."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, key: str, title: str, forms: Mapping[str, str], records: Iterable[Json]) -> "Table":
        """Returns a table of records: a column for each of their keys in ``forms``, with the format of its numbers.

        >>> Table.of("models", "Models", {"num_bytes": ","}, [{"num_bytes": 5, "width": 384}]).columns
        (Column(title='bytes', form=','),)
        """
        columns = tuple(Column(name.removeprefix("num_").replace("_", " "), form) for name, form in forms.items())
        return cls(key, title, columns, [[record.get(name) for name in forms] for record in records])


@dataclass(frozen=True, slots=True)
class Reading:
    """The JSON value of a report."""

    report: Json

    def part(self, *keys: str) -> Any:
        """Returns what stands under a path of keys; None where nothing does.

        >>> Reading({"verdict": None}).part("verdict", "gain") is None
        True
        """
        value: Any = self.report
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def records(self, *keys: str, having: Sequence[str] = ()) -> list[Any]:
        """Returns what is not null of the list under a path of keys, of records those that have all of some values.

        >>> Reading({"rows": [{"dim": 64}, None, {"dim": None}]}).records("rows", having=["dim"])
        [{'dim': 64}]
        """
        found = [record for record in self.part(*keys) or () if record is not None]
        return [record for record in found if all(record.get(name) is not None for name in having)]

    def mapping(self, *keys: str) -> dict[str, Any]:
        """Returns what is not null of the mapping under a path of keys; empty where there is none."""
        return {key: value for key, value in (self.part(*keys) or {}).items() if value is not None}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Returns the figures, as far as it is known whose they are."""
        return self.records("rows", having=("system", "metric"))

    @property
    def metrics(self) -> list[str]:
        """Returns the metrics of the report, its headline first."""
        found = list(dict.fromkeys(str(row["metric"]) for row in self.rows))
        wanted = [self.part("verdict", "metric"), *_HEADLINES]
        return sorted(found, key=lambda metric: wanted.index(metric) if metric in wanted else len(wanted))

    @property
    def dims(self) -> list[int]:
        """Returns all dims, widest first."""
        return sorted({int(row["dim"]) for row in self.rows if row.get("dim") is not None}, reverse=True)

    @property
    def systems(self) -> list[str]:
        """Returns the systems of the report: models before their variants, and last what has no dims."""
        has_dims: dict[str, bool] = {}
        for row in self.rows:
            has_dims[str(row["system"])] = has_dims.get(str(row["system"]), False) or row.get("dim") is not None
        return sorted(has_dims, key=lambda name: (not has_dims[name], VARIANT in name))

    @property
    def pair(self) -> tuple[str, str]:
        """Returns the names of the systems before and after: those that the report compares query by query, or the usual ones."""
        named = (self.part("extremes", "before"), self.part("extremes", "after"))
        if all(named):
            return named
        models = [name for name in self.systems if VARIANT not in name]
        return USUAL if set(USUAL) <= set(models) or len(models) < 2 else (models[0], models[1])

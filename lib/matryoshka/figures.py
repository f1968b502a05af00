"""Pictures for a page: Vega-Lite specifications that a browser draws, each with a table of what it shows.

A specification says what is drawn. The page decides on colours, fonts and sizes, by the names of styles and the order of series.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from matryoshka.reading import Json, Table

MOST_MARKS = 400  # of more, as many are taken at equal steps
PLACES, CHANGE, COUNT, WHOLE, SHARE, FIGURES, TEXT = ".3f", "+.3f", ",.0f", "d", ".1%", ",.4g", ""
CHOSEN, OTHER = "chosen", "other"

_TEXT = 140


@dataclass(frozen=True, slots=True)
class Choice:
    """What a reader chooses for a picture: the value of a parameter of its specification."""

    label: str
    parameter: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture.

    Attributes:
        key: Its name in the page.
        title: What it shows.
        caption: What it says, in a sentence or two.
        spec: Vega-Lite.
        table: The same in numbers.
        choice: What a reader may choose.
        is_wide: Whether it takes the whole width.
    """

    key: str
    title: str
    caption: str
    spec: dict[str, Any]
    table: Table
    choice: Choice | None = None
    is_wide: bool = False


def rows_of(name: str = "rows") -> alt.Chart:
    """Returns a chart without marks, of the data set of a name."""
    return alt.Chart(alt.NamedData(name))


def specify(chart: Any, height: int, **data: Sequence[Json]) -> dict[str, Any]:
    """Returns the specification of a chart that is as wide as its place, with its data sets."""
    fitted = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: dict[str, Any] = chart.properties(width="container", height=height, autosize=fitted).to_dict()
    del spec["config"], spec["$schema"]
    return {**spec, "datasets": {name: list(rows) for name, rows in data.items()}}


def tooltips(forms: Mapping[str, str]) -> list[alt.Tooltip]:
    """Returns what stands in the tooltip of a mark: fields, and the formats of their numbers."""
    return [alt.Tooltip(f"{name}:Q", format=form) if form else alt.Tooltip(f"{name}:N") for name, form in forms.items()]


def log_scale(padding: int = 16, base: int = 10) -> alt.Scale:
    """Returns a logarithmic scale that ends where its data do, with room for marks."""
    return alt.Scale(type="log", base=base, nice=False, padding=padding)


def lines(rows: Sequence[Json], x: alt.X, y: alt.Y, series: str, forms: Mapping[str, str]) -> alt.LayerChart | alt.FacetChart:
    """Returns one line per series, each with a colour and a shape of its own."""
    scale = alt.Scale(domain=list(dict.fromkeys(row[series] for row in rows)))
    base = rows_of().encode(x, y, color=alt.Color(f"{series}:N", title=None, scale=scale))
    shape = alt.Shape(f"{series}:N", title=None, scale=scale)
    return alt.layer(base.mark_line(style="trend"), base.mark_point(style="spot").encode(shape=shape, tooltip=tooltips(forms)))


def marked() -> dict[str, Any]:
    """Returns how points look of which one was chosen: it differs in colour, shape and size from those of choice ``OTHER``."""
    is_other = f"datum.choice === '{OTHER}'"
    return {
        "color": alt.Color("choice:N", legend=None, scale=alt.Scale(range="ramp", domain=[CHOSEN, OTHER])),
        "shape": alt.condition(is_other, alt.value("circle"), alt.value("diamond")),
        "size": alt.condition(is_other, alt.value(60), alt.value(260)),
    }


def steps(num_items: int, most: int = MOST_MARKS) -> list[int]:
    """Returns the places of at most so many of some items, at equal steps, the first and the last among them.

    >>> steps(5, 3), steps(3, 5)
    ([0, 2, 4], [0, 1, 2])
    """
    if num_items <= most:
        return list(range(num_items))
    return [round(step * (num_items - 1) / (most - 1)) for step in range(most)]


def cut(text: str) -> str:
    """Returns the beginning of a text, as much as a tooltip holds."""
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}..."

"""Drawing: a picture of quality against speed as SVG and PNG, and the library that draws in a browser. The door of vl-convert.

Recall is drawn by how much is missing: from 0.9 to 0.99 is as far as from 0.99 to 0.999, since there systems differ.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from matryoshka.tradeoffs import OURS, Point, envelope

_WIDTH, _HEIGHT = 960, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 190, 64, 66
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_GRID, _INK, _FAINT = "#e3e3e3", "#222222", "#777777"
# Okabe and Ito 2008, Color Universal Design: told apart with any colour vision.
_COLOURS = ("#d55e00", "#000000", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#8c7300", "#777777")
_RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_LEAST_MISSING = 5e-4  # a recall of 1 is drawn here
_LABEL_GAP = 19.0
_PADDING = {"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM}
_TITLE, _SPEED = "recall@10 against exact search (drawn by what is missing)", "queries per second in a batch (log)"

Rows = list[dict[str, Any]]


@functools.cache
def browser_library() -> str:
    """Returns Vega-Lite and all that it needs as one script, which leaves ``vegaEmbed`` to the scripts after it."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def draw(path: Path, title: str, points: Mapping[str, Sequence[Point]], labels: Mapping[str, str]) -> None:
    """Draws one line per system, its best points, and fainter dots for those that others of its own beat.

    Args:
        path: An ``.svg`` or ``.png`` file; the PNG is twice as large.
        title: Of the picture.
        points: Of each system; the first is drawn on top of the others. Recalls below 0.8 are left out.
        labels: Names of the systems for people, in an order that gives each its colour, whichever others are drawn.
    """
    shown = {name: [point for point in own if point.recall >= _RECALLS[0]] for name, own in reversed(list(points.items()))}
    shown = {name: own for name, own in shown.items() if own}
    order = list(dict.fromkeys([*labels, *points]))
    colours = {name: _COLOURS[order.index(name) % len(_COLOURS)] for name in shown}
    chart = _chart(title, shown, colours, {name: labels.get(name, name) for name in shown})
    chart.save(path, scale_factor=2 if path.suffix == ".png" else 1)


def _chart(title: str, shown: Mapping[str, Sequence[Point]], colours: Mapping[str, str], labels: Mapping[str, str]) -> Any:
    every = list(itertools.chain.from_iterable(shown.values())) or [Point("", _RECALLS[0], 1.0)]
    least = min(point.recall for point in every)
    recalls = [recall for recall in _RECALLS if recall >= max(own for own in _RECALLS[:-1] if own <= least)]
    logs = [math.log10(point.queries_per_second) for point in every]
    low, high = min(logs) - 0.1, max(logs) + 0.1
    nines = [_nines(recall) for recall in recalls]
    named = {f"{own:.3f}": f"{recall:g}" for own, recall in zip(nines, recalls, strict=True)}
    named |= {f"{nines[-1]:.3f}": f"{1 - _LEAST_MISSING:g}+"}
    bottom = alt.Axis(values=nines, labelExpr=f"{named}[format(datum.value, '.3f')]", labelFlush=False, titlePadding=14)
    x = alt.X("x:Q", title=_TITLE, axis=bottom, scale=alt.Scale(domain=[nines[0], nines[-1]], nice=False))
    rates = alt.Axis(values=ticks(10**low, 10**high), labelExpr="format(datum.value, datum.value < 1 ? '~g' : ',d')")
    y = alt.Y("y:Q", title=None, axis=rates, scale=alt.Scale(type="log", domain=[10**low, 10**high], nice=False))
    return (
        alt.layer(*_systems(shown, colours, x, y), *_labels(shown, colours, labels, (low, high), x, y))
        .properties(
            width=_PLOT_WIDTH, height=_PLOT_HEIGHT, padding=_PADDING, autosize=alt.AutoSizeParams(type="none"),
            title=alt.TitleParams(title, subtitle=f"{_SPEED}; higher and further right is better", anchor="start", frame="group"),
        )
        .configure_axis(gridColor=_GRID, domain=False, ticks=False, labelPadding=8, labelColor=_INK, titleColor=_INK,
                        labelFontSize=13, titleFontSize=13, titleFontWeight="normal")
        .configure_title(fontSize=17, fontWeight="normal", subtitleFontSize=13, subtitleColor=_FAINT, color=_INK, offset=10)
        .configure_view(stroke=None)
    )  # fmt: skip


def _systems(shown: Mapping[str, Sequence[Point]], colours: Mapping[str, str], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Returns the layers of all points, and of each system's best ones."""
    layers = []
    for name, points in shown.items():
        # What is drawn at one recall has one best.
        drawn = [Point("", min(point.recall, 1 - _LEAST_MISSING), point.queries_per_second) for point in points]
        size, width = (64, 3.5) if name == OURS else (38, 2)
        every, best = (alt.Chart(alt.Data(values=_spots(own))).encode(x, y) for own in (drawn, envelope(drawn)))
        layers.append(every.mark_circle(color=colours[name], size=13, opacity=0.4))
        layers.append(best.mark_line(color=colours[name], strokeWidth=width))
        layers.append(best.mark_circle(color=colours[name], size=size, opacity=1))
    return layers


def _labels(
    shown: Mapping[str, Sequence[Point]], colours: Mapping[str, str], labels: Mapping[str, str], logs: tuple[float, float],
    x: alt.X, y: alt.Y,
) -> list[alt.Chart]:  # fmt: skip
    """Returns the layers of each system's name at the right, as near to the height of its end as the others let it."""
    if not shown:
        return [alt.Chart(alt.Data(values=[])).mark_point().encode(x, y)]
    ends = {name: _spots(envelope(points))[-1] for name, points in shown.items()}
    ordered = sorted(ends, key=lambda name: -ends[name]["y"])
    scale = _PLOT_HEIGHT / (logs[1] - logs[0])
    heights: list[float] = []
    for place, name in enumerate(ordered):
        room = _PLOT_HEIGHT - (len(ordered) - 1 - place) * _LABEL_GAP
        wanted = (logs[1] - math.log10(ends[name]["y"])) * scale
        heights.append(max(min(wanted, room), heights[-1] + _LABEL_GAP if heights else 0.0))
    right, layers = _PLOT_WIDTH + 22, []
    for name, height in zip(ordered, heights, strict=True):
        end, own = alt.Chart(alt.Data(values=[ends[name]])), colours[name]
        label, place_y = alt.Chart(alt.Data(values=[{"text": labels[name]}])), alt.YValue(height)
        layers.append(end.mark_rule(color=own, opacity=0.4).encode(x, y, x2=alt.X2Value(right - 6), y2=alt.Y2Value(height)))
        layers.append(label.mark_circle(color=own, size=50, opacity=1).encode(x=alt.XValue(right), y=place_y))
        layers.append(
            label.mark_text(align="left", baseline="middle", fontSize=14, color=_INK, dx=9).encode(
                x=alt.XValue(right), y=place_y, text="text:N"
            )
        )
    return layers


def _spots(points: Sequence[Point]) -> Rows:
    return [{"x": _nines(point.recall), "y": point.queries_per_second} for point in points]


def _nines(recall: float) -> float:
    return -math.log10(max(1 - recall, _LEAST_MISSING))


def ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 of each decade between two numbers.

    >>> ticks(15, 250)
    [20.0, 50.0, 100.0, 200.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low <= step * 10.0**decade <= high]

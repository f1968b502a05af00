"""A picture of quality against speed: SVG as text, and PNG. The one door for Pillow.

Recall is drawn by how much is missing: from 0.9 to 0.99 is as far as from 0.99 to 0.999, since there systems differ.
"""

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import escape

from matryoshka.tradeoffs import OURS, Point, envelope

Spot = tuple[float, float]

_WIDTH, _HEIGHT = 960, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 190, 64, 66
_GRID, _INK, _FAINT = "#e3e3e3", "#222222", "#777777"
# Okabe and Ito 2008, Color Universal Design: told apart with any colour vision.
_COLOURS = ("#d55e00", "#000000", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#8c7300", "#777777")
_RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_LEAST_MISSING = 5e-4  # a recall of 1 is drawn here
_LABEL_GAP = 19.0
_SHARPNESS = 3  # drawn so many times as large, then made smaller: Pillow's lines have steps


def why_no_png() -> str:
    """Returns why no PNG can be drawn; empty where it can."""
    return "" if importlib.util.find_spec("PIL") else "not installed: pillow. Run pip install pillow for a PNG"


class _Canvas(Protocol):
    """What a chart is drawn on; y grows downward."""

    def line(self, spots: Sequence[Spot], colour: str, width: float) -> None:
        """Draws a line through spots."""

    def dot(self, spot: Spot, colour: str, radius: float) -> None:
        """Draws a filled circle."""

    def text(self, spot: Spot, text: str, colour: str, size: float, align: str) -> None:
        """Writes text whose middle line is at a spot; ``align`` is start, middle or end."""


class _Svg:
    """Draws as SVG."""

    def __init__(self) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        self._parts = [f'{head} font-family="sans-serif">', '<rect width="100%" height="100%" fill="white"/>']

    def line(self, spots: Sequence[Spot], colour: str, width: float) -> None:
        """Draws a line through spots."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def dot(self, spot: Spot, colour: str, radius: float) -> None:
        """Draws a filled circle."""
        self._parts.append(f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="{radius}" fill="{colour}"/>')

    def text(self, spot: Spot, text: str, colour: str, size: float, align: str) -> None:
        """Writes text whose middle line is at a spot."""
        place = f'x="{spot[0]:.1f}" y="{spot[1]:.1f}" fill="{colour}" font-size="{size}" text-anchor="{align}"'
        self._parts.append(f'<text {place} dominant-baseline="central">{escape(text)}</text>')

    def write(self, path: Path) -> None:
        """Writes the picture."""
        path.write_text("\n".join([*self._parts, "</svg>\n"]), "utf-8")


class _Png:
    """Draws as PNG."""

    def __init__(self) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self._font: Any = ImageFont.load_default
        self._image = Image.new("RGB", (_WIDTH * _SHARPNESS, _HEIGHT * _SHARPNESS), "white")
        self._draw: Any = ImageDraw.Draw(self._image)

    def line(self, spots: Sequence[Spot], colour: str, width: float) -> None:
        """Draws a line through spots."""
        self._draw.line([_enlarge(spot) for spot in spots], fill=colour, width=round(width * _SHARPNESS), joint="curve")

    def dot(self, spot: Spot, colour: str, radius: float) -> None:
        """Draws a filled circle."""
        self._draw.circle(_enlarge(spot), radius * _SHARPNESS, fill=colour)

    def text(self, spot: Spot, text: str, colour: str, size: float, align: str) -> None:
        """Writes text whose middle line is at a spot."""
        anchor = {"start": "lm", "middle": "mm", "end": "rm"}[align]
        self._draw.text(_enlarge(spot), text, fill=colour, font=self._font(size * _SHARPNESS), anchor=anchor)

    def write(self, path: Path) -> None:
        """Writes the picture, twice as large as the SVG."""
        self._image.resize((_WIDTH * 2, _HEIGHT * 2)).save(path, "PNG")


def _enlarge(spot: Spot) -> Spot:
    return spot[0] * _SHARPNESS, spot[1] * _SHARPNESS


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where recalls and rates are on the picture.

    Attributes:
        recalls: The lowest and the highest that are shown.
        rates: The same.
    """

    recalls: tuple[float, float]
    rates: tuple[float, float]

    @classmethod
    def around(cls, points: Sequence[Point]) -> "_Frame":
        shown = [point for point in points if point.recall >= _RECALLS[0]] or [Point("", _RECALLS[0], 1.0)]
        first = max(recall for recall in _RECALLS[:-1] if recall <= min(point.recall for point in shown))
        logs = [math.log10(point.queries_per_second) for point in shown]
        return cls((first, 1.0), (10 ** (min(logs) - 0.1), 10 ** (max(logs) + 0.1)))

    def spot(self, recall: float, rate: float) -> Spot:
        """Returns where a point is."""
        first, last = map(_nines, self.recalls)
        low, high = map(math.log10, self.rates)
        x = _LEFT + (_nines(recall) - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (math.log10(rate) - low) / max(high - low, 1e-9) * (_HEIGHT - _TOP - _BOTTOM)


def _nines(recall: float) -> float:
    return -math.log10(max(1 - recall, _LEAST_MISSING))


def draw(path: Path, title: str, points: Mapping[str, Sequence[Point]], labels: Mapping[str, str]) -> None:
    """Draws one line per system, its best points, and fainter dots for those that others of its own beat.

    Args:
        path: An ``.svg`` or ``.png`` file.
        title: Of the picture.
        points: Of each system; the first is drawn on top of the others. Recalls below 0.8 are left out.
        labels: Names of the systems for people, in an order that gives each its colour, whichever others are drawn.
    """
    canvas = _Svg() if path.suffix == ".svg" else _Png()
    frame = _Frame.around(list(itertools.chain.from_iterable(points.values())))
    _draw_axes(canvas, frame, title)
    ends: dict[str, tuple[Spot, str]] = {}
    order = list(dict.fromkeys([*labels, *points]))
    for name in reversed(list(points)):
        shown = [point for point in points[name] if point.recall >= frame.recalls[0]]
        colour = _COLOURS[order.index(name) % len(_COLOURS)]
        if shown:
            ends[name] = _draw_system(canvas, frame, shown, colour, is_ours=name == OURS), colour
    _write_labels(canvas, ends, labels)
    canvas.write(path)


def _draw_axes(canvas: _Canvas, frame: _Frame, title: str) -> None:
    left, bottom = frame.spot(frame.recalls[0], frame.rates[0])
    right, top = frame.spot(frame.recalls[1], frame.rates[1])
    for recall in [recall for recall in _RECALLS if recall >= frame.recalls[0]]:
        x = frame.spot(recall, frame.rates[0])[0]
        canvas.line([(x, top), (x, bottom)], _GRID, 1)
        canvas.text((x, bottom + 16), f"{recall:g}" if recall < 1 else f"{1 - _LEAST_MISSING:g}+", _INK, 13, "middle")
    for rate in _rate_ticks(*frame.rates):
        y = frame.spot(frame.recalls[0], rate)[1]
        canvas.line([(left, y), (right, y)], _GRID, 1)
        canvas.text((left - 8, y), f"{rate:,.0f}" if rate >= 1 else f"{rate:g}", _INK, 13, "end")
    canvas.text((left, 24), title, _INK, 17, "start")
    canvas.text((left, 46), "queries per second in a batch (log); higher and further right is better", _FAINT, 13, "start")
    canvas.text(
        ((left + right) / 2, bottom + 42), "recall@10 against exact search (drawn by what is missing)", _INK, 13, "middle"
    )


def _rate_ticks(low: float, high: float) -> list[float]:
    """Returns the rates of 1, 2 and 5 in each decade between two rates."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low <= step * 10.0**decade <= high]


def _draw_system(canvas: _Canvas, frame: _Frame, points: Sequence[Point], colour: str, *, is_ours: bool) -> Spot:
    """Draws a system's points; returns where its line ends."""
    # What is drawn at one recall has one best.
    drawn = [replace(point, recall=min(point.recall, 1 - _LEAST_MISSING)) for point in points]
    best = [frame.spot(point.recall, point.queries_per_second) for point in envelope(drawn)]
    for point in points:
        canvas.dot(frame.spot(point.recall, point.queries_per_second), _lighten(colour), 2)
    if len(best) > 1:
        canvas.line(best, colour, 3.5 if is_ours else 2)
    for spot in best:
        canvas.dot(spot, colour, 4.5 if is_ours else 3.5)
    return best[-1]


def _lighten(colour: str) -> str:
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{255 - (255 - part) * 2 // 5:02x}" for part in parts)


def _write_labels(canvas: _Canvas, ends: Mapping[str, tuple[Spot, str]], labels: Mapping[str, str]) -> None:
    """Writes each system's name at the right, as near to the height of its end as the others let it."""
    x = _WIDTH - _RIGHT + 22
    heights: list[float] = []
    ordered = sorted(ends.items(), key=lambda end: end[1][0][1])
    for place, (_, (spot, _)) in enumerate(ordered):
        room = _HEIGHT - _BOTTOM - (len(ordered) - 1 - place) * _LABEL_GAP
        heights.append(max(min(spot[1], room), heights[-1] + _LABEL_GAP if heights else _TOP))
    for (name, (spot, colour)), height in zip(ordered, heights, strict=True):
        canvas.line([(spot[0] + 6, spot[1]), (x - 14, height), (x, height)], _lighten(colour), 1)
        canvas.dot((x, height), colour, 4)
        canvas.text((x + 9, height), labels.get(name, name), _INK, 14, "start")

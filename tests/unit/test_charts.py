import itertools
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from matryoshka import charts
from matryoshka.tradeoffs import Point

POINTS = {
    "ours": [Point("", 0.7, 90_000.0), Point("", 0.9, 9_000.0), Point("", 0.99, 4_000.0), Point("", 0.98, 3_000.0)],
    "exact": [Point("", 1.0, 200.0)],
    "ivf & co": [Point("", 0.9, 300.0), Point("", 1.0, 199.0)],
}
SVG = "{http://www.w3.org/2000/svg}"


def drawn(path: Path, points: dict[str, list[Point]]) -> ElementTree.Element:
    charts.draw(path, "250,000 documents", points, {"ours": "this project"})
    return ElementTree.parse(path).getroot()


def place_of(element: ElementTree.Element) -> tuple[float, float]:
    """Returns where an element was moved to."""
    x, y = re.findall(r"-?[\d.]+", element.get("transform", ""))[:2]
    return float(x), float(y)


def systems_of(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Returns where the best points of each system are, each in the order in which systems are drawn."""
    layers = [
        group
        for group in root.iter(f"{SVG}g")
        if "role-mark" in group.get("class", "") and "mark-symbol" in group.get("class", "")
    ]
    return [[place_of(dot) for dot in layer.iter(f"{SVG}path")] for layer in layers]


def test_every_system_is_named_beside_its_line_and_no_two_names_overlap(tmp_path: Path):
    root = drawn(tmp_path / "plot.svg", POINTS)
    texts = {text.text: place_of(text)[1] for text in root.iter(f"{SVG}text")}
    heights = sorted(texts[name] for name in ("this project", "exact", "ivf & co"))
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 18


def test_all_points_lie_within_the_picture_and_more_is_further_up(tmp_path: Path):
    layers = systems_of(drawn(tmp_path / "plot.svg", POINTS))
    spots = [spot for layer in layers for spot in layer]
    assert len(spots) == 6 + 5 + 3  # each that is shown faintly, those that none of their system beats, and beside the names
    assert all(-90 < x < 870 and -64 < y < 536 for x, y in spots)
    ivf, exact, ours = layers[0], layers[2], layers[4]
    assert ours[0][1] < ivf[0][1] < exact[0][1]
    assert ours[0][0] < ours[2][0] < ours[1][0] < exact[0][0]


def test_a_system_has_one_colour_whatever_else_is_drawn(tmp_path: Path):
    def colours(*names: str) -> set[str | None]:
        charts.draw(tmp_path / "plot.svg", "", {name: POINTS[name] for name in names}, dict.fromkeys(POINTS, "name"))
        paths = ElementTree.parse(tmp_path / "plot.svg").getroot().iter(f"{SVG}path")
        return {path.get("fill") for path in paths if path.get("fill")}

    assert colours("ivf & co") < colours(*POINTS)
    assert colours("ivf & co").isdisjoint(colours("ours", "exact"))


@pytest.mark.parametrize("points", [{}, {"ours": []}, {"ours": [Point("", 0.0, 5.0)]}, {"ours": [Point("", 1.0, 5.0)]}])
def test_there_is_a_picture_of_little_too(tmp_path: Path, points: dict[str, list[Point]]):
    assert drawn(tmp_path / "plot.svg", points).tag == f"{SVG}svg"


def test_a_png_is_twice_as_large(tmp_path: Path):
    charts.draw(tmp_path / "plot.png", "title", POINTS, {})
    assert struct.unpack(">II", (tmp_path / "plot.png").read_bytes()[16:24]) == (1920, 1200)


def test_the_library_of_browsers_is_one_script_that_can_stand_in_a_page():
    script = charts.browser_library()
    assert "window.vegaEmbed" in script
    assert "</script" not in script
    assert len(script) < 1_000_000

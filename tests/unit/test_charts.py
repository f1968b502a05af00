import itertools
import math
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


def test_every_system_is_named_beside_its_line_and_no_two_names_overlap(tmp_path: Path):
    root = drawn(tmp_path / "plot.svg", POINTS)
    texts = {text.text: float(text.get("y", "nan")) for text in root.iter(f"{SVG}text")}
    heights = sorted(texts[name] for name in ("this project", "exact", "ivf & co"))
    assert len({line.get("stroke") for line in root.iter(f"{SVG}polyline") if line.get("stroke-width") != "1"}) == 2
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 18


def test_all_points_lie_within_the_picture_and_more_is_further_up(tmp_path: Path):
    root = drawn(tmp_path / "plot.svg", POINTS)
    spots = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in root.iter(f"{SVG}circle")]
    assert len(spots) == 6 + 5 + 3  # each that is shown faintly, those that none of their system beats, and beside the names
    assert all(0 < x < 960 and 0 < y < 600 for x, y in spots)
    frame = charts._Frame.around([point for points in POINTS.values() for point in points])
    assert frame.spot(0.9, 300)[1] < frame.spot(0.9, 200)[1]
    assert frame.spot(0.9, 300)[0] < frame.spot(0.99, 300)[0]
    assert math.isclose(
        frame.spot(0.99, 1)[0] - frame.spot(0.9, 1)[0], frame.spot(0.999, 1)[0] - frame.spot(0.99, 1)[0], rel_tol=1e-6
    )


def test_a_system_has_one_colour_whatever_else_is_drawn(tmp_path: Path):
    def colours(*names: str) -> set[str | None]:
        charts.draw(tmp_path / "plot.svg", "", {name: POINTS[name] for name in names}, dict.fromkeys(POINTS, "name"))
        return {dot.get("fill") for dot in ElementTree.parse(tmp_path / "plot.svg").getroot().iter(f"{SVG}circle")}

    assert colours("ivf & co") < colours(*POINTS)
    assert colours("ivf & co").isdisjoint(colours("ours", "exact"))


@pytest.mark.parametrize("points", [{}, {"ours": []}, {"ours": [Point("", 0.0, 5.0)]}, {"ours": [Point("", 1.0, 5.0)]}])
def test_there_is_a_picture_of_little_too(tmp_path: Path, points: dict[str, list[Point]]):
    assert drawn(tmp_path / "plot.svg", points).tag == f"{SVG}svg"


@pytest.mark.skipif(bool(charts.why_no_png()), reason=charts.why_no_png())
def test_a_png_is_twice_as_large(tmp_path: Path):
    charts.draw(tmp_path / "plot.png", "title", POINTS, {})
    assert struct.unpack(">II", (tmp_path / "plot.png").read_bytes()[16:24]) == (1920, 1200)

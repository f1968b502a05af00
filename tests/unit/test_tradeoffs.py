import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.tradeoffs import Point, compare, envelope, rate_at, share_found

SHARES = st.floats(0, 1)
POINTS = st.lists(st.builds(Point, st.just(""), SHARES, st.floats(1e-3, 1e6)), min_size=1, max_size=8)
SWEEPS = {
    "ours": [Point("a", 0.95, 1000.0, 0.79), Point("b", 0.99, 100.0, 0.797), Point("c", 0.995, 80.0, 0.8)],
    "ours_exact": [Point("", 1.0, 30.0, 0.8)],
    "exact": [Point("", 1.0, 20.0, 0.8)],
    "hnsw16": [Point("", 0.9, 500.0), Point("", 0.985, 50.0)],
    "hnsw32": [Point("", 0.9, 400.0), Point("", 0.99, 25.0)],
    "ivf_flat": [Point("", 0.95, 40.0), Point("", 0.94, 10.0)],
    "ivf_pq_refine": [Point("", 0.9, 900.0)],
}
SECONDS = {"ours": 2.0, "hnsw16": 10.0, "hnsw32": 30.0}


@given(POINTS, SHARES)
def test_a_rate_lies_between_those_of_the_neighbours(points: list[Point], recall: float):
    rate = rate_at(points, recall)
    above = [point.queries_per_second for point in points if point.recall >= recall]
    if not above:
        assert rate is None
        return
    below = [point.queries_per_second for point in points if point.recall < recall]
    assert rate is not None
    assert max(above) - 1e-6 <= rate <= max([*above, *below]) + 1e-6


@given(POINTS, SHARES, SHARES)
def test_more_recall_is_never_faster(points: list[Point], one: float, other: float):
    slow, fast = rate_at(points, max(one, other)), rate_at(points, min(one, other))
    assert slow is None or (fast is not None and slow <= fast + 1e-6)


@given(POINTS)
def test_a_rate_at_a_point_of_the_envelope_is_that_points(points: list[Point]):
    for point in envelope(points):
        assert rate_at(points, point.recall) == pytest.approx(point.queries_per_second)


@given(POINTS)
def test_every_point_is_beaten_or_on_the_envelope(points: list[Point]):
    kept = envelope(points)
    assert all(
        any(best.recall >= point.recall and best.queries_per_second >= point.queries_per_second for best in kept)
        for point in points
    )
    assert [point.recall for point in kept] == sorted({point.recall for point in kept})


def test_what_ties_with_the_last_of_the_best_counts_and_no_more_than_all_of_them():
    best = np.array([[0.9, 0.5, 0.5]])
    assert share_found(np.array([[0.9, 0.5, 0.5, 0.5]]), best) == 1
    assert share_found(np.array([[0.5, 0.5, 0.4]]), best) == pytest.approx(2 / 3)
    assert share_found(np.array([[0.9, -np.inf, -np.inf]]), best) == pytest.approx(1 / 3)


def test_ratios_are_those_of_made_up_sweeps():
    ratios, notes = compare(SWEEPS, SECONDS)
    # ours at .985: 1000 falls to 100 over .04, an eighth of that decade is left.
    wanted = {
        "exact@0.99": 5.0,
        "hnsw@0.985": 100 * 10**0.125 / 50,
        "hnsw@0.99": 4.0,
        "ivf_flat@0.95": 25.0,
        "ivf_pq_refine@0.95": None,
        "hnsw_build": 15.0,
        "ours_exact": 1.5,
        "exact@ndcg0.995": 5.0,
    }
    assert ratios == pytest.approx(wanted)
    assert notes == ["ivf_pq_refine@0.95: none, ivf_pq_refine never reaches a recall of 0.95"]


def test_ratios_of_systems_that_were_not_measured_are_none_with_a_note():
    ratios, notes = compare({"ours": [Point("", 0.5, 9.0)], "exact": [Point("", 1.0, 1.0)]}, {"ours": 1.0})
    assert set(ratios.values()) == {None}
    assert "exact@0.99: none, ours never reaches a recall of 0.99" in notes
    assert "hnsw@0.99: none, no hnsw16 or hnsw32 was measured" in notes
    assert len(notes) == len(ratios)


def test_another_library_has_a_ratio_where_it_was_measured():
    assert compare({**SWEEPS, "usearch": [Point("", 1.0, 50.0)]}, SECONDS)[0]["usearch@0.99"] == pytest.approx(2.0)

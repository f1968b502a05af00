from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import frontier
from matryoshka.frontier import Point
from matryoshka.nested import FunnelPlan, Step

shares = st.sampled_from([0.9, 0.95, 0.98, 0.99, 0.995, 1.0, 1.01])
speeds = st.sampled_from([10.0, 20.0, 50.0, 100.0, 400.0])


def point(number: int, chosen: float, low: float, speed: float) -> Point:
    return Point(FunnelPlan((Step(4, number + 1), Step(8, 1))), chosen, low, low, 1.1, speed, 1.0)


made = st.lists(st.tuples(shares, shares, speeds), min_size=1, max_size=8).map(
    lambda rows: [point(number, *row) for number, row in enumerate(rows)]
)
EXACT = Point(FunnelPlan((Step(8, 10),)), 1.0, 1.0, 1.0, 1.0, 20.0, 5.0)


def beats(one: Point, other: Point) -> bool:
    no_worse = one.chosen >= other.chosen and one.queries_per_second >= other.queries_per_second
    return no_worse and (one.chosen, one.queries_per_second) != (other.chosen, other.queries_per_second)


@given(made)
def test_a_frontier_is_what_nothing_beats_fastest_first(points: list[Point]):
    found = frontier.frontier(points)
    assert not any(beats(other, own) for own in found for other in points)
    assert all(any(beats(own, other) or same(own, other) for own in found) for other in points)
    assert [own.queries_per_second for own in found] == sorted({own.queries_per_second for own in found}, reverse=True)
    assert [own.chosen for own in found] == sorted({own.chosen for own in found})


def same(one: Point, other: Point) -> bool:
    return (one.chosen, one.queries_per_second) == (other.chosen, other.queries_per_second)


@given(made, shares)
def test_the_chosen_plan_holds_the_floor_in_both_halves_and_is_the_fastest_that_does(points: list[Point], floor: float):
    choice = frontier.choose(points, floor, EXACT)
    able = [own for own in points if own.chosen >= floor <= own.low and own.queries_per_second > EXACT.queries_per_second]
    if able:
        assert choice.point in able
        assert choice.point.queries_per_second == max(own.queries_per_second for own in able)
    else:
        assert choice.point == EXACT
    assert all(own.chosen >= floor > own.low for own in choice.passed_over)
    assert all(own.queries_per_second >= choice.point.queries_per_second for own in choice.passed_over)


@given(made)
def test_a_point_survives_being_written(points: list[Point]):
    assert [Point.from_json(own.as_json()) for own in points] == points


@given(st.lists(st.tuples(st.floats(1, 9), shares, shares), min_size=1, max_size=40))
def test_the_cheapest_that_hold_each_floor_are_among_those_to_be_timed(rows: list[tuple[float, float, float]]):
    costs, worth, lows = (np.array(own) for own in zip(*rows, strict=True))
    chosen = frontier.worth_timing(costs, worth, lows, [0.98, 0.995])
    assert chosen == sorted(set(chosen))
    for floor in (0.98, 0.995):
        for quality in (worth, lows):
            able = [costs[place] for place in range(len(rows)) if quality[place] >= floor]
            assert not able or min(able) in costs[chosen]


def test_plans_to_be_timed_are_few_and_spread_over_what_they_lose():
    lost = np.geomspace(0.05, 0.0001, 400)
    chosen = frontier.worth_timing(np.linspace(1, 400, 400), 1 - lost, 1 - lost - 0.01, [0.995])
    assert len(chosen) <= 30
    assert np.diff(np.log(lost[chosen])).min() > -1.1  # a factor of three
    assert frontier.worth_timing(np.empty(0), np.empty(0), np.empty(0), [0.995]) == []


def names(count: int) -> list[str]:
    return [f"q{number}" for number in range(count)]


def test_halves_are_disjoint_cover_everything_and_depend_on_each_id_alone():
    every = names(400)
    is_choosing = dict(zip(every, frontier.choosing(every).tolist(), strict=True))
    fewer = every[::-1][:200]
    assert [is_choosing[name] for name in fewer] == frontier.choosing(fewer).tolist()
    assert 150 < sum(is_choosing.values()) < 250


@pytest.mark.parametrize("count", [0, 1, 40])
def test_too_few_queries_are_refused_with_how_many_are_needed(count: int):
    with pytest.raises(ValueError, match=r"queries to choose by .* 30 of each are needed\. Give more queries: at least 90"):
        frontier.choosing(names(count))


def test_an_interval_holds_the_share_and_narrows_with_more_queries():
    rng = np.random.default_rng(1)

    def ends(count: int) -> Sequence[float]:
        reference = rng.uniform(0.2, 1, count)
        worth = reference * rng.choice([1.0, 0.9], count)
        low, high = (float(own[0]) for own in frontier.interval(worth[None], reference))
        assert low < frontier.share(worth, reference) < high
        return low, high

    few, many = ends(50), ends(2_000)
    assert many[1] - many[0] < (few[1] - few[0]) / 3
    reference = rng.uniform(0.2, 1, 50)
    widths = [np.subtract(*frontier.interval(0.9 * reference[None] ** 2, reference, own)[::-1])[0] for own in (0.5, 0.9, 0.99)]
    assert 0 < widths[0] < widths[1] < widths[2]
    exact = np.ones((1, 40))
    assert [own.tolist() for own in frontier.interval(exact, exact[0])] == [[1.0], [1.0]]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    # Many plans at once, on the same queries: each is a case of its own.
    worth = rng.choice([1.0, 0.5], (400, 200), p=[0.9, 0.1])  # 0.95 of exact search, on average
    low, high = frontier.interval(worth, np.ones(200))
    assert 0.9 <= np.mean((low <= 0.95) & (high >= 0.95)) <= 0.99


@pytest.mark.parametrize(("floor", "fast", "high"), [(0.995, 0.98, 0.999), (1.0, 1.0, 1.0), (0.5, 0.0, 0.9)])
def test_fast_may_lose_four_times_as_much_and_high_a_fifth(floor: float, fast: float, high: float):
    assert frontier.floors(floor) == {"fast": fast, "balanced": floor, "high": high}

import numpy as np
import pytest
import report_data

from matryoshka import figures, findings
from matryoshka.reading import Reading


@pytest.fixture(scope="module")
def reading() -> Reading:
    return Reading(report_data.report(50))


@pytest.mark.parametrize("draw", [findings.evidence, findings.quality, findings.resolutions, findings.frontier, findings.gains])
def test_there_is_no_figure_of_what_was_not_measured(draw):
    assert draw(Reading({})) is None


def test_evidence_holds_the_gain_beside_every_other_set_and_the_gain_that_is_required(reading: Reading):
    figure = findings.evidence(reading)
    assert figure
    assert [(row[0], row[5]) for row in figure.table.rows] == [("this data", 0.156), ("scifact", -0.033), ("stsb", -0.005)]
    assert [rule["at"] for rule in figure.spec["datasets"]["rules"]] == [0.0, 0.01]


def test_quality_holds_every_row_of_the_report_the_headline_first(reading: Reading):
    figure = findings.quality(reading)
    assert figure
    assert len(figure.table.rows) == len(reading.records("rows"))
    assert figure.choice
    assert figure.choice.values == report_data.METRICS
    assert "With 32 dims, tuned reaches 0.824 nDCG@10; base needed 384 for 0.691." in figure.caption


def test_without_intervals_none_are_drawn_and_without_words_there_is_no_line():
    rows = [report_data.record(system="base", dim=dim, metric="nDCG@10", value=0.5) for dim in (64, 32)]
    figure = findings.quality(Reading({"rows": rows}))
    assert figure
    assert [layer["mark"]["type"] for layer in figure.spec["layer"]] == ["line", "point"]
    assert figure.caption == ""


def test_the_recommended_dim_and_the_chosen_plan_are_marked_and_no_other(reading: Reading):
    resolutions, frontier = findings.resolutions(reading), findings.frontier(reading)
    assert resolutions
    assert frontier
    marked = [[row for row in figure.spec["datasets"]["rows"] if row["choice"] != "other"] for figure in (resolutions, frontier)]
    assert [[row["dim"]] for row in marked[0]] == [[64]]
    assert [row["name"] for row in marked[1]] == ["balanced"]
    assert "64 dims, which keep 98.3%" in resolutions.caption
    assert "64:50,384:10, 99.6% in 101 microseconds" in frontier.caption


def test_what_has_no_cost_is_not_drawn(reading: Reading):
    for key, value in (("microseconds", None), ("quality", None), ("microseconds", 0.0)):
        points = [{**point, key: value} if point["name"] == "fast" else point for point in reading.records("frontier", "points")]
        figure = findings.frontier(Reading({"frontier": {"chosen": "balanced", "points": points}}))
        assert figure
        assert [row[0] for row in figure.table.rows] == [None, "balanced", "high"]
    assert findings.frontier(Reading({"frontier": {"points": [{"name": "fast", "quality": 1.0}]}})) is None


def test_queries_without_a_value_are_not_counted_and_dims_without_any_not_drawn():
    values = {"base": {"64": [0.1, None, 0.3], "32": []}, "tuned": {"64": [0.2, 0.2, 0.3], "32": []}}
    figure = findings.gains(Reading({"per_query": {"values": values, "texts": ["one"]}}))
    assert figure
    assert figure.table.rows == [["64", 2, 1, 1, 0]]
    assert [row["query"] for row in figure.spec["datasets"]["rows"]] == ["one", ""]
    assert findings.gains(Reading({"per_query": {"values": {"base": {"32": []}, "tuned": {"32": []}}, "texts": []}})) is None


def test_gains_count_every_query_and_draw_some_at_equal_steps():
    reading = Reading(report_data.report(1_000))
    figure = findings.gains(reading)
    assert figure
    before, after = (np.asarray(reading.part("per_query", "values")[system]["32"]) for system in ("base", "tuned"))
    row = next(row for row in figure.table.rows if row[0] == "32")
    assert row[1:] == [1_000, np.sum(after > before), np.sum(after == before), np.sum(after < before)]
    drawn = [query["change"] for query in figure.spec["datasets"]["rows"] if query["dim"] == "32"]
    assert len(drawn) == figures.MOST_MARKS
    assert drawn == sorted(drawn, reverse=True)
    assert (drawn[0], drawn[-1]) == pytest.approx(((after - before).max(), (after - before).min()))

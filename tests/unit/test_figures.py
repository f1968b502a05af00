from typing import Any

import report_data
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import figures, findings
from matryoshka.figures import Choice
from matryoshka.reading import Reading


@given(num_items=st.integers(0, 500), most=st.integers(2, 50))
def test_steps_are_few_rising_and_reach_from_the_first_to_the_last(num_items: int, most: int):
    places = figures.steps(num_items, most)
    assert len(places) == min(num_items, most)
    assert places == sorted(set(places))
    assert not places or (places[0], places[-1]) == (0, num_items - 1)


def test_a_specification_has_its_data_and_nothing_of_how_it_looks():
    rows = [report_data.record(a=1)]
    spec: dict[str, Any] = figures.specify(figures.rows_of().mark_point(style="spot"), 100, rows=rows)
    assert spec["datasets"] == {"rows": rows}
    assert spec["data"] == {"name": "rows"}
    assert spec.keys().isdisjoint({"config", "$schema"})
    assert spec["width"] == "container"


def test_a_choice_is_of_a_parameter_that_its_figure_has():
    reading = Reading(report_data.report(20))
    for figure in (findings.quality(reading), findings.gains(reading)):
        assert figure
        assert isinstance(figure.choice, Choice)
        (parameter,) = figure.spec["params"]
        assert parameter == {"name": figure.choice.parameter, "value": figure.choice.values[0]}


def test_tooltips_hold_the_beginning_of_a_text():
    assert figures.cut("short") == "short"
    assert figures.cut("long " * 100).endswith("...")
    assert len(figures.cut("long " * 100)) < 150

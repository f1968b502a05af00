import json
from pathlib import Path

import pytest

from matryoshka import report
from matryoshka.evaluation import Row

ROWS = [
    Row(system, dim, metric, value)
    for metric, table in {
        "MRR@10": {("base", 64): 0.1, ("tuned", 64): 0.2},
        "nDCG@10": {("base", 64): 0.3, ("base", 384): 0.5, ("tuned", 384): 0.7, ("tuned", 128): 0.6, ("tuned", 64): 0.4,
                    ("base", 128): 0.45},
    }.items()
    for (system, dim), value in table.items()
]  # fmt: skip


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    report.write(tmp_path, "Title", ROWS, {"split": "test"}, {"model": "abc"})
    assert report.read_rows(tmp_path) == ROWS
    value = json.loads((tmp_path / report.JSON).read_text())
    assert (value["title"], value["settings"], value["fingerprints"]) == ("Title", {"split": "test"}, {"model": "abc"})


def test_tables_begin_with_the_headline_and_the_widest_dim_and_leave_gaps_open():
    tables = report.tables(ROWS)
    assert list(tables) == ["nDCG@10", "MRR@10"]
    assert tables["nDCG@10"] == [
        ["dim", "base", "tuned"],
        ["384", "0.500", "0.700"],
        ["128", "0.450", "0.600"],
        ["64", "0.300", "0.400"],
    ]
    assert tables["MRR@10"][1:] == [["384", "", ""], ["128", "", ""], ["64", "0.100", "0.200"]]


def test_markdown_has_every_figure_the_conclusion_and_the_fingerprints(tmp_path: Path):
    report.write(tmp_path, "Title", ROWS, {}, {"model": "abc"})
    text = (tmp_path / report.MARKDOWN).read_text()
    assert text.startswith("# Title\n\nAt 384 dims")
    assert "| dim | base | tuned |\n| ---: | ---: | ---: |\n| 384 | 0.500 | 0.700 |\n" in text
    assert "- model: `abc`" in text
    assert "funnel" not in text


def test_markdown_explains_funnel_rows_where_there_are_any(tmp_path: Path):
    report.write(tmp_path, "Title", [*ROWS, Row("tuned+funnel", 64, "nDCG@10", 0.69)], {}, {})
    assert "A row of a `+funnel` system stands at the dim of its shortlist" in (tmp_path / report.MARKDOWN).read_text()


def test_the_conclusion_names_the_smallest_dim_that_reaches_what_full_width_reached():
    assert report.conclude(ROWS) == (
        "At 384 dims, nDCG@10 went from 0.500 to 0.700. Tuned, 128 dims reach what 384 dims reached before."
    )


def test_the_conclusion_of_a_loss_claims_nothing_and_one_of_a_single_system_is_empty():
    worse = [Row("base", 64, "nDCG@10", 0.5), Row("tuned", 64, "nDCG@10", 0.4)]
    assert report.conclude(worse) == "At 64 dims, nDCG@10 went from 0.500 to 0.400."
    assert report.conclude([row for row in ROWS if row.system == "base"]) == report.conclude([]) == ""


def test_a_folder_without_report_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"report\.json: cannot be read"):
        report.read_rows(tmp_path)

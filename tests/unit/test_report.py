import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from matryoshka import comparison, evaluation, page, report, showcase, verdict
from matryoshka.evaluation import Profile, Row, rank_systems
from matryoshka.report import Report
from matryoshka.runs import Series

ROWS = [
    Row(system, dim, metric, value)
    for metric, table in {
        "MRR@10": {("base", 64): 0.1, ("tuned", 64): 0.2},
        "nDCG@10": {("base", 64): 0.3, ("base", 384): 0.5, ("tuned", 384): 0.7, ("tuned", 128): 0.6, ("tuned", 64): 0.4,
                    ("base", 128): 0.45},
    }.items()
    for (system, dim), value in table.items()
]  # fmt: skip
PROFILE = Profile("base", 91_000_000, 22_700_000, 384, None, 150.4, None)


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    report.write(tmp_path, Report("Title", ROWS, [PROFILE], settings={"split": "test"}, fingerprints={"model": "abc"}))
    assert report.read_rows(tmp_path) == ROWS
    assert report.read_profiles(tmp_path) == [PROFILE]
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
    report.write(tmp_path, Report("Title", ROWS, fingerprints={"model": "abc"}))
    text = (tmp_path / report.MARKDOWN).read_text()
    assert text.startswith("# Title\n\nnDCG@10 at 384 dims")
    assert "| dim | base | tuned |\n| ---: | ---: | ---: |\n| 384 | 0.500 | 0.700 |\n" in text
    assert "- model: `abc`" in text
    assert "funnel" not in text


def test_markdown_explains_funnel_rows_where_there_are_any(tmp_path: Path):
    report.write(tmp_path, Report("Title", [*ROWS, Row("tuned+funnel", 64, "nDCG@10", 0.69)]))
    assert "A row of a `+funnel` system stands at the dim of its shortlist" in (tmp_path / report.MARKDOWN).read_text()


def test_the_conclusion_names_the_smallest_dim_that_reaches_what_full_width_reached():
    assert report.conclude(ROWS) == (
        "nDCG@10 at 384 dims went from 0.500 to 0.700: 0.200 was gained. Tuned, 128 dims reach what 384 dims reached before."
    )


def test_the_conclusion_of_a_loss_claims_nothing_and_one_of_a_single_system_is_empty():
    worse = [Row("base", 64, "nDCG@10", 0.5), Row("tuned", 64, "nDCG@10", 0.4)]
    assert report.conclude(worse) == "nDCG@10 at 64 dims went from 0.500 to 0.400: 0.100 was lost."
    assert report.conclude([row for row in ROWS if row.system == "base"]) == report.conclude([]) == ""


def pair(before: float, after: float, systems: tuple[str, str] = ("base", "tuned"), metric: str = "nDCG@10") -> list[Row]:
    return [Row(systems[0], 64, metric, before), Row(systems[1], 64, metric, after)]


def test_the_change_is_that_of_the_printed_figures():
    """0.0338 rounds to 0.034, but a reader who subtracts finds 0.033."""
    assert report.describe_change(pair(0.6454, 0.6116)).endswith("from 0.645 to 0.612: 0.033 was lost.")
    assert report.describe_change(pair(0.64504, 0.64496)).endswith("from 0.645 to 0.645: nothing changed.")


def test_similarity_has_its_own_headline():
    sentence = report.describe_change(pair(0.82, 0.79, metric="Spearman"), "On stsb, ")
    assert sentence == "On stsb, Spearman at 64 dims went from 0.820 to 0.790: 0.030 was lost."


def test_two_systems_of_other_names_are_compared_by_name_and_three_are_not_compared():
    assert report.conclude(pair(0.5, 0.6, ("old", "new"))) == (
        "nDCG@10 at 64 dims went from 0.500 (old) to 0.600 (new): 0.100 was gained."
        " With new, 64 dims reach what 64 dims reached before."
    )
    assert report.conclude([*pair(0.5, 0.6, ("old", "new")), Row("third", 64, "nDCG@10", 0.7)]) == ""


def test_what_was_lost_elsewhere_has_a_sentence_and_a_table_per_dim(tmp_path: Path):
    rows = [*pair(0.645, 0.612), Row("base", 32, "nDCG@10", 0.3), Row("tuned", 32, "nDCG@10", 0.35)]
    made = Report("Title", ROWS, elsewhere={"scifact": rows, "stsb": pair(0.8, 0.8, metric="Spearman")})
    report.write(tmp_path, made)
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "\n\nOn scifact, nDCG@10 at 64 dims went from 0.645 to 0.612: 0.033 was lost.\n\n" in text
    assert "| 64 | 0.645 | 0.612 | -0.033 |\n| 32 | 0.300 | 0.350 | +0.050 |\n" in text
    value = json.loads((tmp_path / report.JSON).read_text())
    assert [Row(**row) for row in value["elsewhere"]["scifact"]] == rows
    assert value["sentences"] == made.sentences == report.read_sentences(tmp_path)
    assert len(made.sentences) == 3


def test_a_ranking_names_the_best_and_lists_models_in_its_order(tmp_path: Path):
    rows = [*pair(0.4, 0.5, ("small", "wide")), Row("wide", 128, "nDCG@10", 0.6)]
    profiles = [dataclasses.replace(PROFILE, system=name) for name in ("small", "wide")]
    report.write(tmp_path, Report("Title", rows, profiles, rank_systems(rows)))
    assert report.read_best(tmp_path) == "wide"
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "wide is the best of 2: mean nDCG@10 over 64 dims 0.500, before small (0.400). Best per dim: wide at 128, 64." in text
    assert "| wide | 0.500 | 91.0 | 22.7M | 384 |  | 150 |  |\n| small | 0.400 |" in text


def whole(num_queries: int = 60) -> Report:
    """A report of everything that queries tell."""
    rng = np.random.default_rng(0)
    base, ids = rng.random(num_queries), [f"q{n}" for n in range(num_queries)]
    values = {("bm25", None): base - 0.3, ("base", 64): base, ("tuned", 64): base + 0.2, ("tuned", 32): base + 0.19}
    series = [Series(*name, {"nDCG@10": own}, [["d1", "d<2>"]] * num_queries) for name, own in values.items()]
    rows, compared = evaluation.figures(series), comparison.compare(series)
    chosen = comparison.find(compared, "base", "tuned")
    kept = comparison.resolutions(series, "tuned", 0.95, {64: 20.0}, 100)
    forgotten = verdict.Forgotten("scifact", "nDCG@10", 64, 0.645, 0.573, -0.072, -0.1, -0.04)
    answer = dataclasses.replace(
        verdict.decide(chosen, rows),
        forgotten=(forgotten,),
        training=verdict.Training("cuda", 0.5, 4),
        saving=verdict.saving_of(kept),
    )
    texts = {name: f"a *bold* <b>question</b> {name}" for name in ids}
    extremes = showcase.find_extremes(ids, series, chosen, {name: {"d1": 1} for name in ids}, texts)
    elsewhere = {"scifact": [Row("base", 64, "nDCG@10", 0.645), Row("tuned", 64, "nDCG@10", 0.573)]}
    return Report("Title", rows, [PROFILE], remarks=("A remark.",), elsewhere=elsewhere, verdict=answer, comparisons=compared,
                  resolutions=kept, extremes=extremes, per_query=showcase.per_query(ids, series, texts))  # fmt: skip


def test_a_short_dim_that_happens_to_be_better_keeps_all():
    answer = whole().verdict
    assert answer
    assert answer.saving
    lucky = dataclasses.replace(answer, saving=dataclasses.replace(answer.saving, retained=1.342))
    assert "32 dims keep all of full width's nDCG@10 and save" in report.describe_verdict(lucky)


def test_the_verdict_stands_on_top_with_what_it_cost_what_was_forgotten_and_what_a_short_dim_saves(tmp_path: Path):
    made = whole()
    report.write(tmp_path, made)
    text = (tmp_path / report.MARKDOWN).read_text()
    assert text.startswith("# Title\n\nVerdict: fine-tune. nDCG@10 at 64 dims changed by +0.200 (+0.200 to +0.200) on 60 queries")
    first = text.split("\n\n")[1]
    assert "\n\nOn scifact, nDCG@10 at 64 dims went from 0.645 to 0.573: 0.072 was lost (-0.100 to -0.040).\n\n" in text
    assert "Fine-tuning took 0.50 GPU-hours." in first
    assert "32 dims keep 98.6% of full width's nDCG@10 and save 50% of the bytes: 64 MB a million documents, not 128 MB." in first
    assert "\n\nTuned, 64 dims reach what 64 dims reached before.\n\n" in text
    assert "\n\nA remark.\n\n" in text
    assert "| base to tuned | 64 | +0.200 | +0.200 | +0.200 | 0.0001 |" in text
    assert "| 64 | 0.705 | 100.0% | 100.0% | 128 | 20 |\n| 32 | 0.695 | 98.6% | 98.4% | 64 |  |" in text


def test_a_single_judged_query_makes_a_report_without_intervals_that_any_reader_of_json_takes(tmp_path: Path):
    report.write(tmp_path, whole(1))
    text = (tmp_path / report.JSON).read_text()
    assert not {"Infinity", "NaN"} & set(re.findall(r"\w+", text))
    value = json.loads(text)
    own = [*value["rows"], *value["comparisons"], value["verdict"]]
    assert {(one["low"], one["high"]) for one in own} == {(None, None)}
    assert "changed by +0.200 on 1 queries: fewer than 50 queries decide nothing." in value["verdict"]["reason"]
    assert (value["verdict"]["detectable_gain"], value["resolutions"]) == (None, None)
    assert "| base to tuned | 64 | +0.200 |  |  | 1.0000 |" in (tmp_path / report.MARKDOWN).read_text()
    page.write(tmp_path)
    assert report.read(tmp_path).verdict == whole(1).verdict


def test_words_have_a_row_of_their_own_at_the_end_of_a_table():
    assert report.tables(whole().rows)["nDCG@10"][-1] == ["-", "0.205", "", ""]


def test_texts_of_queries_and_ids_do_no_harm_in_markdown(tmp_path: Path):
    report.write(tmp_path, whole())
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "<b>" not in text
    assert "a \\*bold\\* &lt;b&gt;question&lt;/b&gt; q5" in text
    assert "d&lt;2&gt;" in text


def test_a_report_comes_back_as_it_was_written(tmp_path: Path):
    made = whole()
    report.write(tmp_path, made)
    back = report.read(tmp_path)
    assert dataclasses.replace(back, elsewhere=made.elsewhere) == dataclasses.replace(
        made, rows=list(made.rows), profiles=list(made.profiles), comparisons=list(made.comparisons)
    )


def test_a_terminal_shows_fewer_measures_than_the_report():
    rows = [Row("base", 64, metric, 0.5) for metric in ("nDCG@10", "MAP@100", "Recall@10")]
    assert list(report.tables(rows, report.SHOWN)) == ["nDCG@10", "Recall@10"]
    assert report.gain_table(whole().comparisons)[2] == ["base", "tuned", "64", "+0.200", "+0.200 to +0.200", "0.0001"]


def test_a_report_that_ranks_nothing_has_no_best(tmp_path: Path):
    report.write(tmp_path, Report("Title", ROWS))
    with pytest.raises(ValueError, match=r"report\.json: ranks no models"):
        report.read_best(tmp_path)


def test_a_folder_without_report_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"report\.json: cannot be read"):
        report.read_rows(tmp_path)

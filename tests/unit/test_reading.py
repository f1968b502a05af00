import pytest

from matryoshka.reading import Column, Reading, Table


def rows(*systems: tuple[str, int | None], metric: str = "nDCG@10") -> list[dict]:
    return [{"system": system, "dim": dim, "metric": metric, "value": 0.5} for system, dim in systems]


def test_what_is_missing_is_nothing_at_any_depth():
    reading = Reading({"verdict": None, "title": "text"})
    assert reading.part("verdict", "gain") is reading.part("title", "gain") is reading.part("none") is None
    assert (reading.records("rows"), reading.mapping("verdict"), reading.metrics, reading.dims) == ([], {}, [], [])


def test_the_headline_is_the_metric_of_the_verdict_or_else_the_usual_one():
    found = [*rows(("base", 64), metric="MRR@10"), *rows(("base", 64), metric="nDCG@10"), *rows(("base", 64), metric="Recall@10")]
    assert Reading({"rows": found}).metrics == ["nDCG@10", "MRR@10", "Recall@10"]
    assert Reading({"rows": found, "verdict": {"metric": "Recall@10"}}).metrics[0] == "Recall@10"


def test_models_stand_before_their_variants_and_words_last():
    found = rows(("bm25", None), ("base", 64), ("tuned+funnel", 64), ("tuned", 64))
    assert Reading({"rows": found}).systems == ["base", "tuned", "tuned+funnel", "bm25"]


@pytest.mark.parametrize(
    ("report", "pair"),
    [
        ({"rows": rows(("tuned", 64), ("base", 64), ("third", 64))}, ("base", "tuned")),
        ({"rows": rows(("old", 64), ("old+int8", 64), ("new", 64))}, ("old", "new")),
        ({"rows": rows(("tuned", 64), ("base", 64)), "extremes": {"before": "base", "after": "third"}}, ("base", "third")),
        ({}, ("base", "tuned")),
    ],
)
def test_the_pair_is_the_one_that_is_compared_query_by_query_or_else_the_models_before_and_after(report, pair):
    assert Reading(report).pair == pair


def test_a_table_leaves_open_what_a_record_lacks():
    table = Table.of("key", "Title", {"system": "", "p_value": ".3f"}, [{"system": "base", "more": 1}, {"p_value": 0.5}])
    assert table.columns == (Column("system"), Column("p value", ".3f"))
    assert table.rows == [["base", None], [None, 0.5]]

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from matryoshka import comparison, rankings, showcase
from matryoshka.indexing import IndexStore
from matryoshka.metrics import Judgements
from matryoshka.nested import FunnelPlan
from matryoshka.rankings import Catalogue, Rankings
from matryoshka.runs import Series
from matryoshka.vectors import EmbeddingStore

IDS = [f"q{number:02}" for number in range(30)]
TEXTS = {name: f"text of {name} " * 40 for name in IDS}
BEFORE = Series("base", 64, {"nDCG@10": np.full(30, 0.5)}, [[f"b{n}", "x"] for n in range(30)])
AFTER = Series("tuned", 64, {"nDCG@10": np.linspace(0, 1, 30)}, [["x", f"t{n}"] for n in range(30)])
QRELS = {name: {"x": 2, "b29": 0} for name in IDS}


def found() -> showcase.Extremes:
    series = [BEFORE, AFTER]
    chosen = comparison.find(comparison.compare(series), "base", "tuned")
    return showcase.find_extremes(IDS, series, chosen, QRELS, TEXTS)


def test_the_ten_queries_that_gained_and_lost_most_have_their_first_documents_and_grades():
    extremes = found()
    assert [change.query_id for change in extremes.gained] == IDS[::-1][:10]
    assert [change.query_id for change in extremes.lost] == IDS[:10]
    first = extremes.gained[0]
    assert (first.before, first.after, first.text) == (0.5, 1.0, TEXTS["q29"][:300])
    assert first.results == {
        "base": ({"id": "b29", "text": "", "grade": 0}, {"id": "x", "text": "", "grade": 2}),
        "tuned": ({"id": "x", "text": "", "grade": 2}, {"id": "t29", "text": "", "grade": None}),
    }
    told = extremes.with_texts({"x": "y" * 500})
    assert told.gained[0].results["base"][1]["text"] == "y" * 300
    assert extremes.documents == {"x", *(f"{kind}{n}" for kind in "bt" for n in (*range(10), *range(20, 30)))}


def test_queries_that_did_not_gain_are_not_called_gains():
    series = [BEFORE, Series("tuned", 64, {"nDCG@10": np.r_[np.full(28, 0.5), 0.4, 0.6]}, [[]] * 30)]
    chosen = comparison.find(comparison.compare(series), "base", "tuned")
    extremes = showcase.find_extremes(IDS, series, chosen, QRELS, TEXTS)
    assert [change.query_id for change in extremes.gained] == ["q29"]
    assert [change.query_id for change in extremes.lost] == ["q28"]


def test_extremes_come_back_from_json():
    told = found().with_texts({"x": "a text"})
    back = showcase.Extremes.from_json(dataclasses.asdict(told))
    assert back == told


def test_every_query_has_its_value_of_every_system_in_four_digits():
    words = Series("bm25", None, {"nDCG@10": np.full(30, 1 / 3)}, [[]] * 30)
    made = showcase.per_query(IDS, [words, BEFORE, AFTER], TEXTS)
    assert made["ids"] == IDS
    assert made["values"]["bm25"] == {"": [0.3333] * 30}
    assert made["values"]["tuned"]["64"][-2:] == [0.9655, 1.0]
    assert max(map(len, made["texts"])) == 120


def test_searches_show_results_relevant_documents_and_what_each_step_of_the_funnel_kept(
    make_store: Callable[..., EmbeddingStore], make_index: Callable[..., IndexStore], random_vectors: Callable[..., np.ndarray]
):
    store = make_store({"a:0": ([f"d{n:02}" for n in range(40)], random_vectors(40, 8))})
    catalogue, queries, ids = Catalogue.of_store(store), random_vectors(3, 8, 1), ["p", "q", "unjudged"]
    qrels = {"p": {"d00": 1, "d01": 0}, "q": {f"d{n:02}": 1 + n % 2 for n in range(40)}, "never asked": {"d00": 1}}
    judged = Judgements.of(qrels, ids, catalogue.names)
    rows = showcase.choose_searches(judged)
    assert [judged.query_ids[row] for row in rows] == ["p", "q"]
    exact = {dim: rankings.exact(store, catalogue, queries, dim, 100) for dim in (8, 4)}
    results = {dim: showcase.list_results(own, catalogue, judged, rows) for dim, own in exact.items()}
    relevant = [showcase.relevant_documents(qrels, name) for name in ("p", "q")]
    searcher = make_index(store).searcher(FunnelPlan.parse(["4:20", "8:12"]))
    steps = showcase.trace(searcher, catalogue, queries[judged.asked[rows]], relevant)
    assert len(relevant[1]) == 40
    assert steps[1] == [{"dim": 4, "kept": 20, "relevant_kept": 20}, {"dim": 8, "kept": 12, "relevant_kept": 12}]
    shown = showcase.Searches(["p", "q"], results, steps)
    value = shown.as_json(qrels, {"p": "a question"}, {"d00": "z" * 400})
    assert [own["id"] for own in value["queries"]] == ["p", "q"]
    first = value["queries"][0]
    assert (first["text"], first["num_relevant"], set(first["results"])) == ("a question", 1, {"8", "4"})
    assert [name for name, _ in first["results"]["4"]] == exact[4].ids(catalogue.names)[0][:10]
    assert first["results"]["8"][0][1] == pytest.approx(float(exact[8].scores[0, 0]), abs=1e-4)
    for own, judged_documents in zip(value["queries"], relevant, strict=True):
        results = {name for found_ones in own["results"].values() for name, _ in found_ones}
        assert own["relevant"] == {name: grade for name, grade in judged_documents.items() if name in results}
        assert results <= set(value["documents"])
    assert value["queries"][1]["num_relevant"] == 40
    assert len(value["documents"]) < 40  # those that nothing found are counted, and have no text
    assert {"z" * 300, ""} >= set(value["documents"].values())


def test_every_relevant_document_that_is_shown_is_called_relevant_however_many_there_are():
    many = {f"d{n:04}": 1 for n in range(5_000)}
    shown = showcase.Searches(["q"], {8: [[("d4999", 0.5), ("x", 0.4)]], 4: [[("d2500", 0.5)]]})
    (query,) = shown.as_json({"q": {**many, "x": 0}}, {}, {})["queries"]
    assert (query["num_relevant"], query["relevant"]) == (5_000, {"d2500": 1, "d4999": 1})
    assert showcase.relevant_documents({}, "q") == {}


def test_a_query_without_results_is_shown_without_any():
    nothing = Rankings(np.full((1, 3), -np.inf, np.float32), np.full((1, 3), -1))
    catalogue = Catalogue.of(["a"])
    judged = Judgements.of({"q": {"a": 1}}, ["q"], catalogue.names)
    assert showcase.list_results(nothing, catalogue, judged, [0]) == [[]]

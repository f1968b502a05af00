"""A task put to systems: what is kept on disk, and what the queries tell."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import datasets_by_hand
import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, R, Success, nDCG

from matryoshka import artifacts, lexical, metrics, retrieval, storage
from matryoshka.indexing import IndexStore, Layout
from matryoshka.report import Report
from matryoshka.retrieval import Findings, Task
from matryoshka.vectors import EmbeddingStore

THEIRS = {"nDCG@10": nDCG @ 10, "Recall@10": R @ 10, "Recall@100": R @ 100, "MRR@10": RR @ 10, "MAP@100": AP @ 100,
          "Success@1": Success @ 1}  # fmt: skip
NUM_QUERIES, NUM_DOCUMENTS, WIDTH = 60, 150, 8
WORDS = [f"word{number}" for number in range(40)]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Each query is answered by two documents, which share words with it; one is not judged, one is not asked."""
    rng = np.random.default_rng(0)
    documents = {f"d{n:03}": " ".join(rng.choice(WORDS, 6)) for n in range(NUM_DOCUMENTS)}
    queries = {f"q{n:02}": " ".join(documents[f"d{n:03}"].split()[:2]) for n in range(NUM_QUERIES)} | {"unjudged": "word1"}
    grades = {f"q{n:02}": {f"d{n:03}": 2, f"d{n + 60:03}": 1} for n in range(NUM_QUERIES)} | {"never asked": {"d000": 1}}
    return Task.open(datasets_by_hand.write(tmp_path / "data", documents, {"test": queries}, {"test": grades}), "test")


@pytest.fixture
def vectors(random_vectors: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    """Documents of two models, and queries: those of the second model are near the first of their documents."""
    documents, noise = random_vectors(NUM_DOCUMENTS, WIDTH), random_vectors(NUM_QUERIES + 1, WIDTH, 1)
    near = np.concatenate([documents[:NUM_QUERIES], noise[:1]]).astype(np.float32)
    return {"documents": documents, "base": near + 2 * noise, "tuned": near + 0.4 * noise}


@pytest.fixture
def store(make_store: Callable[..., EmbeddingStore], vectors: dict[str, np.ndarray]) -> EmbeddingStore:
    names = [f"d{n:03}" for n in range(NUM_DOCUMENTS)]
    parts = {f"{start}:0": (names[start : start + 70], vectors["documents"][start : start + 70]) for start in (0, 70, 140)}
    return make_store(parts)


@pytest.fixture
def found(task: Task, store: EmbeddingStore, vectors: dict[str, np.ndarray], tmp_path: Path) -> Findings:
    words = retrieval.search_words(task, tmp_path / "out")
    base = retrieval.search_vectors(task, tmp_path / "out", "base", store, vectors["base"], (8, 4))
    tuned = retrieval.search_vectors(
        task, tmp_path / "out", "tuned", store, vectors["tuned"], (8, 4), packings=("int8", "binary")
    )
    return words.and_then(base).and_then(tuned)


def test_ir_measures_gets_the_figures_of_the_report_from_the_runs_on_disk(task: Task, found: Findings, tmp_path: Path):
    made = retrieval.weigh(task, Report("t", ()), found.series, found, "tuned", 0.95, 0.01)
    figures = {(row.system, row.dim, row.metric): row.value for row in made.rows}
    assert [own.label for own in found.series] == [
        "bm25", "base-8", "base-4", "tuned-8", "tuned+int8-8", "tuned+binary-8", "tuned-4", "tuned+int8-4", "tuned+binary-4",
    ]  # fmt: skip
    for own, record in zip(found.series, found.records, strict=True):
        run = list(ir_measures.read_trec_run(str(tmp_path / "out" / record.path)))
        theirs = ir_measures.calc_aggregate(list(THEIRS.values()), task.qrels, run)
        for name in own.values:
            assert figures[own.system, own.dim, name] == pytest.approx(theirs[THEIRS[name]], abs=1e-9)
        assert set(own.values) == set(THEIRS) - (set(metrics.DEEP) if "binary" in own.system else set())
        assert artifacts.check_file(tmp_path / "out", record)


def test_a_report_has_verdict_comparisons_resolutions_extremes_and_searches(task: Task, found: Findings):
    made = retrieval.weigh(task, Report("t", ()), found.series, found, "tuned", 0.95, 0.01)
    assert (made.verdict.decision, made.verdict.num_queries, made.verdict.dim) == ("fine-tune", 61, 8)
    assert [(one.before, one.after) for one in made.comparisons[:2]] == [("bm25", "base"), ("base", "tuned")]
    assert made.resolutions.system == "tuned"
    assert made.resolutions.by_dim[0].microseconds_per_query > 0
    first = made.extremes.gained[0]
    assert first.text == task.texts[first.query_id]
    assert all(one["text"] for one in first.results["tuned"])
    assert made.per_query["ids"] == list(task.judged_ids)
    assert len(made.searches["queries"]) == NUM_QUERIES
    assert all(made.searches["documents"].values())
    assert task.remarks == ("1 queries without judgements were left out.",)
    storage.as_json([made.per_query, made.searches])


def test_a_model_has_to_be_better_than_words(task: Task, found: Findings):
    perfect = {name: np.ones(len(own)) for name, own in found.series[0].values.items()}
    series = [dataclasses.replace(found.series[0], values=perfect), *found.series[1:]]
    made = retrieval.weigh(task, Report("t", ()), series, found, "tuned", 0.95, 0.01)
    assert (made.verdict.decision, "words alone (BM25)" in made.verdict.reason) == ("do not bother", True)


def test_where_nobody_asks_for_a_verdict_models_are_compared_all_the_same(task: Task, found: Findings):
    made = retrieval.weigh(task, Report("t", ()), found.series, found, "tuned", 0.95, None)
    assert (made.verdict, made.extremes.before, made.extremes.after) == (None, "base", "tuned")
    assert made.comparisons


def test_a_funnel_is_evaluated_as_it_is_searched_and_int8_where_the_index_has_it(
    task: Task,
    store: EmbeddingStore,
    make_index: Callable[..., IndexStore],
    vectors: dict[str, np.ndarray],
    tmp_path: Path,
):
    """A plan that hands out twelve documents says nothing of the first hundred."""
    index = make_index(store, layout=Layout("prefix", 4, "Flat", "int8"), plan=["4:20", "8:12"])
    made = retrieval.search_vectors(task, tmp_path / "out", "tuned", store, vectors["tuned"], (8,), index)
    assert [own.label for own in made.series] == ["tuned-8", "tuned+int8-8", "tuned+funnel-4"]
    funnel = made.series[-1]
    assert set(funnel.values) == set(THEIRS) - set(metrics.DEEP)
    ranked = index.searcher().search(vectors["tuned"], 10).ids.tolist()
    means = metrics.measure(task.qrels, task.query_ids, ranked)
    assert funnel.values["nDCG@10"].mean() == pytest.approx(means["nDCG@10"])
    assert [step["dim"] for step in made.shown.funnel[0]] == [4, 8]


def chunked(folder: Path, documents: dict[str, str]) -> Task:
    """A task on documents that were cut into chunks."""
    data = datasets_by_hand.write(folder, documents, {"test": {"q": "x"}}, {"test": {"q": {"a": 1}}})
    facts = {**data.manifest.facts, "is_chunked": True}
    return Task.open(dataclasses.replace(data, manifest=dataclasses.replace(data.manifest, facts=facts)), "test")


def test_a_chunked_document_is_shown_by_its_first_chunk_and_weighs_as_many_rows_as_it_has(tmp_path: Path):
    task = chunked(tmp_path, {"a#0-9": "begins", "b#0-9": "other", "a#9-18": "goes on", "a#18-27": "ends"})
    assert task.find_texts({"a", "unknown"}) == {"a": "begins"}
    assert task.find_texts(set()) == {}
    assert task.count_rows() == 2.0


def test_whole_documents_have_one_row_each(task: Task):
    assert task.count_rows() == 1.0


def test_of_more_texts_than_fit_in_memory_words_are_left_out_and_the_report_says_so(
    task: Task, found: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lexical, "MOST_TEXTS", NUM_DOCUMENTS - 1)
    words = retrieval.search_words(task, tmp_path / "large")
    assert (words.series, words.records) == ((), ())
    without = words.and_then(dataclasses.replace(found, series=found.series[1:]))
    made = retrieval.weigh(task, Report("t", (), remarks=("First.",)), without.series, without, "tuned", 0.95, 0.01)
    assert made.remarks == ("First.", "BM25 was left out: 150 texts, and it holds at most 149 in memory.")
    assert made.remarks[1] in made.sentences
    assert "bm25" not in {row.system for row in made.rows}
    monkeypatch.setattr(lexical, "MOST_TEXTS", NUM_DOCUMENTS)
    assert retrieval.search_words(task, tmp_path / "fits").series


def test_a_split_that_nobody_judged_is_refused(tmp_path: Path):
    data = datasets_by_hand.write(tmp_path, {"d": "text"}, {"test": {"q": "x"}}, {"test": {"stranger": {"d": 1}}})
    with pytest.raises(ValueError, match="no query of split 'test' has judgements"):
        Task.open(data, "test")

from pathlib import Path

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, nDCG

from matryoshka import runs
from matryoshka.metrics import Judgements
from matryoshka.rankings import Rankings
from matryoshka.runs import Series

NAMES = np.array([f"d{number}" for number in range(6)], dtype=object)


def test_ir_measures_reads_the_numbers_that_we_have_out_of_a_run_with_ties(tmp_path: Path):
    """Tools order ties by their own rules; the first document here would be the last one by theirs."""
    documents = np.array([[0, 1, 2, 3], [4, 5, -1, -1], [-1, -1, -1, -1]])
    scores = np.array([[0.5, 0.5, 0.5, 0.25], [0.125, 0.125, -np.inf, -np.inf], [-np.inf] * 4], dtype=np.float32)
    queries, qrels = ["q1", "q2", "q3"], {"q1": {"d0": 1, "d3": 2}, "q2": {"d5": 1}, "q3": {"d1": 1}}
    record = runs.write_trec(tmp_path, "base-8", queries, Rankings(scores, documents), NAMES)
    assert record.path == "runs/base-8.trec"
    read = list(ir_measures.read_trec_run(str(tmp_path / record.path)))
    theirs = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10], qrels, read)
    ours = Judgements.of(qrels, queries, NAMES).measure(documents)
    assert theirs[nDCG @ 10] == pytest.approx(ours["nDCG@10"].mean(), abs=1e-9)
    assert theirs[RR @ 10] == pytest.approx(ours["MRR@10"].mean(), abs=1e-9)
    assert (tmp_path / record.path).read_text().splitlines()[0] == "q1 Q0 d0 1 0.5 matryoshka"


def test_a_label_that_is_no_name_for_a_file_is_made_one(tmp_path: Path):
    nothing = Rankings(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64))
    assert runs.write_trec(tmp_path, "my model/v2+int8-64", [], nothing, NAMES).path == "runs/my_model_v2+int8-64.trec"


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12))
def test_scores_without_ties_go_down_and_stay_where_they_were_but_for_last_bits(values: list[float]):
    scores = np.sort(np.array([values], dtype=np.float32))[:, ::-1]
    fallen = runs.without_ties(scores)
    assert (np.diff(fallen) < 0).all()
    np.testing.assert_allclose(fallen, scores, atol=2e-6)


def test_series_come_back_as_they_were_written(tmp_path: Path):
    made = [
        Series("bm25", None, {"nDCG@10": np.array([0.5, 0.0]), "Recall@100": np.array([1.0, 0.0])}, [["a", "b"], []]),
        Series("base", 64, {"nDCG@10": np.array([0.1, 0.2]), "Recall@100": np.array([0.3, 0.4])}, [["a"], ["c"]]),
        Series("base", 32, {"nDCG@10": np.array([0.1, 0.3]), "Recall@100": np.array([0.3, 0.4])}, [["b"], ["c"]]),
        Series("base+funnel", 32, {"nDCG@10": np.array([0.1, 0.3])}, [["b"], ["c"]]),
    ]
    runs.write_series(tmp_path, ["q1", "q2"], made)
    ids, found = runs.read_series(tmp_path)
    assert ids == ["q1", "q2"]
    assert [own.label for own in found] == ["bm25", "base-64", "base-32", "base+funnel-32"]
    for own, expected in zip(found, made, strict=True):
        assert (own.system, own.dim, own.top) == (expected.system, expected.dim, expected.top)
        assert {name: one.tolist() for name, one in own.values.items()} == {
            name: one.tolist() for name, one in expected.values.items()
        }


def test_an_evaluation_that_says_nothing_of_single_queries_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"says nothing of single queries \(no per_query\.parquet\)\. Evaluate anew"):
        runs.read_series(tmp_path)

from pathlib import Path
from typing import Any

import pytest
import small_runs
import texts
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import dev, model, training, units
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.dev import DevEvaluator, DevSet
from matryoshka.forward import TrainingForward, features_of
from matryoshka.pairs import DatasetStore
from matryoshka.tokens import Role, Tokens

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS = (64, 16, 4)


def store(folder: Path, documents: dict[str, str], qrels: dict[str, list[str]], *, is_chunked: bool = False) -> DatasetStore:
    """Returns a dataset of a dev split whose queries are named by their answers, in two corpus files."""
    ids = list(documents)
    for number in range(2):
        part = ids[number::2]
        texts.write_parquet(
            folder / "corpus" / f"part-{number:05d}.parquet", {"id": part, "text": [documents[name] for name in part]}
        )
    queries = {"id": list(qrels), "text": [f"ask {name}" for name in qrels]}
    judged = [(query, name) for query, names in qrels.items() for name in names]
    columns = {
        "query_id": [query for query, _ in judged],
        "document_id": [name for _, name in judged],
        "grade": [1] * len(judged),
    }
    receipts = [
        Receipt(key, len(rows["grade" if "grade" in rows else "id"]), (FileRecord.of(folder, path),))
        for key, rows in (("queries/dev", queries), ("qrels/dev", columns))
        for path in [texts.write_parquet(folder / f"{key}.parquet", rows)]
    ]
    facts = {"queries": {"dev": len(qrels)}, "is_chunked": is_chunked}
    return DatasetStore(folder, Manifest("dataset", {}, {}, facts, tuple(receipts), is_complete=True))


def corpus_of(count: int) -> dict[str, str]:
    return {f"d{number}": f"text {number}" for number in range(count)}


def test_a_dev_set_holds_the_queries_their_answers_and_other_documents(tmp_path: Path):
    data = store(tmp_path, corpus_of(30), {f"q{number}": [f"d{number}"] for number in range(20)})
    found = dev.choose(data, "dev", 5, 12)
    assert len(found.queries) == len(found.qrels) == 5
    assert len(found.documents) == 12
    for query, text in found.queries.items():
        assert text == f"ask {query}"
        assert found.qrels[query] == {f"d{query[1:]}": 1}
        assert found.documents[f"d{query[1:]}"] == f"text {query[1:]}"


def test_the_same_dataset_gives_the_same_dev_set_whatever_its_files(tmp_path: Path):
    qrels = {f"q{number}": [f"d{number}"] for number in range(20)}
    documents = corpus_of(30)
    first = dev.choose(store(tmp_path / "one", documents, qrels), "dev", 5, 12)
    turned = dict(reversed(documents.items()))
    again = dev.choose(store(tmp_path / "two", turned, qrels), "dev", 5, 12)
    assert (first.queries, first.qrels) == (again.queries, again.qrels)
    assert dict(first.documents) == dict(again.documents)


@given(st.integers(0, 40))
def test_new_documents_push_out_others_but_never_queries_or_answers(tmp_path_factory: pytest.TempPathFactory, num_new: int):
    folder = tmp_path_factory.mktemp("data")
    qrels = {f"q{number}": [f"d{number}"] for number in range(8)}
    before = dev.choose(store(folder / "one", corpus_of(30), qrels), "dev", 5, 15)
    after = dev.choose(store(folder / "two", corpus_of(30 + num_new), qrels), "dev", 5, 15)
    assert (before.queries, before.qrels) == (after.queries, after.qrels)
    assert len(after.documents) == 15
    gone = before.documents.keys() - after.documents.keys()
    come = after.documents.keys() - before.documents.keys()
    assert len(gone) == len(come)
    assert all(int(name[1:]) >= 30 for name in come)
    assert not gone & {name for own in before.qrels.values() for name in own}


def test_at_most_ten_answers_of_a_query_are_read_for_its_sake(tmp_path: Path):
    data = store(tmp_path, corpus_of(50), {"q": [f"d{number}" for number in range(40)]})
    found = dev.choose(data, "dev", 5, 0)
    assert len(found.documents) == 10
    assert found.qrels["q"].keys() == found.documents.keys()


def test_an_answer_that_is_in_the_pool_as_one_of_the_others_counts(tmp_path: Path):
    data = store(tmp_path, corpus_of(12), {"q": [f"d{number}" for number in range(12)]})
    found = dev.choose(data, "dev", 5, 12)
    assert len(found.qrels["q"]) == len(found.documents) == 12


def test_all_chunks_of_an_answer_are_read_and_judged_as_one_document(tmp_path: Path):
    chunks = {units.chunk_id(f"d{number}", start, start + 9): f"text {number} {start}" for number in range(6) for start in (0, 9)}
    data = store(tmp_path, chunks, {"q0": ["d0"], "q1": ["d1"]}, is_chunked=True)
    found = dev.choose(data, "dev", 5, 0)
    assert sorted(found.documents) == ["d0#0-9", "d0#9-18", "d1#0-9", "d1#9-18"]
    assert found.qrels == {"q0": {"d0": 1}, "q1": {"d1": 1}}
    assert found.is_chunked


def test_a_query_whose_answers_are_not_in_the_corpus_is_left_out(tmp_path: Path):
    found = dev.choose(store(tmp_path, corpus_of(3), {"q0": ["gone"], "q1": ["d1"]}), "dev", 5, 3)
    assert list(found.queries) == list(found.qrels) == ["q1"]


def test_a_split_without_an_answer_in_the_corpus_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no query of split 'dev' has a relevant document in the corpus\. Check the qrels"):
        dev.choose(store(tmp_path, corpus_of(3), {"q0": ["gone"]}), "dev", 5, 3)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no split 'test' \(found: dev\)"):
        dev.choose(store(tmp_path, corpus_of(3), {"q0": ["d0"]}), "test", 5, 3)


def measure(base: str, found: DevSet, texts_at_once: int = 512) -> dict[str, float]:
    network: Any = model.load(Path(base), "cpu").eval()
    TrainingForward(network, "float32")

    def embed(tokens: Tokens, _role: Role) -> torch.Tensor:
        with torch.no_grad():
            vectors: torch.Tensor = network(features_of(tokens.ids, tokens.lengths))["sentence_embedding"]
        return vectors

    return DevEvaluator(found, training.make_tokeniser(network, None), embed, DIMS, texts_at_once).measure()


@pytest.mark.parametrize("texts_at_once", [7, 512])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_figure_is_what_brute_force_gives(is_chunked: bool, texts_at_once: int, tiny: str):
    found = small_runs.dev_set(12, 40, is_chunked=is_chunked)
    wanted = small_runs.figures_by_hand(tiny, found, DIMS)
    assert measure(tiny, found, texts_at_once) == pytest.approx(wanted, abs=1e-9)
    assert 0 < wanted["dev_nDCG@10"] < 1


def test_where_scores_are_equal_ids_decide_so_that_a_model_that_has_collapsed_gains_nothing(tiny: str):
    texts_by_id = {f"d{number:02d}": "one text" for number in range(25)}
    for answer, is_found in (("d00", True), ("d09", True), ("d10", False), ("d24", False)):
        turned = dict(sorted(texts_by_id.items(), key=lambda entry: entry[0] != answer))
        figures = measure(tiny, DevSet({"q": "ask"}, turned, {"q": {answer: 1}}))
        assert (figures["dev_nDCG@10"] > 0) == is_found


def test_fewer_documents_than_are_looked_at_are_all_ranked(tiny: str):
    found = small_runs.dev_set(2, 3)
    assert measure(tiny, found) == pytest.approx(small_runs.figures_by_hand(tiny, found, DIMS), abs=1e-9)

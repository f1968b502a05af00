from pathlib import Path

import pyarrow as pa
import pytest

from matryoshka import corpus, pairs
from matryoshka.artifacts import Manifest
from matryoshka.pairs import Dataset, DatasetStore, Pair


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "One", "text": "first"}\n{"_id": "d2", "text": "second"}\n{"_id": "d3", "text": " "}\n'
    )
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "which?"}\n{"_id": "q2", "text": "who?"}\n{"_id": "q3"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq9\td1\t1\nq2\td2\t1\n")
    (folder / "qrels" / "train.tsv").write_text("q2\td2\t1\n")
    return folder


def test_a_beir_folder_gives_all_documents_and_the_judged_queries_of_each_split(tmp_path: Path):
    dataset = pairs.read_beir(write_beir(tmp_path), {}, "salt")
    assert dataset.documents == {"d1": "One first", "d2": "second"}
    assert dataset.queries == {"test": {"q1": "which?", "q2": "who?"}, "train": {"q2": "who?"}}
    assert dataset.qrels == {"test": {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}, "train": {"q2": {"d2": 1}}}
    assert dataset.dropped == {"empty": 1, "empty query": 1}


def test_a_limit_on_a_beir_split_leaves_documents_and_other_splits_alone(tmp_path: Path):
    dataset = pairs.read_beir(write_beir(tmp_path), {"test": 1}, "salt")
    assert (len(dataset.queries["test"]), len(dataset.queries["train"]), len(dataset.documents)) == (1, 1, 2)


BEIR_FAULTS = {
    "corpus.jsonl": (None, r"corpus\.jsonl: cannot be read .*A BEIR folder needs this file"),
    "queries.jsonl": (None, r"queries\.jsonl: cannot be read .*A BEIR folder needs this file"),
    "corpus.jsonl twice": ('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n',
                           r"corpus\.jsonl: id 'a' stands more than once\. Give each its own id"),
    "corpus.jsonl blank": ('{"_id": "a", "text": " "}\n', r"corpus\.jsonl: no text at all\. Check"),
    "corpus.jsonl empty": ("", r"corpus\.jsonl: no text at all\. Check"),
    "queries.jsonl blank": ('{"_id": "q1"}\n', r"queries\.jsonl: no text at all\. Check"),
    "qrels/test.tsv strange": ("q7\td1\t1\n",
                               r"test\.tsv: judges no query of .*queries\.jsonl\. Pass files that belong together"),
    "qrels/test.tsv empty": ("", r"test\.tsv: judges no query"),
    "qrels/test.tsv damaged": ("q1\td1\t1\nq1 d2 1\n", r"test\.tsv: line 2 is not"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BEIR_FAULTS)
def test_every_fault_of_a_beir_folder_is_named(tmp_path: Path, fault: str):
    write_beir(tmp_path)
    content, message = BEIR_FAULTS[fault]
    path = tmp_path / fault.split(maxsplit=1)[0]
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        pairs.read_beir(tmp_path, {}, "salt")


def test_a_beir_folder_without_judgements_is_named(tmp_path: Path):
    for path in (write_beir(tmp_path) / "qrels").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}: no qrels/<split>\.tsv\. A BEIR folder needs"):
        pairs.read_beir(tmp_path, {}, "salt")


NO_TEXT = pa.array([], pa.string())
PAIR_FAULTS = {
    "missing column": ({"query": ["a"], "answer": ["b"]},
                       r"p\.parquet: no column 'positive' \(found: 'query', 'answer'\)\. Pass"),
    "whole numbers": ({"query": ["a"], "positive": [1]}, r"p\.parquet: column 'positive' is int64, not text.*Convert it"),
    "wrong type": ({"query": ["a"], "positive": [["b"]]}, r"p\.parquet: column 'positive' is list.*Convert it"),
    "no rows": ({"query": NO_TEXT, "positive": NO_TEXT}, r": no pairs \(0 rows\)\. Pass files with rows"),
    "null id": ({"query": ["a", "b"], "positive": ["b", "c"], "id": ["x", None]},
                r"p\.parquet: row 1 has no id or no group\. Fill the column, or leave its option out"),
    "null group": ({"query": ["a", "b"], "positive": ["b", "c"], "group": ["x", None]},
                   r"p\.parquet: row 1 has no id or no group\. Fill the column, or leave its option out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_every_fault_of_pair_files_is_named(tmp_path: Path, fault: str):
    columns, message = PAIR_FAULTS[fault]
    corpus.write_rows(tmp_path / "p.parquet", columns)
    optional = ["id" if "id" in columns else None, "group" if "group" in columns else None]
    with pytest.raises(ValueError, match=message):
        pairs.read_pair_files(str(tmp_path), "query", "positive", *optional)


def test_an_id_that_stands_for_two_texts_is_named():
    found = [Pair("one", "a", "x", "d1"), Pair("two", "b", "x", "d1")]
    with pytest.raises(ValueError, match=r"id 'd1' stands for two different texts\. Give each document its own id"):
        pairs.from_pairs(found, {"train": 1.0}, {}, "salt")


def test_pair_files_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere: no Parquet files here\. Pass"):
        pairs.read_pair_files(str(tmp_path / "nowhere"), "query", "positive", None, None)


def test_a_dataset_names_its_splits_when_asked_for_another(tmp_path: Path):
    receipts = tuple(
        pairs.write(tmp_path, Dataset({"d": "x"}, {"dev": {"q": "y"}, "test": {}}, {"dev": {"q": {"d": 1}}, "test": {}}))
    )
    Manifest("dataset", {}, receipts=receipts, is_complete=True).write(tmp_path)
    store = DatasetStore.open(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: no split 'eval' \(found: dev, test\)\. Pass --split"):
        store.queries("eval")
    with pytest.raises(ValueError, match=rf"{tmp_path}: split 'test' is empty\. Pass another --split"):
        store.qrels("test")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no training pairs \(no split 'train'\)\. Prepare data"):
        store.training_pairs()


def test_a_folder_without_dataset_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no dataset here .*Make it first with python -m jobs\.prepare"):
        DatasetStore.open(tmp_path)

from pathlib import Path

import datasets_by_hand as datasets
import pytest
import texts

from matryoshka import corpus, preparation
from matryoshka.cleaning import Rules
from matryoshka.pairs import DatasetStore
from matryoshka.preparation import Finishing
from matryoshka.splits import SplitRule

RULES = Rules(SplitRule("hash", {}, "salt"))


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "One", "text": "first"}\n{"_id": "d2", "text": "second"}\n{"_id": "d3", "text": " "}\n'
    )
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "which?"}\n{"_id": "q2", "text": "who?"}\n{"_id": "q3"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq9\td1\t1\nq2\td2\t1\n")
    (folder / "qrels" / "train.tsv").write_text("q2\td2\t1\nq2\tgone\t2\nq2\td1\t0\n")
    return folder


def prepare(root: Path, rules: Rules = RULES, num_partitions: int = 2) -> DatasetStore:
    return datasets.prepare(preparation.from_beir(root / "beir"), root / "out", rules, num_partitions=num_partitions)


def test_a_beir_folder_gives_all_documents_and_the_judged_queries_of_each_split(tmp_path: Path):
    write_beir(tmp_path / "beir")
    store = prepare(tmp_path)
    documents = corpus.read_texts(corpus.inspect(store.corpus, corpus.Columns()))
    assert dict(zip(*documents, strict=True)) == {"d1": "One first", "d2": "second"}
    queries = {split: dict(zip(*store.queries(split), strict=True)) for split in store.splits}
    assert queries == {"test": {"q1": "which?", "q2": "who?"}, "train": {"q2": "who?"}}
    assert store.qrels("test") == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert store.qrels("train") == {"q2": {"d2": 1, "gone": 2, "d1": 0}}
    assert store.manifest.facts["dropped"] == {
        "empty": 1,
        "empty query": 1,
        "judged document that is not there": 1,
        "judged query that is not there": 1,
    }


def test_training_pairs_are_the_positive_judgements_of_known_documents(tmp_path: Path):
    write_beir(tmp_path / "beir")
    found = datasets.columns_of(prepare(tmp_path).pair_files())
    assert found == {"query_id": ["q2"], "document_id": ["d2"], "query": ["who?"], "positive": ["second"]}


def test_queries_without_text_are_an_error_where_asked_for(tmp_path: Path):
    folder = write_beir(tmp_path / "beir")
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "text": "first"}\n{"_id": "d2", "text": "second"}\n')
    with pytest.raises(ValueError, match=r"prepare: 1 rows have no text\. Fill them, or drop --fail-on-empty"):
        datasets.prepare(preparation.from_beir(folder), tmp_path / "out", RULES, Finishing(fail_on_empty=True))


def test_a_limit_on_a_beir_split_leaves_documents_and_other_splits_alone(tmp_path: Path):
    write_beir(tmp_path / "beir")
    store = prepare(tmp_path, Rules(RULES.splits, {"test": 1}))
    facts = store.manifest.facts
    assert (facts["documents"], facts["queries"]) == (2, {"test": 1, "train": 1})


def test_the_number_of_partitions_does_not_change_a_byte(tmp_path: Path):
    texts.write_beir(tmp_path / "beir", num_pairs=30)
    stores = [prepare(tmp_path, num_partitions=number).manifest.fingerprint for number in (1, 7)]
    assert stores[0] == stores[1]


BEIR_FAULTS = {
    "corpus.jsonl": (None, r"corpus\.jsonl: cannot be read .*A BEIR folder needs this file"),
    "queries.jsonl": (None, r"queries\.jsonl: cannot be read .*A BEIR folder needs this file"),
    "corpus.jsonl twice": ('{"_id": "a", "text": "x"}\n{"_id": "b", "text": "x"}\n{"_id": "a", "text": "y"}\n',
                           r"corpus\.jsonl: line 1 and line 3: id 'a' stands more than once\. Mend or take out"),
    "queries.jsonl twice": ('{"_id": "q1", "text": "x"}\n{"_id": "q1", "text": "y"}\n',
                            r"queries\.jsonl: line 1 and line 2: id 'q1' stands more than once\. Mend"),
    "corpus.jsonl blank": ('{"_id": "a", "text": " "}\n', r"corpus\.jsonl: no text at all\. Check"),
    "corpus.jsonl empty": ("", r"corpus\.jsonl: no text at all\. Check"),
    "queries.jsonl blank": ('{"_id": "q1"}\n', r"queries\.jsonl: no text at all\. Check"),
    "qrels/test.tsv strange": ("q7\td1\t1\n",
                               r"test\.tsv: judges no query of .*queries\.jsonl .*Pass files that belong together"),
    "qrels/test.tsv empty": ("", r"test\.tsv: judges no query"),
    "qrels/test.tsv damaged": ("q1\td1\t1\nq1 d2 1\n", r"test\.tsv: line 2 is not"),
    "qrels/test.tsv contradictory": ("q1\td1\t1\nq2\td1\t0\nq1\td1\t0\n",
                                     r"test\.tsv: line 1 and line 3: document 'd1' answers query 'q1' and does not"),
    "qrels/exam.tsv": ("q1\td1\t1\n", r"exam\.tsv: no split 'exam'\. Name it train\.tsv, dev\.tsv or test\.tsv, or take"),
    "qrels/validation.tsv beside dev.tsv": ("q1\td1\t1\n",
                                            r"validation\.tsv: dev\.tsv has the judgements of split 'dev' too\. Take one out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BEIR_FAULTS)
def test_every_fault_of_a_beir_folder_is_named(tmp_path: Path, fault: str):
    write_beir(tmp_path / "beir")
    content, message = BEIR_FAULTS[fault]
    path = tmp_path / "beir" / fault.split(maxsplit=1)[0]
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    if "beside" in fault:
        (path.parent / fault.rsplit(maxsplit=1)[-1]).write_text(content or "")
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path)


def test_a_beir_folder_without_judgements_is_named(tmp_path: Path):
    for path in (write_beir(tmp_path / "beir") / "qrels").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"beir: no qrels/<split>\.tsv\. A BEIR folder needs"):
        prepare(tmp_path)

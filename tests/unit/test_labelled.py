from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets_by_hand as datasets
import pyarrow as pa
import pytest
import texts

from matryoshka import corpus, positives, preparation
from matryoshka.cleaning import Rules
from matryoshka.labelled import LabelColumns
from matryoshka.pairs import DatasetStore
from matryoshka.preparation import Finishing
from matryoshka.splits import SplitRule

RULES = Rules(SplitRule("column", {}, "salt"))
COLUMNS = LabelColumns("text", "label", split="split")


def prepare(folder: Path, rows: list[tuple[str, str, str]], rules: Rules = RULES, **how: Any) -> DatasetStore:
    path = texts.write_parquet(folder / "in.parquet", dict(zip(("text", "label", "split"), zip(*rows, strict=True), strict=True)))
    return datasets.prepare(preparation.from_labelled([path], COLUMNS, rules), folder / "out", rules, **how)


def messages(num_train: int = 12) -> list[tuple[str, str, str]]:
    train = [(f"message {n}", f"label {n % 3}", "train") for n in range(num_train)]
    return [*train, *((f"question {n}", f"label {n % 3}", "test") for n in range(6))]


def test_documents_are_the_train_messages_and_relevant_are_those_of_the_label(tmp_path: Path):
    store = prepare(tmp_path, messages())
    label_of = {text: label for text, label, _ in messages()}
    documents = dict(zip(*corpus.read_texts(corpus.inspect(store.corpus, corpus.Columns())), strict=True))
    assert sorted(documents.values()) == sorted(text for text, _, split in messages() if split == "train")
    for split in ("train", "test"):
        queries = dict(zip(*store.queries(split), strict=True))
        assert sorted(queries.values()) == sorted(text for text, _, own in messages() if own == split)
    for query, grades in store.qrels("test").items():
        text = dict(zip(*store.queries("test"), strict=True))[query]
        same = {name for name, own in documents.items() if label_of[own] == label_of[text]}
        assert grades == dict.fromkeys(same, 1)
        assert documents.keys().isdisjoint({f"d{query[1:]}"})  # no text is its own answer


def test_nothing_is_judged_for_train_whose_judgements_would_be_the_square_of_its_messages(tmp_path: Path):
    store = prepare(tmp_path, messages())
    assert (store.splits, store.judged_splits) == (("test", "train"), ("test",))
    with pytest.raises(ValueError, match="split 'train' is empty"):
        store.qrels("train")


def test_documents_of_a_label_are_known_for_it_though_their_pairs_leak(tmp_path: Path):
    long = "a message of twelve words that nobody would take for any other"
    rows = [*messages(), (f"{long} one", "label 0", "train"), (f"{long} two", "label 0", "test")]
    store = prepare(tmp_path, rows, finishing=Finishing(None, 0.8))
    pairs = datasets.columns_of(store.pair_files())
    assert f"{long} one" not in [*pairs["query"], *pairs["positive"]]
    documents = dict(zip(*corpus.read_texts(corpus.inspect(store.corpus, corpus.Columns())), strict=True))
    _, known = positives.read(store, [pa.array(list(documents))])
    label_of = {text: label for text, label, _ in rows}
    for label in set(pairs["label"]):
        held = known.holds(positives.hash_labels([label]), positives.hash_texts(documents.values())[None])[0]
        assert held.tolist() == [label_of[text] == label for text in documents.values()]


@pytest.mark.parametrize("pairs_per_text", [1, 2, 9])
def test_every_message_is_a_pair_with_others_of_its_label(tmp_path: Path, pairs_per_text: int):
    rules = Rules(RULES.splits, pairs_per_text=pairs_per_text)
    found = datasets.columns_of(prepare(tmp_path, messages(), rules).pair_files())
    label_of = {text: label for text, label, _ in messages()}
    partners = defaultdict(set)
    for query, positive, label in zip(found["query"], found["positive"], found["label"], strict=True):
        assert label_of[query] == label_of[positive] == label
        assert query != positive
        partners[query].add(positive)
    assert {len(own) for own in partners.values()} == {min(pairs_per_text, 3)}
    assert len(partners) == 12
    assert sorted(found["positive"]) == sorted(found["query"])  # each is as often the one as the other


def test_neither_partitions_nor_the_order_of_tasks_change_a_byte(tmp_path: Path):
    one = prepare(tmp_path / "one", messages(), num_partitions=1)
    assert (
        one.manifest.fingerprint
        == prepare(tmp_path / "two", messages(), num_partitions=5, run=datasets.backwards).manifest.fingerprint
    )


def test_a_text_stands_once_in_the_strongest_split_and_the_rest_is_counted(tmp_path: Path):
    more = [("Message  1", "label 1", "train"), ("message 1", "label 2", "train"), ("question 0", "label 0", "train")]
    store = prepare(tmp_path, [*messages(), *more, (" ", "label 0", "dev")])
    dropped = {"duplicate": 1, "under another label": 1, "in another split": 1, "empty": 1}
    assert store.manifest.facts["dropped"] == dropped
    assert store.manifest.facts["documents"] == 12


def test_a_label_with_a_single_text_is_an_error_that_names_it(tmp_path: Path):
    rows = [*messages(), ("alone", "label 9", "test"), ("ALONE", "label 9", "train")]
    with pytest.raises(ValueError, match=r"in\.parquet: row 18: label 'label 9' has a single text\. Mend or take out"):
        prepare(tmp_path, rows)


def test_a_limit_does_not_make_a_label_single(tmp_path: Path):
    store = prepare(tmp_path, messages(), Rules(RULES.splits, {"train": 6}))
    assert (store.manifest.facts["documents"], store.manifest.facts["dropped"]["over the limit"]) == (6, 6)


def test_a_label_that_stands_alone_in_train_has_a_document_but_no_pair(tmp_path: Path):
    store = prepare(tmp_path, [*messages(), ("one", "label 9", "train"), ("two", "label 9", "test")])
    assert store.manifest.facts["dropped"] == {"alone under its label in train": 1}
    assert (store.manifest.facts["documents"], store.num_pairs) == (13, 12)
    assert "label 9" not in datasets.columns_of(store.pair_files())["label"]


def test_a_label_that_train_lacks_has_no_queries(tmp_path: Path):
    store = prepare(tmp_path, [*messages(), ("one", "label 9", "test"), ("two", "label 9", "test")])
    assert store.manifest.facts["dropped"] == {"no document of its label": 2}
    assert len(store.queries("test")[0]) == 6


def test_a_row_without_label_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"in\.parquet: row 1 has no label, group or split\. Fill the column"):
        prepare(tmp_path, [("a", "x", "train"), ("b", "", "train")])

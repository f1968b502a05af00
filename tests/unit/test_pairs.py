from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import artifacts, corpus, pairs, units
from matryoshka.corpus import Columns
from matryoshka.pairs import Dataset, DatasetStore, Pair

FRACTIONS = {"test": 0.3, "dev": 0.2, "train": 0.5}
word = st.sampled_from(["", " ", "a", "A", "b", " a  b", "a b", "c"])
# A text may stand under two ids, but never two texts under one.
some_pairs = st.lists(
    st.builds(
        lambda query, document, group, copy: Pair(query, document, group, f"{normal(document)} {copy}"),
        word,
        word,
        st.sampled_from("stuvwxyz"),  # of every split
        st.sampled_from("12"),
    ),
    max_size=20,
)


def normal(text: str) -> str:
    return " ".join(text.split())


def distinct_pairs(count: int) -> list[Pair]:
    return [Pair(f"query {n}", f"document {n}", f"group {n % 40}", f"d{n}") for n in range(count)]


def split_of(dataset: Dataset) -> dict[str, str]:
    return {document: split for split, qrels in dataset.qrels.items() for judged in qrels.values() for document in judged}


def write_dataset(folder: Path, dataset: Dataset) -> DatasetStore:
    receipts = tuple(pairs.write(folder, dataset))
    artifacts.Manifest("dataset", {}, facts=dataset.counts, receipts=receipts, is_complete=True).write(folder)
    return DatasetStore.open(folder)


@given(some_pairs, st.booleans())
def test_every_pair_is_kept_or_counted_as_dropped(found: list[Pair], one_to_one: bool):
    dataset = pairs.from_pairs(found, FRACTIONS, {}, "salt", one_to_one=one_to_one)
    judged = [len(documents) for qrels in dataset.qrels.values() for documents in qrels.values()]
    assert sum(judged) + sum(dataset.dropped.values()) == len(found)
    assert all(query.strip() for queries in dataset.queries.values() for query in queries.values())
    assert all(text.strip() for text in dataset.documents.values())


@given(some_pairs, st.integers(0, 3), st.booleans())
def test_every_judgement_is_a_pair_and_no_text_stands_twice(found: list[Pair], limit: int, one_to_one: bool):
    dataset = pairs.from_pairs(found, FRACTIONS, {"train": limit}, "salt", one_to_one=one_to_one)
    known = {(normal(pair.query).casefold(), normal(pair.document)) for pair in found}
    used = set()
    for split, judged in dataset.qrels.items():
        assert list(judged) == list(dataset.queries[split])
        for query, documents in judged.items():
            text = normal(dataset.queries[split][query]).casefold()
            assert {(text, normal(dataset.documents[document])) for document in documents} <= known
            used.update(documents)
    assert used == set(dataset.documents)
    same = [normal(text) for text in dataset.documents.values()]
    assert len(set(same)) == len(same)


@given(some_pairs, st.booleans())
def test_no_query_and_no_document_is_in_two_splits(found: list[Pair], one_to_one: bool):
    dataset = pairs.from_pairs(found, FRACTIONS, {}, "salt", one_to_one=one_to_one)
    queries = [normal(text).casefold() for own in dataset.queries.values() for text in own.values()]
    assert len(set(queries)) == len(queries)
    documents = [{name for judged in qrels.values() for name in judged} for qrels in dataset.qrels.values()]
    assert len(set().union(*documents)) == sum(map(len, documents))


@given(some_pairs)
def test_one_to_one_leaves_each_query_its_document_alone(found: list[Pair]):
    dataset = pairs.from_pairs(found, FRACTIONS, {}, "salt", one_to_one=True)
    judged = [list(documents) for qrels in dataset.qrels.values() for documents in qrels.values()]
    assert all(len(documents) == 1 for documents in judged)
    assert len(judged) == len(dataset.documents)


def test_a_query_keeps_several_documents_and_a_document_several_queries():
    found = [
        Pair("one", "a", "x", "d1"),
        Pair("ONE", "b", "x", "d2"),
        Pair("two", " a ", "x", "d3"),  # the text of d1
        Pair("one ", "a", "x", "d1"),
    ]
    one, two = pairs.text_id("q", "one"), pairs.text_id("q", "two")
    dataset = pairs.from_pairs(found, {"train": 1.0}, {}, "salt")
    assert dataset.documents == {"d1": "a", "d2": "b"}
    assert dataset.queries == {"train": {one: "one", two: "two"}}
    assert dataset.qrels == {"train": {one: {"d1": 1, "d2": 1}, two: {"d1": 1}}}
    assert dataset.dropped == {"duplicate": 1}
    alone = pairs.from_pairs(found, {"train": 1.0}, {}, "salt", one_to_one=True)
    assert alone.qrels == {"train": {one: {"d1": 1}}}
    assert alone.dropped == {"duplicate": 1, "duplicate query": 1, "duplicate document": 1}


def test_pairs_that_would_leak_into_another_split_are_dropped_and_counted():
    groups = {units.choose_split(group, FRACTIONS, "salt"): group for group in "stuvwxyz"}
    assert set(groups) == set(FRACTIONS)
    found = [Pair("one", "a", groups["train"], "d1"), Pair("One", "b", groups["test"], "d2")]
    dataset = pairs.from_pairs([*found, Pair("two", "a", groups["dev"], "d3")], FRACTIONS, {}, "salt")
    assert split_of(dataset) == {"d1": "train"}
    assert dataset.dropped == {"in another split": 2}


def test_a_group_is_never_cut_by_a_split():
    splits = split_of(pairs.from_pairs(distinct_pairs(200), FRACTIONS, {}, "salt"))
    groups = {(f"group {int(document[1:]) % 40}", split) for document, split in splits.items()}
    assert len(groups) == 40
    assert {split for _, split in groups} == set(FRACTIONS)


def test_a_split_does_not_depend_on_other_pairs():
    few, many = (split_of(pairs.from_pairs(distinct_pairs(count), FRACTIONS, {}, "salt")) for count in (100, 200))
    assert few.items() <= many.items()


def test_a_larger_limit_only_adds():
    few, many = (pairs.from_pairs(distinct_pairs(200), FRACTIONS, {"train": limit, "test": 10}, "salt") for limit in (20, 50))
    assert few.queries["train"].items() <= many.queries["train"].items()
    assert (len(few.queries["train"]), len(many.queries["train"])) == (20, 50)
    assert (few.queries["test"], few.queries["dev"]) == (many.queries["test"], many.queries["dev"])
    assert many.dropped["over the limit"] + len(many.documents) == 200


def test_an_id_made_from_text_is_the_same_for_ever():
    # SHA-256 of the empty text begins with e3b0c44298fc1c14.
    assert pairs.text_id("d", "") == "d-e3b0c44298fc1c14"


def test_a_dataset_comes_back_as_it_was_written(tmp_path: Path):
    dataset = pairs.from_pairs(distinct_pairs(60), FRACTIONS, {}, "salt")
    store = write_dataset(tmp_path, dataset)
    for split in FRACTIONS:
        ids, texts = store.queries(split)
        assert dict(zip(ids, texts, strict=True)) == dataset.queries[split]
        assert store.qrels(split) == dataset.qrels[split]
    source = corpus.inspect(store.corpus, Columns())
    assert dict(zip(*corpus.read_texts(source), strict=True)) == dataset.documents
    assert store.corpus_fingerprint == source.fingerprint
    assert artifacts.find_faults(tmp_path, store.manifest) == []


def test_training_pairs_are_the_positive_judgements_of_known_documents(tmp_path: Path):
    dataset = Dataset(
        {"d1": "one", "d2": "two"},
        {"train": {"q1": "first", "q2": "second"}},
        {"train": {"q1": {"d1": 2, "d2": 0, "gone": 1}, "q2": {"d2": 1, "d1": 1}}},
    )
    store = write_dataset(tmp_path, dataset)
    columns = store.training_pairs()
    assert columns["query"] == ["first", "second", "second"]
    assert columns["positive"] == ["one", "two", "one"]
    written = pq.read_table(tmp_path / "pairs" / "train.parquet").to_pydict()
    assert (written["query_id"], written["document_id"]) == (["q1", "q2", "q2"], ["d1", "d2", "d1"])
    assert store.qrels("train") == dataset.qrels["train"]


def test_a_large_corpus_is_written_in_parts(tmp_path: Path):
    documents = {f"d{number}": f"text {number}" for number in range(50_001)}
    store = write_dataset(tmp_path, Dataset(documents, {}, {}))
    source = corpus.inspect(store.corpus, Columns())
    assert [(file.name, file.num_rows) for file in source.files] == [("part-00000.parquet", 50_000), ("part-00001.parquet", 1)]
    assert store.corpus_fingerprint == source.fingerprint


def test_pair_files_are_read_with_ids_and_groups_from_columns_or_text(tmp_path: Path):
    corpus.write_rows(tmp_path / "p.parquet", {"q": ["a", None], "p": ["b", "c"], "id": [1, 2], "g": ["x", "y"]})
    assert pairs.read_pair_files(str(tmp_path), "q", "p", "id", "g") == [Pair("a", "b", "x", "1"), Pair("", "c", "y", "2")]
    first, _ = pairs.read_pair_files(str(tmp_path), "q", "p", None, None)
    assert first == Pair("a", "b", pairs.text_id("d", "b"), pairs.text_id("d", "b"))


def test_one_column_may_serve_as_id_and_as_group(tmp_path: Path):
    corpus.write_rows(tmp_path / "p.parquet", {"query": ["a"], "positive": ["b"], "page": ["x"]})
    assert pairs.read_pair_files(str(tmp_path), "query", "positive", "page", "page") == [Pair("a", "b", "x", "x")]

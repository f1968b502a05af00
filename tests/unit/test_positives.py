from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import pair_rows, write_dataset

from matryoshka import positives
from matryoshka.positives import Documents, Relation, find, hash_ids, hash_labels, hash_queries, hash_texts, mix

words = st.text("abc", min_size=1, max_size=2)

DOCUMENTS = {"d0": "zero", "d1": "one", "d2": "two", "d3": "three", "t1": " one  ", "d4": "four"}


def known_texts(known: Relation, query: str, texts: list[str]) -> set[str]:
    held = known.holds(hash_queries([query]), hash_texts(texts)[None])[0]
    return {text for text, is_held in zip(texts, held, strict=True) if is_held}


@given(st.sets(st.tuples(words, words)), words, st.lists(words, min_size=1))
def test_a_relation_holds_exactly_what_was_put_in(put_in: set[tuple[str, str]], left: str, right: list[str]):
    relation = Relation.of(hash_queries(own for own, _ in put_in), hash_texts(own for _, own in put_in))
    held = relation.holds(hash_queries([left]), hash_texts(right)[None])[0]
    assert held.tolist() == [(left, own) in put_in for own in right]


@given(st.lists(words, unique=True), st.lists(words))
def test_hashes_are_found_where_they_stand(among: list[str], wanted: list[str]):
    hashes = hash_ids(among)
    found = find(hash_ids(wanted), hashes, np.argsort(hashes))
    assert found.tolist() == [among.index(name) if name in among else -1 for name in wanted]


def test_queries_differ_neither_by_case_nor_by_white_space_and_documents_not_by_white_space():
    assert len(set(hash_queries(["Why  so?", " why so? "]).tolist())) == 1
    assert len(set(hash_texts(["Why  so?", "Why so?\n"]).tolist())) == 1
    assert len(set(hash_texts(["Why so?", "why so?"]).tolist())) == 2


def test_kinds_of_text_do_not_share_hashes():
    assert len({int(kind(["a"])[0]) for kind in (hash_ids, hash_labels, hash_queries, hash_texts)}) == 4


def test_mixing_tells_left_from_right():
    left, right = hash_ids(["a"]), hash_ids(["b"])
    assert mix(left, right) != mix(right, left)


def test_what_any_split_judges_relevant_is_known_for_every_query_of_that_text(tmp_path: Path):
    queries = {"train": {"q1": "Why?", "q2": "How?"}, "test": {"q3": "why ? ", "q4": " WHY?"}}
    qrels = {"train": [("q1", "d1", 1), ("q2", "d2", 1)], "test": [("q4", "d3", 2), ("q4", "d4", 0), ("q3", "d0", 1)]}
    pairs = [pair_rows(queries["train"], DOCUMENTS, [("q1", "d1"), ("q2", "d2")])]
    data = write_dataset(tmp_path / "data", DOCUMENTS, queries, qrels, pairs)
    documents, known = positives.read(data, [pa.array(["t1", "d3"]), pa.array(["d0", "d1", "d2", "d4"])])
    assert documents.rows_of(["d0", "t1", "none"]).tolist() == [2, 0, -1]
    np.testing.assert_array_equal(documents.texts, hash_texts(DOCUMENTS[name] for name in ["t1", "d3", "d0", "d1", "d2", "d4"]))
    texts = list(DOCUMENTS.values())
    assert known_texts(known, "Why?", texts) == {"one", " one  ", "three"}  # of 'd4' the grade is 0, and 'why ?' is another text
    assert known_texts(known, "how?", texts) == {"two"}
    assert known_texts(known, "why ?", texts) == {"zero"}


def test_a_pair_makes_its_positive_known_even_where_no_split_judges_it(tmp_path: Path):
    queries = {"train": {"q1": "Why?"}}
    pairs = [pair_rows(queries["train"], DOCUMENTS, [("q1", "d1")]), pair_rows(queries["train"], DOCUMENTS, [("q1", "d4")])]
    data = write_dataset(tmp_path / "data", DOCUMENTS, queries, {"train": [("q1", "d1", 1)]}, pairs)
    _, known = positives.read(data, [pa.array(list(DOCUMENTS))])
    assert known_texts(known, "why?", list(DOCUMENTS.values())) == {"one", " one  ", "four"}


def test_every_chunk_of_a_known_document_is_known_and_so_is_its_copy_elsewhere(tmp_path: Path):
    chunks = {"a#0-3": "head", "a#2-9": "tail", "b#0-3": "head", "b#2-9": "other", "a#b#0-3": "third"}
    queries = {"train": {"q1": "Why?"}, "dev": {"q2": "How?"}}
    qrels = {"train": [("q1", "a", 1)], "dev": [("q2", "a#b", 1)]}
    pairs = [pair_rows(queries["train"], chunks, [("q1", "a#2-9")])]
    data = write_dataset(tmp_path / "data", chunks, queries, qrels, pairs, is_chunked=True)
    _, known = positives.read(data, [pa.array(list(chunks))])
    assert known_texts(known, "why?", list(chunks.values())) == {"head", "tail"}
    assert known_texts(known, "how?", list(chunks.values())) == {"third"}


def test_all_messages_of_a_label_are_known_for_it(tmp_path: Path):
    queries = {"train": {"q1": "one", "q2": "three"}}
    pairs = {**pair_rows(queries["train"], DOCUMENTS, [("q1", "d2"), ("q2", "d4")]), "label": ["low", "high"]}
    data = write_dataset(tmp_path / "data", DOCUMENTS, queries, {"train": []}, [pairs])
    _, known = positives.read(data, [pa.array(list(DOCUMENTS))])
    held = known.holds(hash_labels(["low", "high"]), np.tile(hash_texts(DOCUMENTS.values()), (2, 1)))
    names = np.asarray(list(DOCUMENTS))
    assert [names[own].tolist() for own in held] == [["d1", "d2", "t1"], ["d3", "d4"]]


def test_an_index_of_other_documents_is_refused(tmp_path: Path):
    queries = {"train": {"q1": "Why?"}}
    pairs = [pair_rows(queries["train"], DOCUMENTS, [("q1", "d1")])]
    data = write_dataset(tmp_path / "data", DOCUMENTS, queries, {"train": [("q1", "d1", 1)]}, pairs)
    with pytest.raises(ValueError, match="lacks 1 documents of the index"):
        positives.read(data, [pa.array(["d0", "stranger"])])


def test_hashes_come_back_from_disk_as_they_were(tmp_path: Path):
    documents, known = Documents(hash_ids("ab"), hash_texts("cd")), Relation.of(hash_queries("q"), hash_texts("d"))
    documents.save(tmp_path / "documents.npy")
    known.save(tmp_path / "known.npy")
    assert Documents.open(tmp_path / "documents.npy").rows_of("bax").tolist() == [1, 0, -1]
    assert Relation.open(tmp_path / "known.npy").holds(hash_queries("q"), hash_texts("cd")[None]).tolist() == [[False, True]]

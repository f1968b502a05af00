import json
import random
from pathlib import Path

import datasets_by_hand as datasets
import numpy as np
import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import leaks, preparation
from matryoshka.cleaning import PairColumns, Rules
from matryoshka.leaks import References
from matryoshka.preparation import Finishing
from matryoshka.splits import SplitRule

words = st.lists(st.sampled_from(texts.WORDS[:20]), min_size=3, max_size=40)


@settings(deadline=None)
@given(words, words)
def test_similarity_is_the_share_of_three_word_runs_in_common(left: list[str], right: list[str]):
    runs = [{tuple(own[i : i + 3]) for i in range(len(own) - 2)} for own in (left, right)]
    expected = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    found = leaks.similarity(leaks.shingle("  ".join(left).upper()), leaks.shingle(", ".join(right)))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("how to sort in C++", "how to sort in C#", 2 / 4),
        ("what is C", "what is C++", 0),
        ("\u6211\u4eca\u5929\u5f88\u597d", "\u6211\u4eca\u5929\u5f88\u5fd9", 2 / 4),  # Chinese: five characters, the last differs
        ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0e2a\u0e27\u0e31\u0e2a\u0e14", 3 / 4),  # Thai, with a vowel sign
    ],
)
def test_words_are_what_a_script_and_a_programmer_call_words(left: str, right: str, expected: float):
    assert leaks.similarity(leaks.shingle(left), leaks.shingle(right)) == pytest.approx(expected)


def make_texts(count: int) -> list[str]:
    draw = random.Random(5)
    return [" ".join(draw.choices(texts.WORDS, k=60)) for _ in range(count)]


def near(text: str, num_changed: int) -> str:
    """Changes words at the end; each change but the last costs one run of three."""
    own = text.split()
    return " ".join([*own[: len(own) - num_changed], *(f"other{n}" for n in range(num_changed))])


def load(folder: Path, found: list[tuple[str, str]], threshold: float = 0.9) -> References:
    half = len(found) // 2
    numbered = [(split, number, text) for number, (split, text) in enumerate(found)]
    leaks.save(folder / "a.npz", numbered[:half])
    leaks.save(folder / "b.npz", numbered[half:])
    return References.load(folder, threshold)


def test_near_duplicates_are_found_and_nothing_else(tmp_path: Path):
    known = make_texts(40)
    references = load(tmp_path, [("test" if n % 2 else "dev", text) for n, text in enumerate(known)])
    for number, text in enumerate(known):
        for num_changed in (0, 1, 2):  # Jaccard similarity 1, 57 / 59 and 56 / 60
            assert references.find(near(text, num_changed)) == ("test" if number % 2 else "dev")
        assert references.find(near(text, 4)) is None  # 54 / 62
    assert [references.find(text) for text in ("", "?!", *make_texts(80)[40:])] == [None] * 42


def test_near_duplicates_of_dev_in_test_are_counted(tmp_path: Path):
    known = make_texts(4)
    found = [("dev", known[0]), ("dev", known[1]), ("test", near(known[0], 1)), ("test", known[2]), ("dev", known[0])]
    assert load(tmp_path, found).count_near("dev", "test") == 2


def test_no_texts_give_no_references(tmp_path: Path):
    leaks.save(tmp_path / "a.npz", [])
    assert References.load(tmp_path, 0.9).find("one two three") is None


def test_leaks_leave_the_training_pairs_but_nothing_that_evaluates(tmp_path: Path):
    known = make_texts(8)
    rows = [
        ("test query about this", known[0], "test"),
        ("dev query about that", known[1], "dev"),
        ("train query one", near(known[0], 1), "train"),  # its document is near one of test
        ("Test query: about this!", known[2], "train"),  # its query is near one of test
        ("train query two", near(known[1], 1), "train"),
        ("train query three", known[3], "train"),
    ]
    columns = dict(zip(("query", "positive", "split"), zip(*rows, strict=True), strict=True))
    path = texts.write_parquet(tmp_path / "in.parquet", columns)
    rules = Rules(SplitRule("column", {}, "salt"))
    source = preparation.from_pairs([path], PairColumns("query", "positive", split="split"), rules)
    stores = [
        datasets.prepare(source, tmp_path / str(threshold), rules, Finishing(None, threshold), num_partitions=3)
        for threshold in (None, 0.9)
    ]
    assert [store.num_pairs for store in stores] == [4, 1]
    assert datasets.columns_of(stores[1].pair_files())["query"] == ["train query three"]
    assert stores[1].manifest.facts["near_duplicates"] == {"dev near test": 0, "train near dev": 1, "train near test": 2}
    assert stores[1].manifest.facts["dropped"] == {"near-duplicate of dev or test": 3}
    for split in ("train", "dev", "test"):
        assert stores[0].qrels(split) == stores[1].qrels(split)
    assert stores[0].corpus_fingerprint == stores[1].corpus_fingerprint
    assert np.all([len(store.qrels("train")) == 4 for store in stores])


def test_a_text_is_no_near_duplicate_of_itself_but_of_its_copies(tmp_path: Path):
    known = make_texts(2)
    references = load(tmp_path, [("test", known[0]), ("dev", known[1]), ("dev", near(known[1], 1))])
    assert references.find(known[0], 0) is None
    assert references.find(known[0], 1) == "test"
    assert references.find(known[1], 1) == "dev"


def test_data_with_its_own_splits_keeps_pairs_whose_document_answers_test_too_but_not_its_copies(tmp_path: Path):
    rows = texts.pairs(4)
    beir = texts.write_beir(tmp_path / "beir", num_pairs=4)
    with (beir / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "copy", "title": "", "text": rows["positive"][2]}) + "\n")
    (beir / "qrels" / "train.tsv").write_text("q0\td0\t1\nq1\td2\t1\nq3\tcopy\t1\n")
    (beir / "qrels" / "test.tsv").write_text("q2\td2\t1\n")
    rules = Rules(SplitRule("hash", {}, "salt"))
    store = datasets.prepare(preparation.from_beir(beir), tmp_path / "out", rules, Finishing(None, 0.9))
    assert datasets.columns_of(store.pair_files())["document_id"] == ["d0", "d2"]
    facts = store.manifest.facts
    assert (facts["dropped"], facts["shared"]) == ({"near-duplicate of dev or test": 1}, 1)
    assert facts["near_duplicates"] == {"dev near test": 0, "train near test": 1}
    assert (facts["documents"], len(store.qrels("train"))) == (5, 3)

import math

import numpy as np
import pytest

from matryoshka.lexical import LexicalIndex

TEXTS = ["cats chase mice", "the cat sleeps on a mat", "dogs bark", "a cat and a dog", "the of and"]
STEMS = [["cat", "chase", "mice"], ["cat", "sleep", "mat"], ["dog", "bark"], ["cat", "dog"], []]


def by_hand(query: list[str]) -> list[float]:
    """Lucene's formula: k1 1.5, b 0.75."""
    mean_length = sum(map(len, STEMS)) / len(STEMS)
    scores = []
    for document in STEMS:
        score = 0.0
        for word in query:
            num_with = sum(word in other for other in STEMS)
            idf = math.log(1 + (len(STEMS) - num_with + 0.5) / (num_with + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (0.25 + 0.75 * len(document) / mean_length))
        scores.append(score)
    return scores


def test_scores_are_those_of_the_formula():
    found = LexicalIndex(TEXTS).score(["sleeping cats", "barking dogs dogs"])
    expected = [by_hand(["sleep", "cat"]), by_hand(["bark", "dog", "dog"])]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("query", ["", "the", "zebra", "?!"])
def test_a_query_without_a_known_word_scores_nothing(query: str):
    assert not LexicalIndex(TEXTS).score([query]).any()


def test_documents_without_words_score_nothing():
    assert LexicalIndex(["the", "!"]).score(["cat"]).tolist() == [[0.0, 0.0]]

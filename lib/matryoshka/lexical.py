"""BM25: documents scored by the words that they share with a query. The only room that knows bm25s and its stemmer.

Any model has to be better than this, which needs no training and no vectors.

Source: Robertson et al. 1994, Okapi at TREC-3; Lù 2024, BM25S, arXiv:2407.03618 (scoring as Lucene's, English stop words left
out, Snowball's English stems).
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import Stemmer

NAME = "bm25"

MOST_TEXTS = 1_000_000
"""Of more, no index is made: it takes .55 GB and 16.5 s for every 100,000 texts of 100 words."""

_LANGUAGE = "english"


class LexicalIndex:
    """An index of texts in memory.

    Args:
        texts: Of the documents.

    >>> LexicalIndex(["a cat sleeps", "the dogs bark", "rain"]).score(["sleeping cats", "of"]).argmax(axis=1).tolist()
    [0, 0]
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s  # brings numba and scipy

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs at DEBUG whatever the root says
        self._stemmer: Any = Stemmer.Stemmer(_LANGUAGE)
        self._index: Any = bm25s.BM25(method="lucene")
        self._num_documents = len(texts)
        tokens = self._tokenise(texts)
        self._has_words = any(tokens)
        if self._has_words:
            self._index.index(tokens, show_progress=False)

    def score(self, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        """Returns the score of every document; 0 where it shares no word with the query.

        Shapes: queries [Q] -> [Q, N].
        """
        scores = np.zeros((len(queries), self._num_documents), dtype=np.float32)
        for row, tokens in enumerate(self._tokenise(queries) if self._has_words else ()):
            known = [token for token in tokens if token in self._index.vocab_dict]
            if known:
                scores[row] = self._index.get_scores(known)
        return scores

    def _tokenise(self, texts: Sequence[str]) -> list[list[str]]:
        import bm25s

        tokens: list[list[str]] = bm25s.tokenize(
            list(texts), stopwords=_LANGUAGE, stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return tokens

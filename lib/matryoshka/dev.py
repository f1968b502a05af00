"""Retrieval quality on the dev split while a model is trained: some queries, their documents and others, shared among ranks.

A driver chooses what is looked at; torch is imported by the ranks.
"""

import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from matryoshka import corpus, metrics, units
from matryoshka.corpus import Columns
from matryoshka.nested import shrink
from matryoshka.pairs import DatasetStore
from matryoshka.tokens import Role, Tokeniser, Tokens

if TYPE_CHECKING:
    from torch import Tensor

HEADLINE = "nDCG@10"
DEV = f"dev_{HEADLINE}"

_RELEVANT_PER_QUERY = 10


@dataclass(frozen=True, slots=True)
class DevSet:
    """Queries with judgements, and a pool of documents to find theirs in.

    Attributes:
        queries: Texts by id.
        documents: Texts by id; of chunks, by chunk id.
        qrels: Judgements of documents in the pool.
        is_chunked: Whether ids of documents are those of chunks.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    qrels: metrics.Qrels
    is_chunked: bool = False


def choose(data: DatasetStore, split: str, num_queries: int, num_documents: int) -> DevSet:
    """Returns a part of a split that is the same every night: queries by hash, what answers them, and other documents by hash.

    At most ten documents count as answers of a query. A corpus is read file by file; only what is chosen is kept.

    Raises:
        ValueError: The dataset has no such split, or none of its queries has an answer in the corpus.
    """
    ids, texts = data.queries(split)
    positive = {query: [name for name, grade in own.items() if grade > 0] for query, own in data.qrels(split).items()}
    chosen = units.sample_keys([query for query in ids if positive.get(query)], num_queries, split)
    answers = {name for query in chosen for name in heapq.nsmallest(_RELEVANT_PER_QUERY, positive[query], key=_hash)}
    documents = _read_pool(data, answers, max(num_documents - len(answers), 0))
    pool = {_owner(name, is_chunked=data.is_chunked) for name in documents}
    qrels = {query: {name: 1 for name in positive[query] if name in pool} for query in chosen}
    qrels = {query: own for query, own in qrels.items() if own}
    if not qrels:
        raise ValueError(f"{data.folder}: no query of split '{split}' has a relevant document in the corpus. Check the qrels.")
    by_id = dict(zip(ids, texts, strict=True))
    return DevSet({query: by_id[query] for query in qrels}, documents, qrels, data.is_chunked)


def _read_pool(data: DatasetStore, answers: set[str], num_others: int) -> dict[str, str]:
    """Returns the documents that are answers, and the others of least hash: ids are read first, then the texts of the chosen."""
    found: list[str] = []
    others: list[tuple[int, str]] = []  # a heap: the largest hash first
    _, paths = corpus.find_files(data.corpus)
    for name in corpus.read_ids(paths):
        if _owner(name, is_chunked=data.is_chunked) in answers:
            found.append(name)
        elif len(others) < num_others:
            heapq.heappush(others, (-_hash(name), name))
        elif num_others:
            heapq.heappushpop(others, (-_hash(name), name))
    chosen = [*found, *(name for _, name in sorted(others, reverse=True))]
    texts = corpus.find_texts_in(paths, chosen, Columns())
    return {name: texts[name] for name in chosen}


def _owner(name: str, *, is_chunked: bool) -> str:
    return units.document_of(name) if is_chunked else name


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


class DevEvaluator:
    """Measures a model on a dev set; every rank encodes its share of the texts.

    Args:
        dev: The same on every rank.
        tokeniser: Of the model, at its full window.
        embed: Returns the vectors of some tokenised texts of a role, without gradients.
        dims: The resolutions.
        texts_at_once: How many texts ``embed`` gets in one go.
    """

    def __init__(
        self,
        dev: DevSet,
        tokeniser: Tokeniser,
        embed: "Callable[[Tokens, Role], Tensor]",
        dims: Sequence[int],
        texts_at_once: int = 512,
    ) -> None:
        from torch import distributed

        self._dev, self._embed, self._dims, self._size = dev, embed, tuple(dims), texts_at_once
        is_group = distributed.is_initialized()
        self._rank, self._num_ranks = (distributed.get_rank(), distributed.get_world_size()) if is_group else (0, 1)
        roles: dict[Role, Sequence[str]] = {"query": list(dev.queries.values()), "document": list(dev.documents.values())}
        self._tokens = {role: self._tokenise(tokeniser, texts, role) for role, texts in roles.items()}
        owners = [_owner(name, is_chunked=dev.is_chunked) for name in dev.documents]
        self._names = np.array(sorted(set(owners)), dtype=object)
        place = {name: number for number, name in enumerate(self._names)}
        self._owners = np.array([place[name] for name in owners])

    def _tokenise(self, tokeniser: Tokeniser, texts: Sequence[str], role: Role) -> list[Any]:
        own = texts[self._rank :: self._num_ranks]
        return [tokeniser(own[start : start + self._size], role) for start in range(0, len(own), self._size)]

    def measure(self) -> dict[str, float]:
        """Returns nDCG@10 at each dim (``dev_nDCG@10_64`` and so on) and their mean (``dev_nDCG@10``), the same on every rank."""
        from torch import distributed

        queries, documents = (self._vectors(role) for role in ("query", "document"))
        figures = {f"{DEV}_{dim}": self._measure(queries, documents, dim) for dim in self._dims if not self._rank}
        figures |= {DEV: float(np.mean(list(figures.values())))} if figures else {}
        shared = [figures]
        if self._num_ranks > 1:
            distributed.broadcast_object_list(shared)
        return shared[0]

    def _vectors(self, role: Role) -> npt.NDArray[np.float32]:
        """Returns the vectors of all ranks' texts, in their order.

        Shapes: [N, D].
        """
        from torch import distributed

        own = [self._embed(tokens, role).float().cpu().numpy() for tokens in self._tokens[role]]
        gathered: list[Any] = [own]
        if self._num_ranks > 1:
            gathered = [None] * self._num_ranks
            distributed.all_gather_object(gathered, own)
        width = gathered[0][0].shape[1]
        # A rank without texts has no part at all.
        shares = [np.concatenate([np.empty((0, width), np.float32), *parts]) for parts in gathered]
        vectors = np.empty((sum(map(len, shares)), width), dtype=np.float32)
        for rank, share in enumerate(shares):
            vectors[rank :: self._num_ranks] = share
        return vectors

    def _measure(self, queries: npt.NDArray[np.float32], documents: npt.NDArray[np.float32], dim: int) -> float:
        scores = shrink(queries, dim) @ shrink(documents, dim).T  # [Q, N]
        best = np.full((len(scores), len(self._names)), -np.inf, dtype=np.float32)
        np.maximum.at(best.T, self._owners, scores.T)
        count = min(metrics.SHALLOW, best.shape[1])
        rankings = []
        for row, least in zip(best, np.partition(best, -count, axis=1)[:, -count], strict=True):
            places = np.flatnonzero(row >= least)  # in the order of ids, which decides where scores are equal
            rankings.append(self._names[places[np.argsort(-row[places], kind="stable")[:count]]].tolist())
        return metrics.measure(self._dev.qrels, list(self._dev.queries), rankings)[HEADLINE]

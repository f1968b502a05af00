"""What fine-tuning did to a model: how far each layer moved, how its space lies now, and a map of texts before and after."""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from matryoshka import corpus, geometry, maps, units
from matryoshka.corpus import Columns
from matryoshka.geometry import Points
from matryoshka.maps import Method
from matryoshka.nested import shrink
from matryoshka.pairs import DatasetStore
from matryoshka.weights import EMBEDDINGS, HEAD, Changes, in_order

NAME = "anatomy.json"
BASE, TUNED = "base", "tuned"

FEWEST_DOCUMENTS = geometry.FEWEST_FOR_CKA

_SHOWN_CHARACTERS = 120

Curve = tuple[tuple[int, float], ...]
States = Mapping[str, Points]


@dataclass(frozen=True, slots=True)
class Sample:
    """Texts to look at, chosen by hash.

    Attributes:
        ids: Of the documents.
        documents: Their texts.
        labels: Of the documents; empty where one has none; None where the data has none.
        queries: Of the split, each with a document that answers it.
        positives: The texts of these documents.
        query_labels: Those of the positives.
    """

    ids: tuple[str, ...]
    documents: tuple[str, ...]
    labels: tuple[str, ...] | None
    queries: tuple[str, ...] = ()
    positives: tuple[str, ...] = ()
    query_labels: tuple[str, ...] | None = None

    @classmethod
    def choose(cls, data: DatasetStore, split: str, num_documents: int, num_pairs: int, seed: int) -> Self:
        """Returns a sample of a dataset; of a corpus in chunks, which nobody judged, it has no queries.

        Raises:
            ValueError: The dataset has no such split, or too few documents.
        """
        check_size(data)
        salt = f"anatomy {seed} "
        _, paths = corpus.find_files(data.corpus)
        ids = heapq.nsmallest(num_documents, corpus.read_ids(paths), key=lambda name: units.sample_rank(name, salt))
        pairs = {} if data.is_chunked else _choose_pairs(data, split, num_pairs, salt)
        wanted = {*ids, *pairs.values()}
        texts = corpus.find_texts_in(paths, wanted, Columns())
        pairs = {query: name for query, name in pairs.items() if name in texts}
        labels: dict[str, str] | None = None
        if all(corpus.has_column(path, "label") for path in paths):
            labels = corpus.find_texts_in(paths, wanted, Columns(text="label"))
        return cls(
            tuple(ids),
            tuple(texts[name] for name in ids),
            tuple(labels[name] for name in ids) if labels else None,
            tuple(pairs),
            tuple(texts[name] for name in pairs.values()),
            tuple(labels[name] for name in pairs.values()) if labels else None,
        )


def check_size(data: DatasetStore) -> None:
    """Checks that a dataset has enough documents to look at.

    Raises:
        ValueError: It has not.
    """
    if data.num_documents < FEWEST_DOCUMENTS:
        raise ValueError(
            f"{data.folder}: {data.num_documents} documents are too few to look at. Bring at least {FEWEST_DOCUMENTS}."
        )


def _choose_pairs(data: DatasetStore, split: str, num_pairs: int, salt: str) -> dict[str, str]:
    """Returns texts of queries, each with the id of a document that answers it."""
    ids, texts = data.queries(split)
    qrels = data.qrels(split)
    answers = {name: [own for own, grade in qrels.get(name, {}).items() if grade > 0] for name in ids}
    chosen = units.sample_keys([name for name in ids if answers[name]], num_pairs, salt)
    by_id = dict(zip(ids, texts, strict=True))
    return {by_id[name]: min(answers[name], key=lambda own: units.sample_rank(own, salt + name)) for name in chosen}


@dataclass(frozen=True, slots=True)
class Vectors:
    """What one model makes of a sample.

    Shapes: documents [N, D], queries [Q, D], positives [Q, D].
    """

    documents: Points
    queries: Points
    positives: Points


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of a layer.

    Attributes:
        layer: ``embeddings``, ``layer 0`` and so on, or ``head``: what comes after the layers.
        weight_change: Norm of the difference over the norm before; None where it has no weights.
        cka: How alike what it gives out is before and after (1: the same but for rotation and scale); None: not looked at.
            Unlike its weights' change, this counts what the layers below it did as well.
    """

    layer: str
    weight_change: float | None
    cka: float | None


@dataclass(frozen=True, slots=True)
class Space:
    """How the unit vectors of one model lie.

    Attributes:
        alignment: Mean squared distance of a query and a document that answers it; None where none is judged.
        uniformity: Log of the mean potential of pairs of documents: lower is more evenly spread.
        energy: Share of the variance of documents in each prefix.
        silhouette: How well labels separate documents, in each prefix; None where there are no labels.
        query_silhouette: The same of queries of the split, of which dev and test hold texts that the model was not trained on.
    """

    alignment: float | None
    uniformity: float
    energy: Curve
    silhouette: Curve | None
    query_silhouette: Curve | None


@dataclass(frozen=True, slots=True)
class Map:
    """Where documents lie in two dimensions, before and after.

    Attributes:
        method: How it was drawn.
        ids: Of the documents.
        labels: Of the documents; None where there are none.
        clusters: Numbers of k-means clusters before, to colour by where there are no labels; None where there are.
        texts: Beginnings of the documents.
        before: Places on the map of the base model.
        after: Places on that of the tuned one.
    """

    method: str
    ids: tuple[str, ...]
    labels: tuple[str, ...] | None
    clusters: tuple[int, ...] | None
    texts: tuple[str, ...]
    before: tuple[tuple[float, float], ...]
    after: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Everything that is said of what fine-tuning did to a model."""

    layers: tuple[Layer, ...]
    by_system: Mapping[str, Space]
    map: Map
    remarks: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """What it comes to, in words."""
        found = (_describe_layers(self.layers), _describe_spaces(self.by_system), _describe_clusters(self.by_system))
        return [sentence for sentence in (*found, *self.remarks) if sentence]

    def as_json(self) -> dict[str, Any]:
        """Returns it as a JSON value."""
        return {**dataclasses.asdict(self), "sentences": self.sentences}


def compare_layers(changes: Changes, before: States, after: States) -> tuple[Layer, ...]:
    """Returns what became of each layer, from the lowest to the highest.

    Shapes: of each layer's states [N, D].
    """
    cka = {name: geometry.linear_cka(own, after[name]) for name, own in before.items() if name in after}
    names = in_order(list({**changes.by_layer, **cka}))
    return tuple(Layer(name, _rounded(changes.by_layer.get(name)), _rounded(cka.get(name))) for name in names)


def describe_space(vectors: Vectors, sample: Sample, dims: Sequence[int]) -> Space:
    """Returns how the vectors of one model lie."""
    aligned = geometry.alignment(vectors.queries, vectors.positives) if len(vectors.queries) else None
    return Space(
        _rounded(aligned),
        round(geometry.uniformity(vectors.documents), 4),
        tuple((dim, round(share, 4)) for dim, share in geometry.energy(vectors.documents, dims)),
        _silhouettes(vectors.documents, sample.labels, dims),
        _silhouettes(vectors.queries, sample.query_labels, dims),
    )


def _silhouettes(vectors: Points, labels: Sequence[str] | None, dims: Sequence[int]) -> Curve | None:
    """Returns the silhouette in each prefix, of vectors that have a label."""
    rows = [row for row, label in enumerate(labels or ()) if label]
    if not labels or not rows:
        return None
    own = [labels[row] for row in rows]
    found = [(dim, geometry.silhouette(shrink(vectors[rows], dim), own)) for dim in dims]
    return tuple((dim, round(value, 4)) for dim, value in found if value is not None) or None


def draw_map(sample: Sample, before: Points, after: Points, method: Method, num_clusters: int, seed: int) -> Map:
    """Returns a map of the documents.

    Shapes: before [N, D], after [N, D].
    """
    method = maps.suitable_method(method, len(before))
    first, second = maps.draw(before, after, method, seed)
    clusters = None if sample.labels else tuple(maps.cluster(before, num_clusters, seed).tolist())
    texts = tuple(" ".join(text.split())[:_SHOWN_CHARACTERS] for text in sample.documents)
    return Map(method, sample.ids, sample.labels, clusters, texts, *(_places(own) for own in (first, second)))


def _places(points: Points) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in points)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _describe_layers(layers: Sequence[Layer]) -> str:
    """Returns in one sentence whether the upper layers changed more than the lower ones."""
    inner = [own for own in layers if own.layer not in (EMBEDDINGS, HEAD)]
    lower, upper = inner[: len(inner) // 2], inner[-(len(inner) // 2) :]
    changes = [_mean([own.weight_change for own in half]) for half in (lower, upper)]
    moves = [_mean([None if own.cka is None else 1 - own.cka for own in half]) for half in (lower, upper)]
    parts = [
        *([f"their weights changed by {changes[1]:.2%} against {changes[0]:.2%}"] if None not in changes else []),
        *([f"what they give out moved by {moves[1]:.3f} against {moves[0]:.3f} (1 - CKA)"] if None not in moves else []),
    ]
    if len(inner) < 2 or not parts:
        return ""
    return f"Upper half of the layers against the lower half: {', '.join(parts)}."


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _describe_spaces(spaces: Mapping[str, Space]) -> str:
    before, after = spaces[BASE], spaces[TUNED]
    spread = f"niformity of documents went from {before.uniformity:.2f} to {after.uniformity:.2f} (lower: more evenly spread)."
    if before.alignment is None or after.alignment is None:
        return f"U{spread}"
    figures = f"from {before.alignment:.3f} to {after.alignment:.3f}"
    return f"Alignment of queries with their documents went {figures} (lower: closer), u{spread}"


def _describe_clusters(spaces: Mapping[str, Space]) -> str:
    """Returns in one sentence how well labels are told apart at the narrowest dim, by queries where there are any."""
    names = ("query_silhouette", "silhouette")
    name = next((name for name in names if all(getattr(space, name) for space in spaces.values())), "")
    if not name:
        return ""
    (dim, before), (_, after) = (getattr(spaces[system], name)[-1] for system in (BASE, TUNED))
    texts = "queries" if name == names[0] else "documents"
    return f"Labels separate {texts} with a silhouette of {before:.3f} before and {after:.3f} after, at {dim} dims."

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from small_data import write_dataset

from matryoshka import anatomy, geometry, storage
from matryoshka.anatomy import BASE, TUNED, Anatomy, Layer, Sample, Space, Vectors
from matryoshka.nested import shrink
from matryoshka.pairs import DatasetStore
from matryoshka.weights import Changes

NUM_DOCUMENTS, NUM_QUERIES = 40, 12

Make = Callable[..., DatasetStore]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a dataset whose query ``q<n>`` is answered by documents ``2n`` and ``2n + 1``; every third label is empty."""

    def made(num_documents: int = NUM_DOCUMENTS, **more: Any) -> DatasetStore:
        columns = texts.documents(0, num_documents)
        documents = dict(zip(columns["id"], columns["text"], strict=True))
        queries = {f"q{number}": f"query {number}" for number in range(NUM_QUERIES)}
        judged = [
            (f"q{number}", f"d{2 * number + step:05d}", 1 - step // 2) for number in range(NUM_QUERIES) for step in range(3)
        ]
        return write_dataset(tmp_path / "data", documents, {"test": queries}, {"test": judged}, [], **more)

    return made


def labels_of(num_documents: int = NUM_DOCUMENTS) -> dict[str, str]:
    return {f"d{number:05d}": "" if number % 3 == 0 else f"label {number % 3}" for number in range(num_documents)}


def test_a_sample_is_fixed_by_its_seed_and_a_larger_one_only_adds(make: Make):
    data = make()
    small, again, large = (Sample.choose(data, "test", *sizes, seed=1) for sizes in ((10, 5), (10, 5), (20, 9)))
    assert small == again
    assert large.ids[:10] == small.ids
    assert set(large.queries) > set(small.queries)
    assert Sample.choose(data, "test", 10, 5, seed=2).ids != small.ids


def test_a_sample_holds_texts_of_documents_and_queries_with_what_answers_them(make: Make):
    data = make()
    columns = texts.documents(0, NUM_DOCUMENTS)
    by_id = dict(zip(columns["id"], columns["text"], strict=True))
    sample = Sample.choose(data, "test", 1_000, 1_000, seed=1)
    assert sorted(sample.ids) == columns["id"]
    assert sample.documents == tuple(by_id[name] for name in sample.ids)
    assert sorted(sample.queries) == sorted(f"query {number}" for number in range(NUM_QUERIES))
    for query, positive in zip(sample.queries, sample.positives, strict=True):
        number = int(query.split()[1])
        assert positive in (by_id[f"d{2 * number:05d}"], by_id[f"d{2 * number + 1:05d}"])  # not the one of grade 0
    assert (sample.labels, sample.query_labels) == (None, None)


def test_labels_of_documents_are_those_of_the_queries_that_they_answer(make: Make):
    known = labels_of()
    sample = Sample.choose(make(labels=known), "test", 30, 30, seed=1)
    assert sample.labels == tuple(known[name] for name in sample.ids)
    by_text = dict(zip(texts.documents(0, NUM_DOCUMENTS)["text"], known.values(), strict=True))
    assert sample.query_labels == tuple(by_text[text] for text in sample.positives)


def test_a_corpus_in_chunks_has_no_pairs(make: Make):
    sample = Sample.choose(make(is_chunked=True), "test", 10, 5, seed=1)
    assert (len(sample.ids), sample.queries, sample.positives) == (10, (), ())


def test_too_few_documents_are_refused(make: Make):
    with pytest.raises(ValueError, match=r"data: 3 documents are too few to look at\. Bring at least 4\.$"):
        Sample.choose(make(3), "test", 10, 5, seed=1)


def test_layers_stand_in_order_each_with_what_is_known_of_it():
    states = {name: np.random.default_rng(0).standard_normal((9, 4)) for name in ("embeddings", "layer 0", "layer 1", "head")}
    moved = {**states, "layer 1": np.random.default_rng(1).standard_normal((9, 4))}
    layers = anatomy.compare_layers(Changes({"layer 1": 0.25, "embeddings": 0.0, "layer 0": None}, ()), states, moved)
    assert [layer.layer for layer in layers] == ["embeddings", "layer 0", "layer 1", "head"]
    assert [layer.weight_change for layer in layers] == [0, None, 0.25, None]
    assert [layer.cka for layer in layers] == [1, 1, round(geometry.linear_cka(states["layer 1"], moved["layer 1"]), 5), 1]
    assert [layer.cka for layer in anatomy.compare_layers(Changes({"layer 0": 0.5}, ()), {}, {})] == [None]


def sample_of(labels: tuple[str, ...] | None, num_queries: int = 6) -> Sample:
    names = tuple(f"d{number}" for number in range(40))
    return Sample(names, names, labels, names[:num_queries], names[:num_queries], labels and labels[:num_queries])


def vectors_of(num_queries: int = 6) -> Vectors:
    points = shrink(np.random.default_rng(0).standard_normal((40, 8)), 8).astype(np.float16)
    return Vectors(points, points[:num_queries], points[1 : num_queries + 1])


def test_a_space_is_described_at_every_dim_by_vectors_at_unit_length_there():
    labels = tuple(("a", "b", "", "a")[number % 4] for number in range(40))
    vectors, has_label = vectors_of(), np.array(labels) != ""
    space = anatomy.describe_space(vectors, sample_of(labels), (8, 2))
    assert space.alignment == round(geometry.alignment(vectors.queries, vectors.positives), 5)
    assert space.uniformity == round(geometry.uniformity(vectors.documents), 4)
    assert [dim for dim, _ in space.energy] == [8, 2]
    wanted = geometry.silhouette(shrink(vectors.documents[has_label], 2), [label for label in labels if label])
    assert dict(space.silhouette or ())[2] == round(wanted or 0, 4)
    assert [dim for dim, _ in space.query_silhouette or ()] == [8, 2]


@pytest.mark.parametrize("labels", [None, ("",) * 40, tuple(f"label {number}" for number in range(40))])
def test_without_labels_that_several_texts_have_nothing_is_told_apart(labels: tuple[str, ...] | None):
    space = anatomy.describe_space(vectors_of(0), sample_of(labels, 0), (8, 2))
    assert (space.alignment, space.silhouette, space.query_silhouette) == (None, None, None)


@pytest.mark.parametrize("labels", [None, ("a", "b") * 20])
def test_a_map_has_a_place_and_a_colour_for_every_document(labels: tuple[str, ...] | None):
    sample = dataclasses.replace(sample_of(labels), documents=("a  long\n" + "x" * 200,) * 40)
    points = vectors_of().documents
    drawn = anatomy.draw_map(sample, points, points[::-1], "t-SNE", 3, seed=0)
    assert (drawn.method, drawn.ids, drawn.labels) == ("t-SNE", sample.ids, labels)
    assert set(drawn.texts) == {"a long " + "x" * 113}
    assert {len(drawn.before), len(drawn.after)} == {40}
    assert (drawn.clusters is None) == (labels is not None)
    assert set(drawn.clusters or (0, 1, 2)) == {0, 1, 2}


LAYERS = (
    Layer("embeddings", 0.5, 1.0), Layer("layer 0", 0.01, 0.99), Layer("layer 1", 0.5, 0.5), Layer("layer 2", 0.03, 0.8),
    Layer("head", 0.9, 0.1),
)  # fmt: skip
BEFORE = Space(0.8, -2.0, ((8, 1.0),), ((8, 0.2), (2, 0.1)), ((8, 0.1), (2, 0.05)))
AFTER = Space(0.4, -3.0, ((8, 1.0),), ((8, 0.6), (2, 0.5)), ((8, 0.4), (2, 0.3)))


def anatomy_of(layers: tuple[Layer, ...], before: Space, after: Space, *remarks: str) -> Anatomy:
    points = vectors_of().documents
    return Anatomy(layers, {BASE: before, TUNED: after}, anatomy.draw_map(sample_of(None), points, points, "PCA", 2, 0), remarks)


def test_what_it_comes_to_is_said_in_sentences():
    assert anatomy_of(LAYERS, BEFORE, AFTER, "And more.").sentences == [
        "Upper half of the layers against the lower half: their weights changed by 3.00% against 1.00%, what they give out moved"
        " by 0.200 against 0.010 (1 - CKA).",
        "Alignment of queries with their documents went from 0.800 to 0.400 (lower: closer), uniformity of documents went from"
        " -2.00 to -3.00 (lower: more evenly spread).",
        "Labels separate queries with a silhouette of 0.050 before and 0.300 after, at 2 dims.",
        "And more.",
    ]


def test_what_was_not_measured_is_not_said():
    bare = [dataclasses.replace(own, alignment=None, query_silhouette=None) for own in (AFTER, BEFORE)]
    assert anatomy_of((Layer("layer 0", 0.1, None), Layer("layer 1", 0.2, None)), *bare).sentences == [
        "Upper half of the layers against the lower half: their weights changed by 20.00% against 10.00%.",
        "Uniformity of documents went from -3.00 to -2.00 (lower: more evenly spread).",
        "Labels separate documents with a silhouette of 0.500 before and 0.100 after, at 2 dims.",
    ]
    nothing = [dataclasses.replace(own, silhouette=None) for own in bare]
    assert len(anatomy_of((Layer("layer 0", 0.1, 0.5),), *nothing).sentences) == 1


def test_it_goes_through_json_as_it_is():
    value = anatomy_of(LAYERS, BEFORE, AFTER).as_json()
    assert storage.as_json(value)["layers"][0] == {"layer": "embeddings", "weight_change": 0.5, "cka": 1.0}
    assert storage.as_json(value)["by_system"]["tuned"]["silhouette"] == [[8, 0.6], [2, 0.5]]
    assert set(value) == {"layers", "by_system", "map", "remarks", "sentences"}

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from matryoshka import index
from matryoshka.index import CoarseIndex
from matryoshka.nested import shrink

Make = Callable[..., np.ndarray]


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS knows GPUs")
def test_a_build_without_gpus_says_so(random_vectors: Make):
    with pytest.raises(RuntimeError, match=r"FAISS: this build knows no GPU\. Install the gpu extra, or pass --device cpu"):
        CoarseIndex.build(random_vectors(20, 4).astype(np.float32), "Flat").copy_to_gpu()


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "HNSW16"])
def test_an_index_finds_what_brute_force_finds(random_vectors: Make, factory: str):
    full, queries = shrink(random_vectors(300, 16), 16), shrink(random_vectors(7, 16, 1), 16)
    scores, rows = CoarseIndex.build(full, factory).search(queries, 5)
    expected = np.argsort(-(queries @ full.T), axis=1)[:, :5]
    # Flat is exact; float16 storage and a graph of 300 may each miss a neighbour of nearly the same score.
    assert (rows == expected).mean() >= {"Flat": 1.0, "SQfp16": 0.9, "HNSW16": 0.9}[factory]
    # float32 sums differ in order only; float16 keeps 11 bits of each component.
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ full.T, rows, axis=1), atol=1e-3)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_an_index_comes_back_as_it_was_written(tmp_path: Path, random_vectors: Make):
    full = shrink(random_vectors(50, 8), 8)
    built = CoarseIndex.build(full, "Flat")
    built.write(tmp_path / "coarse.faiss")
    read = CoarseIndex.read(tmp_path / "coarse.faiss")
    assert read.ntotal == 50
    for found, expected in zip(read.search(full[:3], 50), built.search(full[:3], 50), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_lists_that_come_out_short_are_padded(random_vectors: Make):
    full = shrink(random_vectors(2, 8), 8)
    _, rows = CoarseIndex.build(full, "Flat").search(full, 4)
    assert rows[:, 2:].tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize(("factory", "name"), [("IVF8,Flat", "nprobe"), ("PCA4,IVF8,SQ8", "nprobe"), ("HNSW4", "efSearch")])
def test_a_search_leaves_no_parameter_to_the_next(random_vectors: Make, factory: str, name: str):
    full = shrink(random_vectors(600, 8), 8)
    built = CoarseIndex.build(full, factory)
    before = built.search(full[:50], 20)
    wide = built.search(full[:50], 20, {name: 8 if name == "nprobe" else 400})
    assert (wide[1] != before[1]).any()
    for found, expected in zip(built.search(full[:50], 20), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("content", [None, b"", b"not an index at all"])
def test_a_file_that_is_no_index_is_named(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "coarse.faiss").write_bytes(content)
    with pytest.raises(ValueError, match=r"coarse\.faiss: not a FAISS index \(.*\)\. Run python -m jobs\.index"):
        CoarseIndex.read(tmp_path / "coarse.faiss")


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "HNSW32"])
def test_kinds_that_take_vectors_as_they_come_pass_whatever_number_there_is(factory: str, dim: int):
    index.check_factory(factory, dim, 1)
    assert index.is_trained(factory, dim)


@pytest.mark.parametrize(
    ("factory", "needed"), [("IVF16,Flat", 16), ("PQ8", 256), ("PQ32x4fs", 16), ("IVF512,PQ32x4fs", 512), ("RaBitQfs", 1)]
)
def test_kinds_that_learn_pass_where_there_are_documents_enough_to_learn_from(random_vectors: Make, factory: str, needed: int):
    index.check_factory(factory, 64, needed)
    assert not index.is_trained(factory, 64)
    if needed < 256:  # more take seconds
        assert CoarseIndex.train(shrink(random_vectors(needed, 64), 64), factory).ntotal == 0
    if needed > 1:
        with pytest.raises(ValueError, match=rf"--coarse-index {factory}: needs {needed} documents to learn from, and there"):
            index.check_factory(factory, 64, needed - 1)


REFUSED = {
    "IDMap,Flat": r"does not find unit vectors again\. Choose Flat",
    "NSG32": r"(needs training|does not find unit vectors again)\. Choose",
    "Plat": r"not a FAISS factory string for 64 dims\. Write for example Flat",
    "PQ7x4fs": r"not a FAISS factory string for 64 dims",
    "": r"not a FAISS factory string",
    "IVF,Flat": r"not a FAISS factory string",
}


@pytest.mark.parametrize("factory", REFUSED)
def test_kinds_that_cannot_be_built_are_refused(factory: str):
    with pytest.raises(ValueError, match=rf"--coarse-index {factory}: {REFUSED[factory]}"):
        index.check_factory(factory, 64, 1000)


def test_a_sample_that_faiss_cannot_train_on_is_an_error_of_the_user():
    with pytest.raises(ValueError, match=r"--coarse-index IVF16,Flat: cannot be trained on 3 documents .*Choose a smaller one"):
        CoarseIndex.train(np.eye(3, 8, dtype=np.float32), "IVF16,Flat")


BAD_PARAMETERS = [
    ("Flat", "nprobe", ""),
    ("HNSW32", "nprobe", r" \(it has 'efSearch'\)"),
    ("IVF4,Flat", "depth", r" \(it has 'nprobe'\)"),
    ("IVF4_HNSW8,Flat", "quantizer_efSearch", r" \(it has 'nprobe'\)"),  # the next search would find it still set
]


@pytest.mark.parametrize(("factory", "name", "there"), BAD_PARAMETERS)
def test_parameters_that_a_kind_does_not_have_are_named(factory: str, name: str, there: str):
    message = rf"plan: an index of kind {factory} has no parameter '{name}'{there}\. Leave it out"
    with pytest.raises(ValueError, match=message):
        index.check_parameters(factory, 8, {name: 3})


def test_parameters_that_a_kind_has_pass():
    index.check_parameters("IVF4,PQ4x4fs", 8, {"nprobe": 3})
    index.check_parameters("HNSW32", 8, {"efSearch": 30})


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQfp16", "SQ8", "PQ8x4fs", "PQ8x4", "RaBitQ", "RaBitQfs", "HNSW16", "IVF4,Flat", "IVF4,PQ8x4fs",
     "IVF4,RaBitQfs", "PCA8,SQ8"],
)  # fmt: skip
def test_the_bytes_of_a_document_are_those_that_files_grow_by(tmp_path: Path, random_vectors: Make, factory: str):
    full = shrink(random_vectors(1024, 16), 16)
    built, sizes = CoarseIndex.train(full[:300], factory), []
    for _ in range(2):
        built.add(full)
        built.write(tmp_path / "coarse.faiss")
        sizes.append((tmp_path / "coarse.faiss").stat().st_size)
    # Higher levels of a graph are drawn by lot; blocks of fast codes are filled up.
    assert index.bytes_per_document(factory, 16) == pytest.approx((sizes[1] - sizes[0]) / 1024, rel=0.02, abs=0.2)

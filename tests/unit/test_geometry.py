"""Laws of what point clouds say, and brute force beside each short cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score

from matryoshka import geometry
from matryoshka.nested import shrink

seeds = st.integers(0, 2**32 - 1)


def cloud(seed: int, count: int = 40, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width))


def rotation(seed: int, width: int) -> np.ndarray:
    return np.linalg.qr(cloud(seed, width, width))[0]


def kernel_agreement(left: np.ndarray, right: np.ndarray) -> float:
    """The unbiased estimator as it is published: with N x N kernels, and centred by itself."""
    count, ones = len(left), np.ones(len(left))
    kernels = [own @ own.T for own in (left, right)]
    first, second = (kernel - np.diag(np.diag(kernel)) for kernel in kernels)
    sums = (ones @ first @ ones) * (ones @ second @ ones) / ((count - 1) * (count - 2))
    return np.trace(first @ second) + sums - 2 / (count - 2) * (ones @ first @ second @ ones)


@given(seeds, st.floats(0.01, 100), st.floats(-10, 10))
def test_a_cloud_is_like_itself_turned_scaled_and_moved(seed: int, scale: float, shift: float):
    points = cloud(seed)
    assert geometry.linear_cka(points, scale * points @ rotation(seed + 1, 12) + shift) == pytest.approx(1)


@given(seeds)
def test_cka_without_kernels_is_that_with_kernels(seed: int):
    left = cloud(seed) + 1
    right = left @ cloud(seed + 1, 12, 7) + cloud(seed + 2, 40, 7)
    norm = np.sqrt(kernel_agreement(left, left) * kernel_agreement(right, right))
    assert geometry.linear_cka(left, right) == pytest.approx(kernel_agreement(left, right) / norm)
    assert geometry.linear_cka(left, right) == pytest.approx(geometry.linear_cka(right, left))


def test_unrelated_clouds_are_not_alike_even_if_they_are_wide():
    found = [geometry.linear_cka(cloud(seed, 100, 200), cloud(seed + 100, 100, 200)) for seed in range(20)]
    assert np.abs(found).max() < 0.1  # the usual estimator gives 200 / 300
    assert abs(np.mean(found)) < 0.02


def test_a_single_point_many_times_is_like_nothing():
    assert geometry.linear_cka(np.ones((8, 3)), cloud(0, 8)) == 0


def test_cka_of_three_texts_is_refused():
    with pytest.raises(ValueError, match=r"^CKA: 3 texts are too few\. Take at least 4\.$"):
        geometry.linear_cka(cloud(0, 3), cloud(1, 3))


@given(seeds)
def test_pairs_that_are_equal_are_aligned_and_opposite_ones_are_as_far_as_can_be(seed: int):
    vectors = shrink(cloud(seed), 12)
    assert geometry.alignment(vectors, vectors) == 0
    assert geometry.alignment(vectors, -vectors) == pytest.approx(4)


@given(seeds, st.floats(0.01, 0.5))
def test_vectors_that_are_drawn_together_are_less_uniform(seed: int, share: float):
    vectors = shrink(cloud(seed), 12)
    together = shrink(share * vectors + (1 - share) * vectors[0], 12)
    assert geometry.uniformity(vectors) < geometry.uniformity(together) <= 0


def test_uniformity_in_blocks_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry, "_ROWS_AT_ONCE", 30)
    vectors = shrink(cloud(3, 100, 4), 4).astype(np.float64)
    distances = np.square(vectors[:, None] - vectors).sum(axis=2)[~np.eye(len(vectors), dtype=bool)]
    assert geometry.uniformity(vectors) == pytest.approx(np.log(np.exp(-2 * distances).mean()))


@given(seeds)
def test_energy_grows_to_one_at_full_width(seed: int):
    dims, shares = zip(*geometry.energy(cloud(seed), range(1, 13)), strict=True)
    assert dims == tuple(range(1, 13))
    assert list(shares) == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_energy_is_of_what_differs_among_vectors():
    vectors = np.array([[1.0, 9.0, 0.0], [-1.0, 9.0, 0.0]])
    assert geometry.energy(vectors, (3, 1)) == [(3, 1.0), (1, 1.0)]
    assert geometry.energy(np.ones((4, 2)), (2,)) == [(2, 0.0)]


@given(seeds, st.integers(2, 9))
def test_the_silhouette_is_that_of_scikit_learn(seed: int, num_labels: int):
    labels = [f"label {number}" for number in np.random.default_rng(seed).integers(0, num_labels, 40)]
    labels[:2] = "alone", "label 0"
    vectors = shrink(cloud(seed), 12)
    wanted = silhouette_score(vectors, labels, metric="cosine")
    assert geometry.silhouette(vectors, labels) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("labels", [["a", "a", "a"], ["a", "b", "c"], []])
def test_there_is_no_silhouette_without_two_labels_and_two_of_one(labels: list[str]):
    assert geometry.silhouette(np.eye(3)[: len(labels)], labels) is None


def test_equal_vectors_of_different_labels_are_not_told_apart():
    assert geometry.silhouette(np.ones((4, 1)), ["a", "a", "b", "b"]) == 0


@given(seeds)
def test_the_principal_plane_keeps_what_lies_in_a_plane_and_does_not_flip(seed: int):
    flat = cloud(seed, 30, 2) * [3, 1] @ rotation(seed + 1, 12)[:2]
    plane = geometry.principal_plane(flat)
    centred = flat - flat.mean(axis=0)
    np.testing.assert_allclose(plane @ plane.T, centred @ centred.T, atol=1e-9)
    np.testing.assert_allclose(geometry.principal_plane(flat[::-1]), plane[::-1], atol=1e-6)


@given(seeds, st.booleans())
def test_what_was_turned_mirrored_and_moved_is_laid_back(seed: int, is_mirrored: bool):
    points, turn = cloud(seed, 20, 2), rotation(seed + 1, 2)
    turn = turn * [-1, 1] if is_mirrored else turn
    np.testing.assert_allclose(geometry.superimpose(points @ turn + [5, -3], points), points, atol=1e-9)


@given(seeds)
def test_superimposing_brings_points_no_further_and_keeps_their_distances(seed: int):
    points, target = cloud(seed, 20, 2), cloud(seed + 1, 20, 2)
    laid = geometry.superimpose(points, target)
    moved = points - points.mean(axis=0) + target.mean(axis=0)
    assert np.square(laid - target).sum() <= np.square(moved - target).sum() + 1e-9
    inner = [own - own.mean(axis=0) for own in (points, laid)]
    np.testing.assert_allclose(inner[0] @ inner[0].T, inner[1] @ inner[1].T, atol=1e-9)

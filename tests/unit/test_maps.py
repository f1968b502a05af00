from typing import get_args

import numpy as np
import pytest

from matryoshka import maps
from matryoshka.nested import shrink


def groups(num_groups: int = 3, size: int = 12, width: int = 8, seed: int = 0) -> np.ndarray:
    """Returns unit vectors in groups far from each other, one group after the other."""
    centres = np.eye(width)[:num_groups].repeat(size, axis=0)
    return shrink(centres + 0.05 * np.random.default_rng(seed).standard_normal(centres.shape), width)


@pytest.mark.parametrize("method", get_args(maps.Method))
def test_a_map_of_the_same_vectors_lies_where_it_lay_and_comes_out_the_same_again(method: maps.Method):
    vectors = groups()
    first, second = maps.draw(vectors, vectors[:, ::-1], method, seed=3)
    assert first.shape == second.shape == (36, 2)
    np.testing.assert_allclose(first.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(second.mean(axis=0), 0, atol=1e-6)
    again = maps.draw(vectors, vectors[:, ::-1], method, seed=3)
    np.testing.assert_array_equal(again[0], first)
    np.testing.assert_array_equal(again[1], second)
    # The order of the components is no move.
    assert np.square(first - second).sum() < 0.2 * np.square(first).sum()


@pytest.mark.parametrize("method", get_args(maps.Method))
def test_what_lies_together_is_drawn_together(method: maps.Method):
    first, _ = maps.draw(groups(), groups(seed=1), method, seed=3)
    centres = first.reshape(3, 12, 2).mean(axis=1)
    nearest = np.square(first[:, None] - centres).sum(axis=2).argmin(axis=1)
    assert nearest.tolist() == [0] * 12 + [1] * 12 + [2] * 12


def test_a_single_point_many_times_has_a_map():
    first, second = maps.draw(np.ones((40, 4)), np.ones((40, 4)), "t-SNE", seed=0)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()


def test_few_points_are_drawn_by_their_principal_plane():
    assert maps.suitable_method("t-SNE", 29) == maps.suitable_method("PCA", 1_000) == "PCA"
    assert maps.suitable_method("t-SNE", 30) == "t-SNE"


def test_clusters_are_numbered_by_size():
    vectors = np.concatenate([groups(3, 5), groups(1, 9), groups(2, 3)[3:]])  # 14, 5 + 3 and 5
    clusters = maps.cluster(vectors, 3, seed=0)
    assert clusters.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [0] * 9 + [1] * 3


def test_there_are_no_more_clusters_than_vectors():
    assert sorted(maps.cluster(np.eye(3), 12, seed=0).tolist()) == [0, 1, 2]

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.recipe import Recipe, count_steps

RECIPE = Recipe(dims=(8,), num_steps=10, batch_size=2, learning_rate=1e-4)
batches = st.integers(1, 100)


@given(st.integers(0, 5000), batches, st.integers(1, 5))
def test_a_run_takes_whole_batches_of_every_epoch(num_pairs: int, batch_size: int, epochs: int):
    steps = count_steps(num_pairs + batch_size, batch_size, epochs, None)
    assert steps == epochs * ((num_pairs + batch_size) // batch_size)


@given(st.integers(0, 5000), batches, st.floats(0.001, 5), st.integers(1, 50))
def test_a_run_takes_at_least_one_step_and_never_more_than_asked_for(num_pairs: int, batch: int, epochs: float, limit: int):
    steps = count_steps(num_pairs + batch, batch, epochs, limit)
    assert 1 <= steps <= limit
    assert steps == min(count_steps(num_pairs + batch, batch, epochs, None), limit)


def test_an_epoch_of_labelled_pairs_has_the_batches_that_their_labels_fill():
    assert count_steps(100, 10, 2, None, steps_per_epoch=3) == 6


def test_fewer_pairs_than_a_batch_are_refused_with_the_number_that_is_needed():
    with pytest.raises(
        ValueError, match=r"63 training pairs are fewer than one batch of 64\. Bring at least 64 pairs, or pass a sma"
    ):
        count_steps(63, 64, 1, None)


@given(st.integers(1, 500), st.integers(1, 50))
def test_the_dev_split_is_looked_at_before_the_first_step_after_the_last_and_evenly_between(num_steps: int, evaluations: int):
    steps = sorted(dataclasses.replace(RECIPE, num_steps=num_steps, evaluations=evaluations).evaluation_steps)
    assert (steps[0], steps[-1]) == (0, num_steps)
    assert len(steps) == min(evaluations, num_steps) + 1
    gaps = {later - step for step, later in itertools.pairwise(steps)}
    assert max(gaps) - min(gaps) <= 1


def test_without_evaluations_the_dev_split_is_never_looked_at():
    assert RECIPE.evaluation_steps == frozenset()


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_learning_rate_rises_to_its_highest_then_falls_and_is_never_zero_in_a_step(num_steps: int, warmup: float):
    recipe = dataclasses.replace(RECIPE, num_steps=num_steps, warmup=warmup)
    rates = [recipe.rate_at(step) for step in range(num_steps)]
    top = rates.index(max(rates))
    assert max(rates) == 1
    assert min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)

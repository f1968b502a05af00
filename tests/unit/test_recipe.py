import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.recipe import count_steps

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


def test_fewer_pairs_than_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"63 training pairs are fewer than one batch of 64.*pass a smaller --batch-size"):
        count_steps(63, 64, 1, None)

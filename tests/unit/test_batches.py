import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import batches
from matryoshka.batches import BatchPlan

seeds = st.integers(0, 2**31)


def epochs_of(plan: BatchPlan, count: int) -> list[list[np.ndarray]]:
    taken = list(plan.batches(0, count * plan.steps_per_epoch))
    return [taken[start : start + plan.steps_per_epoch] for start in range(0, len(taken), plan.steps_per_epoch)]


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Plans with labels and without, of any size that gives a batch."""
    batch_size = draw(st.integers(1, 6))
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, 8), min_size=batch_size, max_size=10))
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
        return BatchPlan(len(labels), batch_size, draw(seeds), labels)
    return BatchPlan(draw(st.integers(batch_size, 60)), batch_size, draw(seeds))


@given(plans())
def test_an_epoch_takes_whole_batches_and_no_pair_twice(plan: BatchPlan):
    for epoch in epochs_of(plan, 2):
        assert all(batch.shape == (plan.batch_size,) for batch in epoch)
        rows = np.concatenate(epoch)
        assert len(set(rows.tolist())) == len(rows)
        assert rows.min() >= 0
        assert rows.max() < plan.num_pairs


@given(st.integers(1, 8), st.integers(0, 60), seeds)
def test_without_labels_an_epoch_leaves_out_less_than_a_batch(batch_size: int, more: int, seed: int):
    plan = BatchPlan(batch_size + more, batch_size, seed)
    assert plan.num_pairs - plan.steps_per_epoch * batch_size < batch_size


@given(plans(), st.data())
def test_a_run_that_begins_later_sees_what_the_undisturbed_run_sees_from_there(plan: BatchPlan, data: st.DataObject):
    num_steps = data.draw(st.integers(1, 3 * plan.steps_per_epoch + 1))
    first_step = data.draw(st.integers(0, num_steps))
    whole = list(plan.batches(0, num_steps))
    assert len(whole) == num_steps
    np.testing.assert_array_equal(list(plan.batches(first_step, num_steps)), whole[first_step:])


@given(plans())
def test_no_two_pairs_of_a_batch_share_a_label(plan: BatchPlan):
    labels = np.arange(plan.num_pairs) if plan.labels is None else plan.labels
    for batch in plan.batches(0, 2 * plan.steps_per_epoch):
        assert len(set(labels[batch].tolist())) == plan.batch_size


@functools.cache
def most_batches(sizes: tuple[int, ...], batch_size: int) -> int:
    """Tries every choice of labels for a batch, and counts on with what they leave."""
    here = [place for place, size in enumerate(sizes) if size]
    return max(
        (
            1 + most_batches(tuple(sorted(size - (place in chosen) for place, size in enumerate(sizes))), batch_size)
            for chosen in itertools.combinations(here, batch_size)
        ),
        default=0,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_labels_fill_as_many_batches_as_any_way_of_dealing_them_would(batch_size: int):
    for sizes in itertools.product(range(1, 4), repeat=4):
        labels = np.repeat(np.arange(4), sizes)
        assert BatchPlan(len(labels), batch_size, 0, labels).steps_per_epoch == most_batches(sizes, batch_size)


def test_every_epoch_and_every_seed_draws_anew():
    first, second = (np.concatenate(epoch).tolist() for epoch in epochs_of(BatchPlan(64, 8, 1), 2))
    other = np.concatenate(epochs_of(BatchPlan(64, 8, 2), 1)[0]).tolist()
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second
    assert first != other


def test_pairs_that_fill_no_batch_are_refused_with_the_number_that_would():
    with pytest.raises(ValueError, match=r"--batch-size 8: 7 training pairs do not fill one batch\. Bring at least 8 pairs"):
        BatchPlan(7, 8, 0)


def test_fewer_labels_than_a_batch_are_refused_with_their_number():
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"--batch-size 4: the training pairs have 3 labels.*Pass at most 3\."):
        BatchPlan(8, 4, 0, labels)


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_ranks_get_equally_many_pairs_and_every_pair_goes_to_one(num_ranks: int, share: int, data: st.DataObject):
    count = num_ranks * share
    lengths = np.array(data.draw(st.lists(st.integers(1, 512), min_size=count, max_size=count)))
    dealt = batches.deal(lengths, num_ranks)
    assert dealt.shape == (num_ranks, share)
    assert sorted(dealt.ravel().tolist()) == list(range(count))


@given(st.integers(2, 4), st.integers(1, 12), st.data())
def test_no_rank_has_more_tokens_than_another_by_more_than_the_longest_pair(num_ranks: int, share: int, data: st.DataObject):
    lengths = np.array(data.draw(st.lists(st.integers(1, 512), min_size=num_ranks * share, max_size=num_ranks * share)))
    tokens = lengths[batches.deal(lengths, num_ranks)].sum(axis=1)
    assert tokens.max() - tokens.min() <= lengths.max()

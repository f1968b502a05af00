import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.stream import Stream, end_of_step

windows = st.lists(st.integers(1, 20), min_size=1, max_size=12).map(lambda values: np.array(values, dtype=np.int64))


def stream_of(lengths: np.ndarray, *, is_tensor: bool = False) -> tuple[Stream, np.ndarray, list[np.ndarray]]:
    """Returns (stream, order, the ids of each window); no two tokens have the same id."""
    ids = np.arange(lengths.sum(), dtype=np.int32)
    order = np.argsort(-lengths, kind="stable")
    stream = Stream.of(torch.from_numpy(ids) if is_tensor else ids, lengths, order, 2, "cpu")
    return stream, order, np.split(ids, np.cumsum(lengths)[:-1])


@given(windows, st.booleans())
def test_a_stream_holds_the_windows_end_to_end_in_the_order_asked_for(lengths: np.ndarray, is_tensor: bool):
    stream, order, own = stream_of(lengths, is_tensor=is_tensor)
    np.testing.assert_array_equal(stream.ids, np.concatenate([own[number] for number in order]))
    np.testing.assert_array_equal(stream.positions, np.concatenate([np.arange(lengths[number]) + 2 for number in order]))
    np.testing.assert_array_equal(stream.owners, np.repeat(np.arange(len(order)), lengths[order]))
    np.testing.assert_array_equal(stream.bounds, stream.edges)
    np.testing.assert_array_equal(stream.lengths, lengths[order])
    assert stream.bounds.dtype == torch.int32


@given(windows, st.integers(1, 40))
def test_steps_cut_a_stream_into_streams_of_their_own(lengths: np.ndarray, budget: int):
    stream, order, own = stream_of(lengths)
    start = 0
    while start < len(order):
        stop = end_of_step(stream.lengths, start, budget)
        step, chosen = stream.step(start, stop), order[start:stop]
        np.testing.assert_array_equal(step.ids, np.concatenate([own[number] for number in chosen]))
        np.testing.assert_array_equal(step.owners, np.repeat(np.arange(len(chosen)), lengths[chosen]))
        np.testing.assert_array_equal(step.bounds, np.concatenate([[0], np.cumsum(lengths[chosen])]))
        np.testing.assert_array_equal(step.edges, step.bounds)
        start = stop


@given(windows, st.integers(1, 40), st.booleans())
def test_a_step_keeps_to_its_budget_unless_one_window_is_longer_and_takes_all_that_fits(
    lengths: np.ndarray, budget: int, is_padded: bool
):
    ordered = np.sort(lengths)[::-1]

    def cost(start: int, stop: int) -> int:
        return int(ordered[start] * (stop - start) if is_padded else ordered[start:stop].sum())

    start = 0
    while start < len(ordered):
        stop = end_of_step(ordered, start, budget, is_padded=is_padded)
        assert start < stop <= len(ordered)
        assert stop == start + 1 or cost(start, stop) <= budget
        assert stop == len(ordered) or cost(start, stop + 1) > budget
        start = stop

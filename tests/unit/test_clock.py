import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import clock
from matryoshka.clock import PHASES, Clock

_Steps = list[tuple[int, int, str | None]]
_NUM_THREADS = 3

# After so many seconds, a thread leaves the phase that it is in and enters another one, or none.
_steps = st.lists(st.tuples(st.integers(0, 9), st.integers(0, _NUM_THREADS - 1), st.sampled_from([None, *PHASES[:3]])))


class _Time:
    """Stands in for the module time, and passes only when told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@contextlib.contextmanager
def _stopped_time() -> Iterator[_Time]:
    with pytest.MonkeyPatch.context() as patch:
        fake = _Time()
        patch.setattr(clock, "time", fake)
        yield fake


def _play(steps: _Steps, fake: _Time, watch: Clock) -> Iterator[tuple[int, list[str | None]]]:
    """Lets time pass and threads change their phase; yields the seconds of each step and the phases that they were in."""
    inside = [contextlib.ExitStack() for _ in range(_NUM_THREADS)]
    phases: list[str | None] = [None] * _NUM_THREADS
    for seconds, thread, phase in steps:
        fake.now += seconds
        yield seconds, list(phases)
        inside[thread].close()
        phases[thread] = phase
        if phase:
            inside[thread].enter_context(watch.phase(phase))


@given(_steps)
def test_phases_add_up_to_the_time_that_passed(steps: _Steps):
    with _stopped_time() as fake:
        watch = Clock()
        seconds = sum(seconds for seconds, _ in _play(steps, fake, watch))
        taken = watch.take()
    assert list(taken) == list(PHASES)
    assert sum(taken.values()) == seconds


@given(_steps, st.sets(st.integers(0, 9)))
def test_an_instant_belongs_to_the_first_phase_that_any_thread_is_in(steps: _Steps, when_taken: set[int]):
    expected, found = Counter[str](), Counter[str]()
    with _stopped_time() as fake:
        watch = Clock()
        for number, (seconds, phases) in enumerate(_play(steps, fake, watch)):
            expected[next((phase for phase in PHASES if phase in phases), "idle")] += seconds
            if number in when_taken:
                found.update(watch.take())
        found.update(watch.take())
    assert found == expected


def test_what_was_taken_is_not_counted_again():
    with _stopped_time() as fake:
        watch = Clock()
        with watch.phase("compute"):
            fake.now += 5
            assert watch.take() == {"compute": 5, "read": 0, "write": 0, "idle": 0}
            fake.now += 2
        assert watch.take() == {"compute": 2, "read": 0, "write": 0, "idle": 0}
        assert watch.take() == dict.fromkeys(PHASES, 0)


def test_a_phase_ends_where_its_block_fails():
    with _stopped_time() as fake:
        watch = Clock()
        with contextlib.suppress(ValueError), watch.phase("compute"):
            raise ValueError
        fake.now += 3
        assert watch.take()["idle"] == 3


def test_threads_at_once_lose_no_time():
    def work(number: int) -> None:
        for _ in range(200):
            with watch.phase(PHASES[number % 3]):
                time.sleep(0)

    before = time.perf_counter()
    watch = Clock()
    start = time.perf_counter()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    end = time.perf_counter()
    total = sum(watch.take().values())
    assert end - start <= total + 1e-6
    assert total <= time.perf_counter() - before + 1e-6

"""Parts of an index go where memory is."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from jobs.placement import Machine, place

_SIZES = st.lists(st.integers(0, 1_000), max_size=12)
_MACHINES = st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 4)), max_size=6).map(
    lambda found: [Machine(f"m{number}", *own) for number, own in enumerate(found)]
)


@given(_SIZES, _MACHINES)
def test_no_machine_holds_more_parts_than_it_has_slots_and_none_waits_beside_a_free_one(sizes, machines):
    chosen = place(sizes, machines)
    held = Counter(filter(None, chosen))
    assert all(held[own.name] <= own.num_slots for own in machines)
    assert held.total() == min(len(sizes), sum(own.num_slots for own in machines))


@given(_SIZES, _MACHINES)
def test_a_part_that_overfills_a_machine_would_overfill_every_other(sizes, machines):
    chosen = place(sizes, machines)
    left = {own.name: own.num_bytes for own in machines}
    slots = {own.name: own.num_slots for own in machines}
    for number in sorted(range(len(sizes)), key=lambda own: -sizes[own]):
        if name := chosen[number]:
            free = [left[own] for own in left if slots[own]]
            assert left[name] >= sizes[number] or max(free) < sizes[number]
            left[name] -= sizes[number]
            slots[name] -= 1


def test_alike_parts_fill_the_largest_machine_first():
    machines = [Machine("small", 100, 4), Machine("large", 1_000, 4)]
    assert place([100, 100, 100], machines) == ["large"] * 3
    assert place([400, 450, 50], machines) == ["large"] * 3
    assert place([950, 60], machines) == ["large", "small"]

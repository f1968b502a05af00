from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.units import InputFile, assign_shards, choose_split, chunk_id, document_of, plan_units, sample_keys, sample_units

corpora = st.lists(st.integers(0, 300), max_size=5).map(
    lambda counts: [InputFile(f"{number}.parquet", f"{number:064x}"[::-1], count) for number, count in enumerate(counts)]
)
slots = st.lists(st.integers(0, 50), max_size=20).map(
    lambda rows: {f"file-{number // 2}:{number % 2 * 50}": count for number, count in enumerate(rows)}
)
starts = st.sets(st.integers(1, 50), max_size=5).map(lambda found: found | {0})  # every file has a unit that starts at row 0
keys = st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, max_size=30)
FRACTIONS = {"test": 0.2, "dev": 0.1, "train": 0.7}


@given(corpora, st.integers(1, 70))
def test_every_row_is_in_exactly_one_unit(files: list[InputFile], unit_rows: int):
    covered = [(unit.name, row) for unit in plan_units(files, unit_rows) for row in range(unit.start, unit.stop)]
    assert covered == [(file.name, row) for file in files for row in range(file.num_rows)]


@given(corpora, st.integers(1, 70))
def test_no_unit_is_empty_or_above_unit_rows_or_a_small_rest(files: list[InputFile], unit_rows: int):
    units = plan_units(files, unit_rows)
    assert all(0 < unit.num_rows <= unit_rows for unit in units)
    for file in files:
        sizes = [unit.num_rows for unit in units if unit.name == file.name]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


@given(corpora, st.integers(1, 9), st.integers(1, 70))
def test_a_sample_looks_at_no_row_twice_and_at_every_stretch_of_the_corpus(
    files: list[InputFile], num_parts: int, part_rows: int
):
    places, total = sample_units(files, num_parts, part_rows), sum(file.num_rows for file in files)
    firsts, row = {}, 0
    for file in files:
        firsts[file.name], row = row, row + file.num_rows
    looked_at = [firsts[unit.name] + row for unit in places for row in range(unit.start, unit.stop)]
    assert len(set(looked_at)) == len(looked_at)
    assert all(unit.num_rows > 0 for unit in places)
    if total <= num_parts * part_rows:
        assert sorted(looked_at) == list(range(total))
    else:
        stretches = {row * num_parts // total for row in looked_at}
        assert len(places) == num_parts
        assert len(stretches) >= num_parts - 1, "rounding may move a place's first row across an edge"
    assert sample_units(files, num_parts, part_rows) == places


@given(corpora, st.integers(1, 70))
def test_keys_and_slots_are_each_used_once(files: list[InputFile], unit_rows: int):
    units = plan_units(files, unit_rows)
    assert len({unit.key for unit in units}) == len({unit.slot for unit in units}) == len(units)


def test_a_renamed_file_keeps_its_keys_and_a_changed_one_keeps_its_slots():
    (old,), (renamed,), (changed,) = (plan_units([InputFile(*file)], 9) for file in (("a", "0", 9), ("b", "0", 9), ("a", "1", 9)))
    assert renamed.key == old.key
    assert renamed.slot != old.slot
    assert changed.key != old.key
    assert changed.slot == old.slot


@given(slots, st.integers(1, 6))
def test_a_first_build_cuts_the_slots_in_order_into_about_equal_shards(rows: dict[str, int], num_shards: int):
    assigned = assign_shards(rows, num_shards, {})
    assert list(assigned) == list(rows)
    assert list(assigned.values()) == sorted(assigned.values())
    assert set(assigned.values()) == set(range(min(num_shards, len(rows))))
    load = Counter()
    for slot, shard in assigned.items():
        load[shard] += rows[slot]
    assert all(size <= sum(rows.values()) / num_shards + max(rows.values()) for size in load.values())


@given(slots, slots, st.integers(1, 6), st.integers(1, 6))
def test_a_later_build_covers_all_slots_and_leaves_old_ones_where_they_were(
    before: dict[str, int], after: dict[str, int], num_shards: int, num_shards_now: int
):
    after = {**{slot: rows for slot, rows in before.items() if rows % 2}, **{f"new-{slot}": rows for slot, rows in after.items()}}
    previous = assign_shards(before, num_shards, {})
    assigned = assign_shards(after, num_shards_now, previous)
    assert list(assigned) == list(after)
    assert all(assigned[slot] == previous[slot] for slot in after if slot in previous)
    assert all(0 <= shard < max(num_shards, num_shards_now) for shard in assigned.values())


def test_new_files_fill_the_emptiest_shard():
    assigned = assign_shards({"a:0": 9, "b:0": 1, "c:0": 4, "d:0": 5}, 2, {"a:0": 0, "b:0": 1})
    assert assigned == {"a:0": 0, "b:0": 1, "c:0": 1, "d:0": 1}


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "d:0"]), starts, min_size=1),
    starts,
    st.integers(1, 6),
    st.integers(1, 6),
    st.data(),
)
def test_a_file_that_grows_touches_no_shard_but_its_own(
    before: dict[str, set[int]], grown: set[int], num_shards: int, num_shards_now: int, data: st.DataObject
):
    name = data.draw(st.sampled_from(sorted(before)))
    old, new = (
        {f"{file}:{start}": start + 1 for file, own in files.items() for start in sorted(own)}
        for files in (before, {**before, name: grown})
    )
    previous = assign_shards(old, num_shards, {})
    assigned = assign_shards(new, num_shards_now, previous)
    touched = {previous[slot] for slot in old if slot.rpartition(":")[0] == name}
    for shard in {*previous.values(), *assigned.values()} - touched:
        assert {slot for slot in new if assigned[slot] == shard} == {slot for slot in old if previous[slot] == shard}


@given(st.text(st.characters(codec="utf-8")), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_first_split_only_gains_keys(key: str, share: float, more: float):
    if choose_split(key, {"test": share, "train": 1 - share}, "salt") == "test":
        assert choose_split(key, {"test": share + more, "train": 1 - share - more}, "salt") == "test"


def test_splits_are_fixed_for_ever():
    # Another outcome would move documents of existing datasets from train to test.
    splits = {name: choose_split(name, FRACTIONS, "matryoshka") for name in ("numpy", "ray", "json", "torch")}
    assert splits == {"numpy": "train", "ray": "train", "json": "test", "torch": "train"}


def test_splits_have_about_their_share_of_the_keys():
    counts = Counter(choose_split(f"key-{number}", FRACTIONS, "salt") for number in range(4000))
    # Three standard deviations of a binomial share of 4000 keys are at most 0.022.
    assert all(abs(counts[split] / 4000 - share) < 0.022 for split, share in FRACTIONS.items())


@given(keys, st.integers(0, 30), st.integers(0, 30))
def test_a_larger_limit_only_adds(names: list[str], limit: int, more: int):
    few, many = sample_keys(names, limit, "salt"), sample_keys(names, limit + more, "salt")
    assert few == [name for name in many if name in set(few)]
    assert len(few) == min(limit, len(names))


@given(keys, st.integers(0, 30))
def test_a_sample_keeps_the_order_and_does_not_depend_on_it(names: list[str], limit: int):
    sample = sample_keys(names, limit, "salt")
    assert sample == [name for name in names if name in set(sample)]
    assert set(sample_keys(names[::-1], limit, "salt")) == set(sample)


@given(st.text(), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_chunk_leads_back_to_its_document_whatever_its_id_holds(document: str, start: int, end: int):
    assert document_of(chunk_id(document, start, end)) == document


@pytest.mark.parametrize("name", ["", "plain", "a#b", "a#1", "a#-2", "a#1-", "a#1-2-3", "1-2", "a#1-2#x"])
def test_what_is_not_the_id_of_a_chunk_is_refused(name: str):
    with pytest.raises(ValueError, match="not the id of a chunk"):
        document_of(name)

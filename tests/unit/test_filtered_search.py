"""A search that is restricted by a condition finds what it would find if there were no other documents."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import funnel
from matryoshka.funnel import Searcher, Shard, call_locally
from matryoshka.index import CoarseIndex
from matryoshka.nested import FunnelPlan, shrink
from matryoshka.products import StoredVectors
from matryoshka.spaces import Space

WIDTH = 12
WHERE = "kind = 'a' AND NOT year < 2"
Case = tuple[np.ndarray, list[str], pa.RecordBatch, np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Documents of a few different vectors, so that many are equal; ids in no order; their columns; queries."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 60))
    pool = shrink(rng.standard_normal((draw(st.integers(1, 12)), WIDTH)), WIDTH).astype(np.float16)
    full = pool[rng.integers(0, len(pool), count)]
    years = [None if year == 5 else int(year) for year in rng.integers(0, 6, count)]
    kinds = pa.array(rng.choice(["a", "b"], count, p=[0.7, 0.3]).tolist(), pa.large_string()).dictionary_encode()
    ids = [f"d{number}" for number in rng.permutation(count)]
    return full, ids, pa.record_batch({"kind": kinds, "year": pa.array(years, pa.int64())}), rng.standard_normal((3, WIDTH))


def holds(columns: pa.RecordBatch) -> list[int]:
    """Returns the rows for which the condition holds."""
    found = enumerate(zip(*(column.to_pylist() for column in columns.columns), strict=True))
    return [row for row, (kind, year) in found if kind == "a" and year is not None and year >= 2]


def search(
    case: Case, cuts: Sequence[int], removed: Sequence[int], plan: FunnelPlan, where: str | None, k: int
) -> list[list[str]]:
    full, ids, columns, queries = case
    edges = sorted({0, len(full), *(cut for cut in cuts if cut < len(full))})
    shards, names = [], []
    for start, stop in pairwise(edges):
        coarse = CoarseIndex.build(shrink(full[start:stop], 4), "Flat")
        gone = np.array([row - start for row in removed if start <= row < stop], dtype=np.int64)
        shards.append(Shard(full[start:stop], coarse, gone, columns=columns.slice(start, stop - start)))
        names.append(pa.array(ids[start:stop]))
    return Searcher(call_locally(shards), names, plan, Space("prefix", 4)).search(queries, k, where).ids.tolist()


def brute_force(case: Case, rows: Sequence[int], k: int) -> list[list[str]]:
    full, ids, _, queries = case
    units = full.astype(np.float64) / np.linalg.norm(full.astype(np.float64), axis=1, keepdims=True)
    # Equal vectors score equally, but for the order of their sums; different ones differ by far more than 1e-9.
    scores = (queries @ units.T).round(9)
    return [[ids[row] for row in sorted(rows, key=lambda row, own=own: (-own[row], ids[row]))[:k]] for own in scores]


cut_lists = st.lists(st.integers(1, 59), max_size=4)
removals = st.sets(st.integers(0, 59), max_size=20)


@given(cases(), cut_lists, removals, st.integers(1, 20), st.sampled_from([["12:4"], ["4:2", "12:2"], ["3:1000", "12:4"]]))
@settings(max_examples=100)
def test_few_documents_are_found_as_by_brute_force_whatever_the_plan_and_the_shards(
    case: Case, cuts: list[int], removed: set[int], k: int, parts: list[str]
):
    gone = sorted(row for row in removed if row < len(case[0]))
    expected = brute_force(case, sorted(set(holds(case[2])) - set(gone)), k)
    found = search(case, cuts, gone, FunnelPlan.parse(parts), WHERE, k)
    assert [[name for name in own if name] for own in found] == expected


plans = st.sampled_from([["12:4"], ["4:6", "12:3"], ["3:10", "6:5", "12:2"], ["4:5"]])


@given(cases(), cut_lists, removals, st.integers(1, 20), plans)
@settings(max_examples=100)
def test_a_plan_finds_among_many_what_it_finds_where_the_others_are_not_there(
    case: Case, cuts: list[int], removed: set[int], k: int, parts: list[str]
):
    gone = sorted(row for row in removed if row < len(case[0]))
    left = sorted(set(holds(case[2])) - set(gone))
    with pytest.MonkeyPatch.context() as patch:  # as it is where there are millions
        patch.setattr(funnel, "_FEW_DOCUMENTS", 0)
        patch.setattr(funnel, "_FEW_SHARE", 0.0)
        found = search(case, cuts, gone, FunnelPlan.parse(parts), WHERE, k)
    full, ids, columns, queries = case
    if not left:
        assert not any(map(any, found))
        return
    alone = full[left], [ids[row] for row in left], columns.take(pa.array(left)), queries
    assert found == search(alone, [], [], FunnelPlan.parse(parts), None, k)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.int8, np.uint16]), st.integers(1, 20), st.integers(1, WIDTH))
@settings(max_examples=50)
def test_chosen_rows_alone_give_what_all_rows_give_of_which_only_these_are_allowed(
    seed: int, dtype: type, num_kept: int, dim: int
):
    rng = np.random.default_rng(seed)
    pool = shrink(rng.standard_normal((9, WIDTH)), WIDTH)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    stored = {np.float16: pool.astype(np.float16), np.int8: np.rint(100 * pool).astype(np.int8), np.uint16: bits}[dtype]
    vectors = StoredVectors(stored[rng.integers(0, 9, 400)])
    allowed, queries = rng.random(400) < 0.3, rng.standard_normal((5, dim)).astype(np.float32)
    whole = vectors.best(queries, num_kept, allowed)
    alone = vectors.best_of(queries, num_kept, np.flatnonzero(allowed))
    pairs = [[sorted(zip(*own, strict=True)) for own in zip(*found, strict=True)] for found in (whole, alone)]
    strip = [[[pair for pair in own if pair[1] >= 0] for own in lists] for lists in pairs]
    assert strip[0] == strip[1]


def test_a_condition_that_nothing_fulfils_finds_nothing():
    full = np.eye(5, WIDTH, dtype=np.float16)
    case = full, list("abcde"), pa.record_batch({"kind": ["b"] * 5, "year": [1] * 5}), full.astype(np.float64)
    for parts in (["12:4"], ["4:3", "12:2"], ["4:3"]):
        assert search(case, [2], [], FunnelPlan.parse(parts), WHERE, 3) == [[]] * 5


def test_shards_without_columns_refuse_every_condition():
    shards = call_locally([Shard(np.eye(3, 8, dtype=np.float16))])
    with pytest.raises(ValueError, match=r"^--where: no column 'kind' \(the index keeps none\)"):
        Searcher(shards, [pa.array(["a", "b", "c"])], FunnelPlan.parse(["8:2"])).search(np.ones((1, 8)), 1, "kind = 'a'")

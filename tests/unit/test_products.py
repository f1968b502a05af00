from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import kernels, products, scans, topk
from matryoshka.nested import shrink
from matryoshka.products import CoarseVectors, StoredVectors
from matryoshka.scans import CpuScan, GpuScan

_SMALL = products._Parts(segment=1_024, rounded=768, widened=100, pairs=7)


@pytest.fixture(params=[torch.bfloat16, torch.float32], autouse=True)
def small_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a few thousand documents go through every loop more than once."""
    monkeypatch.setitem(products._PARTS, "cpu", _SMALL)
    for name, size in (("_QUERIES", 3), ("_SCORES", 3 * 128), ("_MOST_COLUMNS", 256)):
        monkeypatch.setattr(scans, name, {"cpu": size, "cuda": size})
    monkeypatch.setattr(scans, "scan_dtype", lambda _device: request.param)
    monkeypatch.setattr(products, "_LEAST_PAIRS", 16)
    monkeypatch.setattr(products, "_FEW", {"plain": 0, "rounded": 0})


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
    """Stored vectors of which many are equal or nearly so, queries that may dislike them all, how many to keep, and a mask."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_documents, width = draw(st.sampled_from([1, 5, 255, 256, 257, 700, 2_600])), draw(st.sampled_from([3, 8, 33]))
    middle = draw(st.sampled_from([0.0, 2.0])) * rng.standard_normal(width)
    pool = middle + rng.standard_normal((draw(st.sampled_from([2, 40, 3_000])), width))
    full = pool[rng.integers(0, len(pool), num_documents)]
    kind = draw(st.sampled_from(["float16", "int8", "coarse"]))
    queries = rng.standard_normal((draw(st.integers(1, 8)), width)).astype(np.float32)
    if draw(st.booleans()):
        queries = -np.abs(middle).astype(np.float32) + 0.1 * queries
    allowed = rng.random(num_documents) < draw(st.sampled_from([0.0, 0.01, 0.7])) if draw(st.booleans()) else None
    return stored_as(kind, full), queries, draw(st.sampled_from([1, 4, 30, 400])), allowed


def stored_as(kind: str, full: np.ndarray) -> np.ndarray:
    if kind == "coarse":
        collected = CoarseVectors()
        collected.add(full.astype(np.float32))
        return collected._parts[0]
    unit = shrink(full, full.shape[1])
    return unit.astype(np.float16) if kind == "float16" else np.rint(127 * unit).astype(np.int8)


def expected_scores(stored: np.ndarray, queries: np.ndarray) -> np.ndarray:
    if stored.dtype == np.uint16:
        documents = (stored.astype(np.uint32) << 16).view(np.float32)
        rounded = torch.from_numpy(queries).bfloat16().double().numpy()
        return rounded @ documents.T.astype(np.float64)
    return queries.astype(np.float64) @ shrink(stored, stored.shape[1]).T.astype(np.float64)


def as_sets(lists: tuple[np.ndarray, np.ndarray]) -> list[set[tuple[float, int]]]:
    scores, rows = lists
    return [
        set(zip(own[there := line >= 0].tolist(), line[there].tolist(), strict=True))
        for own, line in zip(scores, rows, strict=True)
    ]


@given(cases())
@settings(max_examples=80)
def test_a_scan_finds_what_brute_force_finds_and_everything_that_ties(
    case: tuple[np.ndarray, np.ndarray, int, np.ndarray | None],
):
    stored, queries, num_kept, allowed = case
    scores, rows = StoredVectors(stored).best(queries, num_kept, allowed)
    truth = expected_scores(stored, queries)
    truth[:, ~allowed if allowed is not None else []] = -np.inf
    num_there = len(stored) if allowed is None else int(allowed.sum())
    for own, own_scores, true in zip(rows, scores, truth, strict=True):
        found = own[own >= 0]
        assert len(set(found)) == len(found) >= min(num_kept, num_there)
        np.testing.assert_allclose(own_scores[own >= 0], true[found], atol=1e-4)  # sums of float32
        assert np.isneginf(own_scores[own < 0]).all()
        if num_there:
            last = -np.sort(-true)[min(num_kept, num_there) - 1]
            assert set(np.flatnonzero(true > last + 1e-4)) <= set(found)
            assert (true[found] >= last - 1e-4).all()


@given(cases(), st.integers(1, 3))
@settings(max_examples=30)
def test_a_prefix_is_scanned_as_if_nothing_else_were_stored(
    case: tuple[np.ndarray, np.ndarray, int, np.ndarray | None], dim: int
):
    stored, queries, num_kept, _ = case
    if stored.dtype == np.uint16:
        stored = stored_as("float16", np.random.default_rng(0).standard_normal(stored.shape))
    found = StoredVectors(stored).best(queries[:, :dim], num_kept)
    alone = StoredVectors(np.ascontiguousarray(stored[:, :dim])).best(queries[:, :dim], num_kept)
    for own, other in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.sort(own, axis=1), np.sort(other, axis=1))


@given(cases())
@settings(max_examples=30)
def test_only_what_is_chosen_is_found_if_it_is_gathered_first(case: tuple[np.ndarray, np.ndarray, int, np.ndarray | None]):
    stored, queries, num_kept, allowed = case
    chosen = np.arange(len(stored)) if allowed is None else np.flatnonzero(allowed)
    vectors = StoredVectors(stored)
    assert as_sets(vectors.best_of(queries, num_kept, chosen)) == as_sets(vectors.best(queries, num_kept, allowed))


def test_rounding_to_bf16_hides_no_best_document(monkeypatch: pytest.MonkeyPatch):
    # Components just above the middle of two bf16 numbers: rounding moves each product the same way, as far as it can.
    monkeypatch.setattr(scans, "scan_dtype", lambda _device: torch.bfloat16)
    above = 1 + 2.0**-10
    full = np.zeros((512, 256), np.float16)
    full[0, :97], full[0, 97:194], full[0, 194:254], full[0, 254] = 1, -above, 1, 0.3
    full[300, :97], full[300, 97:254] = -1, above
    query = np.zeros((1, 256), np.float32)
    query[0, :97], query[0, 97:194], query[0, 194:254], query[0, 254] = 1, above, 1, 1.5
    query /= np.sqrt(np.float32(254.25))
    truth = expected_scores(full, query)
    assert StoredVectors(full).best(query, 1)[1].tolist() == [[int(truth.argmax())]]


def test_searching_leaves_torch_its_threads_everywhere_else(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(scans, "_start_threads", scans._start_threads.__wrapped__)
    with scans._threads() as pool, ThreadPoolExecutor(1) as others:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert others.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


@given(cases())
@settings(max_examples=40)
def test_few_queries_find_what_many_find(case: tuple[np.ndarray, np.ndarray, int, np.ndarray | None]):
    stored, queries, num_kept, allowed = case
    vectors = StoredVectors(stored)
    compared, is_scaled = vectors.as_compared(queries), stored.dtype != np.uint16
    few = scans.compare_few(compared, vectors.bits, num_kept, allowed, is_scaled=is_scaled)
    assert as_sets(few) == as_sets(vectors.best(queries, num_kept, allowed))


@given(cases())
@settings(max_examples=40)
def test_torch_alone_notes_what_the_compiled_loops_find(case: tuple[np.ndarray, np.ndarray, int, np.ndarray | None]):
    # What a GPU runs, on the CPU.
    stored, queries, num_kept, allowed = case
    vectors = StoredVectors(stored)
    compared = torch.from_numpy(vectors.as_compared(queries))
    is_rounded = stored.dtype != np.uint16
    moved = scans.most_moved(queries.shape[1], vectors._longest, scans.scan_dtype("cuda"), is_rounded=is_rounded)
    scan = GpuScan(compared, num_kept, moved)
    room = torch.empty(len(stored), queries.shape[1], dtype=scans.scan_dtype("cuda"))
    for start in range(0, len(stored), 1_000):
        part = slice(start, min(start + 1_000, len(stored)))
        scan.look_through(vectors._block(part, room), start, None if allowed is None else allowed[part])
    lists = [vectors._finish(queries[part], numbers, rows, num_kept) for part, numbers, rows in scan.noted()]
    assert as_sets(topk.pad(lists)) == as_sets(vectors.best(queries, num_kept, allowed))


def test_queries_wider_than_the_vectors_are_refused():
    vectors = StoredVectors(np.ones((3, 4), np.float16))
    with pytest.raises(ValueError, match=r"queries of 8 dims: vectors have 4\. Cut the queries"):
        vectors.score(np.ones((1, 8), np.float32), np.array([0]), np.array([2]))


def test_bars_rise_where_all_scores_are_negative():
    rng = np.random.default_rng(0)
    full = -np.abs(rng.standard_normal((2_600, 8))).astype(np.float16)
    queries = np.abs(rng.standard_normal((3, 8))).astype(np.float32)
    vectors = StoredVectors(full)
    scan = CpuScan(queries, 10, scans.most_moved(8, 1.0, scans.scan_dtype("cpu"), is_rounded=True))
    scan.look_through(vectors._block(slice(0, len(full)), torch.empty(len(full), 8, dtype=scans.scan_dtype("cpu"))), 0, None)
    assert max(int(lot.counts.max()) for lot in scan._lots) < 200


def test_numbers_are_widened_as_numpy_does():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    stored = np.where(np.isfinite(every), every, 0).astype(np.float16)[:, None]
    one = np.ones((1, 1), np.float32)
    rows = np.arange(len(stored))
    found = np.empty(len(stored), np.float32)
    kernels.score_pairs(one, StoredVectors(stored).bits, False, np.zeros_like(rows), rows, found)
    np.testing.assert_array_equal(found, stored[:, 0].astype(np.float32))


def test_long_lists_are_not_made_of_everything():
    rng = np.random.default_rng(0)
    full, queries = rng.standard_normal((2_600, 8)).astype(np.float16), rng.standard_normal((3, 8)).astype(np.float32)
    vectors = StoredVectors(full)
    scan = CpuScan(queries, 40, scans.most_moved(8, 1.0, scans.scan_dtype("cpu"), is_rounded=True))
    room = torch.empty(len(full), 8, dtype=scans.scan_dtype("cpu"))
    scan.look_through(vectors._block(slice(0, len(full)), room), 0, None)
    assert sum(int(lot.counts.sum()) for lot in scan._lots) < 3 * 200


def test_a_product_takes_some_time():
    assert products.time_products(np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)) > 0

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import estimates
from matryoshka.estimates import Driver, Interval, Means, Pace, Part, Shards, Size
from matryoshka.units import InputFile, plan_units

PACE = Pace(100.0, "given", connect_seconds=3.0, calibrate_seconds=2.0, load_seconds=5.0)
SHARDS = Shards(num_shards=4, coarse_bytes=128.0, vector_bytes=768.0, id_bytes=16.0)
MEANS = Means(num_workers=3, workers_per_node=2, node_memory_bytes=64e9, within_seconds=3_600.0)

counts = st.integers(1, 10**9)
workers = st.integers(1, 10_000)


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def size_of(tokens: float, num_units: int, num_rows: int | None = None) -> Size:
    rows = num_rows or num_units * 100
    return Size(rows, rows * 60.0, num_units, rows, exactly(rows), exactly(tokens), long_share=0.0)


def test_of_all_rows_a_sample_is_exact():
    parts = [Part(4, 3, 30, num_long=1), Part(6, 6, 90)]
    size = estimates.size_up(parts, num_rows=10, num_bytes=600, num_units=2)
    assert size == Size(10, 600, 2, 10, exactly(9.0), exactly(120.0), long_share=1 / 9)
    assert size.num_empty == 1.0


def test_a_sample_stands_for_the_rest_with_an_interval_as_computed_by_hand():
    parts = [(10, 90.0), (10, 110.0), (10, 90.0), (10, 110.0)]
    found = estimates.estimate_total(parts, num_rows=400)
    # 10 a row; deviations of 10 each; 3 degrees of freedom, whose quantile is 3.18; a tenth of the rows is known.
    error = math.sqrt(4 * 100 * 4 / 3 * (1 - 40 / 400)) / 40
    assert found.value == 4_000.0
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert found.high - found.value == pytest.approx(3.18 * error * 400, rel=0.01)


@pytest.mark.parametrize(("degrees", "quantile"), [(2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (31, 2.040), (1_000, 1.962)])
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float):
    assert estimates._student(degrees) == pytest.approx(quantile, rel=0.035)


def test_the_interval_holds_the_truth_nineteen_times_of_twenty():
    """Documents of one place are alike: rows taken for independent would hold it two times of three."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1_000):
        lengths = np.repeat(rng.gamma(2.0, 20.0, 640), 8) + rng.gamma(2.0, 20.0, 640 * 8)  # 640 places of 8 rows each
        places = lengths.reshape(640, 8)
        sample = places[rng.permutation(640)[:32]]
        found = estimates.estimate_total([(8, float(own.sum())) for own in sample], lengths.size)
        hits += found.low <= lengths.sum() <= found.high
    assert 930 <= hits <= 970


def test_a_sample_without_text_is_refused():
    with pytest.raises(ValueError, match=r"corpus: no text in the sample \(4 of 100 rows\)\. Check --text-column"):
        estimates.size_up([Part(2, 0, 0), Part(2, 0, 0)], 100, 600, 1)


def test_one_row_does_not_speak_for_others_but_for_itself():
    assert estimates.size_up([Part(1, 1, 7)], 1, 60, 1).tokens == exactly(7.0)
    with pytest.raises(ValueError, match="a sample of 1 row cannot speak for 100"):
        estimates.size_up([Part(1, 1, 7)], 100, 6_000, 1)


def test_the_check_of_a_corpus_reads_ids_again_and_again_where_there_are_many():
    few, many = (estimates.check_seconds(size_of(1.0, 1, num_rows=count)) for count in (2**25, 2**28))
    assert few == pytest.approx(2**25 * (60 * 12e-9 + 0.46e-6))
    assert many == pytest.approx(2**28 * (60 * 12e-9 + 0.3e-6 + 8 * 0.16e-6))


def test_embedding_takes_what_hand_and_pencil_say():
    cost = estimates.estimate_embedding(size_of(90_000.0, num_units=10), PACE, num_workers=3)
    assert cost.work_seconds == exactly(900.0)
    assert cost.embed_seconds == exactly(360.0)  # one of the three has four of the ten units
    assert cost.start_seconds == 10.0
    assert cost.held_hours.value == pytest.approx(3 * (360 + 5) / 3_600)
    assert cost.wall_seconds.value == pytest.approx(360 + 10 + cost.check_seconds + cost.commit_seconds)


@given(counts, st.integers(1, 100_000), workers)
def test_twice_the_documents_take_twice_the_hours(tokens: int, num_units: int, num_workers: int):
    once, twice = (
        estimates.estimate_embedding(size_of(factor * tokens, factor * num_units), PACE, num_workers) for factor in (1, 2)
    )
    assert twice.work_seconds.value == pytest.approx(2 * once.work_seconds.value)
    assert twice.embed_seconds.value <= 2 * once.embed_seconds.value * (1 + 1e-9)


@given(counts, st.integers(1, 100_000), workers, workers)
def test_more_workers_are_never_slower_and_never_do_less(tokens: int, num_units: int, few: int, more: int):
    size = size_of(tokens, num_units)
    slow, fast = (estimates.estimate_embedding(size, PACE, few + extra) for extra in (0, more))
    assert fast.wall_seconds.value <= slow.wall_seconds.value
    assert fast.held_hours.value * 3_600 >= fast.work_seconds.value * (1 - 1e-9)
    builds = [estimates.estimate_index(tokens, 784.0, SHARDS, few + extra).wall_seconds for extra in (0, more)]
    assert builds[1] <= builds[0]


@given(counts, st.integers(1, 10_000), st.floats(1.0, 1e7))
def test_the_workers_that_are_needed_are_enough_and_no_fewer_would_be(tokens: int, num_units: int, seconds: float):
    size = size_of(tokens, num_units)

    def takes(num_workers: int) -> float:
        return estimates.estimate_embedding(size, PACE, num_workers).embed_seconds.value + PACE.load_seconds

    needed = estimates.workers_within(size, PACE, seconds)
    if needed is None:
        assert takes(num_units) > seconds * (1 - 1e-9)
    else:
        assert takes(needed) <= seconds * (1 + 1e-9)
        assert needed == 1 or takes(needed - 1) > seconds * (1 - 1e-9)


@given(st.lists(st.integers(1, 4_096), min_size=2, unique=True), st.floats(0, 200))
def test_more_dims_never_take_fewer_bytes(dims: list[int], id_bytes: float):
    found = [own for _, own in sorted(estimates.bytes_by_dim(dims, id_bytes).items())]
    for narrow, wide in itertools.pairwise(found):
        assert all(narrow[kind] < wide[kind] for kind in narrow)


def test_an_index_weighs_what_its_parts_do():
    index = estimates.estimate_index(10_000, 784.0, SHARDS, num_workers=2)
    assert index.num_bytes == 10_000 * (128 + 768 + 16)
    assert (index.num_shards, index.shard_documents) == (4, 2_500)
    assert index.shard_memory_bytes == 2_500 * (128 + 16)
    assert index.shard_mapped_bytes == 2_500 * 768
    alone = estimates.estimate_index(10_000, 784.0, SHARDS, num_workers=1)
    assert alone.work_seconds == index.work_seconds == pytest.approx(alone.wall_seconds)
    assert index.wall_seconds < alone.wall_seconds


def test_lists_cost_their_comparisons():
    plain, lists, learned = (
        estimates.estimate_index(10**6, 784.0, dataclasses.replace(SHARDS, dim=64, **own), 1).work_seconds
        for own in ({}, {"num_lists": 10_000}, {"num_lists": 10_000, "num_sampled": 100_000})
    )
    assert plain < lists < learned
    assert learned - lists == pytest.approx(lists - plain)  # ten passes over a tenth of the documents


@pytest.mark.parametrize(
    ("num_documents", "num_shards", "width", "seconds"),
    [(60_000, 1, 1_024, 3.4), (250_000, 4, 384, 4.9), (250_000, 1, 1_024, 6.4), (1_000_000, 4, 384, 10.2)],
)
def test_dense_indexes_that_were_built_are_estimated_within_a_quarter(
    num_documents: int, num_shards: int, width: int, seconds: float
):
    shards = Shards(num_shards, float(width), 2.0 * width, 17.0, 0, width // 2, 200_000)
    found = estimates.estimate_index(num_documents, 2.0 * width + 14, shards, num_workers=2)
    assert found.work_seconds == pytest.approx(seconds, rel=0.25)


def test_what_nobody_asks_a_price_for_has_none():
    size = size_of(90_000.0, 10)
    assert estimates.make_estimate(size, PACE, SHARDS, 784.0, MEANS).price is None
    priced = estimates.make_estimate(size, PACE, SHARDS, 784.0, dataclasses.replace(MEANS, price_per_hour=2.0))
    assert priced.price is not None
    hours = priced.embedding.held_hours.value + 3 * priced.index.wall_seconds / 3_600
    assert priced.price.value == pytest.approx(2 * hours)


def test_a_billion_documents_are_planned_for():
    """2,500 files of 400,000 rows, 40 tokens a document, a worker at 1,000,000 tokens a second (a large GPU, a small model)."""
    files = [InputFile(f"part-{number:05d}.parquet", "", 400_000) for number in range(2_500)]
    units = plan_units(files, 20_000)
    size = dataclasses.replace(size_of(40e9, len(units), num_rows=10**9), num_sampled=4_096)
    shards = dataclasses.replace(SHARDS, num_shards=1_000)
    means = Means(64, 8, 512e9, within_seconds=3_600.0, price_per_hour=2.0)
    found = estimates.make_estimate(size, dataclasses.replace(PACE, tokens_per_second=1e6), shards, 784.0, means)
    assert len(units) == 50_000
    assert found.embedding.work_seconds.value == pytest.approx(40_000)
    assert found.embedding.embed_seconds.value == pytest.approx(782 * 0.8)  # waves of 64 units
    assert (found.needs.num_workers, found.needs.num_nodes) == (12, 2)
    assert found.index.num_bytes == 912e9
    assert (found.needs.num_shard_nodes, found.needs.num_memory_nodes) == (1, 2)
    assert [limit.share for limit in found.limits] == sorted((limit.share for limit in found.limits), reverse=True)
    assert all(limit.needed > 0 < limit.most for limit in found.limits)


def test_what_fits_no_node_is_not_promised():
    small = dataclasses.replace(MEANS, node_memory_bytes=1e4, within_seconds=1.0)
    needs = estimates.make_estimate(size_of(90_000.0, 10), PACE, SHARDS, 784.0, small).needs
    assert needs == estimates.Needs(None, None, None, None)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_driver_s_cost_grows_with_units_and_its_journal_with_time(num_units: int, more: int):
    few, many = (estimates.estimate_driver(count, 1_000.0) for count in (num_units, num_units + more))
    for name in ("memory_bytes", "manifest_bytes", "own_seconds", "resume_seconds"):
        assert getattr(few, name) < getattr(many, name)
    assert few.num_segments <= 500
    assert isinstance(few, Driver)


def test_estimates_stand_beside_what_was_taken():
    lines = estimates.compare({"a": 90.0, "b": 0.0, "c": 5.0, "only here": 1.0}, {"a": 100.0, "b": 0.0, "c": 0.0, "d": 1.0})
    assert [(line.name, line.error) for line in lines] == [("a", -0.1), ("b", 0.0), ("c", 1.0)]


@pytest.mark.parametrize(
    ("name", "estimated", "taken", "is_within"),
    [
        ("tokens", 120.0, 100.0, True),
        ("tokens", 130.0, 100.0, False),
        ("tokens", 70.0, 100.0, False),
        ("seconds of work", 4.0, 13.0, True),
        ("seconds of work", 75.0, 100.0, True),
        ("seconds of work", 74.0, 100.0, False),
    ],
)
def test_estimates_are_tolerated_within_a_share_and_seconds_within_chance(
    name: str, estimated: float, taken: float, is_within: bool
):
    assert estimates.Line(name, estimated, taken).is_within(0.25) == is_within

import numpy as np
import pytest

from matryoshka import comparison, significance
from matryoshka.runs import Series

RNG = np.random.default_rng(0)
QUALITY = RNG.random(80)


def series(system: str, dim: int | None, gain: float = 0.0, noise: float = 0.1) -> Series:
    values = np.clip(QUALITY + gain + RNG.normal(0, noise, 80), 0, 1)
    return Series(system, dim, {"nDCG@10": values}, [[]] * 80)


SYSTEMS = [
    series("bm25", None, -0.2),
    series("base", 64), series("base", 32, -0.1), series("base+int8", 64),
    series("tuned", 64, 0.1), series("tuned", 32, 0.05), series("tuned", 16),
    series("tuned+funnel", 16, 0.1), series("tuned+binary", 32),
]  # fmt: skip


def test_models_are_held_against_the_first_one_and_words_and_other_ways_against_their_model():
    made = [(one.before, one.before_dim, one.after, one.dim) for one in comparison.compare(SYSTEMS)]
    assert sorted(made, key=str) == sorted(
        [
            ("bm25", None, "base", 64), ("base", 64, "base+int8", 64), ("bm25", None, "tuned", 64), ("base", 64, "tuned", 64),
            ("base", 32, "tuned", 32), ("tuned", 64, "tuned+funnel", 16), ("tuned", 32, "tuned+binary", 32),
        ],
        key=str,
    )  # fmt: skip


def test_a_comparison_has_the_gain_of_the_means_and_a_larger_corrected_p_value():
    compared = comparison.compare(SYSTEMS)
    values = {(own.system, own.dim): own.values["nDCG@10"] for own in SYSTEMS}
    for one in compared:
        differences = values[one.after, one.dim] - values[one.before, one.before_dim]
        assert one.gain == pytest.approx(differences.mean())
        assert one.low <= one.gain <= one.high
        assert one.p_value <= one.p_corrected <= 1
        assert one.num_queries == 80
    found = comparison.find(compared, "base", "tuned")
    assert (found.dim, found.p_corrected < 0.05) == (64, True)
    assert comparison.find(compared, "tuned", "base") is None


def test_side_questions_do_not_change_the_answer_to_the_main_one():
    two = [own for own in SYSTEMS if own.system in ("base", "tuned") and own.dim == 64]
    (alone,) = comparison.compare(two)
    compared = comparison.compare(SYSTEMS)
    main = comparison.find(compared, "base", "tuned")
    assert alone.p_value == alone.p_corrected == main.p_value == main.p_corrected
    others = [one for one in compared if one is not main]
    expected = significance.correct(np.array([one.p_value for one in others]))
    assert [one.p_corrected for one in others] == expected.tolist()


def test_of_several_models_the_main_questions_are_corrected_for_their_number():
    made = [Series(name, 64, {"nDCG@10": QUALITY + gain}, [[]] * 80) for name, gain in (("a", 0), ("b", 0.1), ("c", 0.2))]
    assert {one.p_corrected for one in comparison.compare(made)} == {2 / 10_001}


def test_one_system_alone_is_compared_with_nothing():
    assert comparison.compare(SYSTEMS[1:3]) == []


def plateau(dim: int, share: float) -> Series:
    return Series("tuned", dim, {"nDCG@10": QUALITY * share}, [[]] * 80)


@pytest.mark.parametrize(("floor", "recommended"), [(0.95, 128), (0.85, 64), (0.99, 384), (0.1, 64)])
def test_the_least_dim_that_surely_keeps_the_floor_is_recommended(floor: float, recommended: int):
    systems = [plateau(384, 1.0), plateau(128, 0.96), plateau(64, 0.9)]
    found = comparison.resolutions(systems, "tuned", floor, {384: 400.0, 64: 100.0}, 1000)
    assert found.recommended == recommended
    assert [one.dim for one in found.by_dim] == [384, 128, 64]
    assert [one.retained for one in found.by_dim] == pytest.approx([1, 0.96, 0.9])
    assert [one.bytes_per_million for one in found.by_dim] == [768_000_000, 256_000_000, 128_000_000]
    # 400 us for 1,000 documents are .4 us for one, and 400 s for a thousand queries and a million documents.
    assert [one.seconds_per_million for one in found.by_dim] == [400.0, None, 100.0]


def test_vectors_of_chunked_documents_weigh_as_much_as_all_their_chunks():
    found = comparison.resolutions([plateau(384, 1.0), plateau(64, 0.9)], "tuned", 0.95, {}, 100, 3.5)
    assert [one.bytes_per_million for one in found.by_dim] == [2_688_000_000, 448_000_000]


def test_a_share_that_is_only_luck_is_not_recommended():
    """On average the short dim keeps everything; on other queries it might not."""
    noisy = Series("tuned", 64, {"nDCG@10": np.where(np.arange(80) % 2, 2, 0) * QUALITY}, [[]] * 80)
    found = comparison.resolutions([plateau(384, 1.0), noisy], "tuned", 0.9, {}, 1)
    assert found.by_dim[1].retained > 0.9 > found.by_dim[1].low
    assert found.recommended == 384


def test_where_nothing_is_found_no_dim_is_recommended():
    assert comparison.resolutions([plateau(64, 0.0)], "tuned", 0.95, {}, 1) is None
    assert comparison.resolutions([plateau(64, 1.0)], "base", 0.95, {}, 1) is None

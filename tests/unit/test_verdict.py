import dataclasses

import numpy as np
import pytest

from matryoshka import significance, storage, verdict
from matryoshka.comparison import Comparison, Resolution, Resolutions
from matryoshka.evaluation import Row
from matryoshka.verdict import DO_NOT_BOTHER, FINE_TUNE, NOT_ENOUGH, Training


def compared(low: float, high: float, num_queries: int = 200, p: float = 0.001) -> Comparison:
    gain = (low + high) / 2
    return Comparison("base", "tuned", 64, 64, "nDCG@10", gain, low, high, p, p, num_queries, 0, 0, 0.03)


def rows() -> list[Row]:
    made = [Row("base", 64, "nDCG@10", 0.6), Row("tuned", 64, "nDCG@10", 0.7), Row("tuned", 64, "MRR@10", 0.1)]
    return [*made, Row("bm25", None, "nDCG@10", 0.5)]


@pytest.mark.parametrize(
    ("comparison", "required", "decision", "reason"),
    [
        (compared(0.05, 0.15), 0.01, FINE_TUNE, "all of it at or above the 0.010 that it must gain"),
        (compared(0.05, 0.15), 0.1, NOT_ENOUGH, "reaches from below the 0.100 that it must gain to above it"),
        (compared(0.05, 0.15), 0.2, DO_NOT_BOTHER, "at its best is less than the 0.200 that it must gain"),
        (compared(-0.002, 0.004), 0.01, DO_NOT_BOTHER, "at its best is less than"),
        (compared(-0.2, -0.1), 0.01, DO_NOT_BOTHER, "changed by -0.150 (-0.200 to -0.100)"),
        (compared(-0.01, 0.05, p=0.2), 0.01, NOT_ENOUGH, "only true gains of 0.040 or more"),
        (compared(0.02, 0.15, p=0.06), 0.01, NOT_ENOUGH, "may be chance (p 0.060)"),
        (compared(0.05, 0.5, num_queries=20), 0.01, NOT_ENOUGH, "so small a set shows only true gains of 0.040 or more"),
        (compared(-0.5, -0.2, num_queries=49), 0.01, NOT_ENOUGH, "fewer than 50 queries decide nothing"),
    ],
)
def test_the_whole_interval_decides_and_the_reason_is_one_sentence(
    comparison: Comparison, required: float, decision: str, reason: str
):
    found = verdict.decide(comparison, rows(), required)
    assert found.decision == decision
    assert reason in found.reason
    assert found.reason.endswith(".")
    assert found.reason.count(". ") == 0
    assert (found.before, found.after, found.required_gain) == (0.6, 0.7, required)
    assert found.is_worth_it == (decision == FINE_TUNE)
    assert found.is_small == (comparison.num_queries < 50)


@pytest.mark.parametrize(
    ("low", "high", "decision", "said"),
    [
        (
            -0.04,
            -0.01,
            DO_NOT_BOTHER,
            "against words alone (BM25), which need no model, the model gains -0.025 (-0.040 to -0.010).",
        ),
        (-0.04, 0.0, DO_NOT_BOTHER, "the model gains -0.020 (-0.040 to +0.000)."),
        (-0.04, 0.01, FINE_TUNE, "; that the model is better than words alone (BM25, 0.500) was not shown."),
        (0.01, 0.04, FINE_TUNE, "that it must gain."),
    ],
)
def test_words_decide_only_where_the_whole_interval_says_that_they_do_as_well(low: float, high: float, decision: str, said: str):
    words = dataclasses.replace(compared(low, high), before="bm25", before_dim=None)
    found = verdict.decide(compared(0.05, 0.15), rows(), words=words)
    assert (found.decision, found.reason[-len(said) :]) == (decision, said)
    assert found.reason.count(". ") == 0


def test_what_words_do_better_than_both_changes_nothing_where_a_set_is_too_small():
    words = dataclasses.replace(compared(-0.4, -0.1, 20), before="bm25", before_dim=None)
    assert verdict.decide(compared(0.05, 0.15, 20), rows(), words=words).decision == NOT_ENOUGH


@pytest.mark.parametrize(("low", "num_queries"), [(0.5, 1), (0.0, 80)])
def test_what_a_set_would_show_is_left_out_where_it_is_unknown(low: float, num_queries: int):
    ends = {"low": None, "high": None} if num_queries == 1 else {}
    found = verdict.decide(dataclasses.replace(compared(low, 0.5, num_queries), detectable=None, **ends), rows())
    assert (found.decision, found.detectable_gain, "true gain" in found.reason) == (NOT_ENOUGH, None, False)


def test_the_gain_that_a_set_is_said_to_show_is_called_worth_it_in_four_of_five_sets():
    """By the verdict's own rule, not by a test against no difference at all."""
    spread = np.random.default_rng(0).normal(0, 0.3, (200, 400))
    detectable = float(np.mean([significance.detectable(own) for own in spread.T]))
    shown = verdict.decide(dataclasses.replace(compared(0, 0.1), detectable=detectable), rows(), 0.05).detectable_gain
    low, high = significance.interval(significance.resampled_means(spread + shown), 200)
    decided = [verdict.decide(compared(*ends), rows(), 0.05).decision for ends in zip(low, high, strict=True)]
    assert decided.count(FINE_TUNE) / 400 == pytest.approx(significance.POWER, abs=0.05)


def test_training_costs_the_hours_of_all_devices_and_what_was_done_before_a_run_was_taken_up_again():
    facts = {"train_seconds": 1800, "num_steps": 100, "stopped_at": None, "device": "cuda", "num_devices": 4}
    assert verdict.training_of(facts) == Training("cuda", 2.0, 4)
    assert verdict.training_of({**facts, "first_step": 50}) == Training("cuda", 4.0, 4)
    assert verdict.training_of({**facts, "stopped_at": 60, "first_step": 30}) == Training("cuda", 4.0, 4)
    earlier = {"train_seconds": 1800, "num_steps": 100, "workers": 2}
    assert verdict.training_of(earlier) == Training("worker", 1.0, 2)
    assert verdict.training_of({"num_steps": 100}) is None


@pytest.mark.parametrize("end", [{}, {"stopped_at": 60, "first_step": 60}, {"stopped_at": 0, "first_step": 0}])
def test_a_run_that_was_taken_up_at_its_end_does_not_say_what_training_cost(end: dict[str, int]):
    facts = {"train_seconds": 3, "num_steps": 100, "stopped_at": None, "device": "cpu", "num_devices": 2, "first_step": 100}
    assert verdict.training_of({**facts, **end}) is None


def resolution(dim: int) -> Resolution:
    return Resolution(dim, 0.5, dim / 128, 0.9, dim * 2_000_000, 1.0, dim / 10)


def test_a_short_dim_saves_what_full_width_costs_more():
    found = verdict.saving_of(Resolutions("tuned", 0.9, 64, (resolution(128), resolution(64))))
    assert (found.dim, found.bytes_per_million_before, found.bytes_per_million) == (64, 256_000_000, 128_000_000)
    assert (found.seconds_per_million_before, found.seconds_per_million) == (12.8, 6.4)
    assert verdict.saving_of(Resolutions("tuned", 0.9, 128, (resolution(128), resolution(64)))) is None
    assert verdict.saving_of(None) is None


def test_what_was_forgotten_is_the_change_at_the_widest_dim_of_both():
    made = [
        Row(system, dim, metric, value)
        for system, dim, metric, value in [
            ("base", 64, "Spearman", 0.8), ("base", 32, "Spearman", 0.7), ("tuned", 32, "Spearman", 0.6),
        ]
    ]  # fmt: skip
    found = verdict.forgotten_on("stsb", None, made, "base", "tuned")
    assert (found.dim, found.change, found.low) == (32, pytest.approx(-0.1), None)
    assert verdict.forgotten_on("stsb", None, made[:1], "base", "tuned") is None
    retrieved = [Row("base", 64, "nDCG@10", 0.6), Row("tuned", 64, "nDCG@10", 0.5)]
    found = verdict.forgotten_on("scifact", compared(-0.15, -0.05), retrieved, "base", "tuned")
    assert (found.metric, found.low, found.high) == ("nDCG@10", -0.15, -0.05)


def test_a_verdict_comes_back_from_json():
    made = verdict.decide(compared(0.05, 0.15), rows())
    forgotten = verdict.forgotten_on("other", None, rows(), "base", "tuned")
    saving = verdict.saving_of(Resolutions("tuned", 0.9, 64, (resolution(128), resolution(64))))
    made = dataclasses.replace(made, forgotten=(forgotten,), training=Training("cpu", 0.5, 2), saving=saving)
    assert verdict.from_json(storage.as_json(made.as_json())) == made

"""Is it worth it? One of three answers, with the reason in one sentence and the numbers behind it.

The answer hangs on the whole interval of the gain at full width: all of it must reach the gain that is required, or stay below
it. Sets of fewer than 50 queries decide nothing.

Source: Voorhees and Buckley 2002, The effect of topic set size on retrieval experiment error, doi:10.1145/564376.564432 (with
fewer than 50 queries, conclusions often turn round on other queries).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matryoshka import significance
from matryoshka.comparison import Comparison, Resolutions
from matryoshka.evaluation import Row

Decision = Literal["fine-tune", "do not bother", "not enough evidence"]

FINE_TUNE: Decision = "fine-tune"
DO_NOT_BOTHER: Decision = "do not bother"
NOT_ENOUGH: Decision = "not enough evidence"
REQUIRED_GAIN = 0.01
LEAST_QUERIES = 50


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What became of both models on other data, at the widest dim that both have there.

    Attributes:
        data: Its name.
        metric: Name of the measure.
        dim: The dim.
        before: Value before fine-tuning.
        after: Value after it.
        change: The difference: below 0, something was forgotten.
        low: Lower end of its 95% interval; None where there are no single queries.
        high: Upper end.
    """

    data: str
    metric: str
    dim: int
    before: float
    after: float
    change: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Training:
    """What fine-tuning cost, as it was measured.

    Attributes:
        device: ``cuda``, ``cpu``, or ``worker`` where the record is of an earlier version and does not say.
        device_hours: Of all devices together.
        num_devices: GPUs, or CPU cores.
    """

    device: str
    device_hours: float
    num_devices: int


@dataclass(frozen=True, slots=True)
class Saving:
    """What the shortest dim that keeps the floor saves, held against full width.

    Attributes:
        dim: The dim.
        retained: Share of full width's quality.
        bytes_per_million_before: Of the vectors of a million documents at full width.
        bytes_per_million: At this dim.
        seconds_per_million_before: In which a thousand queries are compared with a million documents at full width.
        seconds_per_million: At this dim.
    """

    dim: int
    retained: float
    bytes_per_million_before: int
    bytes_per_million: int
    seconds_per_million_before: float | None
    seconds_per_million: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer.

    Attributes:
        decision: One of three.
        reason: One sentence.
        metric: Name of the measure.
        dim: At which the gain was measured.
        before: Value before fine-tuning.
        after: Value after it.
        gain: The difference.
        low: Lower end of its 95% interval; None where there are fewer than two queries.
        high: Upper end.
        p_value: Of the paired permutation test; corrected for the number of models that were held against the first one.
        num_queries: Judged queries.
        required_gain: Least gain that is worth it.
        detectable_gain: True gain that these queries would show to be what is required in 80% of the cases; None: unknown.
        is_small: Whether there are too few queries to decide.
        forgotten: On other data.
        training: What fine-tuning cost; None where nothing was recorded.
        saving: What a short dim saves; None where none is short enough to save anything.
    """

    decision: Decision
    reason: str
    metric: str
    dim: int
    before: float
    after: float
    gain: float
    low: float | None
    high: float | None
    p_value: float
    num_queries: int
    required_gain: float
    detectable_gain: float | None
    is_small: bool
    forgotten: tuple[Forgotten, ...] = ()
    training: Training | None = None
    saving: Saving | None = None

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain that is required was shown."""
        return self.decision == FINE_TUNE

    def as_json(self) -> dict[str, Any]:
        """Returns the verdict as a JSON value."""
        return dataclasses.asdict(self)


def from_json(value: Mapping[str, Any]) -> Verdict:
    """Returns the verdict that ``as_json`` described."""
    parts = {
        "forgotten": tuple(Forgotten(**one) for one in value["forgotten"]),
        "training": Training(**value["training"]) if value["training"] else None,
        "saving": Saving(**value["saving"]) if value["saving"] else None,
    }
    return Verdict(**{**value, **parts})


def decide(
    comparison: Comparison, rows: Sequence[Row], required_gain: float = REQUIRED_GAIN, words: Comparison | None = None
) -> Verdict:
    """Returns the answer to whether one system is worth more than another.

    Args:
        comparison: Of the two, at their widest dim.
        rows: Figures of all systems.
        required_gain: Least gain that is worth it.
        words: Of words with the second system; None where they were not searched.
    """
    values = {(row.system, row.dim): row.value for row in rows if row.metric == comparison.metric}
    shown = None if comparison.detectable is None else required_gain + comparison.detectable
    decision, reason = _judge(comparison, words, required_gain, shown)
    if words and words.low is not None and words.low <= 0 and decision != DO_NOT_BOTHER:
        alone = f"words alone (BM25, {values[words.before, None]:.3f})"
        reason = f"{reason.removesuffix('.')}; that the model is better than {alone} was not shown."
    return Verdict(
        decision, reason, comparison.metric, comparison.dim, values[comparison.before, comparison.before_dim],
        values[comparison.after, comparison.dim], comparison.gain, comparison.low, comparison.high, comparison.p_corrected,
        comparison.num_queries, required_gain, shown, comparison.num_queries < LEAST_QUERIES,
    )  # fmt: skip


def _judge(comparison: Comparison, words: Comparison | None, required: float, shown: float | None) -> tuple[Decision, str]:
    """Returns the decision and its reason."""
    one = comparison
    found = f"{one.metric} at {one.dim} dims changed by {_in_words(one)} on {one.num_queries} queries"
    if one.num_queries < LEAST_QUERIES or one.low is None or one.high is None:
        least = "" if shown is None else f"so small a set shows only true gains of {shown:.3f} or more, and "
        return NOT_ENOUGH, f"{found}: {least}fewer than {LEAST_QUERIES} queries decide nothing."
    if one.high < required:
        return DO_NOT_BOTHER, f"{found}, which at its best is less than the {required:.3f} that it must gain."
    if words and words.high is not None and words.high <= 0:
        return DO_NOT_BOTHER, f"{found}, but against words alone (BM25), which need no model, the model gains {_in_words(words)}."
    if one.low >= required and one.p_corrected < significance.SIGNIFICANT:
        return FINE_TUNE, f"{found}, all of it at or above the {required:.3f} that it must gain."
    if one.low >= required:
        return NOT_ENOUGH, f"{found}, which the paired test says may be chance (p {one.p_corrected:.3f})."
    least = "" if shown is None else f", and so many queries show only true gains of {shown:.3f} or more"
    return NOT_ENOUGH, f"{found}: the interval reaches from below the {required:.3f} that it must gain to above it{least}."


def _in_words(one: Comparison) -> str:
    """Returns a gain with its interval, if it has one."""
    return f"{one.gain:+.3f}" + ("" if one.low is None else f" ({one.low:+.3f} to {one.high:+.3f})")


def saving_of(found: Resolutions | None) -> Saving | None:
    """Returns what the recommended dim saves; None where it is full width."""
    if found is None or found.recommended == found.by_dim[0].dim:
        return None
    full, best = found.by_dim[0], next(one for one in found.by_dim if one.dim == found.recommended)
    return Saving(
        best.dim, best.retained, full.bytes_per_million, best.bytes_per_million,
        full.seconds_per_million, best.seconds_per_million,
    )  # fmt: skip


def training_of(facts: Mapping[str, Any]) -> Training | None:
    """Returns what fine-tuning cost, from the facts of the model's manifest; None where they do not say, or took no step.

    Of a run that was taken up again, seconds are those of its last part, and steps before it are taken to cost the same.
    """
    if not facts.get("train_seconds"):
        return None
    stopped = facts.get("stopped_at")
    num_steps = facts["num_steps"] if stopped is None else stopped
    num_taken = num_steps - facts.get("first_step", 0)
    if num_taken <= 0:
        return None
    num_devices = int(facts.get("num_devices", facts.get("workers", 1)))
    hours = float(facts["train_seconds"]) / num_taken * num_steps * num_devices / 3600
    return Training(str(facts.get("device", "worker")), round(hours, 4), num_devices)


def forgotten_on(data: str, comparison: Comparison | None, rows: Sequence[Row], before: str, after: str) -> Forgotten | None:
    """Returns what became of two systems on other data; None where they share no dim there.

    Args:
        data: Its name.
        comparison: Of the two there; None where there are no single queries.
        rows: Figures there.
        before: The one system.
        after: The other.
    """
    metric = next((row.metric for row in rows), "")
    if comparison:
        metric = comparison.metric
    values = {(row.system, row.dim): row.value for row in rows if row.metric == metric}
    dim = max((dim for system, dim in values if dim and system == before and (after, dim) in values), default=None)
    if dim is None:
        return None
    old, new = values[before, dim], values[after, dim]
    low, high = (comparison.low, comparison.high) if comparison else (None, None)
    return Forgotten(data, metric, dim, old, new, new - old, low, high)

"""What an evaluation found, for machines (``report.json``) and for people (``report.md``)."""

import dataclasses
import html
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matryoshka import evaluation, storage, verdict
from matryoshka.comparison import Comparison, Resolutions
from matryoshka.evaluation import FUNNEL, HEADLINES, Profile, Ranking, Row
from matryoshka.reading import USUAL
from matryoshka.showcase import Change, Extremes
from matryoshka.storage import Place
from matryoshka.verdict import Verdict

JSON, MARKDOWN = "report.json", "report.md"

SHOWN = (*HEADLINES, "MRR@10", "Recall@10")
"""The measures that a terminal shows."""

_NOTE = f"A row of a `{FUNNEL}` system stands at the dim of its shortlist; its results were reranked at wider dims."
_SHOWN_CHANGES = 3

_MARKS = re.compile(r"[\\`*_\[\]|#<>]")

Table = list[list[str]]


@dataclass(frozen=True, slots=True)
class Report:
    """What is to be said.

    Attributes:
        title: What was evaluated.
        rows: The figures.
        profiles: Size and speed of the models behind them.
        ranking: Which model is best, where several were ranked.
        remarks: More sentences for people.
        elsewhere: Figures of the same systems on other data, by its name: what was lost there, or gained.
        verdict: Whether fine-tuning is worth it; None where there are not two models to compare.
        comparisons: Systems held against each other.
        resolutions: Which dim is enough.
        extremes: The queries that gained and lost most.
        per_query: The headline measure of every query, as a JSON value.
        searches: A sample of searches, as a JSON value.
        frontier: Plans of the index that was evaluated, as a JSON value.
        settings: Of the run.
        fingerprints: What the figures rest on.
        sections: More for machines, each under a key of its own.
    """

    title: str
    rows: Sequence[Row]
    profiles: Sequence[Profile] = ()
    ranking: Ranking | None = None
    remarks: Sequence[str] = ()
    elsewhere: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    verdict: Verdict | None = None
    comparisons: Sequence[Comparison] = ()
    resolutions: Resolutions | None = None
    extremes: Extremes | None = None
    per_query: Mapping[str, Any] | None = None
    searches: Mapping[str, Any] | None = None
    frontier: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """Returns the outcome in words: verdict, conclusion or ranking, what happened elsewhere, which dim, and the remarks."""
        answer = describe_verdict(self.verdict) if self.verdict else ""
        gained = describe_reach(self.rows) if self.verdict else conclude(self.rows)  # a verdict has said how much
        first = describe_ranking(self.ranking) if self.ranking else gained
        others = [self._describe_elsewhere(name) for name in self.elsewhere]
        dims = describe_resolutions(self.resolutions) if self.resolutions else ""
        return [sentence for sentence in (answer, first, *others, dims, *self.remarks) if sentence]

    def _describe_elsewhere(self, name: str) -> str:
        """Returns what happened on other data, with its interval where the verdict has one."""
        sentence = describe_change(self.elsewhere[name], f"On {name}, ")
        known = self.verdict.forgotten if self.verdict else ()
        ends = (f"{one.low:+.3f} to {one.high:+.3f}" for one in known if one.data == name and one.low is not None)
        between = next(ends, "")
        return f"{sentence.removesuffix('.')} ({between})." if sentence and between else sentence


def write(folder: Place, report: Report) -> None:
    """Writes both forms of a report, each atomically."""
    value = {
        "title": report.title,
        "sentences": report.sentences,
        "rows": _as_json(report.rows),
        "models": _as_json(report.profiles),
        "ranking": dataclasses.asdict(report.ranking) | {"best": report.ranking.best} if report.ranking else None,
        "elsewhere": {name: _as_json(rows) for name, rows in report.elsewhere.items()},
        "remarks": list(report.remarks),
        "verdict": report.verdict.as_json() if report.verdict else None,
        "comparisons": _as_json(report.comparisons),
        "resolutions": dataclasses.asdict(report.resolutions) if report.resolutions else None,
        "extremes": dataclasses.asdict(report.extremes) if report.extremes else None,
        "per_query": report.per_query,
        "searches": report.searches,
        "frontier": report.frontier,
        "fingerprints": dict(report.fingerprints),
        "settings": dict(report.settings),
        **report.sections,
    }
    storage.publish_json(folder / JSON, value)
    storage.publish_bytes(folder / MARKDOWN, _markdown(report).encode())


def _as_json(values: Sequence[Row] | Sequence[Profile] | Sequence[Comparison]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(value) for value in values]


def read_rows(folder: Place) -> list[Row]:
    """Returns the figures of a report.

    Raises:
        ValueError: There is no report in the folder.
    """
    return [Row(**row) for row in storage.read_json(folder / JSON)["rows"]]


def read_profiles(folder: Place) -> list[Profile]:
    """Returns the models of a report; reports that were made before models were weighed have none.

    Raises:
        ValueError: There is no report in the folder.
    """
    return [Profile(**profile) for profile in storage.read_json(folder / JSON).get("models", ())]


def read_sentences(folder: Place) -> list[str]:
    """Returns the outcome of a report in words.

    Raises:
        ValueError: There is no report in the folder.
    """
    return list(storage.read_json(folder / JSON)["sentences"])


def read(folder: Place) -> Report:
    """Returns a report as it was written, but for its ranking, for what happened elsewhere, and for sections of its own.

    Raises:
        ValueError: There is no report in the folder.
    """
    value = storage.read_json(folder / JSON)
    return Report(
        value["title"],
        read_rows(folder),
        read_profiles(folder),
        remarks=tuple(value.get("remarks", ())),
        verdict=verdict.from_json(value["verdict"]) if value.get("verdict") else None,
        comparisons=[Comparison(**one) for one in value.get("comparisons", ())],
        resolutions=Resolutions.from_json(value["resolutions"]) if value.get("resolutions") else None,
        extremes=Extremes.from_json(value["extremes"]) if value.get("extremes") else None,
        **{name: value.get(name) for name in ("per_query", "searches", "frontier")},
        settings=value["settings"],
        fingerprints=value["fingerprints"],
    )


def read_best(folder: Place) -> str:
    """Returns the system that a report ranks first.

    Raises:
        ValueError: There is no report in the folder, or it ranks nothing.
    """
    ranking = storage.read_json(folder / JSON).get("ranking")
    if not ranking:
        raise ValueError(f"{folder / JSON}: ranks no models. Pass an evaluation that was made with --models.")
    return str(ranking["best"])


def tables(rows: Sequence[Row], shown: Collection[str] = ()) -> dict[str, Table]:
    """Returns one table per metric, headline first: a header, then a line per dim with one figure per system.

    Args:
        rows: The figures.
        shown: The metrics; empty: all.

    >>> tables([Row("base", 64, "nDCG@10", 0.5), Row("tuned", 64, "nDCG@10", 0.75)])
    {'nDCG@10': [['dim', 'base', 'tuned'], ['64', '0.500', '0.750']]}
    """
    systems = list(dict.fromkeys(row.system for row in rows))
    dims = sorted({row.dim or 0 for row in rows}, reverse=True)
    known = {row.metric for row in rows if not shown or row.metric in shown}
    metrics = sorted(known, key=lambda metric: (metric not in HEADLINES, metric))
    values = {(row.metric, row.dim or 0, row.system): f"{row.value:.3f}" for row in rows}
    return {
        metric: [
            ["dim", *systems],
            *([str(dim or "-"), *(values.get((metric, dim, system), "") for system in systems)] for dim in dims),
        ]
        for metric in metrics
    }


def change_tables(rows: Sequence[Row], shown: Collection[str] = ()) -> dict[str, Table]:
    """Returns the tables of two systems with one more column: what the second has more than the first, or less.

    Args:
        rows: The figures.
        shown: The metrics; empty: all.

    >>> change_tables([Row("base", 64, "nDCG@10", 0.645), Row("tuned", 64, "nDCG@10", 0.612)])
    {'nDCG@10': [['dim', 'base', 'tuned', 'change'], ['64', '0.645', '0.612', '-0.033']]}
    """
    before, after = _before_and_after(rows)
    chosen = [row for row in rows if row.system in (before, after)]
    made = tables(sorted(chosen, key=lambda row: row.system != before), shown)
    return {
        metric: [[*table[0], "change"], *([*line, _difference(*line[1:3])] for line in table[1:])]
        for metric, table in made.items()
    }


def _difference(before: str, after: str) -> str:
    """Returns the difference of two figures as they are printed, so that a reader's own subtraction agrees."""
    return f"{float(after) - float(before):+.3f}" if before and after else ""


def model_table(profiles: Sequence[Profile], ranking: Ranking | None = None) -> Table:
    """Returns size and speed of models; ranked ones stand in their order, with the mean that put them there."""
    order = list(ranking.means) if ranking else []
    means = ["mean"] if ranking else []
    header = ["model", *means, "MB", "params", "width", "window", "docs/s", "queries/s"]  # must fit a terminal
    lines = []
    for profile in sorted(profiles, key=lambda profile: order.index(profile.system)) if order else profiles:
        own = [f"{ranking.means[profile.system]:.3f}"] if ranking else []
        size = [f"{profile.num_bytes / 1e6:,.1f}", f"{profile.num_parameters / 1e6:,.1f}M", str(profile.width)]
        rates = [_rate(profile.documents_per_second), _rate(profile.queries_per_second)]
        lines.append([profile.system, *own, *size, str(profile.max_tokens or ""), *rates])
    return [header, *lines]


def _rate(rate: float | None) -> str:
    return f"{rate:,.0f}" if rate else ""


def describe_ranking(ranking: Ranking) -> str:
    """Returns which model is best, by what, and where another one is better.

    >>> describe_ranking(Ranking("nDCG@10", (64, 32), {"a": 0.5, "b": 0.4}, {128: "b", 64: "a", 32: "a"}))
    'a is the best of 2: mean nDCG@10 over 64, 32 dims 0.500, before b (0.400). Best per dim: b at 128; a at 64, 32.'
    """
    first, *others = ranking.means.items()
    dims = ", ".join(map(str, ranking.dims))
    second = f", before {others[0][0]} ({others[0][1]:.3f})" if others else ""
    dims_of: dict[str, list[str]] = {}
    for dim, system in ranking.best_per_dim.items():
        dims_of.setdefault(system, []).append(str(dim))
    per_dim = "; ".join(f"{system} at {', '.join(own)}" for system, own in dims_of.items())
    return (
        f"{first[0]} is the best of {len(ranking.means)}: mean {ranking.metric} over {dims} dims {first[1]:.3f}{second}."
        f" Best per dim: {per_dim}."
    )


def describe_verdict(found: Verdict) -> str:
    """Returns the answer with its reason, what it cost, and what a short dim saves."""
    parts = [f"Verdict: {found.decision}. {found.reason}"]
    if found.training:
        own = found.training
        parts.append(f"Fine-tuning took {own.device_hours:.2f} {DEVICES.get(own.device, own.device)}-hours.")
    if found.saving:
        saving = found.saving
        kept = f"{saving.retained:.1%}" if saving.retained < 1 else "all"
        share = 1 - saving.bytes_per_million / saving.bytes_per_million_before
        parts.append(
            f"{saving.dim} dims keep {kept} of full width's {found.metric} and save {share:.0%} of the bytes:"
            f" {_megabytes(saving.bytes_per_million)} a million documents, not {_megabytes(saving.bytes_per_million_before)}."
        )
    return " ".join(parts)


DEVICES = {"cuda": "GPU", "cpu": "CPU core"}


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def describe_resolutions(found: Resolutions) -> str:
    """Returns which dim is recommended, and why."""
    full, best = found.by_dim[0], next(one for one in found.by_dim if one.dim == found.recommended)
    if best == full:
        return f"{found.system}: no shorter dim surely keeps {found.floor:.0%} of what {full.dim} dims reach; serve {full.dim}."
    return (
        f"{found.system}: serve {best.dim} dims, the least that surely keep {found.floor:.0%} of what {full.dim} dims reach"
        f" ({best.retained:.1%}, at least {best.low:.1%})."
    )


def conclude(rows: Sequence[Row]) -> str:
    """Returns in one sentence what fine-tuning did at full width, and which dim now does what full width did before."""
    sentences = (describe_change(rows), describe_reach(rows))
    return " ".join(filter(None, sentences))


def describe_reach(rows: Sequence[Row]) -> str:
    """Returns in one sentence which dim of the second of two systems does what full width of the first does, if any."""
    before, after = _before_and_after(rows)
    _, values, dims = _headline(rows, before, after)
    enough = [dim for dim in dims if values[after, dim] >= values[before, dims[0]]]
    if not enough:
        return ""
    who = "Tuned" if (before, after) == USUAL else f"With {after}"
    return f"{who}, {enough[-1]} dims reach what {dims[0]} dims reached before."


def describe_change(rows: Sequence[Row], place: str = "") -> str:
    """Returns in one sentence what the second of two systems lost or gained at the widest dim that both have, if any.

    >>> describe_change([Row("base", 64, "nDCG@10", 0.645), Row("tuned", 64, "nDCG@10", 0.612)], "On scifact, ")
    'On scifact, nDCG@10 at 64 dims went from 0.645 to 0.612: 0.033 was lost.'
    """
    before, after = _before_and_after(rows)
    metric, values, dims = _headline(rows, before, after)
    if not dims:
        return ""
    old, new = (f"{values[system, dims[0]]:.3f}" for system in (before, after))
    change = _difference(old, new)
    amount = "nothing changed" if not float(change) else f"{change[1:]} was {'gained' if change[0] == '+' else 'lost'}"
    if (before, after) != USUAL:
        old, new = f"{old} ({before})", f"{new} ({after})"
    return f"{place}{metric} at {dims[0]} dims went from {old} to {new}: {amount}."


def _before_and_after(rows: Sequence[Row]) -> tuple[str, str]:
    """Returns the names of the two systems of a report, the earlier one first; empty ones where there are not two."""
    systems = list(dict.fromkeys(row.system for row in rows if evaluation.is_plain(row)))
    if set(USUAL) <= set(systems):
        return USUAL
    return (systems[0], systems[1]) if len(systems) == 2 else ("", "")


def _headline(rows: Sequence[Row], before: str, after: str) -> tuple[str, dict[tuple[str, int], float], list[int]]:
    """Returns the headline measure, its figures, and the dims, widest first, at which both systems have one."""
    metric = next((name for name in HEADLINES if any(row.metric == name for row in rows)), "")
    values = {(row.system, row.dim): row.value for row in rows if row.metric == metric and row.dim is not None}
    dims = sorted({dim for system, dim in values if system == before and (after, dim) in values}, reverse=True)
    return metric, values, dims


def gain_table(comparisons: Sequence[Comparison]) -> Table:
    """Returns gains with their intervals, and p-values corrected for their number: what fits a terminal."""
    header = ["before", "after", "dim", "gain", "95% interval", "p"]
    lines = []
    for one in comparisons:
        between = "" if one.low is None else f"{one.low:+.3f} to {one.high:+.3f}"
        lines.append([one.before, one.after, str(one.dim), f"{one.gain:+.3f}", between, f"{one.p_corrected:.4f}"])
    return [header, *lines]


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Returns comparisons with their intervals and tests."""
    header = ["systems", "dim", "gain", "from", "to", "p", "corrected", "won", "tied", "lost"]
    return [header, *(_compared(one) for one in comparisons)]


def _compared(one: Comparison) -> list[str]:
    ends = ("" if end is None else f"{end:+.3f}" for end in (one.low, one.high))
    tests = (f"{one.p_value:.4f}", f"{one.p_corrected:.4f}")
    return [
        f"{one.before} to {one.after}",
        str(one.dim),
        f"{one.gain:+.3f}",
        *ends,
        *tests,
        str(one.wins),
        str(one.ties),
        str(one.losses),
    ]


def resolution_table(found: Resolutions) -> Table:
    """Returns what each dim keeps and costs."""
    header = ["dim", "value", "kept", "at least", "MB per million", "us per query"]
    lines = []
    for one in found.by_dim:
        taken = "" if one.microseconds_per_query is None else f"{one.microseconds_per_query:,.0f}"
        shares = (f"{one.value:.3f}", f"{one.retained:.1%}", f"{one.low:.1%}")
        lines.append([str(one.dim), *shares, f"{one.bytes_per_million / 1e6:,.0f}", taken])
    return [header, *lines]


def _markdown(report: Report) -> str:
    lines = [f"# {report.title}", "", *(line for sentence in report.sentences for line in (sentence, ""))]
    lines += _sections(tables(report.rows), "##")
    if any(row.system.endswith(FUNNEL) for row in report.rows):
        lines += [_NOTE, ""]
    if report.comparisons:
        title = f"Gains in {report.comparisons[0].metric}, query by query"
        lines += _sections({title: comparison_table(report.comparisons)}, "##")
    if report.resolutions:
        lines += _sections({f"Which dim is enough ({report.resolutions.system})": resolution_table(report.resolutions)}, "##")
    if report.extremes:
        lines += _changes(report.extremes)
    for name, rows in report.elsewhere.items():
        lines += [
            f"## What it cost, or brought, on {name}",
            "",
            describe_change(rows),
            "",
            *_sections(change_tables(rows), "###"),
        ]
    if report.profiles:
        lines += _sections({"Size and speed": model_table(report.profiles, report.ranking)}, "##")
    lines += ["## Fingerprints", "", *(f"- {name}: `{value}`" for name, value in report.fingerprints.items()), ""]
    return "\n".join(lines)


def _changes(found: Extremes) -> list[str]:
    """Returns the queries that gained and lost most."""
    lines = []
    for word, changes in (("gained", found.gained), ("lost", found.lost)):
        lines += [f"## Queries that {word} most ({found.metric} at {found.dim} dims, {found.before} to {found.after})", ""]
        lines += [line for change in changes for line in _change(change)] or ["None.", ""]
    return lines


def _change(change: Change) -> list[str]:
    lines = [f"- **{_plain(change.text)}** ({_plain(change.query_id)}): {change.before:.3f} to {change.after:.3f}"]
    for system, results in change.results.items():
        first = [f"{_plain(one['id'])}{'' if not one['grade'] else ' (relevant)'}" for one in results[:_SHOWN_CHANGES]]
        lines.append(f"    - {system}: {', '.join(first) or 'nothing'}")
    return [*lines, ""]


def _plain(text: str) -> str:
    """Returns a text on one line, with what Markdown or HTML could take for its own made harmless."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", " ".join(html.escape(text, quote=False).split()))


def _sections(named: Mapping[str, Table], mark: str) -> list[str]:
    lines = []
    for name, table in named.items():
        lines += [f"{mark} {name}", "", _line(table[0]), _line(["---:"] * len(table[0])), *map(_line, table[1:]), ""]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

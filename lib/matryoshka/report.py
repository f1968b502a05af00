"""What an evaluation found, for machines (``report.json``) and for people (``report.md``)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka import storage
from matryoshka.evaluation import HEADLINES, Profile, Ranking, Row

JSON, MARKDOWN = "report.json", "report.md"

_FUNNEL = "+funnel"
_USUAL = ("base", "tuned")
_NOTE = f"A row of a `{_FUNNEL}` system stands at the dim of its shortlist; its results were reranked at wider dims."

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
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """Returns the outcome in words: the conclusion or the ranking, what happened elsewhere, and the remarks."""
        first = describe_ranking(self.ranking) if self.ranking else conclude(self.rows)
        others = [describe_change(rows, f"On {name}, ") for name, rows in self.elsewhere.items()]
        return [sentence for sentence in (first, *others, *self.remarks) if sentence]


def write(folder: Path, report: Report) -> None:
    """Writes both forms of a report, each atomically."""
    value = {
        "title": report.title,
        "sentences": report.sentences,
        "rows": _as_json(report.rows),
        "models": _as_json(report.profiles),
        "ranking": dataclasses.asdict(report.ranking) | {"best": report.ranking.best} if report.ranking else None,
        "elsewhere": {name: _as_json(rows) for name, rows in report.elsewhere.items()},
        "fingerprints": dict(report.fingerprints),
        "settings": dict(report.settings),
        **report.sections,
    }
    storage.publish_json(folder / JSON, value)
    storage.publish_bytes(folder / MARKDOWN, _markdown(report).encode())


def _as_json(values: Sequence[Row] | Sequence[Profile]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(value) for value in values]


def read_rows(folder: Path) -> list[Row]:
    """Returns the figures of a report.

    Raises:
        ValueError: There is no report in the folder.
    """
    return [Row(**row) for row in storage.read_json(folder / JSON)["rows"]]


def read_profiles(folder: Path) -> list[Profile]:
    """Returns the models of a report; reports that were made before models were weighed have none.

    Raises:
        ValueError: There is no report in the folder.
    """
    return [Profile(**profile) for profile in storage.read_json(folder / JSON).get("models", ())]


def read_sentences(folder: Path) -> list[str]:
    """Returns the outcome of a report in words.

    Raises:
        ValueError: There is no report in the folder.
    """
    return list(storage.read_json(folder / JSON)["sentences"])


def read_best(folder: Path) -> str:
    """Returns the system that a report ranks first.

    Raises:
        ValueError: There is no report in the folder, or it ranks nothing.
    """
    ranking = storage.read_json(folder / JSON).get("ranking")
    if not ranking:
        raise ValueError(f"{folder / JSON}: ranks no models. Pass an evaluation that was made with --models.")
    return str(ranking["best"])


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Returns one table per metric, headline first: a header, then a line per dim with one figure per system.

    >>> tables([Row("base", 64, "nDCG@10", 0.5), Row("tuned", 64, "nDCG@10", 0.75)])
    {'nDCG@10': [['dim', 'base', 'tuned'], ['64', '0.500', '0.750']]}
    """
    systems = list(dict.fromkeys(row.system for row in rows))
    dims = sorted({row.dim for row in rows}, reverse=True)
    metrics = sorted({row.metric for row in rows}, key=lambda metric: (metric not in HEADLINES, metric))
    values = {(row.metric, row.dim, row.system): f"{row.value:.3f}" for row in rows}
    return {
        metric: [
            ["dim", *systems],
            *([str(dim), *(values.get((metric, dim, system), "") for system in systems)] for dim in dims),
        ]
        for metric in metrics
    }


def change_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Returns the tables of two systems with one more column: what the second has more than the first, or less.

    >>> change_tables([Row("base", 64, "nDCG@10", 0.645), Row("tuned", 64, "nDCG@10", 0.612)])
    {'nDCG@10': [['dim', 'base', 'tuned', 'change'], ['64', '0.645', '0.612', '-0.033']]}
    """
    before, after = _before_and_after(rows)
    chosen = [row for row in rows if row.system in (before, after)]
    made = tables(sorted(chosen, key=lambda row: row.system != before))
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


def conclude(rows: Sequence[Row]) -> str:
    """Returns in one sentence what fine-tuning did at full width, and which dim now does what full width did before."""
    sentence = describe_change(rows)
    if not sentence:
        return ""
    before, after = _before_and_after(rows)
    _, values, dims = _headline(rows, before, after)
    width = dims[0]
    enough = [dim for dim in dims if values[after, dim] >= values[before, width]]
    if enough:
        who = "Tuned" if (before, after) == _USUAL else f"With {after}"
        sentence += f" {who}, {enough[-1]} dims reach what {width} dims reached before."
    return sentence


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
    if (before, after) != _USUAL:
        old, new = f"{old} ({before})", f"{new} ({after})"
    return f"{place}{metric} at {dims[0]} dims went from {old} to {new}: {amount}."


def _before_and_after(rows: Sequence[Row]) -> tuple[str, str]:
    """Returns the names of the two systems of a report, the earlier one first; empty ones where there are not two."""
    systems = [system for system in dict.fromkeys(row.system for row in rows) if not system.endswith(_FUNNEL)]
    if set(_USUAL) <= set(systems):
        return _USUAL
    return (systems[0], systems[1]) if len(systems) == 2 else ("", "")


def _headline(rows: Sequence[Row], before: str, after: str) -> tuple[str, dict[tuple[str, int], float], list[int]]:
    """Returns the headline measure, its figures, and the dims, widest first, at which both systems have one."""
    metric = next((name for name in HEADLINES if any(row.metric == name for row in rows)), "")
    values = {(row.system, row.dim): row.value for row in rows if row.metric == metric}
    dims = sorted({dim for system, dim in values if system == before and (after, dim) in values}, reverse=True)
    return metric, values, dims


def _markdown(report: Report) -> str:
    lines = [f"# {report.title}", "", *(line for sentence in report.sentences for line in (sentence, ""))]
    lines += _sections(tables(report.rows), "##")
    if any(row.system.endswith(_FUNNEL) for row in report.rows):
        lines += [_NOTE, ""]
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


def _sections(named: Mapping[str, Table], mark: str) -> list[str]:
    lines = []
    for name, table in named.items():
        lines += [f"{mark} {name}", "", _line(table[0]), _line(["---:"] * len(table[0])), *map(_line, table[1:]), ""]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""What an evaluation found, for machines (``report.json``) and for people (``report.md``)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka import storage
from matryoshka.evaluation import Row

JSON, MARKDOWN = "report.json", "report.md"
HEADLINE = "nDCG@10"


def write(folder: Path, title: str, rows: Sequence[Row], settings: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> None:
    """Writes both forms of a report, each atomically."""
    value = {
        "title": title,
        "rows": [dataclasses.asdict(row) for row in rows],
        "fingerprints": dict(fingerprints),
        "settings": dict(settings),
    }
    storage.publish_json(folder / JSON, value)
    storage.publish_bytes(folder / MARKDOWN, _markdown(title, rows, fingerprints).encode())


def read_rows(folder: Path) -> list[Row]:
    """Returns the figures of a report.

    Raises:
        ValueError: There is no report in the folder.
    """
    return [Row(**row) for row in storage.read_json(folder / JSON)["rows"]]


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Returns one table per metric, headline first: a header, then a line per dim with one figure per system.

    >>> tables([Row("base", 64, "nDCG@10", 0.5), Row("tuned", 64, "nDCG@10", 0.75)])
    {'nDCG@10': [['dim', 'base', 'tuned'], ['64', '0.500', '0.750']]}
    """
    systems = list(dict.fromkeys(row.system for row in rows))
    dims = sorted({row.dim for row in rows}, reverse=True)
    metrics = sorted({row.metric for row in rows}, key=lambda metric: (metric != HEADLINE, metric))
    values = {(row.metric, row.dim, row.system): f"{row.value:.3f}" for row in rows}
    return {
        metric: [
            ["dim", *systems],
            *([str(dim), *(values.get((metric, dim, system), "") for system in systems)] for dim in dims),
        ]
        for metric in metrics
    }


def conclude(rows: Sequence[Row]) -> str:
    """Returns in one sentence what fine-tuning did at full width, and which dim now does what full width did before."""
    values = {(row.system, row.dim): row.value for row in rows if row.metric == HEADLINE}
    dims = sorted({dim for system, dim in values if system == "tuned" and ("base", dim) in values}, reverse=True)
    if not dims:
        return ""
    width = dims[0]
    before, after = values["base", width], values["tuned", width]
    enough = [dim for dim in dims if values["tuned", dim] >= before]
    sentence = f"At {width} dims, {HEADLINE} went from {before:.3f} to {after:.3f}."
    if enough:
        sentence += f" Tuned, {enough[-1]} dims reach what {width} dims reached before."
    return sentence


def _markdown(title: str, rows: Sequence[Row], fingerprints: Mapping[str, Any]) -> str:
    lines = [f"# {title}", "", conclude(rows), ""]
    for metric, table in tables(rows).items():
        lines += [f"## {metric}", "", _line(table[0]), _line(["---:"] * len(table[0])), *map(_line, table[1:]), ""]
    if any("+funnel" in row.system for row in rows):
        lines += ["A row of a `+funnel` system stands at the dim of its shortlist; its results were reranked at wider dims.", ""]
    lines += ["## Fingerprints", "", *(f"- {name}: `{value}`" for name, value in fingerprints.items()), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""Pictures of what an evaluation found: quality, what it costs, and the queries behind it. None where a report lacks them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from matryoshka import charts, figures
from matryoshka.figures import CHANGE, CHOSEN, COUNT, OTHER, PLACES, SHARE, TEXT, WHOLE, Choice, Figure
from matryoshka.reading import Json, Reading, Table


def evidence(reading: Reading) -> Figure | None:
    """Returns the gain with its interval, beside what changed on other data."""
    verdict = reading.mapping("verdict")
    if verdict.get("gain") is None:
        return None
    forms = {"data": TEXT, "metric": TEXT, "dim": WHOLE, "before": PLACES, "after": PLACES, "change": CHANGE, "low": CHANGE,
             "high": CHANGE}  # fmt: skip
    here = {**verdict, "data": "this data", "change": verdict["gain"]}
    others = reading.records("verdict", "forgotten", having=("data", "change"))
    rows = [{key: own.get(key) for key in forms} for own in (here, *others)]
    needed = verdict.get("required_gain")
    rules = [{"at": 0.0, "what": "no change"}, *([{"at": needed, "what": "required"}] if needed else [])]
    base = figures.rows_of().encode(
        alt.X("change:Q", title="change of each one's own metric"), alt.Y("data:N", sort=None, title=None)
    )
    rule = figures.rows_of("rules").encode(alt.X("at:Q"))
    notes = rule.encode(y=alt.YValue(0), text="what:N")
    chart = alt.layer(
        rule.mark_rule(style="reference"),
        notes.transform_filter("!datum.at").mark_text(style="note", align="right", baseline="bottom", dx=-4, dy=-4),
        notes.transform_filter("datum.at").mark_text(style="note", align="left", baseline="bottom", dx=4, dy=-4),
        base.mark_rule(style="interval").encode(x=alt.X("low:Q"), x2="high:Q"),
        base.mark_point(style="estimate").encode(tooltip=figures.tooltips(forms)),
    )
    caption = "The dot is the change that was measured; the bar is its 95% interval."
    if needed:
        caption += f" A gain of at least {needed:.3f} was asked for."
    spec = figures.specify(chart, 48 + 40 * len(rows), rows=rows, rules=rules)
    title = "What changed, and how sure that is"
    return Figure("evidence", title, caption, spec, Table.of("evidence", title, forms, rows), is_wide=True)


def quality(reading: Reading) -> Figure | None:
    """Returns quality by dim of every system, with intervals; systems without dims are lines."""
    systems, metrics, dims = reading.systems, reading.metrics, reading.dims
    found = [row for row in reading.rows if row.get("value") is not None]
    if not dims or not found:
        return None
    forms = {"system": TEXT, "dim": WHOLE, "metric": TEXT, "value": PLACES, "low": PLACES, "high": PLACES}
    rows: list[dict[str, Any]] = [{key: row.get(key) for key in forms} for row in found]
    rows.sort(key=lambda row: (metrics.index(row["metric"]), systems.index(row["system"]), -(row["dim"] or 0)))
    dense = alt.Scale(domain=[name for name in systems if any(row["system"] == name and row["dim"] is not None for row in rows)])
    data = figures.rows_of().transform_filter("datum.metric === metric")
    axis = alt.Axis(values=dims, format="d", grid=False)
    base = data.transform_filter("isValid(datum.dim)").encode(
        alt.X("dim:Q", title="dims (log)", scale=figures.log_scale(base=2), axis=axis),
        color=alt.Color("system:N", title=None, scale=dense),
    )
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    flat = data.transform_filter("!isValid(datum.dim)").encode(y)
    note = flat.mark_text(style="note", align="right", baseline="bottom", dy=-4)
    words = [flat.mark_rule(style="reference"), note.encode(x=alt.XValue("width"), text="system:N")]
    band = base.mark_area(style="band").encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    chart = alt.layer(
        *(words if any(row["dim"] is None for row in rows) else []),
        *([band] if any(row["low"] is not None for row in rows) else []),
        base.mark_line(style="trend").encode(y),
        base.mark_point(style="spot").encode(
            y, shape=alt.Shape("system:N", title=None, scale=dense), tooltip=figures.tooltips(forms)
        ),
    ).add_params(alt.param(name="metric", value=metrics[0]))
    spec, title, choice = (
        figures.specify(chart, 340, rows=rows),
        "Quality by resolution",
        Choice("Metric", "metric", tuple(metrics)),
    )
    table = Table.of("quality", title, forms, rows)
    return Figure("quality", title, _say_quality(reading, rows, metrics[0]), spec, table, choice, is_wide=True)


def _say_quality(reading: Reading, rows: Sequence[Json], metric: str) -> str:
    before, after = reading.pair
    found = {(row["system"], row["dim"]): row["value"] for row in rows if row["metric"] == metric}
    width = reading.dims[0]
    texts = ["Shaded: 95% intervals over queries."] if any(row["low"] is not None for row in rows) else []
    enough = [dim for dim in reading.dims if found.get((after, dim), -1) >= found.get((before, width), math.inf)]
    if enough and enough[-1] != width:
        reached, needed = found[after, enough[-1]], found[before, width]
        texts.append(f"With {enough[-1]} dims, {after} reaches {reached:.3f} {metric}; {before} needed {width} for {needed:.3f}.")
    return " ".join(texts)


def resolutions(reading: Reading) -> Figure | None:
    """Returns the quality retained against the size of the vectors, one point per dim, with the recommended one marked."""
    known = reading.records("resolutions", "by_dim", having=("dim", "retained", "bytes_per_million"))
    found = [row for row in known if row["bytes_per_million"] > 0]
    if not found:
        return None
    recommended, floor = reading.part("resolutions", "recommended"), reading.part("resolutions", "floor")
    rows = [
        {**row, "MB": row["bytes_per_million"] / 1e6, "label": f"{row['dim']} dims",
         "choice": CHOSEN if row["dim"] == recommended else OTHER}
        for row in found
    ]  # fmt: skip
    rules = [{"at": floor, "what": f"floor {floor:.1%}"}] if floor is not None else []
    axis = alt.Axis(values=sorted(row["MB"] for row in rows), format=",.0f", grid=False)
    base = figures.rows_of().encode(
        alt.X("MB:Q", title="MB per million documents (log)", scale=figures.log_scale(60), axis=axis),
        alt.Y("retained:Q", title=None, axis=alt.Axis(format=".1%"), scale=alt.Scale(zero=False, padding=22)),
    )
    rule = figures.rows_of("rules").encode(alt.Y("at:Q"))
    note = rule.mark_text(style="note", align="right", baseline="top", dy=4)
    shown = {"label": TEXT, "retained": SHARE, "value": PLACES, "MB": COUNT}
    chart = alt.layer(
        rule.mark_rule(style="reference"),
        note.encode(x=alt.XValue("width"), text="what:N"),
        base.mark_line(style="trend"),
        base.mark_point(style="spot").encode(**figures.marked(), tooltip=figures.tooltips(shown)),
        _beside(base).encode(text="label:N"),
    )
    best = next((row for row in rows if row["dim"] == recommended), None)
    caption = f"Recommended: {recommended} dims, which keep {best['retained']:.1%} of the quality." if best else ""
    forms = {"dim": WHOLE, "value": PLACES, "retained": SHARE, "low": SHARE, "bytes_per_million": COUNT,
             "microseconds_per_query": COUNT}  # fmt: skip
    spec, title = figures.specify(chart, 300, rows=rows, rules=rules), "Quality kept against size"
    return Figure("resolutions", title, caption, spec, Table.of("resolutions", title, forms, rows))


def frontier(reading: Reading) -> Figure | None:
    """Returns quality against time per query of the index's plans, with the chosen one marked."""
    chosen = reading.part("frontier", "chosen")
    forms = {"name": TEXT, "plan": TEXT, "quality": SHARE, "low": SHARE, "high": SHARE, "microseconds": COUNT}
    known = reading.records("frontier", "points", having=("quality", "microseconds"))
    rows = [{key: point.get(key) for key in forms} for point in known if point["microseconds"] > 0]
    if not rows:
        return None
    for row in rows:
        row["choice"] = CHOSEN if chosen and chosen in (row["name"], row["plan"]) else OTHER
        row["label"] = row["name"] or ""
    times = [row["microseconds"] for row in rows]
    axis = alt.Axis(grid=False, values=charts.ticks(min(times), max(times)), format="~r", labelOverlap=True)
    x = alt.X("microseconds:Q", title="microseconds per query (log)", scale=figures.log_scale(60), axis=axis)
    y = alt.Y("quality:Q", title=None, axis=alt.Axis(format=".1%"), scale=alt.Scale(zero=False, padding=18))
    base = figures.rows_of().encode(x, y)
    chart = alt.layer(
        base.mark_rule(style="interval").encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(style="trend"),
        base.mark_point(style="spot").encode(**figures.marked(), tooltip=figures.tooltips(forms)),
        _beside(base).encode(text="label:N"),
    )
    caption = "Quality is the share of what exact search at full width reaches."
    best = next((row for row in rows if row["choice"] == CHOSEN), None)
    if best:
        caption += f" Chosen: {best['plan'] or best['name']}, {best['quality']:.1%} in {best['microseconds']:,.0f} microseconds."
    title = "Quality against time per query"
    return Figure("frontier", title, caption, figures.specify(chart, 300, rows=rows), Table.of("frontier", title, forms, rows))


def _beside(base: alt.Chart) -> Any:
    """Returns labels below and to the right of points, where no line that rises passes."""
    return base.mark_text(style="label", align="left", baseline="top", dx=8, dy=5)


def gains(reading: Reading) -> Figure | None:
    """Returns the change of every query at a dim, from the largest gain to the largest loss."""
    old, new = (reading.mapping("per_query", "values", name) for name in reading.pair)
    found = {dim: _changes(reading, old[dim], new[dim]) for dim in old if dim in new}
    changes = {dim: own for dim, own in found.items() if own}
    if not changes:
        return None
    dims = list(changes)
    num_queries = len(changes[dims[0]])
    drawn = figures.steps(num_queries)
    rows = [
        {"dim": dim, "share": (rank + 0.5) / len(own), **own[rank]}
        for dim, own in changes.items()
        for rank in figures.steps(len(own))
    ]
    kinds = alt.Color("kind:N", title=None, scale=alt.Scale(domain=["lost", "gained"]))
    axis = alt.Axis(format=".0%", grid=False, tickCount=5)
    share = alt.X("share:Q", title="share of queries, ordered by change", axis=axis, scale=alt.Scale(domain=[0, 1], nice=False))
    shown = {"query": TEXT, "before": PLACES, "after": PLACES, "change": CHANGE}
    chart = (
        figures.rows_of()
        .transform_filter("datum.dim === dim")
        .transform_calculate(kind="datum.change > 0 ? 'gained' : 'lost'", end=f"datum.share + {0.9 / len(drawn)}")
        .mark_bar(style="bar")
        .encode(share, alt.Y("change:Q", title=None, axis=alt.Axis(format="+.1f")), alt.X2("end:Q"), alt.Y2Datum(0), kinds)
        .encode(tooltip=figures.tooltips(shown))
        .add_params(alt.param(name="dim", value=dims[0]))
    )
    counts = [_count(dim, own) for dim, own in changes.items()]
    forms = {"dim": TEXT, "queries": COUNT, "gained": COUNT, "unchanged": COUNT, "lost": COUNT}
    first, title = counts[0], "Gains and losses by query"
    caption = f"At {dims[0]} dims {first['gained']:,} queries gained and {first['lost']:,} lost, of {num_queries:,}."
    spec, table = figures.specify(chart, 300, rows=rows), Table.of("gains", title, forms, counts)
    return Figure("gains", title, caption, spec, table, Choice("Dims", "dim", tuple(dims)), is_wide=True)


def _changes(reading: Reading, before: Sequence[float | None], after: Sequence[float | None]) -> list[dict[str, Any]]:
    """Returns what became of each query that has both values, the largest gain first."""
    texts = reading.part("per_query", "texts") or ()
    found = [
        {"query": figures.cut(text or ""), "before": old, "after": new, "change": round(new - old, 4)}
        for text, old, new in itertools.zip_longest(texts, before, after)
        if old is not None and new is not None
    ]
    return sorted(found, key=lambda query: -query["change"])


def _count(dim: str, changes: Sequence[Json]) -> dict[str, Any]:
    gained, lost = (sum(1 for query in changes if sign * query["change"] > 0) for sign in (1, -1))
    return {"dim": dim, "queries": len(changes), "gained": gained, "unchanged": len(changes) - gained - lost, "lost": lost}

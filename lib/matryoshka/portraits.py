"""Pictures of a model: where documents lie before and after fine-tuning, which layers moved, how training went, what took time.

Source: the measures are those of Kornblith et al. 2019, arXiv:1905.00414 (linear CKA), and Rousseeuw 1987,
doi:10.1016/0377-0427(87)90125-7 (silhouette).
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import altair as alt

from matryoshka import figures
from matryoshka.figures import COUNT, FIGURES, OTHER, PLACES, SHARE, TEXT, WHOLE, Figure
from matryoshka.reading import Json, Reading, Table

_NUM_GROUPS = 8  # as many colours and shapes are told apart
_SMALL = "datum.value < 0.01 ? format(datum.value, datum.value ? '~e' : 'd') : datum.label"


def maps(reading: Reading) -> list[Figure]:
    """Returns the latent space before and after: the same documents, each at its place in either."""
    shown = reading.mapping("anatomy", "map")
    documents = _documents(shown)
    if not documents:
        return []
    said = "label" if shown.get("labels") else "cluster before fine-tuning"
    common = [name for name, _ in Counter(own["label"] for own in documents if own["label"]).most_common(_NUM_GROUPS)]
    caption = f"{len(documents):,} documents in two dims ({shown.get('method') or 'projected'}), coloured by {said}."
    caption += " One that is pointed at stands out in both maps."
    return [
        _map(side, title, caption, _places(documents, side, common), common)
        for side, title in (("before", "Documents before fine-tuning"), ("after", "Documents after fine-tuning"))
    ]


def _documents(shown: Json) -> list[dict[str, Any]]:
    """Returns the documents that have a place in both maps, each with its label, or its cluster where there are no labels."""
    labels = shown.get("labels") or [None if one is None else f"cluster {one + 1}" for one in shown.get("clusters") or ()]
    columns = (shown.get("before") or (), shown.get("after") or (), labels, shown.get("ids") or (), shown.get("texts") or ())
    return [
        {"before": before, "after": after, "label": label or "", "id": name or "", "text": figures.cut(text or "")}
        for before, after, label, name, text in itertools.zip_longest(*columns)
        if _is_place(before) and _is_place(after)
    ]


def _is_place(value: Sequence[float | None] | None) -> bool:
    return value is not None and len(value) == 2 and None not in value


def _places(documents: Sequence[Json], side: str, common: Sequence[str]) -> list[dict[str, Any]]:
    """Returns each document with its place and group: its label, if that is among the commonest."""
    return [
        {"place": place, "x": own[side][0], "y": own[side][1], "label": own["label"],
         "group": own["label"] if own["label"] in common else OTHER, "id": own["id"], "text": own["text"]}
        for place, own in enumerate(documents)
    ]  # fmt: skip


def _map(side: str, title: str, caption: str, rows: Sequence[Json], common: Sequence[str]) -> Figure:
    scale = alt.Scale(domain=[*common, *([OTHER] if any(row["group"] == OTHER for row in rows) else [])])
    x, y = (axis(f"{name}:Q", axis=None, scale=_tight()) for axis, name in ((alt.X, "x"), (alt.Y, "y")))
    is_focus = "datum.place === focus"
    chart = (
        figures.rows_of()
        .mark_point(style="star")
        .encode(
            x,
            y,
            color=alt.Color("group:N", title=None, scale=scale),
            shape=alt.Shape("group:N", title=None, scale=scale),
            size=alt.condition(is_focus, alt.value(420), alt.value(34)),
            opacity=alt.condition(is_focus, alt.value(1), alt.value(0.7)),
            tooltip=figures.tooltips({"text": TEXT, "label": TEXT, "id": TEXT}),
        )
        .add_params(alt.param(name="focus", value=-1))
    )
    table = Table.of(f"map-{side}", title, {"id": TEXT, "label": TEXT, "x": FIGURES, "y": FIGURES, "text": TEXT}, rows)
    return Figure(f"map-{side}", title, caption, figures.specify(chart, 380, rows=rows), table)


def _tight() -> alt.Scale:
    return alt.Scale(zero=False, nice=False, padding=12)


def layers(reading: Reading) -> list[Figure]:
    """Returns how far the weights of each layer moved, and how far what it makes of texts did."""
    rows = [
        {
            **row,
            "layer": str(row["layer"]).removeprefix("layer "),
            "moved": 1 - row["cka"] if row.get("cka") is not None else None,
        }
        for row in reading.records("anatomy", "layers", having=("layer",))
    ]
    weights, moved = ([row for row in rows if row.get(key) is not None] for key in ("weight_change", "moved"))
    length = "Length of the change over the length of the weights."
    angle = "One minus the linear CKA of a sample before and after: 0 is the same up to rotation and scale."
    made = [
        _bars("weight_change", "How far the weights of each layer moved", length, weights, ".2%"),
        _bars("moved", "How far what each layer makes of texts moved", angle, moved, ".4f"),
    ]
    return [figure for figure in made if figure]


def _bars(key: str, title: str, caption: str, rows: Sequence[Json], form: str) -> Figure | None:
    if not rows:
        return None
    axis = alt.Axis(labelAngle=0, labelOverlap=True)
    x = alt.X("layer:N", sort=None, title="layer, input to output", axis=axis)
    y = alt.Y(f"{key}:Q", title=None, axis=alt.Axis(format="~%" if "%" in form else "~g"))
    forms = {"layer": TEXT, key: form}
    chart = figures.rows_of().mark_bar(style="bar").encode(x, y, tooltip=figures.tooltips(forms))
    name = f"layers-{key.replace('_', '-')}"
    return Figure(name, title, caption, figures.specify(chart, 260, rows=rows), Table.of(name, title, forms, rows))


def prefixes(reading: Reading) -> list[Figure]:
    """Returns by dim how much of the vectors' energy a prefix holds, and how well labels separate in it."""
    energy = "Share of the vectors' energy that the first dims hold: the higher, the less a cut loses."
    silhouette = "Mean silhouette of labels at each dim, {}: 1 is apart, 0 is mixed."
    queries = silhouette.format("of queries by what answers them")
    made = [
        _by_dim(reading, "energy", "Energy in the first dims", energy, SHARE),
        _by_dim(reading, "silhouette", "How well labels separate documents", silhouette.format("of documents"), PLACES),
        _by_dim(reading, "query_silhouette", "How well labels separate queries", queries, PLACES),
    ]
    return [figure for figure in made if figure]


def _by_dim(reading: Reading, key: str, title: str, caption: str, form: str) -> Figure | None:
    found = {name: reading.records("anatomy", "by_system", name, key) for name in reading.mapping("anatomy", "by_system")}
    rows = [{"system": name, "dim": own[0], "value": own[1]} for name, pairs in found.items() for own in pairs if _is_place(own)]
    if not rows:
        return None
    forms = {"system": TEXT, "dim": WHOLE, "value": form}
    x = alt.X("dim:Q", title="dims (log)", scale=figures.log_scale(base=2), axis=_ticks(rows, "dim"))
    y = alt.Y("value:Q", title=None, axis=alt.Axis(format=".0%" if "%" in form else "~g"), scale=alt.Scale(zero=False))
    spec, key = figures.specify(figures.lines(rows, x, y, "system", forms), 260, rows=rows), key.replace("_", "-")
    return Figure(key, title, caption, spec, Table.of(key, title, forms, rows))


def _ticks(rows: Sequence[Json], key: str) -> alt.Axis:
    return alt.Axis(values=sorted({row[key] for row in rows}), format="d", grid=False, labelOverlap=True)


def training(reading: Reading) -> list[Figure]:
    """Returns how training went: quality on dev while it ran, loss, and learning rate."""
    loss = "On the batches of training: lower is better, but only dev and test tell of quality."
    made = [
        _dev(reading),
        _curve(reading, "loss", "Loss while training", loss),
        _curve(reading, "learning_rate", "Learning rate", "Size of the steps."),
    ]
    return [figure for figure in made if figure]


def _dev(reading: Reading) -> Figure | None:
    rows = [
        {**row, "dims": f"{row['dim']} dims" if row.get("dim") else "mean of all"}
        for row in reading.records("training", "evaluations", having=("step", "metric", "value"))
    ]
    if not rows:
        return None
    forms = {"step": COUNT, "dim": WHOLE, "metric": TEXT, "value": PLACES}
    x = alt.X("step:Q", scale=alt.Scale(nice=False, padding=16), axis=_ticks(rows, "step"))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    spec, title = figures.specify(figures.lines(rows, x, y, "dims", forms), 260, rows=rows), "Quality on dev while training"
    caption = f"{rows[0]['metric']} on the dev split, on which nothing is trained."
    return Figure("dev", title, caption, spec, Table.of("dev", title, forms, rows), is_wide=True)


def _curve(reading: Reading, key: str, title: str, caption: str) -> Figure | None:
    found = reading.records("training", "curves", having=("step", key))
    if not found:
        return None
    rows = [{"step": found[place]["step"], key: found[place][key]} for place in figures.steps(len(found))]
    forms = {"step": COUNT, key: FIGURES}
    x = alt.X("step:Q", axis=alt.Axis(grid=False, tickCount=6))
    y = alt.Y(f"{key}:Q", title=None, axis=alt.Axis(labelExpr=_SMALL))
    chart = figures.rows_of().mark_line(style="trend").encode(x, y, tooltip=figures.tooltips(forms))
    name = key.replace("_", "-")
    return Figure(name, title, caption, figures.specify(chart, 240, rows=rows), Table.of(name, title, forms, rows))


def embedding(reading: Reading) -> Figure | None:
    """Returns where the time of embedding went."""
    seconds = reading.mapping("embedding", "seconds")
    total = sum(seconds.values())
    if not total:
        return None
    rows = [
        {"phase": phase, "seconds": own, "share": own / total, "label": f"{own:,.1f} s, {own / total:.0%}"}
        for phase, own in seconds.items()
    ]
    longest, amounts = max(rows, key=lambda row: row["seconds"]), reading.mapping("embedding")
    room = alt.Scale(domainMax=1.5 * longest["seconds"])
    axis = alt.Axis(grid=False, tickCount=5)
    x = alt.X("seconds:Q", title="seconds of all workers", axis=axis, scale=room)
    base = figures.rows_of().encode(x, alt.Y("phase:N", sort=None, title=None))
    forms = {"phase": TEXT, "seconds": ",.2f", "share": SHARE}
    bars = base.mark_bar(style="bar").encode(tooltip=figures.tooltips(forms))
    chart = alt.layer(bars, base.mark_text(style="label", align="left", dx=6).encode(text="label:N"))
    known = [f"{amounts[key]:,} {key}" for key in ("documents", "tokens") if amounts.get(key)]
    caption = f"{' and '.join(known)}: {longest['share']:.0%} of the time went to '{longest['phase']}'."
    spec, title = figures.specify(chart, 40 + 34 * len(rows), rows=rows), "Where the time of embedding went"
    return Figure("embedding", title, caption.removeprefix(": "), spec, Table.of("embedding", title, forms, rows), is_wide=True)

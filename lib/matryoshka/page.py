"""The report as one HTML file that needs no network: verdict, pictures, tables, and a search page. The one door for Jinja.

All of it comes from ``report.json``, any part of which may be missing. Texts of documents and queries reach the page in two ways
only: escaped by the template, or inside JSON that scripts put into text nodes. A policy in the file forbids every request, and
every script and style but its own, which it knows by their digests.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from matryoshka import charts, findings, portraits, report, storage
from matryoshka.figures import Figure
from matryoshka.reading import Json, Reading, Table
from matryoshka.storage import Place
from matryoshka.verdict import DO_NOT_BOTHER, FINE_TUNE, NOT_ENOUGH

HTML = "report.html"

_WEB = Path(__file__).parent / "web"
_SCRIPTS = ("scheme.js", "charts.js", "tables.js", "queries.js", "search.js")
_VERDICTS: Mapping[str, tuple[str, str, str]] = {
    FINE_TUNE: ("Fine-tune", "good", "✓"),
    DO_NOT_BOTHER: ("Do not bother", "bad", "✕"),
    NOT_ENOUGH: ("Not enough evidence", "unsure", "?"),
}
_FACTS = {"settings": "Settings", "environment": "Environment", "fingerprints": "Fingerprints"}
# Within a script element these could end it or begin a comment, or are line ends to some readers of JavaScript.
_UNSAFE = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


@dataclass(frozen=True, slots=True)
class _Section:
    """A part of the page; one without content is left out. ``is_filled``: the template adds content of its own."""

    key: str
    title: str
    lead: str
    figures: Sequence[Figure | None] = ()
    tables: Sequence[Table] = ()
    sentences: Sequence[str] = ()
    commands: Sequence[str] = ()
    is_filled: bool = False

    @property
    def has_content(self) -> bool:
        return any(self.figures) or any(table.rows for table in self.tables) or bool(self.commands) or self.is_filled


@dataclass(frozen=True, slots=True)
class _Number:
    """One of the few numbers at the top."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The outcome, as it stands at the top."""

    words: str
    tone: str
    sign: str
    reason: str
    caution: str
    numbers: Sequence[_Number]


def write(folder: Place, output: Place | None = None) -> Place:
    """Makes the page of the report in a folder, beside it or elsewhere, atomically; returns where.

    No manifest names it: it says nothing that the report does not, and may be made again in the style of a later version.

    Raises:
        ValueError: There is no report in the folder.
    """
    path = output or folder / HTML
    value = storage.read_json(folder / report.JSON)
    if not isinstance(value, Mapping):
        raise ValueError(f"{folder / report.JSON}: not a report (found {type(value).__name__}). Pass another folder.")
    storage.publish_bytes(path, render(value).encode())
    return path


def restore(folder: Place) -> None:
    """Makes the page of a report that is kept as it is, if the page is missing."""
    if not (folder / HTML).is_file():
        write(folder)


def render(value: Json) -> str:
    """Returns the page of a report, given as the value of its JSON."""
    reading = Reading(_tame(value))
    sections = [section for section in _sections(reading) if section.has_content]
    specs = {figure.key: figure.spec for section in sections for figure in section.figures if figure}
    data = {"figures": specs, "pair": reading.pair, **{key: reading.part(key) for key in ("searches", "per_query")}}
    style, scripts = _source("page.css"), [charts.browser_library(), "\n".join(map(_source, _SCRIPTS))]
    return _template().render(
        title=reading.part("title") or "Report",
        verdict=_verdict(reading),
        sentences=_sentences(reading),
        sections=sections,
        extremes_place=f" at {reading.part('extremes', 'dim')} dims" if reading.part("extremes", "dim") else "",
        gained=_extremes(reading, "gained"),
        lost=_extremes(reading, "lost"),
        has_queries=all(reading.part("per_query", key) for key in ("ids", "texts", "values")),
        policy=_policy(style, scripts),
        style=style,
        scripts=scripts,
        data=_embed(data),
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(_WEB)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _show
    return environment.get_template("page.html")


def _source(name: str) -> str:
    return (_WEB / name).read_text("utf-8")


def _policy(style: str, scripts: Sequence[str]) -> str:
    """Returns the content security policy of a page with one style sheet and some scripts."""
    allowed = " ".join(map(_digest, scripts))
    return f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embed(value: Any) -> str:
    """Returns a value as JSON that can stand in a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)


def _tame(value: Any) -> Any:
    """Returns a JSON value without what cannot be written: halves of surrogate pairs are replaced, and NaN is nothing."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_tame(key): _tame(own) for key, own in value.items()}
    return [_tame(own) for own in value] if isinstance(value, list | tuple) else value


def _show(value: float, form: str) -> str:
    """Returns a number as people read it, with a minus sign as wide as the plus."""
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def _sentences(reading: Reading) -> list[str]:
    """Returns what the report says in words, but for the verdict, which stands above it, and the model, which has a section."""
    reason, elsewhere = reading.part("verdict", "reason"), reading.records("anatomy", "sentences")
    return [one for one in reading.records("sentences") if one not in elsewhere and not (reason and reason in one)]


def _verdict(reading: Reading) -> _Verdict | None:
    verdict = reading.mapping("verdict")
    if "decision" not in verdict:
        return None
    decision = str(verdict["decision"])
    caution = ""
    if verdict.get("is_small"):
        caution = f"{verdict.get('num_queries') or 'So few'} queries tell little."
        if verdict.get("detectable_gain") is not None:
            caution += f" Only a true gain of {verdict['detectable_gain']:.3f} or more would be shown in four of five such sets."
    known = _VERDICTS.get(decision, (decision, "unsure", "?"))
    return _Verdict(*known, verdict.get("reason") or "", caution, list(_numbers(verdict)))


def _numbers(verdict: Json) -> Iterable[_Number]:
    """Yields what was gained, what it cost, and what it saves, as far as each was measured."""
    if verdict.get("gain") is not None:
        place = f"{verdict.get('metric')} gained at {verdict.get('dim')} dims"
        yield _Number(place, _show(verdict["gain"], "+.3f"), "; ".join(_gain_details(verdict)))
    training = verdict.get("training") or {}
    if training.get("device_hours") is not None:
        hours, num_devices = training["device_hours"], training.get("num_devices") or 1
        amount = f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        device = report.DEVICES.get(str(training.get("device")), "worker") + "s" * (num_devices > 1)
        yield _Number("Training cost", amount, f"of device time, measured: {num_devices} {device}, their times added up")
    saving = verdict.get("saving") or {}
    if all(saving.get(key) for key in ("dim", "retained", "bytes_per_million_before", "bytes_per_million")):
        before, after = saving["bytes_per_million_before"], saving["bytes_per_million"]
        detail = f"{_bytes(before)} to {_bytes(after)} per million documents; keeps {saving['retained']:.1%} of the quality"
        yield _Number(f"Smaller vectors at {saving['dim']} dims", _show(after / before - 1, "+.0%"), detail)


def _gain_details(verdict: Json) -> Iterable[str]:
    if verdict.get("before") is not None and verdict.get("after") is not None:
        yield f"{verdict['before']:.3f} to {verdict['after']:.3f}"
    if verdict.get("low") is not None and verdict.get("high") is not None:
        yield f"95% interval {_show(verdict['low'], '+.3f')} to {_show(verdict['high'], '+.3f')}"
    if verdict.get("p_value") is not None:
        yield "p < 0.001" if verdict["p_value"] < 0.001 else f"p = {verdict['p_value']:.3f}"
    if verdict.get("num_queries"):
        yield f"{verdict['num_queries']:,} queries"


def _bytes(amount: float) -> str:
    """Returns an amount of bytes in words.

    >>> _bytes(1_536_000_000), _bytes(256e6)
    ('1.5 GB', '256 MB')
    """
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:,.0f} MB"


def _sections(reading: Reading) -> list[_Section]:
    search = "Real queries of the evaluation, searched beforehand: their results at every resolution side by side."
    model = "What fine-tuning did to the model: where documents lie, and which layers moved."
    time = "How training went, and where the time of embedding went."
    details = "For the engineer: commands, settings, versions and fingerprints."
    costs = [findings.resolutions(reading), findings.frontier(reading)]
    looks = [*portraits.maps(reading), *portraits.layers(reading), *portraits.prefixes(reading)]
    curves = [*portraits.training(reading), portraits.embedding(reading)]
    facts = [_facts(reading, key, title) for key, title in _FACTS.items()]
    commands = list(map(str, reading.records("environment", "commands")))
    has_queries = bool(reading.part("extremes") or reading.part("per_query", "ids"))
    evidence, quality, gains = findings.evidence(reading), findings.quality(reading), findings.gains(reading)
    return [
        _Section("evidence", "Evidence", "Is the gain real, and what did it cost elsewhere?", [evidence], _elsewhere(reading)),
        _Section(
            "quality",
            "Quality",
            "How good is each system at each resolution?",
            [quality],
            [_ranking(reading), _comparisons(reading)],
        ),
        _Section("cost", "Cost", "What does a little quality save?", costs, [_models(reading)]),
        _Section("search", "Search", search, is_filled=bool(reading.part("searches", "queries"))),
        _Section("queries", "Queries", "Which queries gained, and which lost?", [gains], is_filled=has_queries),
        _Section("model", "Model", model, looks, [_spread(reading)], reading.records("anatomy", "sentences")),
        _Section("training", "Training", time, curves, [_amounts(reading)]),
        _Section("details", "Details", details, (), facts, commands=commands),
    ]


def _elsewhere(reading: Reading) -> list[Table]:
    """Returns the figures of the same systems on other data."""
    forms = {"metric": "", "system": "", "dim": "d", "value": ".4f", "low": ".4f", "high": ".4f"}
    return [
        Table.of(f"elsewhere-{name}", f"On other data: {name}", forms, reading.records("elsewhere", name))
        for name in reading.mapping("elsewhere")
    ]


def _comparisons(reading: Reading) -> Table:
    forms = {"before": "", "before_dim": "d", "after": "", "dim": "d", "metric": "", "gain": "+.4f", "low": "+.4f",
             "high": "+.4f", "p_value": ".4f", "p_corrected": ".4f", "wins": "d", "ties": "d", "losses": "d",
             "detectable": ".4f"}  # fmt: skip
    return Table.of("comparisons", "Paired comparisons", forms, reading.records("comparisons"))


def _ranking(reading: Reading) -> Table:
    metric, dims = reading.part("ranking", "metric"), ", ".join(map(str, reading.records("ranking", "dims")))
    rows = [{"system": name, "mean": mean} for name, mean in reading.mapping("ranking", "means").items()]
    return Table.of("ranking", f"Ranking: mean {metric} over {dims} dims", {"system": "", "mean": ".4f"}, rows)


def _models(reading: Reading) -> Table:
    forms = {"system": "", "num_bytes": ",", "num_parameters": ",", "width": "d", "max_tokens": "d",
             "documents_per_second": ",.0f", "queries_per_second": ",.0f"}  # fmt: skip
    return Table.of("models", "Size and speed of the models", forms, reading.records("models"))


def _spread(reading: Reading) -> Table:
    """Returns how each system's vectors lie on the sphere.

    Source: Wang & Isola 2020, arXiv:2005.10242.
    """
    rows = [{"system": name, **own} for name, own in reading.mapping("anatomy", "by_system").items()]
    forms = {"system": "", "alignment": ".4f", "uniformity": ".4f"}
    return Table.of("spread", "Alignment of pairs, and uniformity: lower is better for both", forms, rows)


def _amounts(reading: Reading) -> Table:
    """Returns how much was trained on and embedded."""
    wanted = {"training": ("num_pairs", "seconds"), "embedding": ("documents", "tokens", "padding")}
    found = [(stage, key, reading.part(stage, key)) for stage, keys in wanted.items() for key in keys]
    rows = [
        {"stage": stage, "what": key.removeprefix("num_"), "amount": amount}
        for stage, key, amount in found
        if isinstance(amount, int | float)
    ]
    return Table.of("amounts", "Amounts", {"stage": "", "what": "", "amount": ",.10g"}, rows)


def _facts(reading: Reading, key: str, title: str) -> Table:
    found = {name: value for name, value in (reading.part(key) or {}).items() if name != "commands"}
    return Table.of(key, title, {"name": "", "value": ""}, [{"name": name, "value": value} for name, value in _flatten(found)])


def _flatten(value: Json, before: str = "") -> Iterable[tuple[str, str]]:
    """Yields the values of nested mappings, each under the names that lead to it.

    >>> dict(_flatten({"finetune": {"dims": [64, 32]}, "model": "minilm"}))
    {'finetune.dims': '[64, 32]', 'model': 'minilm'}
    """
    for name, own in value.items():
        if isinstance(own, Mapping) and own:
            yield from _flatten(own, f"{before}{name}.")
        else:
            yield f"{before}{name}", own if isinstance(own, str) else json.dumps(own, ensure_ascii=False)


def _extremes(reading: Reading, key: str) -> list[dict[str, Any]]:
    return [
        {
            **{name: query[name] for name in ("before", "after")},
            "text": query.get("text") or "",
            "change": query["after"] - query["before"],
            "results": {name: _results(own or ()) for name, own in (query.get("results") or {}).items()},
        }
        for query in reading.records("extremes", key, having=("before", "after"))
    ]


def _results(found: Sequence[Json | None]) -> list[dict[str, Any]]:
    return [{"text": one.get("text") or "", "grade": one.get("grade")} for one in found if one]

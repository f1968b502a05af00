"""A report with everything that a report can hold, made up so that it reads like a real one: the same for the same arguments."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

DIMS = (384, 256, 128, 64, 32)
METRICS = ("nDCG@10", "Recall@10", "Recall@100", "MRR@10", "MAP@100", "Success@1")
HOSTILE = (
    "<script>window.harmed = true; alert(1)</script>",
    '</script><img src=x onerror="window.harmed = true">',
    "<!-- <script> ]]> &lt;b&gt; \u2028\u2029 {{ 7 * 7 }} {% raw %} ${7 * 7} `",
    "\u202eright to left, zalgo Z\u0351\u036b\u0343, null \u0000, lone \ud800, emoji \U0001f9ec, \ufeffmark",
    '=HYPERLINK("http://example.invalid", "x")',
    "javascript:window.harmed=true",
    "' onmouseover='window.harmed = true' x='",
)

_TOPICS = (
    "Alzheimer disease",
    "asthma",
    "celiac disease",
    "cystic fibrosis",
    "diabetes",
    "glaucoma",
    "gout",
    "hepatitis B",
    "lupus",
    "migraine",
    "osteoporosis",
    "psoriasis",
)
_ASKED = (
    "What are the symptoms of {}?",
    "How is {} treated?",
    "What causes {}?",
    "Who is at risk for {}?",
    "How is {} diagnosed?",
)
_ANSWER = (
    "{} is usually recognised by its course over weeks or months. A physician takes the history, examines the patient and orders"
    " blood tests; imaging follows where the findings are unclear. Most people are treated with medicine and regular visits."
)
_QUALITY = {
    ("base", 384): 0.691, ("base", 256): 0.695, ("base", 128): 0.662, ("base", 64): 0.607, ("base", 32): 0.450,
    ("tuned", 384): 0.847, ("tuned", 256): 0.846, ("tuned", 128): 0.847, ("tuned", 64): 0.833, ("tuned", 32): 0.824,
    ("tuned+funnel", 64): 0.846, ("tuned+int8", 384): 0.845, ("bm25", None): 0.547,
}  # fmt: skip


def report(num_queries: int = 300, hostile: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the value of a report's JSON; texts of documents, queries and labels begin with one of ``hostile``, if any."""
    draw, texts = np.random.default_rng(7), _Texts(hostile)
    values = _per_query(draw, num_queries)
    ids, queries = [f"q{number}" for number in range(num_queries)], [texts.query(number) for number in range(num_queries)]
    verdict = _verdict(num_queries)
    return record(
        title="Before and after fine-tuning",
        sentences=[
            f"Verdict: {verdict['decision']}. {verdict['reason']}",
            "nDCG@10 at 384 dims went from 0.691 to 0.847: 0.156 was gained. Tuned, 32 dims reach what 384 dims reached before.",
            "On scifact, nDCG@10 at 384 dims went from 0.645 to 0.612: 0.033 was lost.",
            "Upper half of the layers against the lower half: their weights changed by 3.90% against 1.30%.",
        ],
        rows=_rows(),
        models=[_model("base", 96.8, 958.6), _model("tuned", 258.2, None)],
        ranking=None,
        elsewhere={"scifact": [_row("base", 384, "nDCG@10", 0.645), _row("tuned", 384, "nDCG@10", 0.612)]},
        fingerprints=record(
            data="d38fb1bf8ab818f3d063da50fdb41f69833f3f8daed3cae4756ddcc8fd077ce4", model="6af82f790692e212400204"
        ),
        settings=record(output="runs/medquad", model="minilm", finetune=record(dims=list(DIMS), learning_rate=5e-5), tune=None),
        verdict=verdict,
        comparisons=[_comparison(metric, dim, num_queries) for metric in METRICS for dim in DIMS],
        per_query=record(metric="nDCG@10", ids=ids, texts=queries, values=values),
        extremes=_extremes(texts, values),
        resolutions=_resolutions(),
        frontier=_frontier(),
        searches=_searches(texts, draw, min(num_queries, 100)),
        anatomy=_anatomy(texts, draw),
        training=_training(draw),
        embedding=record(
            seconds=record(compute=402.3, read=35.8, write=6.9, idle=12.4), documents=16_373, tokens=3_912_447, padding=0.0
        ),
        environment=record(
            versions=record(torch="2.13.0", ray="2.60.0"),
            python="3.12.4",
            hardware=record(cpu="AMD EPYC", cores=2),
            commands=["python -m jobs.finetune --data runs/medquad/data", "python -m jobs.report --run runs/medquad"],
        ),
    )


def record(**values: Any) -> dict[str, Any]:
    """Returns a JSON object."""
    return values


class _Texts:
    def __init__(self, hostile: Sequence[str]) -> None:
        self._hostile = hostile

    def _taint(self, number: int, text: str) -> str:
        return f"{self._hostile[number % len(self._hostile)]} {text}" if self._hostile else text

    def query(self, number: int) -> str:
        asked = _ASKED[number % len(_ASKED)].format(_TOPICS[number // len(_ASKED) % len(_TOPICS)])
        return self._taint(number, f"{asked} (case {number})")

    def document(self, number: int) -> str:
        return self._taint(number, f"{_ANSWER.format(_TOPICS[number % len(_TOPICS)].capitalize())} Note {number}.")

    def label(self, number: int) -> str:
        return self._taint(number, _TOPICS[number % len(_TOPICS)])


def _rows() -> list[dict[str, Any]]:
    factors = zip(METRICS, (1.0, 1.06, 1.12, 0.97, 0.94, 0.9), strict=True)
    return [_row(system, dim, metric, value * factor) for metric, factor in factors for (system, dim), value in _QUALITY.items()]


def _row(system: str, dim: int | None, metric: str, value: float) -> dict[str, Any]:
    return record(system=system, dim=dim, metric=metric, value=value, low=value - 0.018, high=value + 0.017)


def _model(system: str, documents_per_second: float, queries_per_second: float | None) -> dict[str, Any]:
    size = record(num_bytes=90_868_376, num_parameters=22_713_216, width=384, max_tokens=256)
    return record(system=system, **size, documents_per_second=documents_per_second, queries_per_second=queries_per_second)


def _verdict(num_queries: int) -> dict[str, Any]:
    first = record(before=0.645, after=0.612, change=-0.033, low=-0.052, high=-0.014)
    second = record(before=0.821, after=0.816, change=-0.005, low=None, high=None)
    return record(
        decision="fine-tune",
        reason="nDCG@10 at 384 dims changed by +0.156 (+0.141 to +0.171), more than the 0.010 that was asked for.",
        **record(metric="nDCG@10", dim=384, before=0.691, after=0.847, gain=0.156, low=0.141, high=0.171, p_value=0.0001),
        **record(num_queries=num_queries, required_gain=0.01, detectable_gain=0.021, is_small=num_queries < 50),
        forgotten=[
            record(data="scifact", metric="nDCG@10", dim=384, **first),
            record(data="stsb", metric="Spearman", dim=384, **second),
        ],
        training=record(device="cpu", device_hours=0.283, num_devices=2),
        saving=record(dim=64, retained=0.983, bytes_per_million_before=768_000_000, bytes_per_million=128_000_000),
    )


def _comparison(metric: str, dim: int, num_queries: int) -> dict[str, Any]:
    gain = _QUALITY["tuned", dim] - _QUALITY["base", dim]
    wins, losses = num_queries // 2, num_queries // 10
    return record(
        **record(
            before="base", after="tuned", dim=dim, before_dim=dim, metric=metric, gain=gain, low=gain - 0.015, high=gain + 0.015
        ),
        **record(p_value=0.0001, p_corrected=0.003, wins=wins, ties=num_queries - wins - losses, losses=losses, detectable=0.02),
    )


def _per_query(draw: np.random.Generator, num_queries: int) -> dict[str, dict[str, list[float]]]:
    hardness = draw.beta(2.2, 1.0, num_queries)
    values: dict[str, dict[str, list[float]]] = {}
    for (system, dim), mean in _QUALITY.items():
        if system in ("base", "tuned", "bm25"):
            made = np.clip(hardness * mean / 0.69 + draw.normal(0, 0.18, num_queries), 0, 1)
            values.setdefault(system, {})[str(dim or "")] = made.round(4).tolist()
    return values


def _extremes(texts: _Texts, values: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    before, after = values["base"]["384"], values["tuned"]["384"]
    order = sorted(range(len(before)), key=lambda place: after[place] - before[place])

    def results(place: int, at: int) -> list[dict[str, Any]]:
        numbers = enumerate(range(place, place + 3))
        return [record(id=f"d{number}", text=texts.document(number), grade=1 if rank == at else None) for rank, number in numbers]

    def tell(place: int) -> dict[str, Any]:
        found = record(base=results(place, 2), tuned=results(place, 0))
        return record(query_id=f"q{place}", text=texts.query(place), before=before[place], after=after[place], results=found)

    gained, lost = ([tell(place) for place in places[:10]] for places in (order[::-1], order))
    return record(before="base", after="tuned", dim=384, metric="nDCG@10", gained=gained, lost=lost)


def _resolutions() -> dict[str, Any]:
    values = {dim: _QUALITY["tuned", dim] for dim in DIMS}
    kept = {
        dim: record(value=value, retained=value / values[384], low=value / values[384] - 0.006) for dim, value in values.items()
    }
    costs = {dim: record(bytes_per_million=2_000_000 * dim, microseconds_per_query=0.9 * dim) for dim in DIMS}
    by_dim = [record(dim=dim, **kept[dim], **costs[dim]) for dim in DIMS]
    return record(system="tuned", floor=0.975, recommended=64, by_dim=by_dim)


def _frontier() -> dict[str, Any]:
    plans = [
        (None, "32:20,384:10", 0.952, 37.0),
        ("fast", "32:50,384:10", 0.981, 52.0),
        ("balanced", "64:50,384:10", 0.996, 101.0),
        ("high", "64:200,384:50", 0.9994, 233.0),
    ]
    points = [
        record(plan=plan, name=name, quality=quality, low=quality - 0.004, high=quality + 0.0005, microseconds=microseconds)
        for name, plan, quality, microseconds in plans
    ]
    return record(measure="nDCG@10", chosen="64:50,384:10", points=points)


def _searches(texts: _Texts, draw: np.random.Generator, num_queries: int) -> dict[str, Any]:
    documents = {f"d{number}": texts.document(number) for number in range(4 * num_queries)}
    queries = []
    for number in range(num_queries):
        relevant = {f"d{number}": 2, f"d{number + 1}": 1}
        drawn = [f"d{place}" for place in draw.choice(4 * num_queries, 14, replace=False)]
        others = [name for name in drawn if name not in relevant]
        results = {str(dim): _ranked([*relevant, *others], dim) for dim in DIMS}
        funnel = [record(dim=64, kept=50, relevant_kept=2), record(dim=384, kept=10, relevant_kept=2 - (number % 3 == 0))]
        shown = {name for own in results.values() for name, _ in own}
        counted = record(num_relevant=len(relevant), relevant={name: grade for name, grade in relevant.items() if name in shown})
        queries.append(record(id=f"q{number}", text=texts.query(number), **counted, results=results, funnel=funnel))
    # Of labelled text thousands are relevant, of which ten are shown.
    queries[-1]["num_relevant"] = 2_000
    return record(documents=documents, queries=queries)


def _ranked(documents: list[str], dim: int) -> list[tuple[str, float]]:
    """Returns ten results, which are worse at fewer dims."""
    kept = documents[1:] if dim == 32 else documents
    last = 2 + 64 // dim
    mixed = [kept[0], *kept[1:last][::-1], *kept[last:]]
    return [(name, round(0.9 - 0.03 * rank, 4)) for rank, name in enumerate(mixed[:10])]


def _anatomy(texts: _Texts, draw: np.random.Generator, num_documents: int = 360) -> dict[str, Any]:
    names = ["embeddings", *(f"layer {number}" for number in range(6)), "head"]
    layers = [
        record(layer=name, weight_change=0.002 + 0.004 * place**1.4, cka=1 - 0.008 * place**1.9)
        for place, name in enumerate(names)
    ]
    layers[-1]["weight_change"] = None
    topics = np.arange(num_documents) % len(_TOPICS)
    middles = np.stack([np.cos(topics / len(_TOPICS) * math.tau), np.sin(topics / len(_TOPICS) * math.tau)], axis=1)
    before, after = (scale * middles + draw.normal(0, spread, middles.shape) for scale, spread in ((0.9, 0.55), (2.4, 0.26)))
    shown = record(
        method="PCA",
        ids=[f"d{number}" for number in range(num_documents)],
        labels=[texts.label(int(topic)) for topic in topics],
        clusters=None,
        texts=[texts.document(number)[:120] for number in range(num_documents)],
        before=before.round(3).tolist(),
        after=after.round(3).tolist(),
    )
    said = ["Upper half of the layers against the lower half: their weights changed by 3.90% against 1.30%."]
    return record(
        sentences=said, layers=layers, by_system=record(base=_space(0.7, 0.62, 0.05), tuned=_space(0.4, 0.8, 0.35)), map=shown
    )


def _space(alignment: float, share: float, silhouette: float) -> dict[str, Any]:
    energy = [[dim, (dim / 384) ** (1 - share)] for dim in DIMS]
    apart = [[dim, silhouette * (dim / 384) ** 0.2] for dim in DIMS]
    return record(alignment=alignment, uniformity=-2.5 - alignment, energy=energy, silhouette=apart, query_silhouette=apart)


def _training(draw: np.random.Generator, num_steps: int = 200) -> dict[str, Any]:
    noise = draw.normal(0, 0.05, num_steps)
    rates = [5e-5 * min((step + 1) / 20, (num_steps - step) / (num_steps - 20)) for step in range(num_steps)]
    losses = [0.5 + 2.2 * math.exp(-step / 40) + noise[step] for step in range(num_steps)]
    curves = [record(step=step + 1, loss=losses[step], learning_rate=rates[step]) for step in range(num_steps)]
    values = {dim: (_QUALITY["base", dim], _QUALITY["tuned", dim]) for dim in DIMS}
    evaluations = [
        record(step=step, metric="nDCG@10", dim=dim, value=old + (new - old) * (1 - math.exp(-step / 60)))
        for step in (50, 100, 150, 200)
        for dim, (old, new) in {None: (0.621, 0.839), **values}.items()
    ]
    return record(curves=curves, evaluations=evaluations, seconds=509.0, num_pairs=11_598)

"""Measures searching against other software's indexes: the funnel and its peers, over the same vectors, in turn."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import benchmark_vectors, measurement
from jobs.benchmark_vectors import Vectors
from jobs.terminal import say, show_table
from matryoshka import charts, storage, tradeoffs
from matryoshka.nested import Float32Array, FunnelPlan, Step
from matryoshka.storage import Place
from matryoshka.topk import IntArray
from matryoshka.tradeoffs import EXACT, OUR_EXACT, OURS, Point

if TYPE_CHECKING:
    from jobs.benchmark import Settings
    from matryoshka.indexing import IndexStore
    from matryoshka.search_peers import Peer, PeerIndex

Search = Callable[[Float32Array], IntArray]

LABELS = {
    OURS: "this project",
    OUR_EXACT: "this project, exact",
    EXACT: "FAISS flat, exact",
    "hnsw16": "FAISS HNSW, M 16",
    "hnsw32": "FAISS HNSW, M 32",
    "ivf_flat": "FAISS IVF-Flat",
    "ivf_pq_refine": "FAISS IVF-PQ, refined",
    "hnswlib": "hnswlib",
    "usearch": "usearch",
}

_SINGLE_QUERIES = 30
_WARM_UP_QUERIES = 64
_BATCH = 1_024  # fewer queries at once are no batch to speak of
_PAIR_ROWS = 4_096
_FLOORS = (0.9, 0.95, 0.985, 0.99, 0.995)
_GOOD_RECALL = 0.99
_SLACK = 1.15  # of the estimate of memory
_KEEPS = (10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 400)
_DIALS = (
    (",dense", "nprobe", (1, 2, 4, 8, 16, 32, 64, None), (10, 15, 20, 25, 30, 40, 50, 70, 100, 200)),  # None: as it comes
    ("IVF", "nprobe", (4, 8, 16, 32, 64, 128, 256), (20, 50, 100, 200, 400)),
    ("HNSW", "efSearch", (32, 64, 128, 256, 512), (20, 50, 100, 200, 400)),
)


@dataclass(frozen=True, slots=True)
class System:
    """Something that searches, at several settings.

    Attributes:
        settings: How to search at each of them.
        build_seconds: What it took to make.
        memory_bytes: The index, and the vectors that reranking looks at.
        disk_bytes: All of its files.
    """

    settings: Mapping[str, Search]
    build_seconds: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One setting in one round."""

    batch_seconds: float
    single_seconds: tuple[float, ...]
    rows: IntArray


def measure(settings: "Settings", _device: str, output: Place) -> dict[str, Any]:
    """Returns the report of all systems, and draws it beside the output.

    Raises:
        ValueError: The index, the queries, the judgements or the options cannot be used.
        RuntimeError: Memory does not suffice to hold all systems at once.
    """
    from jobs import benchmark_scale

    device = check_place(settings)
    storage.keep_apart(output, storage.place(settings.index) if settings.index else None)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(measurement.scratch(output))
        index, vectors = benchmark_vectors.prepare(settings, scratch)
        benchmark_scale.check(settings, len(vectors.documents))
        stack.enter_context(all_cores())
        names, not_run = choose_peers(settings.peers, vectors.documents.shape[1])
        systems = _measure_all(names, index, vectors, scratch, settings.rounds)
        scale = benchmark_scale.measure(settings, vectors, scratch / "scale") if settings.scale else []
        report = _make_report(settings, device, index, vectors, systems, not_run, scale)
    report["plots"] = _draw(report, output)
    return report


def _measure_all(
    names: Sequence[str], index: "IndexStore", vectors: Vectors, scratch: Path, num_rounds: int
) -> dict[str, dict[str, Any]]:
    """Returns costs and points of ours and of some peers; none of them is in memory afterwards.

    Raises:
        RuntimeError: Memory does not suffice to hold them all at once, as turns demand.
    """
    _check_memory(names, index, vectors)
    systems = {**our_systems(index, vectors), **{name: build_peer(name, vectors, scratch) for name in names}}
    points = measure_systems(systems, vectors, num_rounds)
    return {
        name: {
            "build_seconds": own.build_seconds,
            "memory_bytes_per_document": own.memory_bytes / len(vectors.documents),
            "disk_bytes_per_document": own.disk_bytes / len(vectors.documents),
            "points": points[name],
        }
        for name, own in systems.items()
    }


def check_place(settings: "Settings") -> str:
    """Returns the device, the CPU.

    Raises:
        ValueError: A GPU or a cluster is named.
    """
    from jobs import cluster

    if settings.device == "cuda":
        raise ValueError("--device cuda: benchmark search compares systems on the CPU. Pass --device cpu, or leave it out.")
    cluster.check_alone()
    return "cpu"


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Gives torch all processors while the block runs; the peers are told to take as many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(measurement.num_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_peers(wanted: Sequence[str], width: int) -> tuple[list[str], dict[str, str]]:
    """Returns the peers to run, exact search always first, and why others do not run.

    Raises:
        ValueError: There is no such peer.
    """
    from matryoshka.search_peers import PEERS, why_not

    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers {unknown[0]}: no such peer. Choose from {', '.join(PEERS)}.")
    reasons = {name: why_not(name, width) for name in PEERS}
    reasons |= {name: "left out by --peers" for name in PEERS if wanted and name not in wanted and name != EXACT}
    return [name for name in PEERS if not reasons[name]], {name: reason for name, reason in reasons.items() if reason}


def _check_memory(names: Sequence[str], index: "IndexStore", vectors: Vectors) -> None:
    """Checks that all systems fit into memory together, as they must for turns.

    Raises:
        RuntimeError: They do not.
    """
    from matryoshka.search_peers import PEERS

    num_documents, width = vectors.documents.shape
    peers = [PEERS[name].bytes_per_document(width) for name in names]
    needed = _SLACK * (num_documents * (sum(peers) + max(peers)) + _our_bytes(index)[0])
    free = measurement.free_bytes()
    if needed > free:
        what = f"the systems take about {needed / 1e9:.1f} GB together, and {free / 1e9:.1f} GB are free"
        raise RuntimeError(f"benchmark: {what}. Pass fewer --peers, or take fewer documents.")


def _our_bytes(index: "IndexStore") -> tuple[int, int]:
    """Returns the bytes of coarse indexes and vectors, and those of all files."""
    from matryoshka.funnel import IDS

    files = [file for receipt in index.manifest.receipts for file in receipt.files]
    on_disk = sum(file.num_bytes for file in files)
    return on_disk - sum(file.num_bytes for file in files if Path(file.path).name == IDS), on_disk


def our_systems(index: "IndexStore", vectors: Vectors) -> dict[str, System]:
    """Returns the index's funnel with several plans, and its exact scan."""
    from matryoshka import funnel
    from matryoshka.funnel import Shard

    call = funnel.call_locally([Shard.open(files) for files in index.shards])
    k = vectors.num_results

    def search_with(plan: FunnelPlan) -> Search:
        searcher = index.searcher(plan, call)
        return lambda queries: _pad(searcher.search(queries, k).documents, k)

    plans, exact = _plans(index, k), []
    with contextlib.suppress(ValueError):  # an index of all dims leaves no other way to search them
        exact = [index.plan_for("exact")]
    own = {OURS: [plan for plan in plans if plan not in exact] or plans, **({OUR_EXACT: exact} if exact else {})}
    seconds = sum(receipt.details.get("seconds", 0.0) for receipt in index.manifest.receipts)
    return {name: System({plan.describe(): search_with(plan) for plan in own[name]}, seconds, *_our_bytes(index)) for name in own}


def _pad(rows: IntArray, width: int) -> IntArray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1)


def _plans(index: "IndexStore", num_results: int) -> list[FunnelPlan]:
    """Returns the plans that tuning found, and usual ones for the kind of index, each once."""
    tuned = index.tuned or {"frontier": [], "plans": {}}
    points = [*tuned["frontier"], *tuned["plans"].values()]
    return list(dict.fromkeys([*(FunnelPlan.parse(point["plan"]) for point in points), *_usual_plans(index, num_results)]))


def _usual_plans(index: "IndexStore", num_results: int) -> list[FunnelPlan]:
    dim, width = index.layout.dim, index.width
    for kind, name, values, keeps in _DIALS:
        if kind in index.layout.factory:
            pairs = [(((name, value),) if value else (), keep) for value in values for keep in keeps]
            return [_funnel(dim, keep, own, width, num_results) for own, keep in pairs]
    dims = [dim] if index.layout.has_index else [own for own in index.dims if own < width]
    return [_funnel(own, keep, (), width, num_results) for own in dims or [width] for keep in _KEEPS]


def _funnel(dim: int, keep: int, parameters: tuple[tuple[str, int], ...], width: int, num_results: int) -> FunnelPlan:
    shortlist = Step(dim, max(keep, num_results), parameters)
    return FunnelPlan((shortlist, Step(width, num_results)) if dim < width else (shortlist,))


def build_peer(name: str, vectors: Vectors, scratch: Path) -> System:
    """Returns a peer's index of the documents; it is written once, to see how large it is."""
    from matryoshka.search_peers import PEERS

    num_documents, width = vectors.documents.shape
    peer, start = PEERS[name], time.perf_counter()
    index = peer.make(num_documents, width, measurement.num_cores())
    index.build(vectors.documents)
    seconds = time.perf_counter() - start
    say(f"benchmark: {name} built in {seconds:.1f} s")
    path = scratch / name
    index.write(path)
    num_bytes = path.stat().st_size
    path.unlink()
    return System(_settings_of(peer, index, num_documents, vectors.num_results), seconds, num_bytes, num_bytes)


def _settings_of(peer: "Peer", index: "PeerIndex", num_documents: int, k: int) -> dict[str, Search]:
    def search_with(parameters: Mapping[str, int]) -> Search:
        return lambda queries: index.search(queries, k, parameters)

    sweep = peer.sweep(num_documents)
    return {", ".join(f"{name} {value}" for name, value in own.items()) or "all documents": search_with(own) for own in sweep}


def measure_systems(systems: Mapping[str, System], vectors: Vectors, num_rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Returns every point of every system, measured in turn after a warm-up: the median over all rounds."""

    def turn(system: System) -> Callable[[], dict[str, Timing]]:
        return lambda: {label: _time(search, vectors.queries) for label, search in system.settings.items()}

    for system in systems.values():
        for search in system.settings.values():
            search(vectors.queries[:_WARM_UP_QUERIES])
    measured = measurement.take_turns(num_rounds, {name: turn(system) for name, system in systems.items()})
    best = _scores(vectors, measured[EXACT][0]["all documents"].rows)
    return {
        name: [_describe_point(label, [turn[label] for turn in turns], vectors, best) for label in turns[0]]
        for name, turns in measured.items()
    }


def _time(search: Search, queries: Float32Array) -> Timing:
    start = time.perf_counter()
    rows = search(queries)
    batch_seconds = time.perf_counter() - start
    singles = []
    for number in range(min(_SINGLE_QUERIES, len(queries))):
        start = time.perf_counter()
        search(queries[number : number + 1])
        singles.append(time.perf_counter() - start)
    return Timing(batch_seconds, tuple(singles), rows)


def _describe_point(label: str, turns: Sequence[Timing], vectors: Vectors, best: Float32Array) -> dict[str, Any]:
    seconds = statistics.median(turn.batch_seconds for turn in turns)
    return {
        "setting": label,
        "recall": tradeoffs.share_found(_scores(vectors, turns[-1].rows), best),
        "ndcg": _ndcg(vectors, turns[-1].rows),
        "queries_per_second": len(vectors.queries) / seconds,
        "milliseconds": 1e3 * statistics.median(single for turn in turns for single in turn.single_seconds),
        "seconds": [turn.batch_seconds for turn in turns],
    }


def _scores(vectors: Vectors, rows: IntArray) -> Float32Array:
    """Returns the exact scores of documents; row -1 scores -inf.

    Shapes: rows [Q, K] -> [Q, K].
    """
    scores = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _PAIR_ROWS // max(rows.shape[1], 1)):
        part = slice(start, start + _PAIR_ROWS // max(rows.shape[1], 1))
        scores[part] = np.einsum("qd,qkd->qk", vectors.queries[part], vectors.documents[rows[part]])
    return np.where(rows >= 0, scores, np.float32(-np.inf))


def _ndcg(vectors: Vectors, rows: IntArray) -> float | None:
    if not vectors.qrels:
        return None
    from matryoshka import metrics

    rankings = [[vectors.ids[row] for row in own if row >= 0] for own in rows]
    return metrics.measure(vectors.qrels, vectors.query_ids, rankings)["nDCG@10"]


def points_of(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Point]]:
    """Returns the points of each system as they are compared."""
    return {
        name: [Point(own["setting"], own["recall"], own["queries_per_second"], own["ndcg"]) for own in points[name]]
        for name in points
    }


_NOTES = (
    "all systems search the full vectors of the index's shards, in float32 at unit length, for 10 results, in one process with"
    " all cores, all in memory at once; ours finds them by its own files, mapped from disk and warm",
    "recall: share of the 10 documents that exact search finds; a document with the score of the tenth counts",
    "queries_per_second: all queries in one call; milliseconds: one query alone; medians over all rounds, after a warm-up",
    "ratios: queries per second of ours over those of the peer at equal recall; between neighbours of a sweep, the logarithm of"
    " the rate is taken to be linear in recall; of HNSW, the M that is faster there",
    "exact@ndcg0.995: the fastest plan whose nDCG@10 is at least 99.5% of exact search's; ours_exact: our scan of all documents",
    "build_seconds: of ours, all tasks added up, training included, each with one core and threads that read ahead, but for what"
    " FAISS learns, with all cores, as peers do everything",
    "hnsw_build: build seconds of HNSW over ours; efConstruction and the like are what each library takes by default",
    "memory: the index as it is written, with the vectors that reranking needs; ids are left out; disk: all files",
    "HNSW, hnswlib and usearch get the documents in random order, which serves graphs where near-duplicates stand together",
    "IVF: as many lists as four times the root of the number of documents, trained on 64 documents each",
)


def _make_report(
    settings: "Settings",
    device: str,
    index: "IndexStore",
    vectors: Vectors,
    systems: Mapping[str, Mapping[str, Any]],
    not_run: Mapping[str, str],
    scale: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    from matryoshka.search_peers import PEERS

    num_documents, width = vectors.documents.shape
    points = points_of({name: own["points"] for name, own in systems.items()})
    ratios, missing = tradeoffs.compare(points, {name: own["build_seconds"] for name, own in systems.items()})
    few = [f"{len(vectors.queries)} queries: fewer than {_BATCH} are a small batch"] if len(vectors.queries) < _BATCH else []
    packages = ["faiss-cpu", *(package for peer in PEERS.values() for package in peer.packages)]
    layout = dataclasses.asdict(index.layout)
    return {
        **measurement.begin_report(settings, device, packages),
        "index": {"num_documents": num_documents, "width": width, "num_shards": len(index.shards), **layout},
        "synthetic": dataclasses.asdict(vectors.spectrum) if vectors.spectrum else None,
        "queries": {"num_queries": len(vectors.queries), "num_judged": len(vectors.qrels)},
        "notes": [*_NOTES, *measurement.caution(settings.rounds), *few, *missing],
        "systems": systems,
        "not_run": dict(not_run),
        "ratios": ratios,
        "scale": list(scale),
    }


def _draw(report: Mapping[str, Any], output: Place) -> list[str]:
    """Draws the report as SVG and as PNG; returns the names of the files."""
    index = report["index"]
    title = f"{index['num_documents']:,} documents, {index['width']} dims, {measurement.place_of(report)}"
    points = points_of({name: system["points"] for name, system in report["systems"].items()})
    names = [output.with_suffix(suffix).name for suffix in (".svg", ".png")]
    for name in names:
        with storage.publish(output.parent / name) as temporary:
            charts.draw(temporary, title, points, LABELS)
    return names


def show(report: Mapping[str, Any]) -> None:
    """Prints what was measured, and says what was not."""
    index = report["index"]
    points = points_of({name: system["points"] for name, system in report["systems"].items()})
    rates = [["system", *(f"{floor:g}" for floor in _FLOORS), "best"]]
    costs = [["system", "build", "memory", "disk", "one query"]]
    for name, system in report["systems"].items():
        found = [tradeoffs.rate_at(points[name], floor) for floor in _FLOORS]
        rates.append([name, *(_number(rate) for rate in found), f"{max(point.recall for point in points[name]):.4f}"])
        memory, disk = system["memory_bytes_per_document"], system["disk_bytes_per_document"]
        holding = [own["milliseconds"] for own in system["points"] if own["recall"] >= _GOOD_RECALL]
        single = f"{min(holding):.2f} ms" if holding else "-"
        costs.append([name, f"{system['build_seconds']:.1f} s", f"{memory:,.0f} B", f"{disk:,.0f} B", single])
    say(
        f"{index['num_documents']:,} documents of {index['width']} dims in {index['num_shards']} shards,"
        f" {report['queries']['num_queries']:,} queries, {measurement.place_of(report)}"
    )
    show_table("queries per second in a batch at recalls, and the best recall", rates)
    show_table(f"costs per document; one query at recall {_GOOD_RECALL}", costs)
    show_table("ours is", [["ratio", "times"], *([name, _number(own)] for name, own in report["ratios"].items())])
    if report["scale"]:
        from jobs import benchmark_scale

        benchmark_scale.show(report["scale"])
    for name, reason in report["not_run"].items():
        say(f"benchmark: {name} was not measured: {reason}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"

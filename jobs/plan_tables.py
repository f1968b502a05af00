"""A plan for people, and what became of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.terminal import say, show_table
from matryoshka import artifacts, estimates, indexing
from matryoshka.artifacts import Manifest
from matryoshka.estimates import SECONDS, Estimate, Interval, Line
from matryoshka.storage import Place

_HOUR, _DAY, _GB = 3_600.0, 86_400.0, 1e9


def show(estimate: Estimate, by_dim: Mapping[int, Mapping[str, float]], layout: str, work: str) -> None:
    """Prints a plan.

    Args:
        estimate: The plan.
        by_dim: Bytes of a document at each resolution.
        layout: The index in words.
        work: What the hours of a worker are called.
    """
    _show_size(estimate, work)
    _show_time(estimate)
    num_documents = estimate.size.documents.value
    rows = [
        [str(dim), *(f"{own[kind]:,.0f} ({_bytes(own[kind] * num_documents)})" for kind in ("float16", "int8", "dense", "codes"))]
        for dim, own in by_dim.items()
    ]
    heads = ["dim", "disk: float16", "int8", "memory: bf16", "4-bit codes"]
    show_table("bytes per document with its id (and in all)", [heads, *rows])
    index = estimate.index
    say(f"index: {layout}, {index.num_shards:,} shards of {index.shard_documents:,} documents, {_bytes(index.num_bytes)} on disk")
    say(
        f"memory of a shard: {_bytes(index.shard_memory_bytes)} for its coarse index and ids,"
        f" and {_bytes(index.shard_mapped_bytes)} of vectors that are mapped and read in part"
    )
    _show_limits(estimate)


def _show_size(estimate: Estimate, work: str) -> None:
    size, cost = estimate.size, estimate.embedding
    rows = [
        ["rows", f"{size.num_rows:,}", f"{size.num_sampled:,} of them looked at"],
        ["documents", _count(size.documents), f"{size.num_empty:,.0f} rows have no text"],
        [
            "tokens",
            _count(size.tokens),
            f"{size.tokens.value / size.documents.value:.1f} a document; {size.long_share:.1%} are too long",
        ],
        ["units", f"{size.num_units:,}", ""],
        ["a worker's tokens a second", f"{estimate.pace.tokens_per_second:,.0f}", estimate.pace.source],
        [work, _interval(cost.work_seconds.times(1 / _HOUR), lambda hours: f"{hours:,.3g}"), "of work alone"],
    ]
    show_table("what there is to do (in brackets: 95% confidence)", [["", "", ""], *rows], text_columns=(0, 2))


def _show_time(estimate: Estimate) -> None:
    cost, index = estimate.embedding, estimate.index
    rows = [
        ["check the corpus", _time(cost.check_seconds)],
        ["start, choose how to run, load the model", _time(cost.start_seconds)],
        [f"embed and write, with {cost.num_workers:,} workers", _interval(cost.embed_seconds, _time)],
        ["plan and record", _time(cost.commit_seconds)],
        ["all of embed", _interval(cost.wall_seconds, _time)],
        ["build the index", _time(index.wall_seconds)],
    ]
    if estimate.price:
        rows.append(["price of both", _interval(estimate.price, lambda price: f"{price:,.2f}")])
    show_table("what it takes", [["", ""], *rows], text_columns=(0,))


def _show_limits(estimate: Estimate) -> None:
    needs, means, driver = estimate.needs, estimate.means, estimate.driver
    say(
        f"to embed within {_time(means.within_seconds)}: {_number(needs.num_workers)} workers on {_number(needs.num_nodes)} nodes"
    )
    say(
        f"to search, on nodes of {_bytes(means.node_memory_bytes)}: {_number(needs.num_shard_nodes)} for coarse indexes and ids,"
        f" {_number(needs.num_memory_nodes)} for all of the index"
    )
    say(
        f"driver: {_bytes(driver.memory_bytes)} of memory, a manifest of {_bytes(driver.manifest_bytes)},"
        f" {driver.num_segments:,} files of the journal; a second run knows after {_time(driver.resume_seconds)} what is done"
    )
    rows = [
        [own.name, *(f"{value:,.3g} {own.unit}" for value in (own.needed, own.most)), f"{own.share:.1%}"]
        for own in estimate.limits
    ]
    show_table("what would break first", [["", "needed", "there is", "share"], *rows], text_columns=(0,))


def judge(plan: Mapping[str, Any], folder: Place) -> tuple[str, list[Line]]:
    """Returns the kind of a finished artifact, and what was estimated beside what was taken.

    Raises:
        ValueError: The folder does not hold what the plan is of, or is not finished.
    """
    kind = artifacts.read(folder).kind
    if kind not in _TAKEN:
        raise ValueError(f"{folder}: holds '{kind}', which no plan is of. Pass embeddings or an index.")
    manifest = artifacts.read_complete(folder, kind)
    if manifest.identity["model"] != plan["model"]["fingerprint"]:
        raise ValueError(f"{folder}: was made with another model than the plan. Make the plan anew.")
    return kind, estimates.compare(plan["compared"][kind], _TAKEN[kind](manifest, plan))


def show_lines(kind: str, folder: Place, lines: Sequence[Line]) -> None:
    """Prints what was estimated beside what was taken."""
    rows = [[line.name, f"{line.estimated:,.0f}", f"{line.taken:,.0f}", f"{line.error:+.1%}"] for line in lines]
    show_table(f"{kind} in {folder}", [["", "estimated", "taken", "off by"], *rows], text_columns=(0,))


def _taken_by_embedding(manifest: Manifest, plan: Mapping[str, Any]) -> dict[str, float]:
    details, last = [receipt.details for receipt in manifest.receipts], manifest.facts.get("last_run", {})
    is_whole = last.get("num_documents") == manifest.num_rows and last.get("num_workers") == plan["means"]["num_workers"]
    if not is_whole:
        say("plan: seconds in all are left out: the run had other workers than the plan, or was made in several goes")
    return {
        "documents": manifest.num_rows,
        "tokens": sum(own["num_tokens"] for own in details),
        "units": len(manifest.receipts),
        "bytes": sum(file.num_bytes for receipt in manifest.receipts for file in receipt.files),
        f"{SECONDS} of work": sum(own[f"{phase}_seconds"] for own in details for phase in ("compute", "read", "write")),
        **({f"{SECONDS} in all": last["start_seconds"] + last["seconds"]} if is_whole else {}),
    }


def _taken_by_index(manifest: Manifest, _plan: Mapping[str, Any]) -> dict[str, float]:
    shards = indexing.shard_receipts(manifest)
    return {
        "documents": manifest.num_rows,
        "shards": len(shards),
        "bytes": sum(file.num_bytes for receipt in shards for file in receipt.files),
        f"{SECONDS} of work": sum(receipt.details.get("seconds", 0.0) for receipt in manifest.receipts),
    }


_TAKEN: dict[str, Callable[[Manifest, Mapping[str, Any]], dict[str, float]]] = {
    "embeddings": _taken_by_embedding,
    "index": _taken_by_index,
}


def _interval(own: Interval, describe: Callable[[float], str]) -> str:
    text = describe(own.value)
    return text if own.low == own.high else f"{text} ({describe(own.low)} to {describe(own.high)})"


def _count(own: Interval) -> str:
    return _interval(own, lambda value: f"{value:,.0f}")


def _number(count: int | None) -> str:
    return "no number of" if count is None else f"{count:,}"


def _time(seconds: float) -> str:
    if seconds < 2 * 60:
        return f"{seconds:.1f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < 3 * _DAY else f"{seconds / _DAY:,.1f} days"


def _bytes(num_bytes: float) -> str:
    power = min(int(math.log(max(num_bytes, 1.0), 1_000)), 5)
    return f"{num_bytes / 1_000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB', 'PB')[power]}"

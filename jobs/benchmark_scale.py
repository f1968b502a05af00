"""Measures how the funnel's cost grows with the number of documents and of shards: part of the benchmark of searching."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import benchmark_search, benchmark_vectors
from jobs.benchmark_vectors import Vectors
from jobs.terminal import say, show_table
from matryoshka import storage, tradeoffs
from matryoshka.tradeoffs import EXACT, OURS

if TYPE_CHECKING:
    from jobs.benchmark import Settings
    from matryoshka.nested import Float32Array
    from matryoshka.vectors import EmbeddingStore

_RECALL = 0.99
_BLOCK_ROWS = 4_096


def measure(settings: "Settings", vectors: Vectors, scratch: Path) -> list[dict[str, Any]]:
    """Returns one row for each number of documents, the first of all, and each number of shards."""
    rows = []
    for num_documents in settings.scale:
        folder = scratch / str(num_documents)
        store, queries = _first(vectors, num_documents, folder / "embeddings")
        for num_shards in settings.shards:
            say(f"benchmark: {num_documents:,} documents in {num_shards} shards")
            rows.append(_measure_row(settings, store, queries, folder / f"index-{num_shards}", num_shards))
        storage.remove(folder)
    return rows


def check(settings: "Settings", num_documents: int) -> None:
    """Checks that there are as many documents as the largest row wants.

    Raises:
        ValueError: There are fewer.
    """
    if max(settings.scale, default=0) > num_documents:
        raise ValueError(f"--scale {max(settings.scale)}: there are {num_documents} documents. Pass at most as many.")


def _first(vectors: Vectors, num_documents: int, folder: Path) -> "tuple[EmbeddingStore, Float32Array]":
    """Returns a store of the first documents, and the queries; queries that are made up are near some of these documents."""
    from matryoshka import synthetic

    if vectors.spectrum:
        spectrum = dataclasses.replace(vectors.spectrum, num_documents=num_documents)
        return synthetic.make_store(folder, spectrum, benchmark_vectors.MADE_QUERIES)
    documents = vectors.documents[:num_documents]
    blocks = (documents[start : start + _BLOCK_ROWS].astype(np.float16) for start in range(0, num_documents, _BLOCK_ROWS))
    return synthetic.write_store(folder, blocks, *documents.shape), vectors.queries


def _measure_row(
    settings: "Settings", store: "EmbeddingStore", queries: "Float32Array", folder: Path, num_shards: int
) -> dict[str, Any]:
    num_documents = store.manifest.num_rows
    index = benchmark_vectors.build_index(settings, store, folder, num_shards)
    nothing: Any = np.empty(0, dtype=object)
    own = Vectors(benchmark_vectors.documents_of(index), nothing, queries, [], {})
    systems = benchmark_search.our_systems(index, own) | {EXACT: benchmark_search.build_peer(EXACT, own, folder)}
    measured = benchmark_search.measure_systems(systems, own, settings.rounds)
    points = benchmark_search.points_of(measured)
    holding = [point for point in measured[OURS] if point["recall"] >= _RECALL]
    best = max(holding, key=lambda point: point["queries_per_second"], default=None)
    best = best or max(measured[OURS], key=lambda point: point["recall"])
    return {
        "num_documents": num_documents,
        "num_shards": len(index.shards),
        "coarse_index": index.layout.factory,
        **{name: best[name] for name in ("setting", "recall", "queries_per_second", "milliseconds")},
        "exact_queries_per_second": points[EXACT][0].queries_per_second,
        "ratio": tradeoffs.compare(points, {OURS: systems[OURS].build_seconds})[0]["exact@0.99"],
        "build_seconds": systems[OURS].build_seconds,
        "memory_bytes_per_document": systems[OURS].memory_bytes / num_documents,
        "disk_bytes_per_document": systems[OURS].disk_bytes / num_documents,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what grew, and how."""
    speed = [["documents", "shards", "queries/s", "recall", "one query", "exact queries/s"]]
    costs = [["documents", "shards", "build", "memory", "disk", "plan"]]
    for row in rows:
        size = [f"{row['num_documents']:,}", str(row["num_shards"])]
        rates = [f"{row[name]:,.0f}" for name in ("queries_per_second", "exact_queries_per_second")]
        bytes_per_document = [f"{row[f'{place}_bytes_per_document']:,.0f} B" for place in ("memory", "disk")]
        speed.append([*size, rates[0], f"{row['recall']:.4f}", f"{row['milliseconds']:.2f} ms", rates[1]])
        costs.append([*size, f"{row['build_seconds']:.1f} s", *bytes_per_document, row["setting"]])
    show_table(f"scale: the fastest plan that holds a recall of {_RECALL}, or else the best one", speed)
    show_table("scale: costs, memory and disk per document", costs, text_columns=(5,))

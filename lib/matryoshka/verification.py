"""Checks every artifact against its manifest, down to the vectors: the first lie is found, and named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from matryoshka import artifacts, corpus, indexing, model, pairs, removals, storage, vectors
from matryoshka.artifacts import Manifest
from matryoshka.funnel import COARSE, DENSE, IDS, LISTS, VECTORS, ShardFiles
from matryoshka.index import CoarseIndex
from matryoshka.indexing import IndexStore
from matryoshka.storage import Place
from matryoshka.topk import IntArray

_BATCH_ROWS = 16_384
_UNIT_TOLERANCE = 2e-3  # float16 rounding moves the norm of a unit vector by up to 2e-4; ten times that is a fault


def find_artifacts(folder: Place) -> list[Place]:
    """Returns every artifact in a folder and below it.

    Raises:
        ValueError: There is none.
    """
    found: list[Place] = sorted(path.parent for path in folder.rglob(artifacts.MANIFEST))
    if not found:
        raise ValueError(f"{folder}: no artifacts here (no {artifacts.MANIFEST}). Pass the output of a job.")
    return found


def verify(folder: Place) -> tuple[Manifest, list[str]]:
    """Returns the manifest of an artifact and everything that is wrong with it, one line each.

    Files are compared with their receipts first; only where they agree is their content looked at.
    """
    manifest = artifacts.read(folder)
    faults = artifacts.find_faults(folder, manifest)
    check = {
        "dataset": _check_dataset,
        "embeddings": _check_embeddings,
        "index": _check_index,
        "negatives": _check_negatives,
        "model": _check_model,
        "results": _check_results,
        "run": _check_run,
    }
    try:
        indexing.has_update(folder, manifest) if manifest.kind == "index" else artifacts.read_journal(folder)
    except ValueError as error:
        faults.append(str(error))
    if not faults and manifest.kind in check:
        with storage.borrowing():
            faults = list(check[manifest.kind](folder, manifest))
    return manifest, faults


def _check_embeddings(folder: Place, manifest: Manifest) -> Iterator[str]:
    every_id = []
    for receipt in manifest.receipts:
        path = folder / receipt.files[0].path
        ids, block = vectors.read_unit(path if isinstance(path, Path) else path.read_bytes(), path)
        yield from _check_block(path, ids, block, receipt.num_rows, int(manifest.facts["width"]))
        every_id.append(ids)
    yield from _check_ids(folder, every_id)


def _check_index(folder: Place, manifest: Manifest) -> Iterator[str]:
    every_id = []
    index = IndexStore(folder, manifest)
    training, listed = indexing.training_of(index.training), removals.longest_list(manifest.receipts)
    for receipt, shard in zip(indexing.shard_receipts(manifest), index.shards, strict=True):
        with storage.borrowing():
            ids = vectors.open_ids(shard.path(IDS))
            yield from _check_shard(shard, ids, receipt.num_rows, int(manifest.facts["width"]))
            if receipt.details.get("training") != training:
                yield f"{shard.folder}: was built with another training than the other shards"
            if listed and removals.find(ids, removals.open_list(folder, listed)).tolist() != shard.read_removed().tolist():
                place = folder / shard.removed.path if shard.removed else shard.folder
                yield f"{place}: does not leave out exactly the documents on the list of removed ones"
            every_id.append(ids)
    yield from _check_ids(folder, every_id)


def _check_shard(shard: ShardFiles, ids: pa.Array, num_rows: int, width: int) -> Iterator[str]:
    full = np.load(shard.path(VECTORS), mmap_mode="r", allow_pickle=False)
    yield from _check_block(shard.folder / VECTORS, ids, full, num_rows, width)
    for name in filter(shard.has, (COARSE, DENSE)):
        ntotal = _count_coarse(shard, name)
        if ntotal != num_rows:
            yield f"{shard.folder / name}: {ntotal} documents, the receipt says {num_rows}"
    if shard.has(LISTS) and not _has_every_row(shard, num_rows):
        yield f"{shard.folder / LISTS}: lists do not have each of the {num_rows} documents once"


def _has_every_row(shard: ShardFiles, num_rows: int) -> bool:
    """Returns whether every document is in one list, and only once."""
    with np.load(shard.path(LISTS), allow_pickle=False) as found:
        edges, rows, num_lists = found["edges"], found["rows"], len(found["centroids"])
    ends = len(edges) == num_lists + 1 and (edges[0], edges[-1]) == (0, num_rows)
    return bool(ends and (np.diff(edges) >= 0).all() and np.array_equal(np.sort(rows), np.arange(num_rows)))


def _count_coarse(shard: ShardFiles, name: str) -> int:
    if name == DENSE:
        return len(np.load(shard.path(name), mmap_mode="r", allow_pickle=False))
    return CoarseIndex.read(shard.path(name)).ntotal


def _check_block(path: Place, ids: pa.Array, block: npt.NDArray[Any], num_rows: int, width: int) -> Iterator[str]:
    if len(ids) != num_rows or block.shape != (num_rows, width):
        yield f"{path}: {len(ids)} ids and vectors {block.shape}, the manifest says ({num_rows}, {width})"
        return
    starts = range(0, num_rows, _BATCH_ROWS)
    wrong = np.concatenate([np.empty(0, np.int64), *(_find_wrong(block[start : start + _BATCH_ROWS], start) for start in starts)])
    if wrong.size:
        yield f"{path}: {wrong.size} vectors are not finite or not of unit length (first: '{ids[int(wrong[0])]}')"


def _find_wrong(block: npt.NDArray[Any], first_row: int) -> IntArray:
    """Returns the rows that are no unit vectors; int8 holds directions, whose largest component is 127."""
    if block.dtype == np.int8:
        return first_row + np.flatnonzero(np.abs(block.astype(np.int16)).max(axis=1) != np.iinfo(np.int8).max)
    squares = np.einsum("nd,nd->n", block, block, dtype=np.float32)
    return first_row + np.flatnonzero(~(np.abs(np.sqrt(squares) - 1) < _UNIT_TOLERANCE))


def _check_ids(folder: Place, parts: list[pa.Array]) -> Iterator[str]:
    every_id = pa.chunked_array(parts, pa.large_string())
    num_repeated = len(every_id) - pc.count_distinct(every_id).as_py()
    if num_repeated:
        yield f"{folder}: {num_repeated} ids stand more than once"


def _check_dataset(folder: Place, manifest: Manifest) -> Iterator[str]:
    store = pairs.DatasetStore(folder, manifest)
    every_id = []
    for receipt in manifest.receipts:
        table = corpus.open_parquet(folder / receipt.files[0].path).read()
        if table.num_rows != receipt.num_rows:
            yield f"{folder / receipt.files[0].path}: {table.num_rows} rows, the receipt says {receipt.num_rows}"
        if receipt.key.startswith(f"{pairs.CORPUS}/"):
            every_id += [chunk.cast(pa.large_string()) for chunk in table.column("id").chunks]
    yield from _check_ids(folder, every_id)
    kind = "chunks" if store.is_chunked else "documents"
    if sum(map(len, every_id)) != manifest.facts[kind]:
        yield f"{folder}: {sum(map(len, every_id))} {kind}, the manifest says {manifest.facts[kind]}"
    for split in (split for split in store.judged_splits if manifest.facts["queries"].get(split)):
        strangers = set(store.qrels(split)) - set(store.queries(split)[0])
        if strangers:
            yield f"{folder}: split '{split}' judges {len(strangers)} queries that it does not have"


def _check_negatives(folder: Place, manifest: Manifest) -> Iterator[str]:
    yield from _check_results(folder, manifest)
    for receipt in manifest.receipts:
        path = folder / receipt.files[0].path
        num_rows = 0
        for rows in corpus.read_rows(path, _BATCH_ROWS, ["negatives", "negative_ids"]):
            for texts, ids in zip(rows["negatives"], rows["negative_ids"], strict=True):
                if len(texts) != len(ids):
                    yield f"{path}: row {num_rows} has {len(texts)} negatives and {len(ids)} ids"
                num_rows += 1


def _check_results(folder: Place, manifest: Manifest) -> Iterator[str]:
    for receipt in manifest.receipts:
        num_rows = corpus.open_parquet(folder / receipt.files[0].path).metadata.num_rows
        if num_rows != receipt.num_rows:
            yield f"{folder / receipt.files[0].path}: {num_rows} rows, the receipt says {receipt.num_rows}"


def _check_run(folder: Place, manifest: Manifest) -> Iterator[str]:
    for name, fingerprint in manifest.inputs.items():
        stage = artifacts.peek(folder / name)
        if stage is None:
            yield f"{folder / name}: missing, or its manifest cannot be read"
        elif stage.fingerprint != fingerprint:
            yield f"{folder / name}: is not what the report was made from"


def _check_model(folder: Place, manifest: Manifest) -> Iterator[str]:
    width = model.describe(str(folder)).width
    if max(manifest.identity["dims"]) > width:
        yield f"{folder}: trained for {max(manifest.identity['dims'])} dims, its vectors have {width}"

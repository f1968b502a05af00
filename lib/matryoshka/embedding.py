"""The embed stage's work: what there is to do, and one unit of it."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from matryoshka import artifacts, corpus, storage, vectors
from matryoshka.corpus import Columns, Corpus
from matryoshka.encode import Encoder, Precision
from matryoshka.model import ModelInfo
from matryoshka.units import Unit

UNITS = "units"


def make_identity(
    info: ModelInfo, columns: Columns, precision: Precision | None, tokens_per_step: int | None, unit_rows: int
) -> dict[str, Any]:
    """Returns what must be equal for two units to stand in one store: the model, and all that changes bytes or units."""
    return {
        "model": info.fingerprint,
        "width": info.width,
        "id_column": columns.id,
        "text_column": columns.text,
        "precision": precision,
        "tokens_per_step": tokens_per_step,
        "unit_rows": unit_rows,
    }


def make_manifest(source: Corpus, info: ModelInfo, identity: dict[str, Any], run: dict[str, Any]) -> artifacts.Manifest:
    """Returns the manifest of a store in which nothing is finished yet."""
    facts = {
        "width": info.width,
        "dims": list(info.dims),
        "is_tuned": info.is_tuned,
        "model": str(info.folder),
        "corpus": corpus.remember(source),
        "run": run,
    }
    return artifacts.Manifest("embeddings", identity, {"corpus": source.fingerprint}, facts)


def place(receipt: artifacts.Receipt, unit: Unit) -> artifacts.Receipt:
    """Returns the receipt with the unit's place in the corpus as it is now: a renamed file keeps its vectors, not its slot."""
    return dataclasses.replace(receipt, details={**receipt.details, "slot": unit.slot})


def embed_unit(encoder: Encoder, source: Corpus, unit: Unit, folder: Path) -> artifacts.Receipt:
    """Embeds one unit, publishes its file, and returns its receipt.

    Raises:
        ValueError: The input changed since it was planned, or documents (named) have no finite vector.
    """
    start = time.perf_counter()
    ids, texts = corpus.read_unit(source.path_of(unit.name), source.columns, unit)
    try:
        encoded = encoder.encode(texts, "document")
    except ValueError as error:
        reason, rows = error.args if len(error.args) == 2 else (error, [])
        names = ", ".join(f"'{ids[row]}'" for row in rows[:3])
        raise ValueError(f"{unit.name}, rows {unit.start} to {unit.stop}: {reason} ({len(rows)} documents: {names}).") from None
    encode_seconds = time.perf_counter() - start
    path = folder / UNITS / f"{unit.key}.parquet"
    with storage.publish(path) as temporary:
        vectors.write_unit(temporary, ids, encoded.vectors)
    details = {
        "slot": unit.slot,
        "num_empty": unit.num_rows - len(ids),
        "num_tokens": encoded.num_tokens,
        "num_padded_tokens": encoded.num_padded_tokens,
        "num_truncated": encoded.num_truncated,
        "encode_seconds": round(encode_seconds, 3),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return artifacts.Receipt(unit.key, len(ids), (artifacts.FileRecord.of(folder, path),), details)

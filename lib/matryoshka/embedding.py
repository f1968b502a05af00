"""The embed stage's work: what there is to do, and one unit of it."""

import dataclasses
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from matryoshka import artifacts, corpus, storage, vectors
from matryoshka.calibration import Choice
from matryoshka.clock import PHASES, Clock
from matryoshka.corpus import Columns, Corpus
from matryoshka.model import ModelInfo
from matryoshka.storage import Place
from matryoshka.tokens import Long
from matryoshka.units import Unit

if TYPE_CHECKING:
    from matryoshka.encode import Encoder

UNITS = "units"


def make_identity(
    info: ModelInfo,
    columns: Columns,
    choice: Choice,
    unit_rows: int,
    long: Long = "truncate",
) -> dict[str, Any]:
    """Returns what must be equal for two units to stand in one store: the model, and all that changes bytes or units."""
    return {
        "model": info.fingerprint,
        "width": info.width,
        "id_column": columns.id,
        "text_column": columns.text,
        **dataclasses.asdict(choice),
        "is_compiled": choice.is_compiled or None,  # stores made before there was a choice do not say
        "unit_rows": unit_rows,
        "long": long,
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


def embed_unit(encoder: "Encoder", source: Corpus, unit: Unit, folder: Place, clock: Clock | None = None) -> artifacts.Receipt:
    """Embeds one unit, publishes its file, and returns its receipt.

    Several threads of a worker may each be at a unit of their own: one reads while another computes and a third writes.

    Args:
        encoder: The model.
        source: The corpus.
        unit: The rows.
        folder: The embeddings artifact.
        clock: Counts what the worker does and waits for.

    Raises:
        ChangedError: The input changed since it was planned.
        ValueError: Documents (named) have no finite vector.
    """
    start, clock = time.perf_counter(), clock or Clock()
    with clock.phase("read"):
        ids, texts = source.read(unit)
        tokens = encoder.tokenise(texts, "document")
    try:
        with clock.phase("compute"):
            encoded = encoder.compute(tokens, "document")
    except ValueError as error:
        reason, rows = error.args if len(error.args) == 2 else (error, [])
        names = ", ".join(f"'{ids[row]}'" for row in rows[:3])
        raise ValueError(f"{reason} ({len(rows)} documents: {names}).") from None
    path = folder / UNITS / f"{unit.key}.parquet"
    with clock.phase("write"), storage.publish(path) as temporary:
        vectors.write_unit(temporary, ids, encoded.vectors)
        record = artifacts.FileRecord.named(f"{UNITS}/{path.name}", temporary)
    details = {
        "slot": unit.slot,
        "num_empty": unit.num_rows - len(ids),
        "is_compiled": encoder.is_compiled,
        **{name: getattr(encoded, name) for name in _COUNTS},
        "seconds": round(time.perf_counter() - start, 3),
        **{f"{name}_seconds": round(seconds, 3) for name, seconds in clock.take().items()},
    }
    return artifacts.Receipt(unit.key, len(ids), (record,), details)


_COUNTS = ("num_tokens", "num_padded_tokens", "num_truncated", "num_cut_tokens", "num_split", "num_flops", "tokens_per_step")


def summarise(
    receipts: Iterable[artifacts.Receipt], num_workers: int, seconds: float, flops_per_second: float | None
) -> dict[str, Any]:
    """Returns what a run did and where its time went, from the receipts of the units that it finished.

    Args:
        receipts: Of the units of this run.
        num_workers: How many workers there were; what none of their units accounts for, they waited for work.
        seconds: How long the run took, from the first call to a worker to the last receipt.
        flops_per_second: What one worker could reach with large matrix products, if it was measured.
    """
    totals: dict[str, float] = {"num_documents": 0}
    for receipt in receipts:
        totals["num_documents"] += receipt.num_rows
        for name in (*_COUNTS[:-1], *(f"{phase}_seconds" for phase in PHASES)):
            totals[name] = totals.get(name, 0) + receipt.details[name]
    phases = {phase: totals.pop(f"{phase}_seconds", 0.0) for phase in PHASES}
    worker_seconds = max(num_workers * seconds, sum(phases.values()) - phases["idle"], 1e-9)
    shares = {phase: round(phases[phase] / worker_seconds, 4) for phase in ("compute", "read", "write")}
    num_tokens, num_flops = totals.get("num_tokens", 0), totals.pop("num_flops", 0)
    return {
        **totals,
        "seconds": round(seconds, 1),
        "documents_per_second": round(totals["num_documents"] / max(seconds, 1e-9), 1),
        "tokens_per_second": round(num_tokens / max(seconds, 1e-9), 1),
        "padding_share": round(1 - num_tokens / max(totals.get("num_padded_tokens", 0), 1), 4),
        "compute_share": shares["compute"],
        "wait_for_tokens_share": shares["read"],
        "wait_for_writer_share": shares["write"],
        "wait_for_work_share": round(1 - sum(shares.values()), 4),
        "matrix_rate_share": round(num_flops / max(phases["compute"], 1e-9) / flops_per_second, 4) if flops_per_second else None,
    }


def tokens_per_step_that_fit(receipts: Iterable[artifacts.Receipt], planned: int) -> int:
    """Returns the smallest budget that any worker ended up with: where memory ran out once, it would again."""
    return min((receipt.details["tokens_per_step"] for receipt in receipts), default=planned)

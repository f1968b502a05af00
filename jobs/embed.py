"""Turns the documents of a corpus into vectors, unit by unit: what is finished stays finished, whatever happens."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jobs import cluster
from jobs.cluster import Encoders, Outcome, Session
from jobs.entry import HopelessError, StageSettings, describe_run, main
from jobs.terminal import Counter, report_failure, say
from jobs.watch import journal_of
from matryoshka import artifacts, corpus, embedding, model, storage
from matryoshka.artifacts import Manifest, Receipt
from matryoshka.calibration import Calibration, Choice
from matryoshka.config import Field, InputPath
from matryoshka.corpus import Columns, Corpus
from matryoshka.indexing import IndexStore
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.rates import TOKENS_PER_STEP
from matryoshka.storage import Place
from matryoshka.tokens import Long
from matryoshka.units import Unit, plan_units
from matryoshka.vectors import EmbeddingStore

_WORTH_MEASURING = 20_000  # rows: for fewer, measuring takes longer than it can gain
SAMPLE_ROWS = 1_000
_SAMPLE_UNITS = 4
_SHOWN_FAILURES = 3
_SMALL_UNIT_ROWS = 2_000  # so that every worker gets some of a small corpus


class Settings(StageSettings):
    """Turns the documents of a Parquet corpus into vectors: one Parquet file per unit, float16, unit length, full width.

    Units that are finished stay finished: after a crash, or with new, changed or removed input files, the same command
    does only what is missing.
    """

    corpus: InputPath = Field(description="Parquet files: a folder, a file, or a glob pattern in quotes.")
    model: str = Field("minilm", description="Model folder, hub name, or minilm (the demo extra's model).")
    id_column: str = Field("id", description="Column with the document's id.")
    text_column: str = Field("text", description="Column with the document's text.")
    unit_rows: int = Field(20_000, ge=1, description="Most rows in a unit, which is what one worker does in one go.")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="auto: bf16 where a measurement says it pays.")
    tokens_per_step: int | None = Field(None, ge=1, description="Most tokens in a forward pass; none: the fastest, measured.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="Compile the model (needs a C++ compiler); auto: for long runs, where a measurement says it pays."
    )
    long: Long = Field("truncate", description="Texts beyond the model's window: cut, or the mean of overlapping windows.")
    workers: int | None = Field(None, ge=1, description="Most encoder processes; none: one per GPU, or per CPU.")
    attempts: int = Field(3, ge=1, description="How often a unit is tried before it counts as failed.")
    fail_on_empty: bool = Field(False, description="Make an error of rows without text instead of leaving them out.")


def refuse_strangers(flag: str, made: EmbeddingStore | IndexStore | None, info: ModelInfo, data: DatasetStore) -> None:
    """Refuses what another model made, or what was made of another corpus than a dataset's.

    Raises:
        ValueError: It was.
    """
    if made and made.manifest.identity["model"] != info.fingerprint:
        raise ValueError(f"{flag} {made.folder}: was made with another model than {info.folder}. Make it anew.")
    if made and corpus.recall(made.manifest.facts.get("corpus")).fingerprint != data.corpus_fingerprint:
        raise ValueError(f"{flag} {made.folder}: was not made from {data.corpus}. Pass one made from this data.")


def embed_dataset(output: Place, data: DatasetStore, model: str, workers: int | None, *, replace: bool) -> EmbeddingStore:
    """Returns the vectors of a dataset's documents, made where they are not there yet."""
    own = {"output": str(output), "corpus": data.corpus, "model": model, "workers": workers, "replace": replace}
    run(Settings.from_values({**own, "unit_rows": _SMALL_UNIT_ROWS}, "embed"))
    return EmbeddingStore.open(output)


def run(settings: Settings) -> Manifest:
    """Embeds what the output lacks."""
    called = time.perf_counter()
    output = storage.place(settings.output)
    known = artifacts.peek(output, "embeddings")
    source = _inspect(settings, known)
    storage.keep_apart(output, *_places(settings.corpus, source), storage.place(settings.model))
    info = model.describe(settings.model)
    choice = _recorded(settings, known)
    identity = embedding.make_identity(info, source.columns, choice, settings.unit_rows, settings.long)
    previous = artifacts.claim(output, "embeddings", identity, settings.replace, known)
    if previous is None:  # what is discarded decides nothing
        choice = _recorded(settings, None)
    units = plan_units(source.files, settings.unit_rows)
    finished = artifacts.finished_receipts(output, previous, [unit.key for unit in units], compare_digests=settings.replace)
    todo = [unit for unit in units if unit.key not in finished]
    is_whole = previous and previous.is_complete and not artifacts.read_journal(output)
    if previous and is_whole and not todo and previous.inputs == {"corpus": source.fingerprint}:
        say(f"embed: nothing to do, {output} is complete ({previous.num_rows} documents)")
        return previous
    with cluster.connected() as session:
        num_workers = min(cluster.check_workers(settings.workers) or cluster.capacity().default_workers, max(len(todo), 1))
        num_rows = sum(unit.num_rows for unit in todo)
        best = calibrate(session, info, choice, num_rows, num_workers, lambda: _sample(source, todo))
        identity = embedding.make_identity(info, source.columns, best.choice, settings.unit_rows, settings.long)
        manifest = embedding.make_manifest(source, info, identity, describe_run("embed", settings))
        artifacts.begin(output, manifest, previous)
        budget = embedding.tokens_per_step_that_fit(finished.values(), best.tokens_per_step)
        pool = session.encoders(info, best.precision, budget, settings.workers, settings.long, is_compiled=best.is_compiled)
        num_workers = max(min(pool.start(len(todo)), len(todo)), 1)
        start = time.perf_counter()
        failures = _embed(pool, source, todo, settings, finished)
        seconds = time.perf_counter() - start
    done = [finished[unit.key] for unit in todo if unit.key in finished]
    summary = embedding.summarise(done, num_workers, seconds, best.flops_per_second)
    summary |= {"num_workers": num_workers, "start_seconds": round(start - called, 1)}
    if done:
        _report(summary)
    num_plain = sum(not receipt.details.get("is_compiled") for receipt in done)
    if best.is_compiled and num_plain:
        say(f"embed: {num_plain} of {len(done)} units were done without the compiled model: last bits of vectors may differ")
    if failures:
        raise (HopelessError if all(failure.is_hopeless for failure in failures.values()) else RuntimeError)(
            f"embed: {len(failures)} of {len(units)} units failed ({_describe_failures(failures, units)})."
            " The others are finished and kept. Mend the cause and run the same command again."
        )
    receipts = tuple(embedding.place(finished[unit.key], unit) for unit in units)
    facts = {**manifest.facts, "last_run": summary}
    manifest = dataclasses.replace(manifest, facts=facts, receipts=receipts, is_complete=True)
    manifest.write(output, embedding.UNITS)
    say(f"embed: {manifest.num_rows} documents in {output}, {source.num_empty} rows had no text; {len(todo)} units done now")
    return manifest


def calibrate(
    session: Session,
    info: ModelInfo,
    choice: Choice,
    num_rows: int,
    num_workers: int,
    read_sample: Callable[[], Sequence[str]],
) -> Calibration:
    """Returns how workers should run: measured where there is enough to do, otherwise what usually suits the device.

    Args:
        session: The cluster.
        info: The model.
        choice: What is not to be chosen.
        num_rows: How many rows all workers will have to do.
        num_workers: How many there will be.
        read_sample: Returns texts to measure with.
    """
    if num_rows < _WORTH_MEASURING:
        precision, budget = choice.precision or session.choose_precision("auto"), TOKENS_PER_STEP[cluster.capacity().device]
        return Calibration(precision, choice.tokens_per_step or budget, bool(choice.is_compiled))
    best = session.calibrate(info, choice, read_sample() if choice.is_open else [], num_rows // num_workers)
    if best.notice:
        say(f"embed: {best.notice}")
    return best


def _sample(source: Corpus, todo: Sequence[Unit]) -> list[str]:
    """Returns the texts of the first rows of some units."""
    texts: list[str] = []
    for unit in todo[:: -(-len(todo) // _SAMPLE_UNITS)]:
        head = dataclasses.replace(unit, stop=min(unit.start + SAMPLE_ROWS // _SAMPLE_UNITS, unit.stop))
        texts += source.read(head)[1]
    return texts


def _describe_failures(failures: Mapping[str, Outcome[Receipt]], units: Sequence[Unit]) -> str:
    """Returns the first failed units, by file and rows, each with its error."""
    failed = [f"{unit.title}: {failures[unit.key].error.rstrip('.')}" for unit in units if unit.key in failures]
    more = f"; and {len(failed) - _SHOWN_FAILURES} more" if len(failed) > _SHOWN_FAILURES else ""
    return "; ".join(failed[:_SHOWN_FAILURES]) + more


def _report(summary: Mapping[str, Any]) -> None:
    """Says what the run did and where its time went."""
    say(
        f"embed: {summary['num_documents']:,} documents and {summary['num_tokens']:,} tokens in {summary['seconds']} s:"
        f" {summary['documents_per_second']:,.0f} documents/s, {summary['tokens_per_second']:,.0f} tokens/s"
    )
    say(
        f"embed: workers computed {summary['compute_share']:.1%} of the time, waited for tokens"
        f" {summary['wait_for_tokens_share']:.1%}, for the writer {summary['wait_for_writer_share']:.1%}, for work"
        f" {summary['wait_for_work_share']:.1%}; padding {summary['padding_share']:.1%} of the tokens"
    )
    if summary["matrix_rate_share"] is not None:
        say(f"embed: while computing, {summary['matrix_rate_share']:.0%} of the rate of a large matrix product on this machine")
    if summary["num_truncated"]:
        say(
            f"embed: {summary['num_truncated']:,} documents were longer than the model's window and lost"
            f" {summary['num_cut_tokens']:,} tokens. Pass --long mean to keep them."
        )
    if summary["num_split"]:
        say(f"embed: {summary['num_split']:,} documents were longer than the model's window and are the mean of several.")


def _inspect(settings: Settings, known: Manifest | None) -> Corpus:
    columns = Columns(settings.id_column, settings.text_column)
    source = corpus.inspect(settings.corpus, columns, known.facts.get("corpus") if known else None)
    if settings.fail_on_empty and source.num_empty:
        raise ValueError(f"{settings.corpus}: {source.num_empty} rows have no text. Fill them, or drop --fail-on-empty.")
    return source


def _places(location: str, source: Corpus) -> list[Place]:
    """Returns what of a corpus must not be mixed with the output: the folder that is searched for files, and the files."""
    folder = storage.place(location)
    return [*([folder] if folder.is_dir() else []), *(source.path_of(file.name) for file in source.files)]


def _recorded(settings: Settings, known: Manifest | None) -> Choice:
    """Returns what was asked for, or else what an earlier run in this output chose: another machine must not choose anew."""
    recorded = known.identity if known else {}
    return Choice(
        recorded.get("precision") if settings.precision == "auto" else settings.precision,
        settings.tokens_per_step or recorded.get("tokens_per_step"),
        _recorded_compiling(known) if settings.compile == "auto" else settings.compile == "on",
    )


def _recorded_compiling(known: Manifest | None) -> bool | None:
    return bool(known.identity.get("is_compiled")) if known else None


def _embed(
    pool: Encoders, source: Corpus, todo: Sequence[Unit], settings: Settings, finished: dict[str, Receipt]
) -> dict[str, Outcome[Receipt]]:
    """Adds the receipts of units to ``finished`` and to the journal; returns what became of each unit that failed."""
    if not todo:
        return {}
    output = storage.place(settings.output)
    failures: dict[str, Outcome[Receipt]] = {}
    titles = {unit.key: unit.title for unit in todo}
    with journal_of(output) as journal, Counter("embed", len(todo), "documents") as counter:
        for outcome in pool.embed(source, todo, output, settings.attempts):
            if outcome.result is None:
                failures[outcome.key] = outcome
                report_failure("embed", titles[outcome.key], outcome.error)
            else:
                journal.add(outcome.result)
                finished[outcome.key] = outcome.result
                counter.advance(outcome.result.num_rows, unit=outcome.key, **outcome.result.details)
    return failures


if __name__ == "__main__":
    main("embed", Settings, run)

"""Says what a corpus will cost before anything is spent on it, and afterwards how near that was."""

import dataclasses
import time
from datetime import datetime
from typing import Annotated, Any, Literal

from jobs import cluster, index, measurement, plan_pace, plan_tables
from jobs.cluster import Session
from jobs.entry import describe_run, main
from jobs.plan_pace import Extent, Sample
from jobs.terminal import say
from matryoshka import corpus, estimates, layouts, model, nested, storage
from matryoshka.config import Field, InputPath, JobSettings, Metavar, check_settings
from matryoshka.corpus import Columns, Corpus
from matryoshka.estimates import Estimate, Means, Shards
from matryoshka.layouts import Given, Wanted
from matryoshka.model import ModelInfo
from matryoshka.tokens import Long

_ID_BYTES, _END_BYTES = 4, 8  # what an id takes beside its text: in Parquet, in an index
_HOUR, _GB = 3_600.0, 1e9


class Settings(JobSettings):
    """Says what a corpus will cost before anything is spent on it, and afterwards how near that was.

    Counts tokens in a sample with the model's own tokenizer, takes the pace of a worker as it is given, as a benchmark found
    it, or as it measures it now, and prints documents, units, hours, bytes, price, and what would break first. With --compare,
    holds an earlier plan against what the finished artifacts say of themselves.
    """

    corpus: InputPath | None = Field(None, description="Parquet files: a folder, a file, or a glob pattern in quotes.")
    model: str = Field("minilm", description="Model folder, hub name, or minilm (the demo extra's model).")
    output: Annotated[str | None, Metavar("FILE.json")] = Field(None, description="Where the plan goes, for --estimate.")
    id_column: str = Field("id", description="Column with the document's id.")
    text_column: str = Field("text", description="Column with the document's text.")
    documents: int | None = Field(None, ge=1, description="Plan for so many rows like those of --corpus; none: for those rows.")
    unit_rows: int = Field(20_000, ge=1, description="Most rows in a unit, as for embed.")
    shard_rows: int = Field(index.ROWS_PER_SHARD, ge=1, description="Documents in a shard of the index, about.")
    dims: tuple[int, ...] = Field((), description="Resolutions whose bytes are listed; none: those of the model.")
    long: Long = Field("truncate", description="Texts beyond the model's window, as for embed.")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="As for embed.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="As for embed, and tried as embed would: for a long run, that takes a minute."
    )
    tokens_per_second: float | None = Field(None, gt=0, description="Pace of one worker, in place of a measurement.")
    documents_per_second: float | None = Field(None, gt=0, description="The same, in documents.")
    benchmark: Annotated[str | None, Metavar("FILE.json")] = Field(
        None, description="Report of benchmark encode to take the pace from, if it is of this model and hardware."
    )
    workers: int | None = Field(
        None, ge=1, description="Encoder processes of the run; none: one per GPU, or per CPU, of this cluster."
    )
    workers_per_node: int | None = Field(None, ge=1, description="Of the nodes that would be needed; none: as on this cluster.")
    memory: float | None = Field(None, gt=0, description="GB of memory of a node; none: what is free on this one.")
    within_hours: float = Field(24.0, gt=0, description="In which embedding is to be done, for workers and nodes needed.")
    price_per_hour: float | None = Field(None, ge=0, description="Of one worker, in any currency.")
    estimate: Annotated[str | None, Metavar("FILE.json")] = Field(
        None, description="An earlier plan, to be held against --compare."
    )
    compare: Annotated[tuple[str, ...], Metavar("FOLDER,...")] = Field(
        (), description="Finished embeddings, indexes, or both, that --estimate was made for."
    )
    tolerance: float | None = Field(
        None, ge=0, description="Largest share by which --estimate may be off; more ends with code 1."
    )

    @check_settings
    def _one_thing_at_a_time(self) -> "Settings":
        if bool(self.estimate) != bool(self.compare):
            raise ValueError("plan: --estimate FILE.json and --compare FOLDER go together. Pass both, or neither.")
        if bool(self.estimate) == bool(self.corpus):
            raise ValueError("plan: pass --corpus to make a plan, or --estimate and --compare to judge one.")
        if self.tolerance is not None and not self.compare:
            raise ValueError("--tolerance: says nothing without --compare. Leave it out.")
        given = [name for name in ("tokens_per_second", "documents_per_second", "benchmark") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"plan: {' and '.join(given)} both say how fast a worker is. Pass one of them.")
        return self


def run(settings: Settings) -> dict[str, Any]:
    """Makes a plan, or holds one against what it was made for."""
    if settings.compare:
        return _judge(settings)
    output = measurement.check_output(settings.output, "plan") if settings.output else None
    source = corpus.survey(settings.corpus or "", Columns(settings.id_column, settings.text_column))
    if settings.documents is not None and settings.documents < source.num_rows:
        raise ValueError(f"--documents {settings.documents}: the corpus has {source.num_rows} rows. Pass as many, or more.")
    info = model.describe(settings.model)
    dims = nested.check_dims(settings.dims, info.width, "--dims") if settings.dims else info.dims
    sample = Sample.read(source)
    start = time.perf_counter()
    with cluster.connected() as session:
        connect_seconds = time.perf_counter() - start
        estimate, facts = _estimate(settings, session, source, info, sample, connect_seconds)
    by_dim = estimates.bytes_by_dim(dims, sample.id_bytes + _END_BYTES)
    report = {
        **describe_run("plan", settings),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": {"name": settings.model, "fingerprint": info.fingerprint},
        **facts,
        **dataclasses.asdict(estimate),
        "bytes_per_document": by_dim,
        "compared": estimate.comparable(),
    }
    if output:  # before anything is printed: who reads may stop reading
        storage.publish_json(output, report)
    for note in facts["notes"]:
        say(f"plan: {note}")
    plan_tables.show(estimate, by_dim, facts["layout"], "GPU-hours" if facts["hardware"]["gpu"] else "worker-hours")
    return report


def _estimate(
    settings: Settings, session: Session, source: Corpus, info: ModelInfo, sample: Sample, connect_seconds: float
) -> tuple[Estimate, dict[str, Any]]:
    """Returns the plan, and on what it rests."""
    extent = Extent.of(source, settings.documents, settings.unit_rows)
    there, notes = cluster.capacity(), list[str]()
    means = Means(
        min(settings.workers or there.default_workers, extent.num_units),
        settings.workers_per_node or max(there.cpus_per_node // there.cpus_per_gpu, 1),
        settings.memory * _GB if settings.memory else float(measurement.free_bytes()),
        settings.within_hours * _HOUR,
        settings.price_per_hour,
    )
    hardware = session.describe_worker()
    known = plan_pace.find_known(settings, info, hardware, notes)
    size, pace = plan_pace.find_size_and_pace(settings, session, info, sample, known, extent, means.num_workers)
    pace = dataclasses.replace(pace, connect_seconds=connect_seconds)
    has_bf16 = there.device == "cuda" or session.choose_precision("auto") == "bf16"
    num_documents = round(size.documents.value)
    num_shards = -(-num_documents // settings.shard_rows)
    id_bytes = sample.id_bytes + _END_BYTES
    choice = layouts.choose(Given(num_documents, num_shards, info.dims, False, id_bytes, there.device, has_bf16), Wanted())
    learned = (choice.layout.num_lists, choice.layout.dim, index.Settings.model_fields["sample"].default)
    shards = Shards(num_shards, choice.coarse_bytes, choice.vector_bytes, id_bytes, *learned)
    embedding_bytes = 2.0 * info.width + sample.id_bytes + _ID_BYTES
    estimate = estimates.make_estimate(size, pace, shards, embedding_bytes, means)
    if known and plan_pace.is_too_short(pace, estimate.embedding.work_seconds.value / means.num_workers):
        notes.append("the benchmark's model was compiled, and this run is too short for that: leave --benchmark out")
    return estimate, {"hardware": hardware, "layout": choice.describe(), "notes": notes}


def _judge(settings: Settings) -> dict[str, Any]:
    """Prints what was estimated beside what was taken.

    Raises:
        RuntimeError: An estimate is off by more than is tolerated.
    """
    plan = measurement.read_report(storage.place(settings.estimate or ""), "plan")
    found, beyond = {}, []
    for folder in map(storage.place, settings.compare):
        kind, lines = plan_tables.judge(plan, folder)
        plan_tables.show_lines(kind, folder, lines)
        found[kind] = {line.name: {**dataclasses.asdict(line), "error": line.error} for line in lines}
        limit = settings.tolerance
        beyond += [f"{kind}: {own.name} {own.error:+.1%}" for own in lines if limit is not None and not own.is_within(limit)]
    if beyond:
        raise RuntimeError(
            f"plan: off by more than {settings.tolerance:.0%} ({'; '.join(beyond)}). Plan anew where the run runs."
        )
    return found


if __name__ == "__main__":
    main("plan", Settings, run, writes=None)

"""Says how well a model retrieves, at every dim, and through an index's funnel."""

import dataclasses
from pathlib import Path

from jobs import cluster, embed, prepare
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say, show_table
from matryoshka import artifacts, corpus, evaluation, model, nested, report, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, FolderPath, check_settings
from matryoshka.evaluation import Row
from matryoshka.indexing import IndexStore
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.vectors import EmbeddingStore

_UNIT_ROWS = 2_000  # small, so that every worker gets some of a small corpus


class Settings(StageSettings):
    """Says how well a model retrieves: nDCG@10, Recall@10 and MRR@10 at every dim, and through an index's funnel.

    Every document is compared with every query, so the figures are exact. Documents are embedded into the output folder,
    unless --embeddings names vectors that this model already made of this corpus.
    """

    data: FolderPath | None = Field(None, description="Folder that the prepare job wrote.")
    beir: FolderPath | None = Field(None, description="BEIR folder, in place of --data.")
    split: str = Field("test", description="Split whose queries and judgements are used.")
    model: str = Field("minilm", description="Model folder, hub name, or minilm (the demo extra's model).")
    dims: tuple[int, ...] = Field((), description="Resolutions to evaluate; none: those of the model.")
    embeddings: FolderPath | None = Field(None, description="Folder that the embed job wrote from this model and data.")
    index: FolderPath | None = Field(None, description="Folder that the index job wrote: its funnel is evaluated as well.")
    compare: FolderPath | None = Field(None, description="An earlier evaluation of the same data, to stand beside this one.")
    system: str | None = Field(
        None, description="Name in the report; none: 'tuned' if this project trained the model, else 'base'."
    )
    workers: int | None = Field(None, ge=1, description="Encoder processes; none: one per GPU, or per CPU.")

    @check_settings
    def _one_source(self) -> "Settings":
        if bool(self.data) == bool(self.beir):
            raise ValueError("give the data as --data (from the prepare job) or as --beir, one of them.")
        return self


def run(settings: Settings) -> Manifest:
    """Evaluates the model, unless the output already holds the report."""
    output = storage.local_path(settings.output)
    info = model.describe(settings.model)
    dims = nested.check_dims(settings.dims or info.dims, info.width, settings.model, info.dims if info.is_tuned else ())
    artifacts.check_owner(output, "evaluation")
    data = _open_data(settings, output)
    query_ids, texts = data.queries(settings.split)
    qrels = data.qrels(settings.split)
    store = EmbeddingStore.open(storage.local_path(settings.embeddings)) if settings.embeddings else None
    index = IndexStore.open(storage.local_path(settings.index)) if settings.index else None
    system = settings.system or ("tuned" if info.is_tuned else "base")
    identity = {
        "model": info.fingerprint,
        "data": data.manifest.fingerprint,
        "split": settings.split,
        "dims": dims,
        "system": system,
        "embeddings": store.manifest.fingerprint if store else None,
        "index": index.manifest.fingerprint if index else None,
        "compare": _fingerprint(settings.compare),
    }
    _refuse_strangers(info, data, store, index, settings)
    previous = artifacts.claim(output, "evaluation", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        say(f"evaluate: nothing to do, {output} is complete")
        return previous
    manifest = Manifest("evaluation", identity, facts={"run": describe_run("evaluate", settings)})
    artifacts.begin(output, manifest, previous)
    with cluster.connected() as session:
        store = store or _embed(settings, data, output)
        made = store.manifest.identity
        pool = session.encoders(info, made["precision"], made["tokens_per_step"], settings.workers)
        queries = pool.encode(texts, "query")
    rows = report.read_rows(storage.local_path(settings.compare)) if settings.compare else []
    rows += evaluation.evaluate_dims(system, store, queries, query_ids, qrels, dims)
    if index:
        dim = index.plan.shortlist.dim
        rows += evaluation.evaluate_funnel(f"{system}+funnel", index.searcher(), dim, queries, query_ids, qrels)
    return _finish(output, manifest, rows, len(texts), store.manifest.num_rows)


def _open_data(settings: Settings, output: Path) -> DatasetStore:
    if settings.data:
        return DatasetStore.open(storage.local_path(settings.data))
    folder = output / "data"
    prepare.run(prepare.Settings(output=str(folder), beir=settings.beir, replace=settings.replace))
    return DatasetStore.open(folder)


def _fingerprint(compare: str | None) -> str | None:
    return artifacts.read_complete(storage.local_path(compare), "evaluation").fingerprint if compare else None


def _refuse_strangers(
    info: ModelInfo, data: DatasetStore, store: EmbeddingStore | None, index: IndexStore | None, settings: Settings
) -> None:
    """Refuses what does not belong together: each artifact says what it was made from.

    Raises:
        ValueError: Embeddings or index come from another model or corpus, or the report to compare with from other data.
    """
    for name, artifact in (("--embeddings", store), ("--index", index)):
        if artifact and artifact.manifest.identity["model"] != info.fingerprint:
            raise ValueError(f"{name} {artifact.folder}: was made with another model than {settings.model}. Make it anew.")
        if artifact and corpus.recall(artifact.manifest.facts["corpus"]).fingerprint != data.corpus_fingerprint:
            raise ValueError(f"{name} {artifact.folder}: was not made from {data.corpus}. Pass one made from the evaluated data.")
    if settings.compare:
        other = artifacts.read_complete(storage.local_path(settings.compare), "evaluation")
        if (other.identity["data"], other.identity["split"]) != (data.manifest.fingerprint, settings.split):
            raise ValueError(f"--compare {settings.compare}: evaluated other data or another split. Compare like with like.")


def _embed(settings: Settings, data: DatasetStore, output: Path) -> EmbeddingStore:
    folder = output / "embeddings"
    embed.run(
        embed.Settings(
            output=str(folder), corpus=data.corpus, model=settings.model, workers=settings.workers, replace=settings.replace,
            unit_rows=_UNIT_ROWS,
        )
    )  # fmt: skip
    return EmbeddingStore.open(folder)


def _finish(output: Path, manifest: Manifest, rows: list[Row], num_queries: int, num_documents: int) -> Manifest:
    title = f"Retrieval quality: {num_queries} queries, {num_documents} documents"
    report.write(output, title, rows, manifest.facts["run"]["settings"], manifest.identity)
    records = [FileRecord.of(output, output / name) for name in (report.JSON, report.MARKDOWN)]
    receipts = tuple(Receipt(record.path, len(rows), (record,)) for record in records)
    finished = dataclasses.replace(manifest, receipts=receipts, is_complete=True)
    finished.write(output)
    for metric, table in report.tables(rows).items():
        show_table(metric, table)
    say(f"evaluate: report in {output / report.MARKDOWN} and {output / report.JSON}")
    return finished


if __name__ == "__main__":
    main("evaluate", Settings, run)

"""Asks an index: one question at the terminal, or a file of queries into Parquet and a TREC run file."""

import dataclasses
from pathlib import Path

import numpy as np

from jobs import cluster
from jobs.entry import describe_run, main
from jobs.terminal import say, show_table
from matryoshka import artifacts, corpus, model, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, FolderPath, InputPath, JobSettings, check_settings
from matryoshka.corpus import Columns
from matryoshka.encode import TOKENS_PER_STEP, Encoder
from matryoshka.funnel import Ranking
from matryoshka.indexing import IndexStore, Quality
from matryoshka.model import ModelInfo
from matryoshka.nested import FunnelPlan

_SHOWN_CHARACTERS = 160
_TREC_TAG = "matryoshka"


class Settings(JobSettings):
    """Asks an index: one question at the terminal, or a file of queries into Parquet and a TREC run file.

    Queries are encoded by the very model that the index was made with.
    """

    index: FolderPath = Field(description="Folder that the index job wrote.")
    query: str | None = Field(None, description="One question; the best documents are printed.")
    queries: InputPath | None = Field(None, description="Parquet files with queries: a folder, file or glob pattern.")
    id_column: str = Field("id", description="Column of --queries with the query's id.")
    text_column: str = Field("text", description="Column of --queries with the query's text.")
    output: FolderPath | None = Field(None, description="Folder for results.parquet and results.trec; needed with --queries.")
    results: int = Field(10, ge=1, description="Documents per query.")
    plan: tuple[str, ...] = Field((), description="Another funnel than the index's own, as dim:keep steps: 64:500,384:100.")
    quality: Quality | None = Field(None, description="A plan that the tune job found, by name, in place of --plan.")
    model: str | None = Field(None, description="Where the index's model is now, if it was moved.")
    workers: int | None = Field(None, ge=1, description="Processes for --queries; none: one per GPU, or per CPU.")
    replace: bool = Field(False, description="Discard what the output holds if it came from other inputs or settings.")

    @check_settings
    def _one_question(self) -> "Settings":
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either --query or --queries.")
        if self.query is not None and not self.query.strip():
            raise ValueError("--query is empty. Ask something.")
        if self.query is not None and self.output:
            raise ValueError("--output goes with --queries; the answer to --query is printed.")
        if self.queries and not self.output:
            raise ValueError("--queries needs --output, a folder for the results.")
        if self.plan and self.quality:
            raise ValueError("--plan and --quality both choose the funnel. Give one of them.")
        return self


def run(settings: Settings) -> None:
    """Answers the question, or all of the file's."""
    index = IndexStore.open(storage.local_path(settings.index))
    info = _model_of(index, settings)
    plan = FunnelPlan.parse(settings.plan) if settings.plan else index.plan_for(settings.quality)
    index.check_plan(plan)
    if index.tuned and not index.is_tuning_current and not settings.plan:
        say("search: the index was tuned with other documents than it has now; python -m jobs.tune measures again")
    if settings.query is not None:
        _answer(settings.query, index, info, plan, settings.results)
    else:
        _answer_all(settings, index, info, plan)


def _model_of(index: IndexStore, settings: Settings) -> ModelInfo:
    info = model.describe(settings.model or str(index.manifest.facts["model"]))
    if info.fingerprint != index.manifest.identity["model"]:
        raise ValueError(f"{info.folder}: is not the model that {index.folder} was made with. Pass --model, or index again.")
    return info


def _answer(query: str, index: IndexStore, info: ModelInfo, plan: FunnelPlan, num_results: int) -> None:
    model.quieten()
    searcher = index.searcher(plan)
    encoder = Encoder(info.folder, "cpu", "float32", TOKENS_PER_STEP["cpu"])
    ranking = searcher.search(encoder.encode([query], "query").vectors, num_results)
    texts = _texts(index, ranking)
    rows = [
        [str(rank), f"{score:.3f}", document, " ".join(texts.get(document, "").split())[:_SHOWN_CHARACTERS]]
        for rank, (score, document) in enumerate(zip(ranking.scores[0], ranking.ids[0], strict=True), start=1)
        if document
    ]
    show_table(query, [["rank", "score", "document", "text"], *rows], text_columns=(2, 3))
    say(f"{searcher.num_documents} documents, {len(index.shards)} shards, funnel {plan.describe()}")


def _texts(index: IndexStore, ranking: Ranking) -> dict[str, str]:
    """Returns the texts of the results, if the corpus is still what the index was made from."""
    source = corpus.recall(index.manifest.facts["corpus"])
    names = [str(name) for name in ranking.ids.ravel()]
    return corpus.find_texts(source, names) if corpus.is_unchanged(source) else {}


def _answer_all(settings: Settings, index: IndexStore, info: ModelInfo, plan: FunnelPlan) -> None:
    source = corpus.inspect(settings.queries or "", Columns(settings.id_column, settings.text_column))
    output = storage.local_path(settings.output or "")
    identity = {
        "index": index.manifest.fingerprint,
        "queries": source.fingerprint,
        "plan": plan.describe(),
        "results": settings.results,
    }
    previous = artifacts.claim(output, "results", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        say(f"search: nothing to do, {output} is complete ({previous.num_rows} results)")
        return
    query_ids, texts = corpus.read_texts(source)
    manifest = Manifest("results", identity, facts={"run": describe_run("search", settings)})
    artifacts.begin(output, manifest, previous)
    with cluster.connected() as session:
        tokens_per_step = TOKENS_PER_STEP[cluster.capacity().device]
        pool = session.encoders(info, index.manifest.facts["precision"], tokens_per_step, settings.workers)
        queries = pool.encode(texts, "query")
        with session.shards(index.shards, settings.workers) as call:
            ranking = index.searcher(plan, call).search(queries, settings.results)
    receipts = _write(output, query_ids, ranking)
    dataclasses.replace(manifest, receipts=receipts, is_complete=True).write(output)
    say(f"search: {len(query_ids)} queries answered in {output}, {source.num_empty} had no text")


def _write(output: Path, query_ids: list[str], ranking: Ranking) -> tuple[Receipt]:
    found = ranking.documents >= 0
    query_numbers, positions = np.nonzero(found)
    columns = {
        "query_id": [query_ids[number] for number in query_numbers],
        "rank": (positions + 1).tolist(),
        "document_id": ranking.ids[found].tolist(),
        "score": ranking.scores[found].tolist(),
    }
    with storage.publish(output / "results.parquet") as temporary:
        corpus.write_rows(temporary, columns)
    results = zip(*columns.values(), strict=True)
    lines = (f"{query} Q0 {document} {rank} {score!r} {_TREC_TAG}\n" for query, rank, document, score in results)
    storage.publish_bytes(output / "results.trec", "".join(lines).encode())
    parquet, trec = (FileRecord.of(output, output / name) for name in ("results.parquet", "results.trec"))
    return (Receipt("results", len(positions), (parquet, trec)),)


if __name__ == "__main__":
    main("search", Settings, run)

"""Asks an index: one question at the terminal, or a file of queries into Parquet and a TREC run file."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jobs import cluster
from jobs.cluster import Session, ShardActors, ShardsLostError
from jobs.entry import RUN_ID, describe_run, main
from jobs.index import tell_update
from jobs.terminal import Counter, say, show_table
from matryoshka import artifacts, corpus, model, queries, results, storage, vectors
from matryoshka.artifacts import Manifest
from matryoshka.config import Field, FolderPath, InputPath, JobSettings, check_settings
from matryoshka.corpus import Columns, Corpus
from matryoshka.funnel import Ranking
from matryoshka.indexing import IndexStore, Quality
from matryoshka.model import ModelInfo
from matryoshka.nested import FunnelPlan
from matryoshka.results import Rows
from matryoshka.units import plan_units

_SHOWN_CHARACTERS = 160
_PART_QUERIES = 32_768  # read, and encoded, at a time
_MOST_QUERIES = 4_096  # searched at a time
_MOST_CANDIDATES = 1 << 24  # at a time: 200 MB

Part = tuple[Any, Any]
"""Ids and vectors of some queries."""


class Settings(JobSettings):
    """Asks an index: one question at the terminal, or a file of queries into Parquet and a TREC run file.

    Queries are encoded by the very model that the index was made with; queries that are vectors already need none.
    """

    index: FolderPath = Field(description="Folder that the index job wrote.")
    query: str | None = Field(None, description="One question; the best documents are printed.")
    queries: InputPath | None = Field(None, description="Parquet files with queries: a folder, file or glob pattern.")
    id_column: str = Field("id", description="Column of --queries with the query's id.")
    text_column: str = Field("text", description="Column of --queries with the query's text.")
    vector_column: str | None = Field(None, description="Column of --queries with the query's vector, instead of its text.")
    output: FolderPath | None = Field(None, description="Folder for results.parquet and results.trec; needed with --queries.")
    results: int = Field(10, ge=1, description="Documents per query.")
    with_text: bool = Field(False, description="Add the text of each document to results.parquet.")
    where: str | None = Field(None, description="Search only documents for which this holds: \"subreddit = 'python'\".")
    plan: tuple[str, ...] = Field((), description="Another funnel than the index's own, as dim:keep steps: 64:500,384:100.")
    quality: Quality | None = Field(None, description="A plan that the tune job found, by name, in place of --plan.")
    allow_partial: bool = Field(False, description="Leave out shards that cannot be searched, and say how much was searched.")
    model: str | None = Field(None, description="Where the index's model is now, if it was moved.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where --queries are searched; GPUs must hold all vectors.")
    workers: int | None = Field(None, ge=1, description="Most processes for --queries; none: one per GPU, or per CPU.")
    replace: bool = Field(False, description="Discard what the output holds if it came from other inputs or settings.")
    run_id: str | None = RUN_ID

    @check_settings
    def _one_question(self) -> "Settings":
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either --query or --queries.")
        if self.query is not None and not self.query.strip():
            raise ValueError("--query is empty. Ask something.")
        if self.query is not None and (self.output or self.vector_column or self.with_text):
            raise ValueError("--output, --vector-column and --with-text go with --queries; the answer to --query is printed.")
        if self.queries and not self.output:
            raise ValueError("--queries needs --output, a folder for the results.")
        if self.plan and self.quality:
            raise ValueError("--plan and --quality both choose the funnel. Give one of them.")
        return self


def run(settings: Settings) -> None:
    """Answers the question, or all of the file's."""
    folder, faults = storage.place(settings.index), dict[str, str]()
    if settings.allow_partial:
        index, faults = IndexStore.open_partial(folder)
    else:
        index = IndexStore.open(folder)
    tell_update(index)
    plan = FunnelPlan.parse(settings.plan) if settings.plan else index.plan_for(settings.quality)
    index.check_plan(plan, settings.device if settings.queries else "cpu")
    index.check_where(settings.where)
    if index.tuned and not index.is_tuning_current and not settings.plan:
        say("search: the index was tuned with other documents than it has now; python -m jobs.tune measures again")
    info = None if settings.vector_column else model.describe_maker(index.folder, index.manifest, settings.model)
    if info and settings.query is not None:
        _answer(settings.query, index, info, plan, settings)
        _report_missing(index, faults)
    else:
        _answer_all(settings, index, info, plan, faults)


def _answer(query: str, index: IndexStore, info: ModelInfo, plan: FunnelPlan, settings: Settings) -> None:
    from matryoshka.encode import Encoder  # of this process; the file's queries are computed by workers

    model.quieten()
    searcher = index.searcher(plan)
    encoder = Encoder(info.folder, "cpu", "float32")
    ranking = searcher.search(encoder.encode([query], "query").vectors, settings.results, settings.where)
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
    source = corpus.recall(index.manifest.facts.get("corpus"))
    names = [str(name) for name in ranking.ids.ravel()]
    return corpus.find_texts(source, names) if corpus.is_unchanged(source) else {}


def _report_missing(index: IndexStore, faults: Mapping[str, str]) -> None:
    """Says which shards were left out, and why."""
    for key, fault in faults.items():
        say(f"search: without shard {key} ({index.num_documents_of[key]} documents): {fault}")
    if faults:
        say(f"search: {index.coverage:.2%} of the documents were searched")


def _answer_all(settings: Settings, index: IndexStore, info: ModelInfo | None, plan: FunnelPlan, faults: dict[str, str]) -> None:
    source = _inspect(settings, index)
    output = storage.place(settings.output or "")
    identity = {
        "index": index.manifest.fingerprint,
        "queries": source.fingerprint,
        "plan": plan.describe(),
        "results": settings.results,
        "where": settings.where,
        "with_text": settings.with_text or None,  # results made before there was a choice do not say
        "allow_partial": settings.allow_partial or None,
    }
    previous = artifacts.claim(output, "results", identity, settings.replace)
    is_whole = previous and previous.is_complete and not previous.facts.get("missing")
    if previous and is_whole and not artifacts.find_faults(output, previous):
        say(f"search: nothing to do, {output} is complete ({previous.num_rows} results)")
        return
    manifest = Manifest("results", identity, facts={"run": describe_run("search", settings)})
    with cluster.connected() as session:
        cluster.check_device(settings.device)
        artifacts.begin(output, manifest, previous)
        with storage.scratch(output) as work:
            parts = _encode(session, source, info, settings, index, work) if info else _read(source, index.width)
            with session.shards(index.shards, settings.workers, settings.device) as actors:
                asking = _Asking(settings, index, plan, actors, faults)
                rows = asking.rows(parts, source.num_rows - source.num_empty)
                if settings.with_text:
                    rows = results.with_texts(rows, corpus.recall(index.manifest.facts.get("corpus")), work)
                receipt = results.write_results(output, rows)
    facts = {**manifest.facts, "missing": asking.faults, "coverage": asking.index.coverage}
    dataclasses.replace(manifest, facts=facts, receipts=(receipt,), is_complete=True).write(output)
    _report_missing(asking.index, asking.faults)
    say(f"search: {source.num_rows - source.num_empty} queries answered in {output}, {source.num_empty} had no text")


def _inspect(settings: Settings, index: IndexStore) -> Corpus:
    """Returns the checked queries.

    Raises:
        ValueError: Anything is wrong with them, or the texts of documents are asked for and are not there.
    """
    if settings.with_text and not corpus.is_unchanged(corpus.recall(index.manifest.facts.get("corpus"))):
        raise ValueError("--with-text: the corpus is not what the index was made from. Leave it out, or embed and index again.")
    place = settings.queries or ""
    if settings.vector_column:
        return queries.inspect_vectors(place, settings.id_column, settings.vector_column, index.width, _PART_QUERIES)
    return corpus.inspect(place, Columns(settings.id_column, settings.text_column))


def _encode(
    session: Session, source: Corpus, info: ModelInfo, settings: Settings, index: IndexStore, work: Path
) -> Iterator[Part]:
    """Encodes all queries, since encoders and shards take the same CPUs in turn; yields them from disk, part by part."""
    precision, paths = index.manifest.facts["precision"], []
    for number, unit in enumerate(plan_units(source.files, _PART_QUERIES)):
        ids, texts = source.read(unit)
        if ids:
            paths.append(work / f"{number:08d}.parquet")
            vectors.write_unit(paths[-1], ids, session.encode_queries(info, precision, texts, settings.workers))
    return map(vectors.read_unit, paths)


def _read(source: Corpus, width: int) -> Iterator[Part]:
    """Yields the queries of a source of vectors, part by part."""
    return (queries.read_vectors(source, unit, width) for unit in plan_units(source.files, _PART_QUERIES))


class _Asking:
    """Asks shards in actors, and goes on without those that are lost, if that is allowed.

    Attributes:
        index: Without the shards that are left out.
        faults: Why each of them is.
    """

    def __init__(
        self, settings: Settings, index: IndexStore, plan: FunnelPlan, actors: ShardActors, faults: dict[str, str]
    ) -> None:
        self._settings, self._plan, self._actors = settings, plan, actors
        self.faults = faults
        self._use(index)

    def _use(self, index: IndexStore) -> None:
        self.index = index
        self._searcher = index.searcher(self._plan, self._actors.caller(index.shards))
        most = self._searcher.count_candidates(max(self._plan.shortlist.keep, self._settings.results))
        self._num_at_once = min(max(_MOST_CANDIDATES // most, 1), _MOST_QUERIES)

    def rows(self, parts: Iterator[Part], num_queries: int) -> Iterator[Rows]:
        """Yields the results of all queries in their order."""
        with Counter("search", num_queries, "queries") as counter:
            for ids, block in parts:
                done = 0
                while done < len(ids):
                    now = slice(done, done + self._num_at_once)
                    yield self._ask(ids[now], block[now])
                    counter.advance(len(ids[now]), len(ids[now]))
                    done = now.stop

    def _ask(self, ids: Any, block: Any) -> Rows:
        while True:
            try:
                scores, documents = self._searcher.find(block, self._settings.results, self._settings.where)
            except ShardsLostError as error:
                self._leave_out(error)
            else:
                coverage = self.index.coverage if self._settings.allow_partial else None
                return results.to_rows(ids, scores, documents, self._searcher.ids_of, coverage)

    def _leave_out(self, error: ShardsLostError) -> None:
        """Goes on without the shards that were lost.

        Raises:
            RuntimeError: That is not allowed, or none is left.
        """
        if not self._settings.allow_partial:
            raise RuntimeError(f"search: {error}. Mend it, or pass --allow-partial to search the others.") from None
        self.faults |= error.faults
        if len(error.faults) == len(self.index.shards):
            raise RuntimeError(f"search: no shard is left ({error}). Run the same command again.") from None
        self._use(self.index.without(error.faults))


if __name__ == "__main__":
    main("search", Settings, run)

"""Says how good models are, at every dim: at retrieval, through an index's funnel, at telling similar sentences."""

import dataclasses
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cluster, embed, prepare
from jobs.cluster import Encoders, Session
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say, show_table
from matryoshka import artifacts, evaluation, model, nested, page, report, storage, sts
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, FolderPath, InputPath, check_settings
from matryoshka.encode import TOKENS_PER_STEP
from matryoshka.evaluation import Profile, Row
from matryoshka.indexing import IndexStore
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.report import Report
from matryoshka.sts import ScoredPairs
from matryoshka.tokens import Role
from matryoshka.vectors import EmbeddingStore, Float16Array

_OF_ONE_MODEL = ("model", "system", "embeddings", "index", "compare")
_OF_RETRIEVAL = ("split", "embeddings", "index")
_NAME = re.compile(r"[\w.-]+")


class Settings(StageSettings):
    """Says how good a model is at every dim: nDCG@10, Recall@10, MRR@10 and P@1 of retrieval (P@1 is the accuracy of the nearest
    neighbour), also through an index's funnel; or, with --sts, the rank correlation with people's judgements of similarity.

    Every document is compared with every query, so the figures are exact; where documents are chunked, a document counts as
    its best chunk. Documents are embedded into the output folder, unless --embeddings names vectors that this model already
    made of this corpus. Several --models are ranked, each with its size and speed; one that is added later costs only itself.
    """

    data: FolderPath | None = Field(None, description="Folder that the prepare job wrote.")
    beir: FolderPath | None = Field(None, description="BEIR folder, in place of --data.")
    sts: InputPath | None = Field(
        None,
        description="Scored pairs, in place of --data: STS-benchmark's file, or CSV or Parquet with score, sentence1, sentence2.",
    )
    split: str = Field("test", description="Split whose queries and judgements are used.")
    model: str = Field("minilm", description="Model folder, hub name, or minilm (the demo extra's model).")
    models: tuple[str, ...] = Field((), description="Models to rank, in place of --model; NAME=MODEL gives one another name.")
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
        if sum(map(bool, (self.data, self.beir, self.sts))) != 1:
            raise ValueError("give the data as --data (from the prepare job), --beir or --sts, one of them.")
        self._refuse_together("sts", _OF_RETRIEVAL, "it goes with --data or --beir")
        self._refuse_together("models", _OF_ONE_MODEL, "it goes with one model")
        return self

    def _refuse_together(self, name: str, others: tuple[str, ...], reason: str) -> None:
        given = [other for other in others if other in self.model_fields_set and getattr(self, other) is not None]
        if getattr(self, name) and given:
            raise ValueError(f"--{given[0]} cannot be used with --{name}: {reason}. Drop one of them.")


def run(settings: Settings) -> Manifest:
    """Evaluates the model or ranks the models, unless the output already holds the report."""
    artifacts.check_owner(storage.local_path(settings.output), "evaluation")
    return _rank(settings) if settings.models else _evaluate(settings)


def named_models(models: tuple[str, ...]) -> dict[str, str]:
    """Returns models by their names in reports and folders: the last part of the path, or what stands before ``=``.

    Raises:
        ValueError: Two have one name, or a name is no name for a folder.
    """
    named: dict[str, str] = {}
    for text in models:
        name, is_named, location = ("", "", text) if Path(text).exists() else text.partition("=")
        name, location = (name, location) if is_named else (Path(text).name, text)
        if not _NAME.fullmatch(name) or not location:
            raise ValueError(f"--models {text}: '{name}' cannot name a folder. Write NAME=MODEL, with letters and digits.")
        if name in named:
            raise ValueError(f"--models: two are named '{name}' ({named[name]}, {location}). Write another-name={location}.")
        named[name] = location
    return named


def check_models(settings: Settings) -> None:
    """Checks models that are to be ranked, before any work.

    Raises:
        ValueError: One is none, or their names or dims are unusable.
    """
    _describe_all(settings)


def check_data(settings: Settings) -> None:
    """Checks that the data to evaluate on is there, before any work.

    Raises:
        ValueError: It is not.
    """
    if settings.sts:
        sts.read(storage.local_path(settings.sts))
    elif settings.data:
        _Retrieval.open(settings)
    else:
        path = storage.local_path(settings.beir or "") / "qrels" / f"{settings.split}.tsv"
        if not path.is_file():
            raise ValueError(f"{path}: not there. Pass a BEIR folder with judgements for the split, or another split.")


def _describe(settings: Settings) -> tuple[ModelInfo, tuple[int, ...]]:
    info = model.describe(settings.model)
    return info, nested.check_dims(settings.dims or info.dims, info.width, settings.model, info.dims if info.is_tuned else ())


def _describe_all(settings: Settings) -> dict[str, tuple[str, ModelInfo, tuple[int, ...]]]:
    """Returns location, description and dims of each model by its name: of the dims that were asked for, those that it has.

    Raises:
        ValueError: A model is none, names or dims are unusable, or there is no dim that all have.
    """
    found = {}
    for name, location in named_models(settings.models).items():
        info = model.describe(location)
        usable = [dim for dim in settings.dims if (dim in info.dims if info.is_tuned else dim <= info.width)]
        # Where none is usable, all are refused by name.
        dims = nested.check_dims(usable or settings.dims or info.dims, info.width, location, info.dims if info.is_tuned else ())
        found[name] = (location, info, dims)
    every = {dim for _, _, dims in found.values() for dim in dims}
    nowhere = [dim for dim in settings.dims if dim not in every]
    if nowhere:
        raise ValueError(f"--models: none of them has {', '.join(map(str, nowhere))} dims. Choose others as --dims.")
    if not any(all(dim in dims for _, _, dims in found.values()) for dim in every):
        own = "; ".join(f"{name}: {', '.join(map(str, dims))}" for name, (_, _, dims) in found.items())
        raise ValueError(f"--models: no dim that all of them have ({own}). Pass --dims with one that they share.")
    return found


def _evaluate(settings: Settings) -> Manifest:
    """Evaluates one model."""
    output = storage.local_path(settings.output)
    info, dims = _describe(settings)
    system = settings.system or ("tuned" if info.is_tuned else "base")
    source: _Retrieval | _Similarity = _Similarity.open(settings) if settings.sts else _Retrieval.open(settings)
    store = EmbeddingStore.open(storage.local_path(settings.embeddings)) if settings.embeddings else None
    index = IndexStore.open(storage.local_path(settings.index)) if settings.index else None
    identity = {
        "model": info.fingerprint,
        "data": source.fingerprint,
        "split": source.split,
        "dims": dims,
        "system": system,
        "embeddings": store.manifest.fingerprint if store else None,
        "index": index.manifest.fingerprint if index else None,
        "plan": index.plan.describe() if index else None,
        "compare": _fingerprint(settings.compare),
    }
    if isinstance(source, _Retrieval):
        embed.refuse_strangers("--embeddings", store, info, source.data)
        embed.refuse_strangers("--index", index, info, source.data)
    _refuse_comparing(source, system, settings)
    previous = artifacts.claim(output, "evaluation", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        say(f"evaluate: nothing to do, {output} is complete")
        return previous
    manifest = Manifest("evaluation", identity, facts={"run": describe_run("evaluate", settings)})
    artifacts.begin(output, manifest, previous)
    with cluster.connected() as session:
        found = source.evaluate(session, settings, _Job(system, info, dims, store, index))
    rows, profiles = [*_rows(settings.compare), *found.rows], [*_profiles(settings.compare), found.profile]
    made = Report(found.title, rows, profiles, remarks=found.remarks, settings=manifest.facts["run"]["settings"],
                  fingerprints=identity)  # fmt: skip
    return _finish(output, manifest, made)


def _rank(settings: Settings) -> Manifest:
    """Evaluates each of several models in a folder of its own below the output, and ranks them."""
    output = storage.local_path(settings.output)
    found = _describe_all(settings)
    source: _Retrieval | _Similarity = _Similarity.open(settings) if settings.sts else _Retrieval.open(settings)
    identity = {"data": source.fingerprint, "split": source.split, "dims": settings.dims}
    inputs = {name: info.fingerprint for name, (_, info, _) in found.items()}
    previous = artifacts.claim(output, "evaluation", identity, settings.replace)
    if previous and previous.is_complete and previous.inputs == inputs and not artifacts.find_faults(output, previous):
        say(f"evaluate: nothing to do, {output} is complete")
        return previous
    own = {
        name: settings.model_copy(
            update={"output": str(folder_of(output, name)), "models": (), "model": location, "dims": dims, "system": name,
                    **source.as_settings}
        )
        for name, (location, _, dims) in found.items()
    }  # fmt: skip
    manifest = Manifest("evaluation", identity, inputs, {"run": describe_run("evaluate", settings)})
    artifacts.begin(output, manifest, previous)
    with cluster.connected():
        for name, one in own.items():
            say(f"evaluate: {name} ({one.model})")
            _evaluate(one)
    rows = [row for one in own.values() for row in _rows(one.output)]
    profiles = [profile for one in own.values() for profile in _profiles(one.output)]
    title = f"Models ranked: {len(own)} on {source.title}"
    made = Report(title, rows, profiles, evaluation.rank_systems(rows), settings=manifest.facts["run"]["settings"],
                  fingerprints={**identity, **inputs})  # fmt: skip
    return _finish(output, manifest, made)


def folder_of(output: Path, name: str) -> Path:
    """Returns where the evaluation of one of several models is."""
    return output / f"evaluation-{name}"


def embeddings_of(output: Path) -> Path:
    """Returns where an evaluation puts the embeddings that it makes."""
    return output / "embeddings"


@dataclass(frozen=True, slots=True)
class _Job:
    """One model to evaluate, and what there is of it already."""

    system: str
    info: ModelInfo
    dims: tuple[int, ...]
    store: EmbeddingStore | None
    index: IndexStore | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What an evaluation of one model gave."""

    title: str
    rows: list[Row]
    profile: Profile
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Retrieval:
    """Queries, documents and judgements of a split."""

    data: DatasetStore
    split: str
    query_ids: list[str]
    queries: list[str]
    qrels: Mapping[str, Mapping[str, int]]

    @classmethod
    def open(cls, settings: Settings) -> "_Retrieval":
        folder = storage.local_path(settings.data) if settings.data else storage.local_path(settings.output) / "data"
        if settings.beir:
            own = prepare.Settings(output=str(folder), beir=settings.beir, near_duplicates=0, replace=settings.replace)
            prepare.run(own)  # nothing is trained here, so nothing can leak
        data = DatasetStore.open(folder)
        query_ids, queries = data.queries(settings.split)
        qrels = data.qrels(settings.split)
        if qrels.keys().isdisjoint(query_ids):
            raise ValueError(f"{folder}: no query of split '{settings.split}' has judgements. Pass another --split.")
        return cls(data, settings.split, query_ids, queries, qrels)

    @property
    def fingerprint(self) -> str:
        return self.data.manifest.fingerprint

    @property
    def as_settings(self) -> dict[str, Any]:
        """What leads an evaluation of one model to data that is already prepared."""
        return {"data": str(self.data.folder), "beir": None}

    @property
    def title(self) -> str:
        return f"{len(self.queries)} queries of split '{self.split}'"

    def evaluate(self, session: Session, settings: Settings, job: _Job) -> _Found:
        store = job.store or embed.embed_dataset(
            embeddings_of(storage.local_path(settings.output)),
            self.data,
            settings.model,
            settings.workers,
            replace=settings.replace,
        )
        made, is_chunked = store.manifest.identity, self.data.is_chunked
        pool = session.encoders(job.info, made["precision"], made["tokens_per_step"], settings.workers)
        queries, rate = _encode(pool, self.queries, "query")
        known = (queries, self.query_ids, self.qrels)
        rows = evaluation.evaluate_dims(job.system, store, *known, job.dims, is_chunked=is_chunked)
        if job.index:
            system, dim = f"{job.system}+funnel", job.index.plan.shortlist.dim
            rows += evaluation.evaluate_funnel(system, job.index.searcher(), dim, *known, is_chunked=is_chunked)
        title = f"Retrieval quality: {self.title}, {store.manifest.num_rows} {'chunks of ' * is_chunked}documents"
        documents_per_second = store.manifest.facts.get("last_run", {}).get("documents_per_second")
        return _Found(title, rows, _profile(job, documents_per_second, rate))


@dataclass(frozen=True, slots=True)
class _Similarity:
    """Pairs of sentences with people's scores."""

    fingerprint: str
    pairs: ScoredPairs
    split: None = None

    @classmethod
    def open(cls, settings: Settings) -> "_Similarity":
        path = storage.local_path(settings.sts or "")
        return cls(pairs=sts.read(path), fingerprint=storage.digest_file(path))

    @property
    def as_settings(self) -> dict[str, Any]:
        """What leads an evaluation of one model here: nothing has to be prepared."""
        return {}

    @property
    def title(self) -> str:
        return f"{len(self.pairs.scores)} pairs of sentences"

    def evaluate(self, session: Session, settings: Settings, job: _Job) -> _Found:
        precision, pairs = session.choose_precision("auto"), self.pairs
        pool = session.encoders(job.info, precision, TOKENS_PER_STEP[cluster.capacity().device], settings.workers)
        # Neither sentence searches for the other. Most models that tell roles apart leave documents as they are and put an
        # instruction to retrieve before queries (BGE, Qwen3); and documents' vectors are what an index holds.
        vectors, rate = _encode(pool, [*pairs.firsts, *pairs.seconds], "document")
        firsts, seconds = np.split(vectors, 2)
        rows = evaluation.evaluate_similarity(job.system, firsts, seconds, pairs.scores, job.dims)
        left_out = f"{pairs.num_unusable} rows without a score or a sentence were left out."
        return _Found(f"Similarity: {self.title}", rows, _profile(job, rate, None), (left_out,) if pairs.num_unusable else ())


def _encode(pool: Encoders, texts: list[str], role: Role) -> tuple[Float16Array, float]:
    """Returns the vectors of texts, and how many were done in a second, once the workers had started."""
    pool.start()
    start = time.perf_counter()
    vectors = pool.encode(texts, role)
    return vectors, round(len(texts) / max(time.perf_counter() - start, 1e-9), 1)


def _profile(job: _Job, documents_per_second: float | None, queries_per_second: float | None) -> Profile:
    num_bytes, num_parameters = model.weigh(job.info.folder)
    return Profile(
        job.system, num_bytes, num_parameters, job.info.width, job.info.max_tokens,
        documents_per_second or None,  # 0 where another run had embedded everything
        queries_per_second,
    )  # fmt: skip


def _fingerprint(compare: str | None) -> str | None:
    return artifacts.read_complete(storage.local_path(compare), "evaluation").fingerprint if compare else None


def _rows(folder: str | None) -> list[Row]:
    return report.read_rows(storage.local_path(folder)) if folder else []


def _profiles(folder: str | None) -> list[Profile]:
    return report.read_profiles(storage.local_path(folder)) if folder else []


def _refuse_comparing(source: _Retrieval | _Similarity, system: str, settings: Settings) -> None:
    """Refuses to compare what cannot stand in one table.

    Raises:
        ValueError: The report to compare with comes from other data, or has a system of this name.
    """
    if settings.compare:
        other = artifacts.read_complete(storage.local_path(settings.compare), "evaluation")
        if (other.identity["data"], other.identity["split"]) != (source.fingerprint, source.split):
            raise ValueError(f"--compare {settings.compare}: evaluated other data or another split. Compare like with like.")
        if system in {row.system for row in _rows(settings.compare)}:
            raise ValueError(f"--compare {settings.compare}: has a system '{system}' as well. Pass --system with another name.")


def _finish(output: Path, manifest: Manifest, made: Report) -> Manifest:
    report.write(output, made)
    page.write(output)
    records = [FileRecord.of(output, output / name) for name in (report.JSON, report.MARKDOWN)]
    receipts = tuple(Receipt(record.path, len(made.rows), (record,)) for record in records)
    finished = dataclasses.replace(manifest, receipts=receipts, is_complete=True)
    finished.write(output)
    for metric, table in report.tables(made.rows).items():
        show_table(metric, table)
    show_table("Size and speed", report.model_table(made.profiles, made.ranking), text_columns=(0,))
    for sentence in made.sentences:
        say(sentence)
    say(f"evaluate: report in {output / page.HTML}, {output / report.MARKDOWN} and {output / report.JSON}")
    return finished


if __name__ == "__main__":
    main("evaluate", Settings, run)

"""Says how good models are, at every dim, beside words, through an index's funnel, quantised; and whether tuning is worth it."""

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from jobs import cluster, embed, prepare
from jobs.cluster import Encoders, Session
from jobs.entry import NoGainError, StageSettings, describe_run, main
from jobs.terminal import say, show_table
from matryoshka import artifacts, evaluation, lexical, model, nested, page, report, retrieval, runs, storage, sts, verdict
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.comparison import FLOOR
from matryoshka.config import Field, FolderPath, InputPath, check_settings
from matryoshka.evaluation import Profile, Row
from matryoshka.indexing import IndexStore
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.rates import TOKENS_PER_STEP
from matryoshka.report import Report
from matryoshka.retrieval import Findings, Task
from matryoshka.storage import Place
from matryoshka.sts import ScoredPairs
from matryoshka.tokens import Role
from matryoshka.vectors import EmbeddingStore, Float16Array
from matryoshka.verdict import Training

_OF_ONE_MODEL = ("model", "system", "embeddings", "index", "compare")
_OF_RETRIEVAL = ("split", "embeddings", "index", "bm25", "quantised", "require_gain")
_NAME = re.compile(r"[\w.-]+")
_TUNED, _BASE = "tuned", "base"
_ASK_FOR_BOTH = "Pass a model that this project tuned as --model, and an evaluation of an untouched one as --compare."


class Settings(StageSettings):
    """Says how good a model is at every dim: nDCG@10, Recall@10, Recall@100, MRR@10, MAP@100 and Success@1 of retrieval (which is
    the accuracy of the nearest neighbour), also beside BM25, through an index's funnel, or quantised; or, with --sts, the rank
    correlation with people's judgements of similarity.

    Every document is compared with every query, so the figures are exact; where documents are chunked, a document counts as
    its best chunk. Documents are embedded into the output folder, unless --embeddings names vectors that this model already
    made of this corpus. Several --models are ranked, each with its size and speed; one that is added later costs only itself.
    With --compare, systems are held against each other query by query; of a tuned model and an untouched one, the verdict is
    whether fine-tuning was worth it.
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
    bm25: bool = Field(
        False,
        description="Evaluate BM25 as well: documents scored by the words of a query; left out above a million documents.",
    )
    quantised: tuple[Literal["int8", "binary"], ...] = Field(
        (),
        description="Evaluate vectors as int8 (always where the index stores them so), or chosen by signs, then rescored.",
    )
    floor: float = Field(FLOOR, gt=0, le=1, description="Share of full width's nDCG@10 that the recommended dim surely keeps.")
    require_gain: float | None = Field(
        None,
        description="End with code 3 unless this gain in nDCG@10 over the untouched model is shown; none: the verdict asks 0.01.",
    )
    verdict: bool = Field(True, description="Say whether fine-tuning was worth it, of a tuned model beside an untouched one.")
    system: str | None = Field(
        None, description="Name in the report; none: 'tuned' if this project trained the model, else 'base'."
    )
    workers: int | None = Field(None, ge=1, description="Most encoder processes; none: one per GPU, or per CPU.")

    @check_settings
    def _one_source(self) -> "Settings":
        if sum(map(bool, (self.data, self.beir, self.sts))) != 1:
            raise ValueError("give the data as --data (from the prepare job), --beir or --sts, one of them.")
        self._refuse_together("sts", _OF_RETRIEVAL, "it goes with --data or --beir")
        self._refuse_together("models", _OF_ONE_MODEL, "it goes with one model")
        if self.require_gain is not None and not (self.compare or self.models):
            raise ValueError("--require-gain: nothing to gain on. Pass an evaluation of the untouched model as --compare.")
        if self.require_gain is not None and not self.verdict:
            raise ValueError("--require-gain cannot be used with --no-verdict: then nobody judges the gain. Drop one of them.")
        return self

    def _refuse_together(self, name: str, others: tuple[str, ...], reason: str) -> None:
        values = {other: getattr(self, other) for other in others if other in self.model_fields_set}
        # Not by equality: a gain of 0 equals False.
        given = [other for other, value in values.items() if value is not None and value is not False and value != ()]
        if getattr(self, name) and given:
            raise ValueError(f"--{given[0].replace('_', '-')} cannot be used with --{name}: {reason}. Drop one of them.")


def run(settings: Settings) -> Manifest:
    """Evaluates the model or ranks the models, unless the output already holds the report.

    Raises:
        NoGainError: The gain that is required was not shown; the report is there.
    """
    output = storage.place(settings.output)
    artifacts.check_owner(output, "evaluation")
    manifest = _rank(settings) if settings.models else _evaluate(settings)
    if settings.require_gain is not None:
        found = report.read(output).verdict
        if found is None:
            raise ValueError(f"{output}: both models share no dim, so there is no gain. Pass --dims that both have.")
        if not found.is_worth_it:
            raise NoGainError(f"{found.decision}. {found.reason}")
    return manifest


def named_models(models: tuple[str, ...]) -> dict[str, str]:
    """Returns models by their names in reports and folders: the last part of the path, or what stands before ``=``.

    Raises:
        ValueError: Two have one name, or a name is no name for a folder.
    """
    named: dict[str, str] = {}
    for text in models:
        name, location = _split_name(text)
        if not _NAME.fullmatch(name) or not location:
            raise ValueError(f"--models {text}: '{name}' cannot name a folder. Write NAME=MODEL, with letters and digits.")
        if name in named:
            raise ValueError(f"--models: two are named '{name}' ({named[name]}, {location}). Write another-name={location}.")
        named[name] = location
    return named


def _split_name(text: str) -> tuple[str, str]:
    name, is_named, location = text.partition("=")
    if not is_named or "://" in name or Path(text).exists():  # else it belongs to the path
        return PurePosixPath(text).name, text
    return name, location


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
        sts.read(storage.place(settings.sts))
    elif settings.data:
        _Retrieval.open(settings)
    else:
        path = storage.place(settings.beir or "") / "qrels" / f"{settings.split}.tsv"
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
    output = storage.place(settings.output)
    info, dims = _describe(settings)
    system = settings.system or (_TUNED if info.is_tuned else _BASE)
    source: _Retrieval | _Similarity = _Similarity.open(settings) if settings.sts else _Retrieval.open(settings)
    store = EmbeddingStore.open(storage.place(settings.embeddings)) if settings.embeddings else None
    index = IndexStore.open(storage.place(settings.index)) if settings.index else None
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
        **_asked(settings),
    }
    if isinstance(source, _Retrieval):
        embed.refuse_strangers("--embeddings", store, info, source.task.data)
        embed.refuse_strangers("--index", index, info, source.task.data)
    _refuse_comparing(source, system, settings)
    has_verdict = _has_verdict(settings, info)
    if settings.require_gain is not None and not has_verdict:
        raise ValueError(f"--require-gain: nothing to gain on. {_ASK_FOR_BOTH}")
    previous = artifacts.claim(output, "evaluation", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        return _keep(output, previous)
    manifest = Manifest("evaluation", identity, facts={"run": describe_run("evaluate", settings)})
    with cluster.connected() as session:
        artifacts.begin(output, manifest, previous)
        found = source.evaluate(session, settings, _Job(system, info, dims, store, index))
    profiles = [*_profiles(settings.compare), found.profile]
    described = {"settings": manifest.facts["run"]["settings"], "fingerprints": identity, "remarks": found.remarks}
    if isinstance(source, _Retrieval) and found.findings:
        findings = dataclasses.replace(found.findings, training=_training(info))
        made = Report(found.title, (), profiles, **described)
        return _finish(output, manifest, *source.weigh(output, settings, made, findings, system, has_verdict=has_verdict))
    return _finish(output, manifest, Report(found.title, [*_rows(settings.compare), *found.rows], profiles, **described))


def _asked(settings: Settings) -> dict[str, Any]:
    """Returns what else decides what a report of any number of models says."""
    return {name: getattr(settings, name) for name in ("bm25", "quantised", "floor", "require_gain", "verdict")}


def _has_verdict(settings: Settings, info: ModelInfo) -> bool:
    """Returns whether fine-tuning is to be judged: the model is tuned, and the first one that it is held against is not."""
    first = next((row.system for row in _rows(settings.compare) if evaluation.is_plain(row)), None)
    untouched = {profile.system for profile in _profiles(settings.compare) if not profile.is_tuned}
    return settings.verdict and info.is_tuned and first in untouched


def _rank(settings: Settings) -> Manifest:
    """Evaluates each of several models in a folder of its own below the output, and ranks them.

    Raises:
        ValueError: As ``_describe_all``, or a gain is required and there is not one of each, tuned and untouched.
    """
    output = storage.place(settings.output)
    found = _describe_all(settings)
    untouched = [name for name, (_, info, _) in found.items() if not info.is_tuned]
    has_both = 0 < len(untouched) < len(found)
    if settings.require_gain is not None and not has_both:
        raise ValueError("--require-gain: nothing to gain on. Name a tuned model and an untouched one as --models.")
    source: _Retrieval | _Similarity = _Similarity.open(settings) if settings.sts else _Retrieval.open(settings)
    identity = {"data": source.fingerprint, "split": source.split, "dims": settings.dims, **_asked(settings)}
    inputs = {name: info.fingerprint for name, (_, info, _) in found.items()}
    previous = artifacts.claim(output, "evaluation", identity, settings.replace)
    if previous and previous.is_complete and previous.inputs == inputs and not artifacts.find_faults(output, previous):
        return _keep(output, previous)
    alone = {"output": "", "models": (), "bm25": False, "require_gain": None, "verdict": False, **source.as_settings}
    own = {
        name: settings.model_copy(
            update={**alone, "output": str(folder_of(output, name)), "model": location, "dims": dims, "system": name}
        )
        for name, (location, _, dims) in found.items()
    }
    manifest = Manifest("evaluation", identity, inputs, {"run": describe_run("evaluate", settings)})
    with cluster.connected():
        artifacts.begin(output, manifest, previous)
        for name, one in own.items():
            say(f"evaluate: {name} ({one.model})")
            _evaluate(one)
    rows = [row for one in own.values() for row in _rows(one.output)]
    ranking = evaluation.rank_systems(rows)
    made = Report(
        f"Models ranked: {len(own)} on {source.title}",
        rows,
        [profile for one in own.values() for profile in _profiles(one.output)],
        ranking,
        settings=manifest.facts["run"]["settings"],
        fingerprints={**identity, **inputs},
    )
    if isinstance(source, _Retrieval):
        words = retrieval.search_words(source.task, output) if settings.bm25 else Findings()
        is_judged = settings.verdict and has_both
        tuned = next((name for name in ranking.means if name not in untouched), ranking.best)
        ordered = sorted(own, key=lambda name: name not in untouched[:1])  # the others are held against the first
        series = (one for name in ordered for one in runs.read_series(storage.place(own[name].output))[1])
        every = dataclasses.replace(words, series=(*words.series, *series), training=_training(found[tuned][1]))
        return _finish(output, manifest, *source.weigh(output, settings, made, every, tuned, has_verdict=is_judged))
    return _finish(output, manifest, made)


def folder_of(output: Place, name: str) -> Place:
    """Returns where the evaluation of one of several models is."""
    return output / f"evaluation-{name}"


def embeddings_of(output: Place) -> Place:
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
    profile: Profile
    rows: Sequence[Row] = ()
    remarks: tuple[str, ...] = ()
    findings: Findings | None = None


@dataclass(frozen=True, slots=True)
class _Retrieval:
    """Queries, documents and judgements of a split."""

    task: Task

    @classmethod
    def open(cls, settings: Settings) -> "_Retrieval":
        folder = storage.place(settings.data) if settings.data else storage.place(settings.output) / "data"
        if settings.beir:
            own = prepare.Settings(output=str(folder), beir=settings.beir, near_duplicates=0, replace=settings.replace)
            prepare.run(own)  # nothing is trained here, so nothing can leak
        return cls(Task.open(DatasetStore.open(folder), settings.split))

    @property
    def fingerprint(self) -> str:
        return self.task.data.manifest.fingerprint

    @property
    def split(self) -> str:
        return self.task.split

    @property
    def as_settings(self) -> dict[str, Any]:
        """What leads an evaluation of one model to data that is already prepared."""
        return {"data": str(self.task.data.folder), "beir": None}

    @property
    def title(self) -> str:
        return f"{len(self.task.queries)} queries of split '{self.split}'"

    def evaluate(self, session: Session, settings: Settings, job: _Job) -> _Found:
        output, data = storage.place(settings.output), self.task.data
        store = job.store or embed.embed_dataset(
            embeddings_of(output), data, settings.model, settings.workers, replace=settings.replace
        )
        made = store.manifest.identity
        pool = session.encoders(job.info, made["precision"], made["tokens_per_step"], settings.workers)
        queries, rate = _encode(pool, self.task.queries, "query")
        words = retrieval.search_words(self.task, output) if settings.bm25 else Findings()
        found = retrieval.search_vectors(self.task, output, job.system, store, queries, job.dims, job.index, settings.quantised)
        title = f"Retrieval quality: {self.title}, {store.manifest.num_rows} {'chunks of ' * data.is_chunked}documents"
        profile = _profile(job, store.manifest.facts.get("last_run", {}).get("documents_per_second"), rate)
        return _Found(title, profile, remarks=self.task.remarks, findings=words.and_then(found))

    def weigh(
        self, output: Place, settings: Settings, made: Report, found: Findings, system: str, *, has_verdict: bool
    ) -> tuple[Report, tuple[FileRecord, ...]]:
        """Returns the report with what the queries tell of systems beside each other, and the records of the files behind it."""
        required = verdict.REQUIRED_GAIN if settings.require_gain is None else settings.require_gain
        known = runs.read_series(storage.place(settings.compare))[1] if settings.compare else []
        series = [*known, *found.series]
        written = runs.write_series(output, self.task.judged_ids, series)
        whole = retrieval.weigh(self.task, made, series, found, system, settings.floor, required if has_verdict else None)
        return whole, (*found.records, written)


@dataclass(frozen=True, slots=True)
class _Similarity:
    """Pairs of sentences with people's scores."""

    fingerprint: str
    pairs: ScoredPairs
    split: None = None

    @classmethod
    def open(cls, settings: Settings) -> "_Similarity":
        path = storage.place(settings.sts or "")
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
        remarks = (left_out,) if pairs.num_unusable else ()
        return _Found(f"Similarity: {self.title}", _profile(job, rate, None), rows, remarks)


def _encode(pool: Encoders, texts: list[str], role: Role) -> tuple[Float16Array, float]:
    """Returns the vectors of texts, and how many were done in a second, once the workers had started."""
    pool.start_for_texts(len(texts))
    start = time.perf_counter()
    vectors = pool.encode(texts, role)
    return vectors, round(len(texts) / max(time.perf_counter() - start, 1e-9), 1)


def _profile(job: _Job, documents_per_second: float | None, queries_per_second: float | None) -> Profile:
    num_bytes, num_parameters = model.weigh(job.info.folder)
    return Profile(
        job.system, num_bytes, num_parameters, job.info.width, job.info.max_tokens,
        documents_per_second or None,  # 0 where another run had embedded everything
        queries_per_second,
        job.info.is_tuned,
    )  # fmt: skip


def _fingerprint(compare: str | None) -> str | None:
    return artifacts.read_whole(storage.place(compare), "evaluation").fingerprint if compare else None


def _rows(folder: str | None) -> list[Row]:
    return report.read_rows(storage.place(folder)) if folder else []


def _profiles(folder: str | None) -> list[Profile]:
    return report.read_profiles(storage.place(folder)) if folder else []


def _refuse_comparing(source: _Retrieval | _Similarity, system: str, settings: Settings) -> None:
    """Refuses to compare what cannot stand in one table.

    Raises:
        ValueError: The report to compare with comes from other data, or has a system of this name.
    """
    if settings.compare:
        other = artifacts.read_complete(storage.place(settings.compare), "evaluation")
        if (other.identity["data"], other.identity["split"]) != (source.fingerprint, source.split):
            raise ValueError(f"--compare {settings.compare}: evaluated other data or another split. Compare like with like.")
        if isinstance(source, _Retrieval):
            runs.find_series(storage.place(settings.compare))
        if settings.bm25 and lexical.NAME in {row.system for row in _rows(settings.compare)}:
            raise ValueError(f"--compare {settings.compare}: has BM25 already. Leave out --bm25.")
        if system in {row.system for row in _rows(settings.compare)}:
            raise ValueError(f"--compare {settings.compare}: has a system '{system}' as well. Pass --system with another name.")


def _training(info: ModelInfo) -> Training | None:
    made = artifacts.peek(info.folder, "model") if info.is_tuned else None
    return verdict.training_of(made.facts) if made else None


def _keep(output: Place, previous: Manifest) -> Manifest:
    """Returns the manifest of an evaluation that is complete; its page, which no manifest names, is made if it is missing."""
    page.restore(output)
    say(f"evaluate: nothing to do, {output} is complete")
    return previous


def _finish(output: Place, manifest: Manifest, made: Report, records: Sequence[FileRecord] = ()) -> Manifest:
    report.write(output, made)
    page.write(output)
    records = [*records, *(FileRecord.of(output, output / name) for name in (report.JSON, report.MARKDOWN))]
    receipts = tuple(Receipt(record.path, len(made.rows), (record,)) for record in records)
    finished = dataclasses.replace(manifest, receipts=receipts, is_complete=True)
    finished.write(output)
    for metric, table in report.tables(made.rows, report.SHOWN).items():
        show_table(metric, table)
    if made.comparisons:
        show_table("Gains, query by query", report.gain_table(made.comparisons), text_columns=(0, 1))
    show_table("Size and speed", report.model_table(made.profiles, made.ranking), text_columns=(0,))
    for sentence in made.sentences:
        say(sentence)
    say(f"evaluate: report in {output / page.HTML}, {output / report.MARKDOWN} and {output / report.JSON}")
    return finished


if __name__ == "__main__":
    main("evaluate", Settings, run)

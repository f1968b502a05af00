"""Builds a sharded index from embeddings: a coarse index in a narrow space, and full vectors for reranking."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jobs import cluster
from jobs.cluster import Session
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import Counter, say
from jobs.watch import journal_of
from matryoshka import artifacts, corpus, filters, indexing, layouts, model, nested, removals, storage, vectors
from matryoshka.artifacts import Manifest, Receipt
from matryoshka.config import Field, FolderPath, InputPath, check_settings
from matryoshka.corpus import Columns
from matryoshka.indexing import SHARDS, TRAINED, IndexStore, Layout, ShardPlan
from matryoshka.layouts import Choice, Given, Wanted
from matryoshka.nested import FunnelPlan
from matryoshka.removals import REMOVED, Removed
from matryoshka.storage import Place
from matryoshka.vectors import EmbeddingStore, Float16Array

ROWS_PER_SHARD = 1_000_000
_FEW_ROWS = 100_000  # which any machine indexes in seconds
_SHOWN = 3
_AUTO = "auto"
_GB = 1e9


class Settings(StageSettings):
    """Builds a sharded index from embeddings: a coarse index in a narrow space, and full vectors for reranking.

    What is not asked for is chosen by the number of documents, the device and the memory limit, and stays as it was chosen
    until --replace. What must be trained is trained once, and shards whose documents did not change are kept as they are.
    """

    embeddings: FolderPath = Field(description="Folder that the embed job wrote.")
    shards: int | None = Field(None, ge=1, description="Shards of the first build; none: one per million documents.")
    space: Literal["auto", "prefix", "rotation", "projection"] = Field(
        "auto", description="Of the shortlist: the trained prefix, a rotation, or a projection that looks at queries too."
    )
    dim: int | None = Field(None, ge=1, description="Of the shortlist's space; none: the first of --plan, or chosen.")
    plan: tuple[str, ...] = Field((), description="Funnel as dim:keep steps, for example 64:200,384:100; none: a cautious one.")
    coarse_index: str = Field(
        "auto", description="Index of the shortlist: dense, IVF2000,dense (lists), a FAISS factory string, or none: no index."
    )
    storage: Literal["auto", "float16", "int8"] = Field(
        "auto", description="Of full vectors; int8 takes half the room, and what it loses is measured."
    )
    sample: int = Field(200_000, ge=1, description="Documents (and queries), at most, that is learned from.")
    queries: InputPath | None = Field(
        None, description="Parquet files with real queries, as text or as vectors in column 'embedding', for a projection."
    )
    text_column: str = Field("text", description="Column of --queries with the query's text.")
    filter_columns: tuple[str, ...] = Field((), description="Columns of the corpus that searches can be restricted by.")
    remove: InputPath | None = Field(
        None, description="Parquet files with ids of documents to take out, now and in every later build."
    )
    id_column: str = Field("id", description="Column of --queries and --remove with ids.")
    memory_limit: float | None = Field(
        None, gt=0, description="GB of memory of a process that holds a shard, which what is chosen respects; none: no limit."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where it will be searched; auto: what the cluster has.")
    workers: int | None = Field(None, ge=1, description="Most encoder processes for --queries; none: one per GPU, or per CPU.")

    @check_settings
    def _usable_space(self) -> "Settings":
        if self.queries and self.space not in (_AUTO, "projection"):
            raise ValueError(f"--queries goes with --space projection, not {self.space}. Drop one of them.")
        if self.coarse_index == indexing.NO_INDEX and (self.queries or self.space not in (_AUTO, "prefix")):
            raise ValueError("--coarse-index none compares prefixes: it has no --space and no --queries. Drop one of them.")
        return self


def check_plan(settings: Settings, width: int, declared: Sequence[int] = (), space: str = "prefix") -> FunnelPlan | None:
    """Returns the funnel that the settings give, if they give one.

    Raises:
        ValueError: The funnel is not usable with vectors of this width, or a prefix is none that the model was trained for.
    """
    if settings.dim and settings.dim > width:
        raise ValueError(f"--dim {settings.dim}: does not fit vectors of width {width}. Choose from 1 to {width}.")
    if not settings.plan:
        return None
    plan = FunnelPlan.parse(settings.plan)
    own = [step.dim for step in plan.steps]
    nested.check_dims(own, width, "--plan")
    nested.check_dims(own if space == "prefix" else own[1:] or [width], width, "--plan", declared)
    return plan


@dataclass(frozen=True, slots=True)
class _Queries:
    """Real queries to learn a projection from: texts, or vectors."""

    fingerprint: str
    num_rows: int
    texts: tuple[str, ...] = ()
    vectors: Float16Array | None = None

    @classmethod
    def open(cls, settings: Settings, store: EmbeddingStore) -> "_Queries | None":
        if settings.queries is None:
            return None
        _, paths = corpus.find_files(settings.queries)
        if corpus.has_column(paths[0], "embedding"):
            found = vectors.read_embeddings(paths, store.width)
            return cls(storage.digest_json([storage.digest_file(path) for path in paths]), len(found), vectors=found)
        source = corpus.inspect(settings.queries, Columns(settings.id_column, settings.text_column))
        _, texts = corpus.read_texts(source)
        return cls(source.fingerprint, len(texts), tuple(texts))

    def encode(self, session: Session, settings: Settings, store: EmbeddingStore) -> Float16Array:
        """Returns the vectors of as many as are learned from, at even distances."""
        rows = np.unique(np.linspace(0, self.num_rows - 1, min(settings.sample, self.num_rows)).astype(np.int64))
        if self.vectors is not None:
            return self.vectors[rows]
        info = model.describe_maker(store.folder, store.manifest, None, "Pass --queries with vectors")
        texts = [self.texts[row] for row in rows]
        return session.encode_queries(info, store.manifest.identity["precision"], texts, settings.workers)


@dataclass
class _State:
    """What is finished, by key, and what is left to do; ``before``: the keys of what the index consisted of so far."""

    finished: dict[str, Receipt]
    shards: list[ShardPlan]
    layout: Layout
    before: set[str]

    @property
    def training(self) -> Receipt | None:
        return self.finished.get(TRAINED)

    @property
    def must_train(self) -> bool:
        return indexing.needs_training(self.layout) and self.training is None

    @property
    def todo(self) -> list[ShardPlan]:
        return [shard for shard in self.shards if shard.key not in self.finished]

    @property
    def spares_others(self) -> bool:
        """Whether what is left to do leaves every file of the index that is there as it is."""
        return not self.must_train and not any(shard.key in self.before for shard in self.todo)

    @property
    def has_new(self) -> bool:
        """Whether there are shards, built now or by a run that did not finish, that the index did not have."""
        return any(shard.key not in self.before for shard in self.shards)

    def unburied(self, listed: Receipt | None) -> list[Receipt]:
        """Returns the shards whose tombstones are not those of the list."""
        built = [self.finished[shard.key] for shard in self.shards if shard.key in self.finished]
        return [shard for shard in built if listed and not removals.is_clean(shard, listed, self.finished)]

    def receipts(self, listed: Receipt | None) -> tuple[Receipt, ...]:
        """Returns what the finished index is made of."""
        built = [self.finished[shard.key] for shard in self.shards]
        marks = [removals.key_of(shard) for shard in built if listed and not removals.leaves_out(shard, listed)]
        own = [*filter(None, [self.training]), *built, *filter(None, [listed])]
        return (*own, *(self.finished[key] for key in marks))


def run(settings: Settings) -> Manifest:
    """Builds the shards that the output lacks, and marks in the others what is to be gone."""
    output = storage.place(settings.output)
    store = EmbeddingStore.open(storage.place(settings.embeddings))
    storage.keep_apart(output, store.folder)
    artifacts.check_owner(output, "index")
    known = artifacts.peek(output, "index")
    journal = artifacts.read_journal(output) if known else []
    queries = _Queries.open(settings, store)
    removed = _removed(settings, output, known, journal, store)
    with contextlib.ExitStack() as stack:
        choice = _choose(settings, store, known, stack, has_queries=queries is not None)
        identity = _identity(settings, store, choice.layout, queries, known)
        previous = artifacts.claim(output, "index", identity, settings.replace)
        num_shards = settings.shards or _default_shards(store)
        slots, plans = indexing.plan_shards(store, num_shards, indexing.known_slots(output, previous, journal))
        kinds = filters.find_kinds(corpus.recall(store.manifest.facts.get("corpus")), settings.filter_columns)
        if kinds:
            plans = indexing.find_origins(plans, store, kinds)
        finished = indexing.finished(output, previous, plans, store.manifest.num_rows, replace=settings.replace)
        state = _State(finished, plans, choice.layout, {receipt.key for receipt in previous.receipts} if previous else set())
        facts = {**_facts(settings, store, choice, slots), "filter_columns": kinds}
        manifest = Manifest("index", identity, {"embeddings": store.manifest.fingerprint}, facts)
        if previous and not journal and _is_current(previous, manifest, state, removed):
            say(f"index: nothing to do, {output} is complete ({previous.num_rows} documents)")
            return previous
        if state.must_train and choice.layout.space == "projection" and queries is None:
            raise ValueError("--space projection: needs queries to learn from. Pass --queries, or choose rotation.")
        if previous:
            kept = {name: fact for name, fact in previous.facts.items() if name != indexing.TUNED}
            kept |= indexing.tuning_of(previous, choice.plan)
            manifest = dataclasses.replace(manifest, facts={**kept, **manifest.facts})
        session = stack.enter_context(cluster.connected())
        listed = removed.remember(output) if artifacts.is_artifact(output) else None
        if listed:  # it outlives what is discarded
            manifest = dataclasses.replace(manifest, receipts=(listed,))
        artifacts.begin(output, manifest, previous, spares=state.spares_others)
        if previous:  # what earlier runs began for another night
            artifacts.remove_strangers(output, SHARDS, previous, {plan.key for plan in plans})
        return _build(session, settings, store, state, listed or removed.remember(output), manifest, queries)


def _default_shards(store: EmbeddingStore) -> int:
    return max(-(-store.manifest.num_rows // ROWS_PER_SHARD), 1)


def _choose(
    settings: Settings, store: EmbeddingStore, known: Manifest | None, stack: contextlib.ExitStack, *, has_queries: bool
) -> Choice:
    """Returns what the index is made of: what was asked for, then what it was made of before, then what the rule says."""
    plan = check_plan(settings, store.width)
    there = indexing.layout_of(known) if known else None
    before = None if settings.replace else there
    asked: dict[str, Any] = {
        name: None if value == _AUTO else value
        for name, value in (("space", settings.space), ("factory", settings.coarse_index), ("storage", settings.storage))
    }
    wanted = Wanted(**asked, dim=settings.dim, plan=plan)
    if before:
        wanted = _as_before(wanted, before)
    given = Given(
        store.manifest.num_rows,
        settings.shards or _default_shards(store),
        store.dims,
        has_queries,
        vectors.mean_id_bytes(store),
        *(_machine(settings, stack) if wanted.factory is None else (settings.device.replace(_AUTO, "cpu"), False)),
        settings.memory_limit and settings.memory_limit * _GB,
    )
    choice = layouts.choose(given, wanted)
    check_plan(settings, store.width, store.dims if store.manifest.facts["is_tuned"] else (), choice.layout.space)
    indexing.check_layout(choice.layout, choice.plan, min(given.num_documents, settings.sample))
    if known and there == choice.layout and not settings.plan:
        choice = dataclasses.replace(choice, plan=FunnelPlan.parse(known.facts["plan"]))
    if before is None:
        for sentence in (choice.describe(), *choice.reasons, choice.weigh(given.num_documents)):
            say(f"index: {sentence}")
    return choice


def _as_before(wanted: Wanted, before: Layout) -> Wanted:
    """Returns what was asked for, and what the index has where nothing was."""
    dim = wanted.dim or (None if wanted.plan or not before.has_index else before.dim)
    factory = wanted.factory or before.factory
    space = wanted.space or (before.space if factory != indexing.NO_INDEX else None)
    return dataclasses.replace(wanted, space=space, dim=dim, factory=factory, storage=wanted.storage or before.storage)


def _removed(
    settings: Settings, output: Place, known: Manifest | None, journal: Sequence[Receipt], store: EmbeddingStore
) -> Removed:
    """Returns the documents that stay out, and says which of the ids are of no document."""
    asked = removals.read(settings.remove, settings.id_column) if settings.remove else removals.none()
    strangers = removals.unknown(store, asked)
    if strangers:
        shown = ", ".join(strangers[:_SHOWN])
        say(f"index: {len(strangers)} of {len(asked)} ids to remove are of no document ({shown}); they stay out if they come")
    return Removed.open(output, known, journal, asked)


def _machine(settings: Settings, stack: contextlib.ExitStack) -> tuple[str, bool]:
    """Returns where the index will be searched, and whether bf16 pays there."""
    session = stack.enter_context(cluster.connected())
    device = cluster.capacity().device if settings.device == _AUTO else settings.device
    return device, device == "cuda" or session.choose_precision("auto") == "bf16"


def _identity(
    settings: Settings, store: EmbeddingStore, layout: Layout, queries: _Queries | None, known: Manifest | None
) -> dict[str, Any]:
    learned = {"fingerprint": queries.fingerprint, "num_queries": queries.num_rows} if queries else None
    if layout.space == "projection" and known and not learned:
        learned = known.identity.get("queries")
    return {
        "model": store.manifest.identity["model"],
        "space": layout.space,
        "dim": layout.dim,
        "coarse_index": layout.factory,
        "storage": layout.storage,
        "shards": settings.shards or (known.identity.get("shards") if known and not settings.replace else None),
        "queries": learned,
        "filter_columns": list(settings.filter_columns) or None,
    }


def _facts(settings: Settings, store: EmbeddingStore, choice: Choice, slots: dict[str, int]) -> dict[str, Any]:
    return {
        "slots": slots,
        "plan": choice.plan.parts,
        "width": store.width,
        "dims": list(store.dims),
        "model": store.manifest.facts["model"],
        "precision": store.manifest.identity["precision"],
        "corpus": store.manifest.facts["corpus"],
        "bytes_per_document": round(choice.num_bytes, 1),
        "run": describe_run("index", settings),
    }


def _is_current(previous: Manifest, manifest: Manifest, state: _State, removed: Removed) -> bool:
    """Returns whether there is nothing to do."""
    is_built = previous.is_complete and not state.must_train and not state.todo and previous.inputs == manifest.inputs
    is_clean = not removed.num_added and not state.unburied(removed.listed)
    return is_built and is_clean and previous.facts["plan"] == manifest.facts["plan"]


def _build(
    session: Session,
    settings: Settings,
    store: EmbeddingStore,
    state: _State,
    listed: Receipt | None,
    manifest: Manifest,
    queries: _Queries | None,
) -> Manifest:
    """Does what is left to do, with a receipt for each part on disk as soon as it is done; commits the manifest."""
    output = storage.place(settings.output).resolve()
    todo = state.todo
    if state.training:
        _tell_age(state.training, store.manifest.num_rows)
    with journal_of(output) as journal:
        journal.add(indexing.note_update(manifest))
        if listed:
            journal.add(listed)
        journal.flush()  # what is to be gone is known before anything is learned
        training = _train(session, settings, store, state, queries)
        if training:
            state.finished[training.key] = training
            journal.add(training)
            journal.flush()
        calls = [(shard, state.layout, output, state.training, listed) for shard in todo]
        are_short = sum(shard.num_rows for shard in todo) <= _FEW_ROWS
        with Counter("index", len(todo), "documents") as counter:
            for receipt in session.run_tasks(indexing.build_shard, calls, are_short=are_short):
                journal.add(receipt)
                state.finished[receipt.key] = receipt
                counter.advance(receipt.num_rows, shard=receipt.key, seconds=receipt.details["seconds"])
        buried = [(output, shard, listed) for shard in state.unburied(listed)]
        for receipt in session.run_tasks(removals.bury, buried, are_short=True):
            journal.add(receipt)
            state.finished[receipt.key] = receipt
        loss = _loss(session, store, state) if todo or state.has_new else None
    facts = {**manifest.facts, **({"storage_loss": loss} if loss else {})}
    manifest = dataclasses.replace(manifest, facts=facts, receipts=state.receipts(listed), is_complete=True)
    num_removed = indexing.count_missing(manifest)
    if manifest.num_rows + num_removed != store.manifest.num_rows:
        raise RuntimeError(f"index: {manifest.num_rows} documents of {store.manifest.num_rows} came in. Build it with --replace.")
    manifest.write(output, SHARDS, REMOVED)
    say(
        f"index: {manifest.num_rows} documents in {settings.output}, {num_removed} left out; {len(todo)} of"
        f" {len(state.shards)} shards built; {FunnelPlan.parse(facts['plan']).describe()}"
    )
    return manifest


def tell_update(index: IndexStore) -> None:
    """Says where an index is as it was before a run that has not finished, such as one that was to remove documents."""
    with contextlib.suppress(ValueError):  # the journal is being removed, or was altered: verify says so
        if indexing.has_update(index.folder, index.manifest):
            say(f"{index.folder}: an update was begun and is not finished; the index answers as it was before")


def _tell_age(training: Receipt, num_documents: int) -> None:
    advice = f"; there are {num_documents} now: --replace learns it anew, and builds all shards"
    say(
        f"index: what shards share is kept as it was learned from {training.details['num_documents']} documents"
        + (advice if indexing.outgrown(training, num_documents) else "")
    )


def _train(
    session: Session, settings: Settings, store: EmbeddingStore, state: _State, queries: _Queries | None
) -> Receipt | None:
    """Returns the receipt of what all shards share, where it is still to be learned."""
    if not state.must_train:
        return None
    asked = queries.encode(session, settings, store) if queries else None
    # On a machine of its own there is nothing to do beside it; on a cluster others may have the CPUs.
    num_threads = 1 if cluster.address() else cluster.capacity().num_cpus
    training = (store, state.layout, asked, settings.sample, storage.place(settings.output).resolve(), num_threads)
    (receipt,) = session.run_tasks(indexing.train, [training])
    trained: Receipt = receipt
    return trained


def _loss(session: Session, store: EmbeddingStore, state: _State) -> dict[str, float] | None:
    """Returns what storing vectors as int8 costs, measured wherever something was built, and says it."""
    if state.layout.storage == "float16":
        return None
    (loss,) = session.run_tasks(indexing.measure_loss, [(store, state.layout)])
    measured: dict[str, float] = loss
    say(
        f"index: vectors as {state.layout.storage} err by {measured['mean_score_error']:.1e} in a score on average, and keep"
        f" {measured['top_10_kept']:.1%} of the exact top 10 ({measured['num_queries']} of {measured['num_documents']} documents"
        " asked)"
    )
    return measured


if __name__ == "__main__":
    main("index", Settings, run)

"""Builds a sharded index from embeddings: a coarse FAISS index in a narrow space, and full vectors for reranking."""

import dataclasses
from collections.abc import Sequence

from jobs import cluster
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import Counter, say
from matryoshka import artifacts, corpus, filters, index, indexing, nested, storage
from matryoshka.artifacts import Journal, Manifest
from matryoshka.config import Field, FolderPath
from matryoshka.indexing import SHARDS, TRAINED, Layout, Storage
from matryoshka.nested import FunnelPlan
from matryoshka.spaces import Kind
from matryoshka.vectors import EmbeddingStore

_ROWS_PER_SHARD = 1_000_000


class Settings(StageSettings):
    """Builds a sharded index from embeddings: a coarse FAISS index in a narrow space, and full vectors for reranking.

    What must be trained is trained once, and shards whose documents did not change since the last build are kept as they are.
    """

    embeddings: FolderPath = Field(description="Folder that the embed job wrote.")
    shards: int | None = Field(None, ge=1, description="Shards of the first build; none: one per million documents.")
    space: Kind = Field("prefix", description="Of the shortlist: the trained prefix, a rotation, or a query-aware projection.")
    plan: tuple[str, ...] = Field((), description="Funnel as dim:keep steps, for example 64:200,384:100; none: a cautious one.")
    coarse_index: str = Field("Flat", description="FAISS factory string of the shortlist's index; none: compare all documents.")
    storage: Storage = Field("float16", description="Of full vectors; int8 takes half the room and loses a little.")
    filter_columns: tuple[str, ...] = Field((), description="Columns of the corpus that searches can be restricted by.")
    sample: int = Field(200_000, ge=1, description="Documents, at most, that spaces and coarse indexes are trained on.")


def check_plan(settings: Settings, dims: Sequence[int], width: int, declared: Sequence[int] = ()) -> FunnelPlan:
    """Returns the funnel that the settings give, or else a cautious one for the dims of the model.

    Raises:
        ValueError: The funnel or the kind of coarse index is not usable with vectors of this width.
    """
    plan = FunnelPlan.parse(settings.plan) if settings.plan else nested.default_plan(dims)
    own = [step.dim for step in plan.steps]
    nested.check_dims(own, width, "--plan")
    nested.check_dims(own if settings.space == "prefix" else own[1:] or [width], width, "--plan", declared)
    return plan


def run(settings: Settings) -> Manifest:
    """Builds the shards that the output lacks."""
    output = storage.local_path(settings.output)
    store = EmbeddingStore.open(storage.local_path(settings.embeddings))
    storage.keep_apart(output, store.folder)
    plan = check_plan(settings, store.dims, store.width, store.dims if store.manifest.facts["is_tuned"] else ())
    layout = Layout(settings.space, plan.shortlist.dim, settings.coarse_index, settings.storage)
    if layout.has_index:
        index.check_factory(layout.factory, layout.dim, store.manifest.num_rows)
        index.check_parameters(layout.factory, layout.dim, dict(plan.shortlist.parameters))
    identity = {
        "model": store.manifest.identity["model"],
        "space": layout.space,
        "dim": layout.dim,
        "coarse_index": layout.factory,
        "storage": layout.storage,
        "shards": settings.shards,
        "filter_columns": list(settings.filter_columns) or None,
    }
    previous = artifacts.claim(output, "index", identity, settings.replace)
    num_shards = settings.shards or max(-(-store.manifest.num_rows // _ROWS_PER_SHARD), 1)
    slots, plans = indexing.plan_shards(store, num_shards, previous.facts["slots"] if previous else {})
    kinds = filters.find_kinds(corpus.recall(store.manifest.facts["corpus"]), settings.filter_columns)
    if kinds:
        plans = indexing.find_origins(plans, store, kinds)
    keys = [*([TRAINED] if indexing.needs_training(layout) else []), *(shard.key for shard in plans)]
    finished = artifacts.finished_receipts(output, previous, keys, compare_digests=settings.replace)
    if TRAINED in keys and TRAINED not in finished:
        finished = {}  # shards of another training cannot be searched together
    todo = [shard for shard in plans if shard.key not in finished]
    inputs = {"embeddings": store.manifest.fingerprint}
    facts = {
        "slots": slots,
        "plan": plan.parts,
        "width": store.width,
        "dims": list(store.dims),
        "model": store.manifest.facts["model"],
        "precision": store.manifest.identity["precision"],
        "corpus": store.manifest.facts["corpus"],
        "filter_columns": kinds,
        "run": describe_run("index", settings),
    }
    if previous and previous.is_complete and not todo and previous.inputs == inputs and previous.facts["plan"] == plan.parts:
        say(f"index: nothing to do, {output} is complete ({previous.num_rows} documents)")
        return previous
    manifest = Manifest("index", identity, inputs, facts)
    artifacts.begin(output, manifest, previous)
    journal = Journal(output)
    calls = [(shard, layout, output.resolve()) for shard in todo]
    try:
        with cluster.connected() as session, Counter("index", len(todo), "documents") as counter:
            if TRAINED in keys and TRAINED not in finished:
                training = (store, layout, None, settings.sample, output.resolve())
                (finished[TRAINED],) = session.run_tasks(indexing.train, [training])
                journal.add(finished[TRAINED])
            for receipt in session.run_tasks(indexing.build_shard, calls):
                journal.add(receipt)
                finished[receipt.key] = receipt
                counter.advance(receipt.num_rows, shard=receipt.key, **receipt.details)
    finally:
        journal.flush()
    manifest = dataclasses.replace(manifest, receipts=tuple(finished[key] for key in keys), is_complete=True)
    if manifest.num_rows != store.manifest.num_rows:
        raise RuntimeError(f"index: {manifest.num_rows} documents of {store.manifest.num_rows} came in. Build it with --replace.")
    manifest.write(output)
    artifacts.remove_strangers(output, SHARDS, manifest)
    say(f"index: {manifest.num_rows} documents in {output}; {len(todo)} of {len(plans)} shards built; {plan.describe()}")
    return manifest


if __name__ == "__main__":
    main("index", Settings, run)

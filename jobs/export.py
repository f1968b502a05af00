"""Writes every shard of an index as one plain FAISS file, which ``faiss.read_index`` loads and searches by itself."""

import dataclasses

from jobs import cluster
from jobs.entry import StageSettings, describe_run, main
from jobs.index import tell_update
from jobs.terminal import Counter, say
from jobs.watch import journal_of
from matryoshka import artifacts, indexing, storage
from matryoshka.artifacts import Manifest
from matryoshka.config import Field, FolderPath
from matryoshka.indexing import SHARDS, IndexStore
from matryoshka.nested import FunnelPlan


class Settings(StageSettings):
    """Writes every shard of an index as one plain FAISS file, which faiss.read_index loads and searches by itself.

    A file takes queries of full width, makes the shortlist of the plan's first step (for 10 results) and reranks it at full
    width. The ids of its documents, in their order, stand in a Parquet file beside it; removed documents are in neither.
    """

    index: FolderPath = Field(description="Folder that the index job wrote.")
    plan: tuple[str, ...] = Field((), description="Another funnel than the index's own, as dim:keep steps: 64:500,384:100.")


def run(settings: Settings) -> Manifest:
    """Exports the shards that the output lacks."""
    output = storage.place(settings.output)
    index = IndexStore.open(storage.place(settings.index).absolute())
    tell_update(index)
    storage.keep_apart(output, index.folder)
    plan = FunnelPlan.parse(settings.plan) if settings.plan else index.plan
    index.check_plan(plan)
    identity = {"plan": str(plan.shortlist), "model": index.manifest.identity["model"]}
    previous = artifacts.claim(output, "export", identity, settings.replace)
    keys = indexing.export_keys(index, plan)
    finished = artifacts.finished_receipts(output, previous, keys, compare_digests=settings.replace)
    todo = [number for number, key in enumerate(keys) if key not in finished]
    inputs = {"index": index.manifest.fingerprint}
    is_whole = previous and previous.is_complete and not artifacts.read_journal(output)
    if previous and is_whole and not todo and previous.inputs == inputs:
        say(f"export: nothing to do, {output} is complete ({previous.num_rows} documents)")
        return previous
    manifest = Manifest("export", identity, inputs, {"run": describe_run("export", settings)})
    calls = [(index, number, plan, output.resolve(), keys[number]) for number in todo]
    with cluster.connected() as session:
        artifacts.begin(output, manifest, previous)
        with journal_of(output) as journal, Counter("export", len(todo), "documents") as counter:
            for receipt in session.run_tasks(indexing.export_shard, calls):
                journal.add(receipt)
                finished[receipt.key] = receipt
                counter.advance(receipt.num_rows, shard=receipt.key)
    manifest = dataclasses.replace(manifest, receipts=tuple(finished[key] for key in keys), is_complete=True)
    manifest.write(output, SHARDS)
    say(f"export: {manifest.num_rows} documents in {len(keys)} plain FAISS files below {output / SHARDS}")
    return manifest


if __name__ == "__main__":
    main("export", Settings, run)

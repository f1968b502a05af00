"""Finds hard negatives for training pairs: documents that a model takes for the answer, though they are not."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs import cluster, embed, index
from jobs.cluster import Encoders, Session
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import Counter, say
from jobs.watch import journal_of
from matryoshka import artifacts, corpus, indexing, mining, model, positives, storage
from matryoshka.artifacts import Manifest, Receipt
from matryoshka.config import Field, FolderPath, check_settings
from matryoshka.indexing import IndexStore
from matryoshka.mining import Rules, Sampling, Sources
from matryoshka.pairs import DatasetStore
from matryoshka.storage import Place
from matryoshka.vectors import EmbeddingStore

_ROWS_PER_SHARD = 250_000  # a worker holds one shard at a time: 0.4 GB of vectors of 384 dims
_KEEP = 100  # only names the index: a search asks for what the window needs
_QUERIES_AT_ONCE = 16_384
_WORK = "work"


class Settings(StageSettings):
    """Finds hard negatives for the training pairs of a dataset: documents near the query that nothing says are right.

    The corpus is embedded and indexed below the output, unless --embeddings names vectors that this model already made of it.
    What is judged relevant for a query of the same text, in any split, is never taken, and neither is a copy of it.
    """

    # MedQuAD, MiniLM: with 0:100 and a margin of .05, half of the best candidates answer another question about the same topic,
    # and 2% may answer this one. A window from 10 on leaves a third of the doubtful, and a quarter of those others.
    data: FolderPath = Field(description="Folder that the prepare job wrote.")
    model: str = Field("minilm", description="Model folder, hub name, or minilm (the demo extra's model).")
    negatives: int = Field(1, ge=1, description="Negatives per pair, those that the data brings included.")
    window: str = Field("0:100", description="Ranks to take them from, as FIRST:LAST; the best FIRST are passed over.")
    relative_margin: float = Field(
        0.05, ge=0, lt=1, description="A negative's score is at most the positive's score less this share of it."
    )
    sampling: Sampling = Field("top", description="top: the best that qualify; random: any of them, by hash of the pair.")
    embeddings: FolderPath | None = Field(None, description="Folder that the embed job wrote from this model and data.")
    workers: int | None = Field(None, ge=1, description="Most encoder processes; none: one per GPU, or per CPU.")

    @check_settings
    def _usable_window(self) -> "Settings":
        first, last = self.ranks
        if last - first < self.negatives:
            raise ValueError(
                f"--window {self.window} has no room for {self.negatives} negatives. Pass a longer one, as FIRST:LAST."
            )
        return self

    @property
    def ranks(self) -> tuple[int, int]:
        """The window's edges.

        Raises:
            ValueError: They are not two whole numbers.
        """
        first, _, last = self.window.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"--window {self.window} is not FIRST:LAST. Write for example 10:100.")
        return int(first), int(last)


def check_window(settings: Settings, data: DatasetStore) -> Rules:
    """Returns the rules that the settings give.

    Raises:
        ValueError: The data has fewer documents than the window has ranks.
    """
    rules = Rules(settings.negatives, *settings.ranks, settings.relative_margin, settings.sampling)
    rules.check(data.num_documents, str(data.folder))
    return rules


def run(settings: Settings) -> Manifest:
    """Mines the files of pairs that the output lacks."""
    output = storage.place(settings.output).absolute()  # workers have a working folder of their own
    data = DatasetStore.open(storage.place(settings.data).absolute())
    info = model.describe(settings.model)
    store = EmbeddingStore.open(storage.place(settings.embeddings).absolute()) if settings.embeddings else None
    storage.keep_apart(output, data.folder, info.folder, store.folder if store else None)
    files, rules = data.pair_files(), check_window(settings, data)
    embed.refuse_strangers("--embeddings", store, info, data)
    identity = {
        "data": data.manifest.fingerprint,
        "model": info.fingerprint,
        "embeddings": store.manifest.fingerprint if store else None,
        **dataclasses.asdict(rules),
    }
    previous = artifacts.claim(output, "negatives", identity, settings.replace)
    keys = [mining.key_of(path) for path in files]
    finished = artifacts.finished_receipts(output, previous, keys, compare_digests=settings.replace)
    todo = [path for path in files if mining.key_of(path) not in finished]
    if previous and previous.is_complete and not todo:
        storage.remove(output / _WORK)
        say(f"mine: nothing to do, {output} is complete ({previous.num_rows} pairs)")
        return previous
    manifest = Manifest("negatives", identity, facts={"run": describe_run("mine", settings)})
    with cluster.connected() as session:
        artifacts.begin(output, manifest, previous)
        store = store or embed.embed_dataset(
            output / "embeddings", data, settings.model, settings.workers, replace=settings.replace
        )
        rules.check(store.manifest.num_rows, data.corpus)  # documents without text are not among them
        made = store.manifest.identity
        pool = session.encoders(info, made["precision"], made["tokens_per_step"], settings.workers)
        _encode_queries(pool, todo, output / _WORK, store.width)  # before other work ends the pool that has just embedded
        sources = _gather(output / _WORK, data, store, _index(store, output / _WORK / "index"), rules)
        _mine(session, sources, todo, output, finished)
    manifest = _finish(output, manifest, [finished[key] for key in keys])
    storage.remove(output / _WORK)
    return manifest


def _index(store: EmbeddingStore, folder: Place) -> IndexStore:
    """Returns an index for exact search at full width; one of other vectors makes way for it."""
    shards = -(-store.manifest.num_rows // _ROWS_PER_SHARD)
    own: dict[str, Any] = {"plan": (f"{store.width}:{_KEEP}",), "coarse_index": indexing.NO_INDEX, "shards": shards}
    index.run(index.Settings(output=str(folder), embeddings=str(store.folder), replace=True, **own))
    return IndexStore.open(folder)


def _gather(work: Place, data: DatasetStore, store: EmbeddingStore, built: IndexStore, rules: Rules) -> Sources:
    """Returns what workers need, with the hashes of documents and of what is known written to a folder of this run."""
    documents, known = positives.read(data, built.open_ids())
    for name, hashes in ((mining.DOCUMENTS, documents), (mining.KNOWN, known)):
        with storage.publish(work / name) as temporary:
            hashes.save(temporary)
    source = dataclasses.replace(corpus.recall(store.manifest.facts.get("corpus")), root=data.corpus)
    return Sources(built, source, work, rules)


def _encode_queries(pool: Encoders, todo: Sequence[Place], work: Place, width: int) -> None:
    """Writes the vectors of each file's queries, row by row, where an earlier run has not; memory holds a part of a file."""
    missing = [path for path in todo if not mining.vectors_of(work, path).is_file()]
    with Counter("mine: queries", len(missing), "queries") as counter:
        for path in missing:
            num_rows = corpus.count_rows(path)
            with storage.publish(mining.vectors_of(work, path)) as temporary:
                vectors = np.lib.format.open_memmap(temporary, "w+", np.float16, (num_rows, width))
                start = 0
                for rows in corpus.read_rows(path, _QUERIES_AT_ONCE, ["query"]):
                    distinct = {text: number for number, text in enumerate(dict.fromkeys(rows["query"]))}
                    numbers = [distinct[text] for text in rows["query"]]
                    vectors[start : start + len(numbers)] = pool.encode(list(distinct), "query")[numbers]
                    start += len(numbers)
                vectors.flush()
            counter.advance(num_rows, file=path.name)


def _mine(session: Session, sources: Sources, todo: Sequence[Place], output: Place, finished: dict[str, Receipt]) -> None:
    """Adds the receipts of files to ``finished`` and to the journal."""
    calls = [(sources, path, output) for path in todo]
    with journal_of(output) as journal, Counter("mine", len(todo), "pairs") as counter:
        for receipt in session.run_tasks(mining.mine_file, calls):
            journal.add(receipt)
            finished[receipt.key] = receipt
            counter.advance(receipt.num_rows, file=receipt.key, **receipt.details)


def _finish(output: Place, manifest: Manifest, receipts: Sequence[Receipt]) -> Manifest:
    summary = mining.summarise(receipt.details for receipt in receipts)
    facts = {**manifest.facts, "mined": summary}
    finished = dataclasses.replace(manifest, facts=facts, receipts=tuple(receipts), is_complete=True)
    finished.write(output)
    say(
        f"mine: {summary['num_mined']} negatives for {summary['num_pairs']} pairs in {output}: {summary['full_share']:.1%} of the"
        f" pairs got all, {summary['some_share']:.1%} some; passed over: {summary['num_known']} known positives,"
        f" {summary['num_near']} too near the positive"
    )
    say(f"mine: mean score {summary['positive_score']:.3f} of positives, {summary['negative_score']:.3f} of negatives")
    return finished


if __name__ == "__main__":
    main("mine", Settings, run)

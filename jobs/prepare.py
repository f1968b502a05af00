"""Turns text into the dataset that every later stage reads: documents, queries and judgements by split, training pairs."""

from collections.abc import Iterator
from pathlib import Path

from jobs import cluster
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say
from matryoshka import artifacts, corpus, docstrings, pairs, storage
from matryoshka.artifacts import Manifest
from matryoshka.config import Field, FolderPath, InputPath, check_settings
from matryoshka.docstrings import SourceFile
from matryoshka.pairs import Dataset, Pair

_SOURCES_PER_TASK = 400


class Settings(StageSettings):
    """Turns text into the dataset that every later stage reads.

    Give one source: --pairs (Parquet with a query and a positive column), --beir (a BEIR folder), or --python-docs
    (the documentation of the Python packages that are installed here).
    """

    pairs: InputPath | None = Field(None, description="Parquet files with training pairs: a folder, file or glob pattern.")
    query_column: str = Field("query", description="Column of --pairs with the query.")
    positive_column: str = Field("positive", description="Column of --pairs with the document that answers it.")
    id_column: str | None = Field(None, description="Column of --pairs with the document's id; none: made from its text.")
    group_column: str | None = Field(
        None, description="Column of --pairs whose equal values stay in one split; none: the document."
    )
    beir: FolderPath | None = Field(None, description="BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.")
    python_docs: bool = Field(False, description="Use docstrings of the installed packages and the standard library.")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="Share of the groups that make the test split.")
    dev_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the groups that make the dev split.")
    max_train: int | None = Field(None, ge=1, description="Most queries in the train split, chosen by hash.")
    max_dev: int | None = Field(None, ge=1, description="Most queries in the dev split, chosen by hash.")
    max_test: int | None = Field(None, ge=1, description="Most queries in the test split, chosen by hash.")
    split_salt: str = Field("matryoshka", description="Another text gives another, equally fixed, split and sample.")
    fail_on_empty: bool = Field(False, description="Make an error of rows without text instead of leaving them out.")

    @check_settings
    def _one_source(self) -> "Settings":
        if sum(map(bool, (self.pairs, self.beir, self.python_docs))) != 1:
            raise ValueError("give exactly one source: --pairs, --beir or --python-docs.")
        if self.test_fraction + self.dev_fraction >= 1:
            raise ValueError("--test-fraction and --dev-fraction leave nothing to train on. Lower one of them.")
        return self


def run(settings: Settings) -> Manifest:
    """Makes the dataset, unless the output already holds it."""
    output = storage.local_path(settings.output)
    storage.keep_apart(output, *(storage.local_path(text) for text in (settings.pairs, settings.beir) if text))
    sources = docstrings.find_sources() if settings.python_docs else []
    identity = {"source": _fingerprint(settings, sources), **settings.model_dump(exclude={"output", "replace", *_SOURCES})}
    previous = artifacts.claim(output, "dataset", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        say(f"prepare: nothing to do, {output} is complete")
        return previous
    dataset = _collect(settings, sources)
    if not dataset.documents:
        raise ValueError(f"prepare: no pair with text is left (left out: {dict(dataset.dropped)}). Check the columns.")
    if settings.fail_on_empty and (
        num_empty := sum(count for reason, count in dataset.dropped.items() if reason.startswith("empty"))
    ):
        raise ValueError(f"prepare: {num_empty} rows have no text. Fill them, or drop --fail-on-empty.")
    manifest = Manifest("dataset", identity, facts={**dataset.counts, "run": describe_run("prepare", settings)})
    artifacts.begin(output, manifest, None)
    finished = Manifest("dataset", identity, {}, manifest.facts, tuple(pairs.write(output, dataset)), is_complete=True)
    finished.write(output)
    queries = ", ".join(f"{count} {split}" for split, count in dataset.counts["queries"].items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in dataset.dropped.items()) or "none"
    say(f"prepare: {len(dataset.documents)} documents, queries: {queries}; left out: {dropped}")
    return finished


_SOURCES = ("pairs", "beir", "python_docs")


def _fingerprint(settings: Settings, sources: list[SourceFile]) -> str:
    if settings.python_docs:
        return storage.digest_json([[source.module, storage.digest_file(Path(source.path))] for source in sources])
    if settings.beir:
        folder = storage.local_path(settings.beir)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder. Pass a BEIR folder with corpus.jsonl, queries.jsonl and qrels/.")
        files = sorted(path for path in folder.rglob("*") if path.suffix in {".jsonl", ".tsv"})
        root = folder
    else:
        root, files = corpus.find_files(settings.pairs or "")
    return storage.digest_json([[str(path.relative_to(root)), storage.digest_file(path)] for path in files])


def _collect(settings: Settings, sources: list[SourceFile]) -> Dataset:
    limits = {"train": settings.max_train, "dev": settings.max_dev, "test": settings.max_test}
    if settings.beir:
        return pairs.read_beir(storage.local_path(settings.beir), limits, settings.split_salt)
    train = 1 - settings.test_fraction - settings.dev_fraction
    fractions = {"test": settings.test_fraction, "dev": settings.dev_fraction, "train": train}
    if settings.python_docs:
        return pairs.from_pairs(_read_docstrings(sources), fractions, limits, settings.split_salt, one_to_one=True)
    columns = (settings.query_column, settings.positive_column, settings.id_column, settings.group_column)
    found = pairs.read_pair_files(settings.pairs or "", *columns)
    return pairs.from_pairs(found, fractions, limits, settings.split_salt)


def _read_docstrings(sources: list[SourceFile]) -> Iterator[Pair]:
    parts = [(sources[start : start + _SOURCES_PER_TASK],) for start in range(0, len(sources), _SOURCES_PER_TASK)]
    with cluster.connected() as session:
        for found in session.run_tasks(_extract, parts):
            yield from found


def _extract(sources: list[SourceFile]) -> list[Pair]:
    found = [pair for source in sources for pair in docstrings.extract_pairs(source)]
    return [Pair(pair.query, pair.document, pair.package, pair.id) for pair in found]


if __name__ == "__main__":
    main("prepare", Settings, run)

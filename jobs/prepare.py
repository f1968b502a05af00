"""Turns text into the dataset that every later stage reads: documents, queries and judgements by split, training pairs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from jobs import cluster
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say
from matryoshka import artifacts, chunks, corpus, docstrings, model, preparation, sources, splits, storage
from matryoshka.artifacts import Manifest
from matryoshka.chunks import ChunkPlan
from matryoshka.cleaning import PairColumns, Rules
from matryoshka.config import Field, FolderPath, InputPath, check_settings
from matryoshka.labelled import LabelColumns
from matryoshka.preparation import Finishing, Prepared, Source
from matryoshka.splits import SplitBy, SplitRule
from matryoshka.storage import Place

_FILES = "Parquet, CSV or JSONL files: a folder, file or glob pattern."
_SOURCES = ("pairs", "titled", "labelled", "beir", "python_docs")
_ROWS = ("pairs", "titled", "labelled")
_ONLY_FOR = {
    "negatives_column": ("pairs",),
    "id_column": ("pairs", "titled"),
    "pairs_per_text": ("labelled",),
    "split_column": _ROWS,
    "group_column": _ROWS,
    "min_query_characters": ("pairs", "titled", "python_docs"),
    "min_characters": (*_ROWS, "python_docs"),
    "chunk_tokens": ("pairs", "titled", "beir", "python_docs"),
}


class Settings(StageSettings):
    """Turns text into the dataset that every later stage reads.

    Give one source: --pairs (a query and a positive column), --titled (a title and a body column), --labelled (a text and a
    label column), --beir (a BEIR folder), or --python-docs (the documentation of the Python packages that are installed here).
    """

    pairs: InputPath | None = Field(None, description=f"Queries and the documents that answer them; {_FILES}")
    query_column: str = Field("query", description="Column of --pairs with the query.")
    positive_column: str = Field("positive", description="Column of --pairs with the document that answers it.")
    negatives_column: str | None = Field(
        None, description="Column of --pairs with texts that do not answer the query (a list, or one text); none: no such column."
    )
    titled: InputPath | None = Field(None, description=f"Titles, which become queries, and their bodies; {_FILES}")
    title_column: str = Field("title", description="Column of --titled with the title.")
    body_column: str = Field("body", description="Column of --titled with the body.")
    labelled: InputPath | None = Field(None, description=f"Texts with labels, each the other's answer under one label; {_FILES}")
    text_column: str = Field("text", description="Column of --labelled with the text.")
    label_column: str = Field("label", description="Column of --labelled with the label.")
    pairs_per_text: int = Field(1, ge=1, description="With how many others of its label a text of --labelled makes a pair.")
    beir: FolderPath | None = Field(None, description="BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.")
    python_docs: bool = Field(False, description="Use docstrings of the installed packages and the standard library.")
    id_column: str | None = Field(
        None, description="Column of --pairs or --titled with the document's id; none: made from its text."
    )
    split_column: str | None = Field(
        None, description="Column that says train, dev or test (or validation); it goes before --split-by."
    )
    split_by: Literal["auto", "files", "hash"] = Field(
        "auto",
        description="files: names of files or folders, such as train.csv, train-00001.parquet, validation/0.csv; hash: of the"
        " group or query, so that new data never moves an old row; auto: files where names give two splits or more, else hash."
        " A BEIR folder has its own splits.",
    )
    group_column: str | None = Field(
        None,
        description="Column whose equal values stay in one split when splitting by hash; none: the query, or labelled text.",
    )
    test_fraction: float = Field(0.2, ge=0, lt=1, description="Share of the groups that make the test split, by hash.")
    dev_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the groups that make the dev split, by hash.")
    max_train: int | None = Field(None, ge=1, description="Most queries in the train split, chosen by hash.")
    max_dev: int | None = Field(None, ge=1, description="Most queries in the dev split, chosen by hash.")
    max_test: int | None = Field(None, ge=1, description="Most queries in the test split, chosen by hash.")
    split_salt: str = Field("matryoshka", description="Another text gives another, equally fixed, split and sample.")
    fail_on_empty: bool = Field(False, description="Make an error of rows without text instead of leaving them out.")
    min_query_characters: int = Field(1, ge=1, description="Leave out pairs with a shorter query.")
    min_characters: int = Field(1, ge=1, description="Leave out pairs with a shorter document, or shorter texts.")
    near_duplicates: float = Field(
        0.9,
        ge=0,
        le=1,
        description="A training pair with a text this close to dev or test (Jaccard similarity of three-word runs) is a leak, and"
        " left out of the pairs; 0: do not look.",
    )
    chunk_tokens: int | None = Field(
        None, ge=8, description="Cut documents into windows of whole sentences with at most so many tokens; none: do not cut."
    )
    chunk_overlap: int = Field(0, ge=0, description="Most tokens that a window repeats of the one before it.")
    model: str = Field("minilm", description="Model whose tokenizer counts --chunk-tokens.")

    @check_settings
    def _one_source(self) -> "Settings":
        if sum(bool(getattr(self, name)) for name in _SOURCES) != 1:
            raise ValueError("give exactly one source: --pairs, --titled, --labelled, --beir or --python-docs.")
        if self.test_fraction + self.dev_fraction >= 1:
            raise ValueError("--test-fraction and --dev-fraction leave nothing to train on. Lower one of them.")
        if self.chunk_tokens and self.chunk_overlap >= self.chunk_tokens:
            raise ValueError(
                f"--chunk-overlap {self.chunk_overlap} leaves no room in a chunk of {self.chunk_tokens} tokens. Lower it."
            )
        if self.chunk_overlap and not self.chunk_tokens:
            raise ValueError("--chunk-overlap is for --chunk-tokens. Pass both, or neither.")
        return self

    @check_settings
    def _options_of_the_source(self) -> "Settings":
        source = next(name for name in _SOURCES if getattr(self, name))
        for name, sources_of in _ONLY_FOR.items():
            if getattr(self, name) != type(self).model_fields[name].default and source not in sources_of:
                flags = [f"--{word.replace('_', '-')}" for word in (name, *sources_of)]
                raise ValueError(f"{flags[0]} is for {' and '.join(flags[1:])}. Leave it out.")
        return self

    @property
    def location(self) -> str | None:
        """Where the files of the input are."""
        return self.pairs or self.titled or self.labelled


def run(settings: Settings) -> Manifest:
    """Makes the dataset, unless the output already holds it."""
    output = storage.place(settings.output).absolute()  # workers have a working folder of their own
    storage.keep_apart(output, *(storage.place(text) for text in (settings.location, settings.beir) if text))
    chunk_plan = _plan_chunks(settings)
    root, paths = _find_input(settings)
    rules = _rules(settings, root, paths)
    identity = _identity(settings, root, paths, chunk_plan)
    previous = artifacts.claim(output, "dataset", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        storage.remove_leftovers(output)  # of a run with --replace that was killed
        say(f"prepare: nothing to do, {output} is complete")
        return previous
    source = _source(settings, paths, rules)
    finishing = Finishing(chunk_plan, settings.near_duplicates or None, settings.fail_on_empty)
    stamps = corpus.stamp(root, paths)
    with storage.workspace(output, "prepare") as work:
        changed = storage.ChangedError(f"{source.files[0]}: the input changed while it was read. Run the same command again.")
        try:
            with cluster.connected() as session:
                prepared = preparation.prepare(source, rules, finishing, work, session.run_tasks)
        except ValueError as error:
            raise (error if corpus.stamp(root, paths) == stamps else changed) from None
        if corpus.stamp(root, paths) != stamps:
            raise changed
        manifest = Manifest("dataset", identity, facts={**prepared.facts, "run": describe_run("prepare", settings)})
        finished = _publish(output, work, manifest, prepared)
    say(f"prepare: {_summary(finished.facts)}")
    return finished


def _plan_chunks(settings: Settings) -> ChunkPlan | None:
    if settings.chunk_tokens is None:
        return None
    info = model.describe(settings.model)
    return chunks.plan_chunks(info.folder, info.max_tokens, settings.chunk_tokens, settings.chunk_overlap)


def _find_input(settings: Settings) -> tuple[Place, Sequence[Place]]:
    """Returns the root and the files of the input, in the order in which they are read; all paths are absolute."""
    if settings.python_docs:
        return Path("/"), [Path(source.path).absolute() for source in docstrings.find_sources()]
    if settings.beir:
        folder = storage.place(settings.beir).absolute()
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder. Pass a BEIR folder with corpus.jsonl, queries.jsonl and qrels/.")
        names = sorted(map(PurePosixPath, storage.names(folder)))
        return folder, [folder / str(name) for name in names if name.suffix in {".jsonl", ".tsv"}]
    return corpus.find_files(settings.location or "", sources.SUFFIXES)


def _identity(settings: Settings, root: Place, paths: Sequence[Place], chunk_plan: ChunkPlan | None) -> dict[str, Any]:
    digests = [[_name_of(path, root), storage.digest_file(path)] for path in paths]
    own = settings.model_dump(exclude={"output", "replace", "run_id", "model", *_SOURCES})
    tokenizer = storage.digest_file(storage.place(chunk_plan.tokenizer)) if chunk_plan else None
    return {"source": storage.digest_json(digests), "tokenizer": tokenizer, **own}


def _name_of(path: Place, root: Place) -> str:
    """Returns the path of a file below a folder."""
    return path.as_posix().removeprefix(root.as_posix()).lstrip("/")


def _rules(settings: Settings, root: Place, paths: Sequence[Place]) -> Rules:
    train = 1 - settings.test_fraction - settings.dev_fraction
    names = [_name_of(path, root) for path in paths]
    fractions = {"test": settings.test_fraction, "dev": settings.dev_fraction, "train": train}
    return Rules(
        SplitRule(_split_by(settings, names), fractions, settings.split_salt, str(root)),
        {"train": settings.max_train, "dev": settings.max_dev, "test": settings.max_test},
        settings.min_query_characters,
        settings.min_characters,
        settings.python_docs,
        settings.pairs_per_text,
    )


def _split_by(settings: Settings, names: Sequence[str]) -> SplitBy:
    """Returns what gives rows their split; BEIR folders and docstrings do not ask."""
    if settings.split_column:
        return "column"
    by_name = settings.split_by == "files" or (settings.split_by == "auto" and splits.name_splits(names))
    if not settings.location or not by_name:
        return "hash"
    splits.check_names(names)
    return "files"


def _source(settings: Settings, paths: Sequence[Place], rules: Rules) -> Source:
    if settings.python_docs:
        return preparation.from_docstrings(docstrings.find_sources())
    if settings.beir:
        return preparation.from_beir(storage.place(settings.beir).absolute())
    shared = settings.group_column, settings.split_column
    if settings.labelled:
        return preparation.from_labelled(paths, LabelColumns(settings.text_column, settings.label_column, *shared), rules)
    names = (settings.query_column, settings.positive_column, settings.negatives_column)
    if settings.titled:
        names = (settings.title_column, settings.body_column, None)
    return preparation.from_pairs(paths, PairColumns(*names, settings.id_column, *shared), rules)


def _publish(output: Place, work: Place, manifest: Manifest, prepared: Prepared) -> Manifest:
    """Moves the finished files to where they belong, and commits the manifest."""
    artifacts.begin(output, manifest, None, work)
    for path, receipt in prepared.moves.items():
        storage.move(path, output / receipt.files[0].path)
    finished = dataclasses.replace(manifest, receipts=tuple(prepared.moves.values()), is_complete=True)
    finished.write(output)
    return finished


def _summary(facts: Mapping[str, Any]) -> str:
    cut = f" in {facts['chunks']} chunks" if facts["is_chunked"] else ""
    shared = f" ({facts['shared']} with a document that answers dev or test too)" if facts["shared"] else ""
    return (
        f"{facts['documents']} documents{cut}, queries: {_counts(facts['queries'])}; {facts['pairs']} training pairs{shared};"
        f" left out: {_counts(facts['dropped'])}; near-duplicates: {_counts(facts['near_duplicates'])}"
    )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


if __name__ == "__main__":
    main("prepare", Settings, run)

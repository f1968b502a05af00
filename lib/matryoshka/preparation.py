"""The prepare stage's work: from a source, in passes of small tasks, to the files of a dataset.

Who calls the tasks is not known here: a job hands them to Ray, a test calls them one after the other.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matryoshka import assembly, beir, cleaning, docstrings, labelled, pairs, sources, storage
from matryoshka.artifacts import Receipt
from matryoshka.assembly import Layout, Part
from matryoshka.chunks import ChunkPlan
from matryoshka.cleaning import PairColumns, Raw, Rules, Tally
from matryoshka.docstrings import SourceFile
from matryoshka.labelled import LabelColumns
from matryoshka.sources import Slice
from matryoshka.splits import STRENGTH, TRAIN, Sample
from matryoshka.storage import Place

_PARTITION_BYTES = 2**25
_SMALL_BYTES = 2**20  # not worth more than a task
_SOURCES_PER_TASK = 400
_SHOWN = 3

RunTasks = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]
"""Yields the results of a function, called once per tuple of arguments, in that order."""

Pass = Callable[..., Tally]

_CLEANING: tuple[Pass, ...] = (cleaning.settle_documents, cleaning.settle_queries)


@dataclass(frozen=True, slots=True)
class Source:
    """Where data comes from, and the passes that make it clean.

    Attributes:
        files: Of the input, by number, for people.
        splits: The splits that there will be.
        brought: Those of them that the data itself brings, and what to say where no query of one is left.
        reading: Tasks, each a function and its arguments after the layout and the rules.
        settling: Passes over the partitions that decide what is kept.
        dealing: The pass that hands on what the limits let in.
        linking: Passes after it.
        keeps_all: Whether every text becomes a document, used or not.
        keeps_shared: Whether a document that answers dev or test may answer a training pair too.
        extras: Further columns of the training pairs.
    """

    files: tuple[str, ...]
    splits: tuple[str, ...]
    brought: Mapping[str, str]
    reading: tuple[tuple[Any, ...], ...]
    settling: tuple[Pass, ...]
    dealing: Pass
    linking: tuple[Pass, ...] = ()
    keeps_all: bool = False
    keeps_shared: bool = False
    extras: tuple[str, ...] = ()


def from_pairs(paths: Sequence[Place], columns: PairColumns, rules: Rules) -> Source:
    """Returns files with a query and a document in every row as a source.

    Raises:
        ValueError: A file is not readable, or lacks a column.
    """
    slices = sources.plan_slices(paths, columns.wanted())
    reading = tuple((_take_pairs, part, columns) for part in slices)
    extras = ("negatives", "negative_ids") if columns.negatives else ()
    brought = _brought(paths, rules)
    return Source(
        tuple(map(str, paths)),
        tuple(brought or STRENGTH),
        brought,
        reading,
        _CLEANING,
        cleaning.deal_pairs,
        keeps_shared=rules.splits.by != "hash",
        extras=extras,
    )


def _take_pairs(layout: Layout, rules: Rules, part: Slice, columns: PairColumns) -> Tally:
    return cleaning.take(layout, rules, part.title, cleaning.read_rows(part, columns, rules.splits))


def from_docstrings(found: Sequence[SourceFile]) -> Source:
    """Returns the documentation of Python files as a source."""
    firsts = range(0, len(found), _SOURCES_PER_TASK)
    reading = tuple(
        (_take_docstrings, number, tuple(found[first : first + _SOURCES_PER_TASK])) for number, first in enumerate(firsts)
    )
    files = tuple(f"Python files from {found[first].module}" for first in firsts)
    return Source(files, tuple(STRENGTH), {}, reading, _CLEANING, cleaning.deal_pairs)


def _take_docstrings(layout: Layout, rules: Rules, number: int, found: Sequence[SourceFile]) -> Tally:
    pairs_found = (pair for source in found for pair in docstrings.extract_pairs(source))
    rows = (
        Raw(sources.place_of(number, row), pair.query, pair.document, [], pair.id, pair.package, "")
        for row, pair in enumerate(pairs_found)
    )
    return cleaning.take(layout, rules, f"{number:06d}", rows)


def from_labelled(paths: Sequence[Place], columns: LabelColumns, rules: Rules) -> Source:
    """Returns files with a text and a label in every row as a source.

    Raises:
        ValueError: A file is not readable, or lacks a column.
    """
    slices = sources.plan_slices(paths, columns.wanted())
    reading = tuple((_take_labelled, part, columns) for part in slices)
    brought = _brought(paths, rules)
    return Source(
        tuple(map(str, paths)),
        tuple(brought or STRENGTH),
        brought,
        reading,
        (labelled.settle_messages,),
        labelled.deal_messages,
        (labelled.settle_labels,),
        extras=("label",),
    )


def _take_labelled(layout: Layout, rules: Rules, part: Slice, columns: LabelColumns) -> Tally:
    return labelled.take(layout, rules, part.title, labelled.read_rows(part, columns, rules.splits))


def from_beir(folder: Place) -> Source:
    """Returns a BEIR folder as a source.

    Raises:
        ValueError: A file is missing, or there are no judgements.
    """
    judgements = beir.find_splits(folder)
    files = [folder / beir.CORPUS, folder / beir.QUERIES, *judgements.values()]
    reading: list[tuple[Any, ...]] = [(beir.take_corpus, folder), (beir.take_queries, folder)]
    reading += [(beir.take_judgements, path, split, number) for number, (split, path) in enumerate(judgements.items(), start=2)]
    return Source(
        tuple(map(str, files)),
        tuple(judgements),
        {split: f"{path}: judges no query of {files[1]}" for split, path in judgements.items()},
        tuple(reading),
        (beir.settle_queries,),
        beir.deal_queries,
        (beir.link_documents,),
        keeps_all=True,
        keeps_shared=True,
    )


def _brought(paths: Sequence[Place], rules: Rules) -> dict[str, str]:
    """Returns the splits that files bring by their names, and what to say where no row of one is left."""
    if rules.splits.by != "files":
        return {}
    named = {rules.splits.of_path(str(path)) or TRAIN: path for path in paths}
    return {split: f"{named[split]}: no row for split '{split}' is left" for split in STRENGTH if split in named}


@dataclass(frozen=True, slots=True)
class Finishing:
    """What is done with a dataset whatever its source.

    Attributes:
        chunk_plan: How documents are cut, if they are.
        near_duplicates: Similarity from which on a training pair is a leak; None: nothing is.
        fail_on_empty: Whether rows without text are an error.
    """

    chunk_plan: ChunkPlan | None = None
    near_duplicates: float | None = None
    fail_on_empty: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """The files of a dataset, where they lie by now, their receipts, and what there is to know of them."""

    moves: Mapping[Place, Receipt]
    facts: Mapping[str, Any]


def prepare(
    source: Source,
    rules: Rules,
    finishing: Finishing,
    work: Place,
    run: RunTasks,
    num_partitions: int | None = None,
) -> Prepared:
    """Makes the files of a dataset in a folder of its own.

    The same input gives the same bytes, whoever runs the tasks, in whatever order, and however many partitions there are.

    Raises:
        ValueError: Anything is wrong with the input; files and rows are named.
    """
    num_partitions = num_partitions or _count_partitions(source.files)
    layout = Layout(
        work,
        num_partitions,
        source.keeps_all,
        source.extras,
        finishing.chunk_plan,
        finishing.near_duplicates,
        source.keeps_shared,
    )
    dropped: Counter[str] = Counter()
    taken = list(run(_call, [(function, layout, rules, *arguments) for function, *arguments in source.reading]))
    dropped.update(_dropped(taken))
    _refuse_empty(dropped, finishing)
    layout = dataclasses.replace(layout, parts=assembly.pack_parts([size for tally in taken for size in tally.sizes]))
    numbers = range(num_partitions)
    sample = Sample(rules.limits, rules.splits.salt)
    for settle in source.settling:
        for tally in _checked(run(settle, [(layout, rules, number) for number in numbers]), source):
            dropped.update(tally.dropped)
            sample.merge(tally.lowest)
    _refuse_empty(dropped, finishing)  # what only the passes find
    cutoffs = sample.cutoffs()
    dropped.update(_dropped(run(source.dealing, [(layout, rules, cutoffs, number) for number in numbers])))
    for link in source.linking:
        dropped.update(_dropped(_checked(run(link, [(layout, rules, number) for number in numbers]), source)))
    return _assemble(layout, source, dropped, run)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _count_partitions(files: Iterable[str]) -> int:
    places = map(storage.place, files)
    num_bytes = sum(place.stat().st_size for place in places if place.is_file())
    return 1 + min(num_bytes // _SMALL_BYTES, 3) + num_bytes // _PARTITION_BYTES


def _dropped(tallies: Iterable[Tally]) -> Counter[str]:
    return sum((tally.dropped for tally in tallies), Counter[str]())


def _refuse_empty(dropped: Mapping[str, int], finishing: Finishing) -> None:
    num_empty = sum(count for reason, count in dropped.items() if reason.startswith("empty"))
    if finishing.fail_on_empty and num_empty:
        raise ValueError(f"prepare: {num_empty} rows have no text. Fill them, or drop --fail-on-empty.")


def _checked(tallies: Iterable[Tally], source: Source) -> list[Tally]:
    """Returns the tallies of a pass that found no fault.

    Raises:
        ValueError: It found some; the first are named.
    """
    found = list(tallies)
    faults = sorted({fault for tally in found for fault in tally.faults})
    if faults:
        shown = "; ".join(
            f"{sources.describe_places(source.files, first, second)}: {what}" for first, second, what in faults[:_SHOWN]
        )
        more = f" ({len(faults)} such places)" if len(faults) > _SHOWN else ""
        raise ValueError(f"{shown}{more}. Mend or take out these rows, and run again.")
    return found


def _assemble(layout: Layout, source: Source, dropped: Counter[str], run: RunTasks) -> Prepared:
    found = list(run(assembly.assemble_split, [(layout, split) for split in source.splits]))
    num_queries = {split: queries.num_rows for split, (queries, _) in zip(source.splits, found, strict=True) if queries.num_rows}
    _refuse_nothing(num_queries, source, dropped)
    files = [file for queries, qrels in found if queries.num_rows for file in (queries, qrels)]
    parts = range(len(layout.parts))
    near: Counter[str] = Counter()
    if layout.near_duplicates is not None and TRAIN in source.splits:
        list(run(assembly.save_references, [(layout, number) for number in (assembly.ALL_QUERIES, *parts)]))
        (near["dev near test"],) = run(assembly.count_dev_in_test, [(layout,)])
    built: list[Part] = list(run(assembly.assemble_part, [(layout, number) for number in parts]))
    for part in built:
        near.update({f"train near {split}": count for split, count in part.near.items()})
        dropped[assembly.NEAR] += part.near.total()
    num_shared = sum(part.num_shared for part in built)
    dropped[assembly.SHARED] += 0 if layout.keeps_shared else num_shared
    facts = {
        "documents": sum(part.num_documents for part in built),
        "queries": num_queries,
        "pairs": sum(part.pairs.num_rows for part in built),
        "dropped": {reason: dropped[reason] for reason in sorted(+dropped)},
        "shared": num_shared if layout.keeps_shared else 0,
        "near_duplicates": {name: near[name] for name in sorted(near)},
        "is_chunked": layout.chunk_plan is not None,
        **({"chunks": sum(part.corpus.num_rows for part in built)} if layout.chunk_plan else {}),
    }
    corpus_files = _renamed([part.corpus for part in built], f"{pairs.CORPUS}/part-")
    pair_files = _renamed([part.pairs for part in built], f"{pairs.PAIRS}/{TRAIN}-") if TRAIN in source.splits else {}
    moves = {**corpus_files, **{file.files[0].path: file for file in files}, **pair_files}
    return Prepared({layout.out / path: receipt for path, receipt in moves.items()}, facts)


def _renamed(files: Sequence[Receipt], prefix: str) -> dict[str, Receipt]:
    """Returns the receipts of files that have rows, numbered anew, by where the files lie."""
    renamed = {}
    for number, file in enumerate(file for file in files if file.num_rows):
        (record,) = file.files
        key = f"{prefix}{number:05d}"
        own = dataclasses.replace(record, path=f"{key}.parquet")
        renamed[record.path] = dataclasses.replace(file, key=key, files=(own,))
    return renamed


def _refuse_nothing(num_queries: Mapping[str, int], source: Source, dropped: Mapping[str, int]) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count) or "nothing"
    if not num_queries:
        raise ValueError(f"prepare: no pair with text is left (left out: {counts}). Check the columns and what they hold.")
    lacking = [place for split, place in source.brought.items() if split not in num_queries]
    if lacking:
        raise ValueError(f"{lacking[0]} (left out: {counts}). Pass files that belong together.")

"""Datasets prepared from a bucket to a bucket are those prepared on a disk, whatever they are made from."""

from collections.abc import Callable
from pathlib import Path

import datasets_by_hand as datasets
import pytest
import texts

from matryoshka import chunks, corpus, preparation, sources, storage
from matryoshka.cleaning import PairColumns, Rules
from matryoshka.labelled import LabelColumns
from matryoshka.preparation import Finishing, Source
from matryoshka.splits import SplitRule
from matryoshka.storage import Place


def _write_beir(folder: Path) -> None:
    texts.write_beir(folder, splits=("train", "dev", "test"))


def _write_pairs(folder: Path) -> None:
    """Writes pairs as Parquet and as JSON lines, the second half of them a second time."""
    made = texts.pairs(60)
    texts.write_parquet(folder / "a.parquet", {**made, "id": [f"d{number}" for number in range(60)]})
    rows = list(zip(made["query"], made["positive"], strict=True))[30:]
    texts.write_json_lines(folder / "b" / "c.jsonl", ({"query": query, "positive": own, "id": ""} for query, own in rows))


def _write_labelled(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [f"text {number} of {number % 5},label {number % 5}\n" for number in range(60)]
    for split, own in (("train", rows[:40]), ("test", rows[40:])):
        (folder / f"{split}.csv").write_text("".join(["text,label\n", *own]))


def _paths(root: Place) -> list[Place]:
    return corpus.find_files(str(root), sources.SUFFIXES)[1]


def _open_pairs(root: Place) -> tuple[Source, Rules]:
    return preparation.from_pairs(_paths(root), PairColumns("query", "positive"), datasets.RULES), datasets.RULES


def _open_labelled(root: Place) -> tuple[Source, Rules]:
    rules = Rules(SplitRule("files", datasets.FRACTIONS, "salt", str(root)))
    return preparation.from_labelled(_paths(root), LabelColumns("text", "label"), rules), rules


def _open_beir(root: Place) -> tuple[Source, Rules]:
    return preparation.from_beir(root), datasets.RULES


@pytest.mark.parametrize(
    ("write", "open_source", "is_chunked"),
    [(_write_beir, _open_beir, True), (_write_pairs, _open_pairs, False), (_write_labelled, _open_labelled, False)],
)
def test_a_dataset_prepared_in_a_bucket_is_the_one_prepared_on_a_disk(
    write: Callable[[Path], None],
    open_source: Callable[[Place], tuple[Source, Rules]],
    is_chunked: bool,
    bucket: str,
    tiny: str,
    tmp_path: Path,
):
    there = storage.place(bucket) / "night"
    write(tmp_path / "given")
    for name in storage.names(tmp_path / "given"):
        storage.publish_bytes(there / "given" / name, (tmp_path / "given" / name).read_bytes())
    storage.publish_bytes(there / "tokenizer.json", (Path(tiny) / "tokenizer.json").read_bytes())
    made = []
    for root, model in ((tmp_path, Path(tiny)), (there, there)):
        plan = chunks.plan_chunks(model, None, 8, 0) if is_chunked else None
        source, rules = open_source(root / "given")
        made.append(datasets.prepare(source, root / "data", rules, Finishing(plan, near_duplicates=0.5), num_partitions=3))
    assert made[0].manifest.fingerprint == made[1].manifest.fingerprint
    assert [path.name for path in made[1].pair_files()] == [path.name for path in made[0].pair_files()]
    assert {split: made[1].qrels(split) for split in made[1].judged_splits} == {
        split: made[0].qrels(split) for split in made[0].judged_splits
    }
    assert made[0].splits == made[1].splits
    assert [name for name in storage.names(there) if storage.TEMPORARY in name] == []

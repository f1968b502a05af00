from pathlib import Path

import datasets_by_hand as datasets
import pytest
import texts

from matryoshka import corpus, preparation
from matryoshka.cleaning import PairColumns, Rules
from matryoshka.corpus import Columns
from matryoshka.pairs import DatasetStore
from matryoshka.splits import SplitRule


def test_a_dataset_names_its_splits_when_asked_for_another(tmp_path: Path):
    store = datasets.write(tmp_path, {"d": "x"}, {"dev": {"q": "y"}, "test": {}}, {"dev": {"q": {"d": 1}}, "test": {}})
    assert store.splits == store.judged_splits == ("dev",)  # 'test' is empty
    with pytest.raises(ValueError, match=rf"{tmp_path}: no split 'eval' \(found: dev, test\)\. Pass --split"):
        store.queries("eval")
    with pytest.raises(ValueError, match=rf"{tmp_path}: split 'test' is empty\. Pass another --split"):
        store.qrels("test")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no training pairs \(no split 'train'\)\. Prepare data"):
        store.pair_files()
    assert (store.num_pairs, store.is_chunked) == (0, False)


def test_a_folder_without_dataset_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no dataset here .*Make it first with python -m jobs\.prepare"):
        DatasetStore.open(tmp_path)


def test_a_large_dataset_is_written_in_parts_in_the_order_of_the_input(tmp_path: Path):
    numbers = range(9_000)
    columns = {"query": [f"q{n}" for n in numbers], "positive": [f"text {n}" for n in numbers], "id": [f"d{n}" for n in numbers]}
    path = texts.write_parquet(tmp_path / "in.parquet", columns)
    rules = Rules(SplitRule("hash", {"train": 1.0}, "salt"))
    source = preparation.from_pairs([path], PairColumns("query", "positive", id="id"), rules)
    store = datasets.prepare(source, tmp_path / "out", rules)
    found = corpus.inspect(store.corpus, Columns())
    assert [(file.name, file.num_rows) for file in found.files] == [
        ("part-00000.parquet", 8_192),
        ("part-00001.parquet", 808),
    ]
    assert corpus.read_texts(found)[0] == columns["id"]
    assert store.corpus_fingerprint == found.fingerprint
    assert [path.name for path in store.pair_files()] == [f"train-{number:05d}.parquet" for number in range(2)]
    pairs = datasets.columns_of(store.pair_files())
    assert (pairs["query"], pairs["positive"], pairs["document_id"]) == tuple(columns.values())
    assert store.num_pairs == 9_000

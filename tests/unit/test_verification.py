import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import datasets_by_hand as datasets
import numpy as np
import pytest

from matryoshka import artifacts, corpus, verification
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.funnel import LISTS, VECTORS
from matryoshka.indexing import IndexStore, Layout
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]
MakeIndex = Callable[..., IndexStore]


def good_parts(random_vectors: Make) -> dict[str, tuple[list[str], np.ndarray]]:
    return {"a:0": (["x", "y"], random_vectors(2, 8, 1)), "b:0": (["z"], random_vectors(1, 8, 2))}


def write_dataset(folder: Path, qrels: dict[str, dict[str, int]]) -> Path:
    store = datasets.write(folder, {"d": "text"}, {"test": {"q": "query"}, "dev": {}}, {"test": qrels, "dev": {}})
    return store.folder


def test_sound_artifacts_have_no_faults_and_all_are_found(
    tmp_path: Path, make_store: MakeStore, make_index: MakeIndex, random_vectors: Make
):
    store = make_store(good_parts(random_vectors))
    make_index(store, name="deep/index")
    write_dataset(tmp_path / "data", {"q": {"d": 1}})
    found = verification.find_artifacts(tmp_path)
    assert [folder.relative_to(tmp_path).as_posix() for folder in found] == ["data", "deep/index", "embeddings"]
    assert [verification.verify(folder)[0].kind for folder in found] == ["dataset", "index", "embeddings"]
    assert [verification.verify(folder)[1] for folder in found] == [[], [], []]


def test_a_folder_without_artifacts_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no artifacts here .*Pass the output of a job"):
        verification.find_artifacts(tmp_path)


FAULTS = {
    "missing": lambda path, data: path.unlink(),  # noqa: ARG005
    "bytes, the receipt says": lambda path, data: path.write_bytes(data[:-1]),
    "its bytes were altered": lambda path, data: path.write_bytes(data[:-1] + b"x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_missing_truncated_or_altered_file_is_found(
    make_store: MakeStore, make_index: MakeIndex, random_vectors: Make, fault: str
):
    store = make_store(good_parts(random_vectors))
    index = make_index(store)
    for artifact in (store, index):
        paths = [artifact.folder / file.path for receipt in artifact.manifest.receipts for file in receipt.files]
        for path in paths:
            FAULTS[fault](path, path.read_bytes())
        _, found = verification.verify(artifact.folder)
        assert [line.split(": ")[0] for line in found] == [str(path) for path in paths]
        assert all(fault in line for line in found)


@pytest.mark.filterwarnings("ignore:invalid value")  # from infinity
@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.0, 2.0])
def test_vectors_that_are_not_finite_or_not_of_unit_length_are_named(
    make_store: MakeStore, make_index: MakeIndex, random_vectors: Make, wrong: float
):
    parts = good_parts(random_vectors)
    parts["a:0"][1][1] = parts["a:0"][1][1] * np.float16(wrong)
    store = make_store(parts)
    if np.isfinite(wrong):
        folders = [store.folder, make_index(store).folder]
    else:
        folders = [store.folder]
        with pytest.raises(ValueError, match=r"unit-0\.parquet: 1 vectors are not finite \(first: 'y'\)\. Embed it again"):
            make_index(store)
    for folder in folders:
        _, (fault,) = verification.verify(folder)
        assert "1 vectors are not finite or not of unit length (first: 'y')" in fault


def test_an_id_that_stands_in_two_units_is_counted(make_store: MakeStore, make_index: MakeIndex, random_vectors: Make):
    store = make_store({"a:0": (["x", "y"], random_vectors(2, 8, 1)), "b:0": (["x"], random_vectors(1, 8, 2))})
    for folder in (store.folder, make_index(store).folder):
        assert verification.verify(folder)[1] == [f"{folder}: 1 ids stand more than once"]


@pytest.mark.parametrize("make", ["store", "index"])
def test_counts_and_widths_other_than_the_manifest_says_are_found(
    make_store: MakeStore, make_index: MakeIndex, random_vectors: Make, make: str
):
    store = make_store(good_parts(random_vectors))
    artifact = store if make == "store" else make_index(store)
    receipts = tuple(dataclasses.replace(receipt, num_rows=7) for receipt in artifact.manifest.receipts)
    dataclasses.replace(artifact.manifest, receipts=receipts).write(artifact.folder)
    assert sum("the manifest says (7, 8)" in fault for fault in verification.verify(artifact.folder)[1]) == len(receipts)
    dataclasses.replace(artifact.manifest, facts={**artifact.manifest.facts, "width": 9}).write(artifact.folder)
    assert len(verification.verify(artifact.folder)[1]) == len(receipts)


def test_an_index_of_int8_is_verified_by_the_largest_component(
    make_store: MakeStore, make_index: MakeIndex, random_vectors: Make
):
    index = make_index(make_store(good_parts(random_vectors)), layout=Layout("prefix", 4, "Flat", "int8"))
    assert verification.verify(index.folder)[1] == []
    path = index.shards[0].folder / VECTORS
    stored = np.load(path)
    stored[1] //= 2
    np.save(path, stored)
    _rewrite(index)
    assert verification.verify(index.folder)[1] == [f"{path}: 1 vectors are not finite or not of unit length (first: 'y')"]


def _rewrite(index: IndexStore, **details: object) -> None:
    """Commits the files of an index as they are now, the first shard with other details."""
    receipts = [
        dataclasses.replace(receipt, files=tuple(FileRecord.of(index.folder, index.folder / file.path) for file in receipt.files))
        for receipt in index.manifest.receipts
    ]
    number = next(n for n, receipt in enumerate(receipts) if receipt.files[0].path.startswith("shards/"))
    receipts[number] = dataclasses.replace(receipts[number], details={**receipts[number].details, **details})
    dataclasses.replace(index.manifest, receipts=tuple(receipts)).write(index.folder)


def test_tombstones_that_are_not_those_of_the_list_are_found(make_store: MakeStore, make_index: MakeIndex, random_vectors: Make):
    index = make_index(make_store(good_parts(random_vectors)), removed=["y"])
    assert verification.verify(index.folder)[1] == []
    path = index.folder / index.shards[0].removed.path
    np.save(path, np.array([0]))
    _rewrite(index)
    assert verification.verify(index.folder)[1] == [
        f"{path}: does not leave out exactly the documents on the list of removed ones"
    ]


def test_documents_that_are_in_no_list_are_found(make_store: MakeStore, make_index: MakeIndex, random_vectors: Make):
    index = make_index(make_store(good_parts(random_vectors)), layout=Layout("prefix", 4, "IVF2,dense"))
    assert verification.verify(index.folder)[1] == []
    path = index.folder / index.shards[0].folder / LISTS
    with np.load(path) as found:
        np.savez(path, **{**found, "rows": np.zeros_like(found["rows"])})
    _rewrite(index)
    (fault,) = verification.verify(index.folder)[1]
    assert fault.startswith(f"{path}: lists do not have each of the ")


def test_a_shard_of_another_training_is_found(make_store: MakeStore, make_index: MakeIndex, random_vectors: Make):
    store = make_store({f"{n}:0": ([f"{n}-{i}" for i in range(5)], random_vectors(5, 8, n)) for n in range(2)})
    index = make_index(store, layout=Layout("rotation", 4, "Flat"))
    assert verification.verify(index.folder)[1] == []
    _rewrite(index, training="other")
    assert verification.verify(index.folder)[1] == [
        f"{index.shards[0].folder}: was built with another training than the other shards"
    ]


def test_judgements_of_queries_that_are_not_there_are_found(tmp_path: Path):
    folder = write_dataset(tmp_path, {"q": {"d": 1}, "r": {"d": 1}, "s": {"d": 1}})
    assert verification.verify(folder)[1] == [f"{folder}: split 'test' judges 2 queries that it does not have"]


def test_rows_ids_and_documents_of_a_dataset_are_counted(tmp_path: Path):
    folder = write_dataset(tmp_path, {"q": {"d": 1}})
    manifest = artifacts.read(folder)
    assert verification.verify(folder)[1] == []
    receipts = [dataclasses.replace(receipt, num_rows=7) for receipt in manifest.receipts]
    dataclasses.replace(manifest, receipts=tuple(receipts)).write(folder)
    faults = verification.verify(folder)[1]
    assert len(faults) == len(receipts)
    assert all("rows, the receipt says 7" in fault for fault in faults)
    dataclasses.replace(manifest, facts={**manifest.facts, "documents": 2}).write(folder)
    assert verification.verify(folder)[1] == [f"{folder}: 1 documents, the manifest says 2"]


def test_an_id_that_stands_twice_in_a_dataset_is_counted(tmp_path: Path):
    folder = write_dataset(tmp_path, {"q": {"d": 1}})
    manifest, path = artifacts.read(folder), folder / "corpus" / "part-00000.parquet"
    corpus.write_rows(path, {"id": ["d", "d"], "text": ["text", "other"]})
    receipts = [
        dataclasses.replace(receipt, num_rows=2, files=(FileRecord.of(folder, path),))
        if receipt.files[0].path == "corpus/part-00000.parquet"
        else receipt
        for receipt in manifest.receipts
    ]
    dataclasses.replace(manifest, facts={**manifest.facts, "documents": 2}, receipts=tuple(receipts)).write(folder)
    assert verification.verify(folder)[1] == [f"{folder}: 1 ids stand more than once"]


def test_results_with_other_rows_than_the_receipt_says_are_found(tmp_path: Path):
    path = tmp_path / "results.parquet"
    corpus.write_rows(path, {"query_id": ["q"], "document_id": ["d"]})
    for num_rows, faults in ((1, []), (2, [f"{path}: 1 rows, the receipt says 2"])):
        receipt = Receipt("results", num_rows, (FileRecord.of(tmp_path, path),))
        Manifest("results", {}, receipts=(receipt,), is_complete=True).write(tmp_path)
        assert verification.verify(tmp_path)[1] == faults


def test_a_run_whose_stages_changed_or_went_away_is_found(tmp_path: Path):
    data = write_dataset(tmp_path / "data", {"q": {"d": 1}})
    Manifest("run", {}, {"data": artifacts.read(data).fingerprint}, is_complete=True).write(tmp_path)
    assert verification.verify(tmp_path)[1] == []
    manifest = artifacts.read(data)
    dataclasses.replace(manifest, identity={"other": 1}).write(data)
    assert verification.verify(tmp_path)[1] == [f"{data}: is not what the report was made from"]
    (data / artifacts.MANIFEST).unlink()
    assert verification.verify(tmp_path)[1] == [f"{data}: missing, or its manifest cannot be read"]


def test_an_unfinished_artifact_is_a_fault_and_an_altered_manifest_is_refused(make_store: MakeStore, random_vectors: Make):
    store = make_store(good_parts(random_vectors))
    dataclasses.replace(store.manifest, is_complete=False).write(store.folder)
    assert verification.verify(store.folder)[1] == [f"{store.folder}: not finished"]
    store.manifest.write(store.folder)
    path = store.folder / artifacts.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": {"corpus": "other"}}))
    with pytest.raises(ValueError, match=r"manifest\.json: was altered"):
        verification.verify(store.folder)


def test_a_model_whose_dims_do_not_fit_its_width_is_a_fault(minilm_copy: Callable[..., Path]):
    folder = minilm_copy()
    Manifest("model", {"dims": [384, 64]}, is_complete=True).write(folder)
    assert verification.verify(folder)[1] == []
    Manifest("model", {"dims": [768, 64]}, is_complete=True).write(folder)
    assert verification.verify(folder)[1] == [f"{folder}: trained for 768 dims, its vectors have 384"]

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import artifacts
from matryoshka.artifacts import FileRecord, Manifest, Receipt

name = st.text("abcdef/.-", min_size=1, max_size=6)
scalar = st.none() | st.booleans() | st.integers() | name
mapping = st.dictionaries(name, scalar | st.lists(scalar, max_size=2), max_size=3)
path = st.text("abcdef-", min_size=1, max_size=6)
count = st.integers(0, 2**63 - 1)
records = st.builds(FileRecord, path, count, name)
receipts = st.builds(Receipt, name, count, st.lists(records, max_size=2).map(tuple), mapping)
manifests = st.builds(
    Manifest, st.just("embeddings"), mapping, mapping, mapping, st.lists(receipts, max_size=3).map(tuple), st.booleans()
)
RECEIPT = Receipt("unit-1", 3, (FileRecord("units/1", 4, "d1"),), {"seconds": 1.5})
MANIFEST = Manifest("embeddings", {"model": "m", "dims": (4, 2)}, {"corpus": "c"}, {"width": 4}, (RECEIPT,), is_complete=True)


def alter(folder: Path, **changes: object) -> None:
    path = folder / artifacts.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@given(manifest=manifests)
def test_a_manifest_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest):
    folder = tmp_path_factory.mktemp("artifact")
    manifest.write(folder)
    assert artifacts.read(folder, "embeddings") == manifest
    assert artifacts.read(folder).fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "index"},
        {"identity": {"model": "other", "dims": [4, 2]}},
        {"inputs": {}},
        {"receipts": ()},
        {"receipts": (dataclasses.replace(RECEIPT, key="unit-2"),)},
        {"receipts": (dataclasses.replace(RECEIPT, num_rows=4),)},
        {"receipts": (dataclasses.replace(RECEIPT, files=(FileRecord("units/1", 4, "d2"),)),)},
    ],
)
def test_whatever_decides_the_content_changes_the_fingerprint(change: dict[str, Any]):
    assert dataclasses.replace(MANIFEST, **change).fingerprint != MANIFEST.fingerprint


def test_costs_facts_and_order_do_not_change_the_fingerprint():
    other = dataclasses.replace(RECEIPT, key="unit-0")
    cheap = dataclasses.replace(RECEIPT, details={})
    assert dataclasses.replace(MANIFEST, facts={}, receipts=(cheap,)).fingerprint == MANIFEST.fingerprint
    both = [dataclasses.replace(MANIFEST, receipts=parts).fingerprint for parts in ((RECEIPT, other), (other, RECEIPT))]
    assert both[0] == both[1]


ALTERED = [
    ("kind", "index"),
    ("kind", 5),
    ("identity", {"model": "n"}),
    ("identity", None),
    ("identity", 5),
    ("inputs", {}),
    ("inputs", [5]),
    ("receipts", []),
    ("receipts", None),
    ("receipts", [{"key": "unit-1"}]),
    ("fingerprint", None),
    ("format", 99),
]


@pytest.mark.parametrize(("key", "value"), ALTERED, ids=[f"{key}={value}" for key, value in ALTERED])
def test_a_manifest_that_was_altered_by_hand_is_refused(tmp_path: Path, key: str, value: object):
    MANIFEST.write(tmp_path)
    alter(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"{tmp_path}.*(with --replace|Pass another folder)\."):
        artifacts.read(tmp_path)


def test_an_unfinished_manifest_that_is_declared_complete_by_hand_is_refused(tmp_path: Path):
    artifacts.begin(tmp_path, MANIFEST, None)
    alter(tmp_path, is_complete=True)
    with pytest.raises(ValueError, match=r"manifest\.json: was altered .*--replace"):
        artifacts.read(tmp_path)


def test_a_newer_format_is_named_as_such_even_where_it_has_other_keys(tmp_path: Path):
    MANIFEST.write(tmp_path)
    alter(tmp_path, format=2, novelty=1)
    with pytest.raises(ValueError, match=r"format 2, this version reads 1"):
        artifacts.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", "5", '{"name": "my extension"}', "{", "null"])
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, content: str):
    (tmp_path / artifacts.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not "):
        artifacts.read(tmp_path)


def test_a_folder_without_manifest_says_which_job_makes_it(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no embeddings here .*python -m jobs\.embed"):
        artifacts.read(tmp_path, "embeddings")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no artifact here .*Check the path"):
        artifacts.read(tmp_path)


def test_an_artifact_of_another_kind_or_that_is_not_finished_is_refused(tmp_path: Path):
    dataclasses.replace(MANIFEST, is_complete=False).write(tmp_path)
    with pytest.raises(ValueError, match=r"holds 'embeddings', not 'index'\. Pass the folder of the index"):
        artifacts.read(tmp_path, "index")
    with pytest.raises(ValueError, match=r"not finished\. Run python -m jobs\.embed again"):
        artifacts.read_complete(tmp_path, "embeddings")
    assert artifacts.peek(tmp_path, "index") is None
    assert artifacts.peek(tmp_path, "embeddings").receipts == (RECEIPT,)


FAULTS = {
    "missing": (lambda path: path.unlink(), r"units/1: missing"),
    "truncated": (lambda path: path.write_bytes(b"abc"), r"units/1: 3 bytes, the receipt says 4"),
    "altered": (lambda path: path.write_bytes(b"abcx"), r"units/1: its bytes were altered"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), r"units/1: missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_truncated_or_altered_file_is_found(tmp_path: Path, fault: str):
    path = tmp_path / "units" / "1"
    path.parent.mkdir()
    path.write_bytes(b"abcd")
    manifest = dataclasses.replace(MANIFEST, receipts=(Receipt("unit-1", 1, (FileRecord.of(tmp_path, path),)),))
    assert artifacts.find_faults(tmp_path, manifest) == []
    spoil, message = FAULTS[fault]
    spoil(path)
    (found,) = artifacts.find_faults(tmp_path, manifest)
    assert message in found


def test_an_unfinished_artifact_and_a_path_out_of_the_folder_are_faults(tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"abcd")
    folder = tmp_path / "artifact"
    folder.mkdir()
    receipt = Receipt("unit-1", 1, (FileRecord("../secret", 4, "d"),))
    found = artifacts.find_faults(folder, Manifest("embeddings", {}, receipts=(receipt,)))
    assert found == [f"{folder}: not finished", f"{folder}/../secret: leads out of the artifact's folder"]

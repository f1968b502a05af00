import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from manifests import IDENTITY, MANIFEST, finish, tree

from matryoshka import artifacts
from matryoshka.artifacts import Manifest


def write_alien(folder: Path) -> None:
    (folder / "precious.txt").write_text("years of work")


def write_alien_manifest(folder: Path) -> None:
    write_alien(folder)
    (folder / "manifest.json").write_text(json.dumps({"name": "my extension", "version": "1.0"}))


def write_journal(folder: Path) -> None:
    (folder / "journal").mkdir()
    (folder / "journal" / "2024.txt").write_text("years of work")


def write_other_kind(folder: Path) -> None:
    Manifest("dataset", {}, receipts=(finish(folder, "a"),), is_complete=True).write(folder)


def write_altered_other_kind(folder: Path) -> None:
    write_other_kind(folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": {"corpus": "other"}}))


ALIENS = [write_alien, write_alien_manifest, write_journal, write_other_kind, write_altered_other_kind]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("write", ALIENS)
def test_a_folder_that_belongs_to_something_else_is_refused_and_untouched(
    tmp_path: Path, write: Callable[[Path], None], replace: bool
):
    write(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*Pass another"):
        artifacts.claim(tmp_path, "embeddings", IDENTITY, replace)
    assert tree(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: is a file\. Pass another --output"):
        artifacts.claim(tmp_path / "file", "embeddings", IDENTITY, replace=True)


def test_an_artifact_of_another_identity_is_refused_until_replace_discards_it(tmp_path: Path):
    dataclasses.replace(MANIFEST, receipts=(finish(tmp_path, "a"),), is_complete=True).write(tmp_path)
    before, other = tree(tmp_path), {**IDENTITY, "model": "n"}
    with pytest.raises(ValueError, match=r"made with other inputs or settings \(model: m there, n now\)\. Pass another --output"):
        artifacts.claim(tmp_path, "embeddings", other, replace=False)
    assert artifacts.claim(tmp_path, "embeddings", other, replace=True) is None
    assert tree(tmp_path) == before
    artifacts.begin(tmp_path, dataclasses.replace(MANIFEST, identity=other), None)
    assert list(tree(tmp_path)) == ["manifest.json"]


def test_the_same_identity_goes_on_with_or_without_replace(tmp_path: Path):
    dataclasses.replace(MANIFEST, is_complete=True).write(tmp_path)
    as_from_json = {"dims": [4, 2], "model": "m"}
    assert all(artifacts.claim(tmp_path, "embeddings", as_from_json, replace) for replace in (False, True))


def test_a_new_or_empty_folder_and_one_of_other_artifacts_can_be_claimed(tmp_path: Path):
    assert artifacts.claim(tmp_path / "new", "run", {}, replace=False) is None
    assert artifacts.claim(tmp_path, "run", {}, replace=False) is None
    MANIFEST.write(tmp_path / "embeddings")
    assert artifacts.claim(tmp_path, "run", {}, replace=False) is None
    artifacts.begin(tmp_path, Manifest("run", {}), None)
    assert artifacts.is_artifact(tmp_path / "embeddings")

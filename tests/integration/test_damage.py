"""Damage to an artifact is found, named, and mended by the command that made it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import texts

from jobs import embed, index, prepare, search, verify

pytestmark = pytest.mark.usefixtures("local_ray")

_TARGETS = {
    "unit file": "embeddings/units/*.parquet",
    "coarse index": "index/shards/*/coarse.faiss",
    "full vectors": "index/shards/*/vectors.npy",
    "ids": "index/shards/*/ids.arrow",
    "weights": "model/model.safetensors",
    "queries": "data/queries/test.parquet",
    "results": "results/results.parquet",
    "report": "report.json",
}
_DAMAGES = {"flipped byte": folders.flip_byte, "truncated": folders.truncate, "deleted": folders.delete}


@pytest.fixture
def copied_pipeline(finished_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_pipeline, tmp_path / "run"))


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("target", _TARGETS)
def test_verify_names_the_damaged_file(copied_pipeline: Path, target: str, damage: str) -> None:
    path = sorted(copied_pipeline.glob(_TARGETS[target]))[0]
    _DAMAGES[damage](path)
    with pytest.raises(RuntimeError, match=re.escape(str(path))):
        verify.run(verify.Settings(folder=str(copied_pipeline)))


def test_verify_finds_a_manifest_that_was_edited(copied_pipeline: Path) -> None:
    path = copied_pipeline / "embeddings" / "manifest.json"
    path.write_text(path.read_text().replace('"unit_rows": 40', '"unit_rows": 41'))
    with pytest.raises((RuntimeError, ValueError), match=re.escape(str(path))):
        verify.run(verify.Settings(folder=str(copied_pipeline)))


def test_verify_ends_with_code_5_and_names_the_file(copied_pipeline: Path) -> None:
    path = next((copied_pipeline / "embeddings" / "units").glob("*.parquet"))
    folders.flip_byte(path)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.verify", str(copied_pipeline)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
    assert "FAULT" in done.stdout


@pytest.mark.parametrize("name", ["coarse.faiss", "ids.arrow"])
def test_search_refuses_an_index_with_an_altered_shard(copied_pipeline: Path, name: str) -> None:
    path = next((copied_pipeline / "index" / "shards").glob(f"*/{name}"))
    folders.flip_byte(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        search.run(search.Settings(index=str(copied_pipeline / "index"), query="bada bife"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """Embeddings of a small corpus."""
    root = tmp_path_factory.mktemp("embedded")
    texts.write_corpus(root / "corpus")
    embed.run(_embed(root, tiny))
    return root


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Path:
    """The same, and an index of it."""
    root = tmp_path_factory.mktemp("indexed")
    shutil.copytree(embedded, root, dirs_exist_ok=True)
    index.run(_index(root))
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset."""
    root = tmp_path_factory.mktemp("prepared")
    texts.write_parquet(root / "pairs.parquet", texts.pairs(60))
    prepare.run(_prepare(root))
    return root


def _embed(root: Path, model: str) -> embed.Settings:
    return embed.Settings(
        output=str(root / "embeddings"), corpus=str(root / "corpus"), model=model, unit_rows=10, precision="float32"
    )


def _index(root: Path) -> index.Settings:
    own = {"shards": 2, "plan": ("16:50", "64:20"), "coarse_index": "Flat"}
    return index.Settings(output=str(root / "index"), embeddings=str(root / "embeddings"), **own)


def _prepare(root: Path) -> prepare.Settings:
    return prepare.Settings(output=str(root / "data"), pairs=str(root / "pairs.parquet"))


def _damage(made: Path, root: Path, pattern: str, damage: folders.Damage) -> Path:
    """Copies what was made to a folder of the test's own, damages one file there, and returns it."""
    shutil.copytree(made, root, dirs_exist_ok=True)
    path = sorted(root.glob(pattern))[0]
    damage(path)
    return path


@pytest.mark.parametrize("damage", [folders.truncate, folders.delete])
def test_the_same_embed_command_mends_lost_units(embedded: Path, tmp_path: Path, tiny: str, damage: folders.Damage) -> None:
    path = _damage(embedded, tmp_path, "embeddings/units/*.parquet", damage)
    embed.run(_embed(tmp_path, tiny))
    _assert_mended(embedded, tmp_path, path)


def test_embed_with_replace_mends_altered_units_as_verify_advises(embedded: Path, tmp_path: Path, tiny: str) -> None:
    path = _damage(embedded, tmp_path, "embeddings/units/*.parquet", folders.flip_byte)
    embed.run(_embed(tmp_path, tiny).model_copy(update={"replace": True}))
    _assert_mended(embedded, tmp_path, path)


@pytest.mark.parametrize("damage", [folders.truncate, folders.delete])
def test_the_same_index_command_mends_lost_shards(indexed: Path, tmp_path: Path, damage: folders.Damage) -> None:
    path = _damage(indexed, tmp_path, "index/shards/*/vectors.npy", damage)
    index.run(_index(tmp_path))
    _assert_mended(indexed, tmp_path, path)


def test_index_with_replace_mends_altered_shards_as_search_advises(indexed: Path, tmp_path: Path) -> None:
    path = _damage(indexed, tmp_path, "index/shards/*/vectors.npy", folders.flip_byte)
    index.run(_index(tmp_path).model_copy(update={"replace": True}))
    _assert_mended(indexed, tmp_path, path)


def test_index_is_not_built_from_altered_embeddings(embedded: Path, tmp_path: Path) -> None:
    path = _damage(embedded, tmp_path, "embeddings/units/*.parquet", folders.flip_byte)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(path.name)):
        index.run(_index(tmp_path))


@pytest.mark.parametrize("damage", [folders.truncate, folders.delete])
def test_the_same_prepare_command_mends_lost_files(prepared: Path, tmp_path: Path, damage: folders.Damage) -> None:
    path = _damage(prepared, tmp_path, "data/corpus/*.parquet", damage)
    prepare.run(_prepare(tmp_path))
    _assert_mended(prepared, tmp_path, path)


def _assert_mended(made: Path, root: Path, path: Path) -> None:
    verify.run(verify.Settings(folder=str(root)))
    name = path.relative_to(root)
    assert path.read_bytes() == (made / name).read_bytes()

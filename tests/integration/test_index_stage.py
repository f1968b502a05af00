"""The index job as a stage: what it chooses, what it learns once, what it takes out, what it exports."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import folders
import numpy as np
import numpy.typing as npt
import progress
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts

from jobs import embed, export, index, search, verify
from jobs.entry import HopelessError
from matryoshka import artifacts, storage
from matryoshka.encode import Encoder
from matryoshka.indexing import IndexStore

pytestmark = pytest.mark.usefixtures("local_ray")

_SMALL, _LARGE = 120, 500
_FUNNEL: dict[str, Any] = {"coarse_index": "Flat", "plan": ("16:50", "64:20")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """Embeddings of a small corpus, of the same with more files, and one more; queries, also as vectors; ids to remove."""
    root = tmp_path_factory.mktemp("stage")
    for name, num_documents in (("small", _SMALL), ("large", _LARGE), ("larger", _LARGE)):
        if name == "larger":  # by one file, which comes first
            texts.write_parquet(root / name / "more.parquet", texts.documents(_LARGE, _LARGE + 20))
        for number, start in enumerate(range(0, num_documents, 40)):
            texts.write_parquet(root / name / f"part-{number}.parquet", texts.documents(start, min(start + 40, num_documents)))
        embed.run(
            embed.Settings(
                output=str(root / f"{name}-vectors"),
                corpus=str(root / name),
                model=tiny,
                unit_rows=20,
                precision="float32",
                workers=1,
            )
        )
    questions = [" ".join(text.split()[:6]) for text in texts.documents(0, 30)["text"]]
    texts.write_parquet(root / "queries.parquet", {"id": [f"q{n}" for n in range(30)], "text": questions})
    vectors = Encoder(Path(tiny), "cpu", "float32").encode(questions, "query").vectors
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])
    pq.write_table(pa.table({"embedding": column}), root / "query-vectors.parquet")
    texts.write_parquet(root / "remove.parquet", {"id": ["d00003", "d00004", "d00099", "nobody"]})
    return root


def _settings(root: Path, output: Path, which: str = "small", **more: Any) -> index.Settings:
    return index.Settings(output=str(output), embeddings=str(root / f"{which}-vectors"), **{"shards": 3, **more})


def _vectors(root: Path, which: str) -> dict[str, npt.NDArray[np.float16]]:
    """Returns the vector of each document."""
    return {name: np.frombuffer(own, np.float16) for name, own in folders.vectors(root / f"{which}-vectors").items()}


def _found(folder: Path, vector: npt.NDArray[np.float16], num_results: int = 3) -> list[str]:
    found: list[str] = IndexStore.open(folder).searcher().search(vector[None], num_results).ids[0].tolist()
    return found


def test_what_is_not_asked_for_is_chosen_once_with_its_reasons_and_its_weight(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = index.run(_settings(root, tmp_path / "index"))
    printed = capsys.readouterr().out
    assert f"{_SMALL} documents are few enough on cpu to compare a prefix of every one" in printed
    assert "no coarse index, vectors as float16, funnel 32d keep 200 > 64d keep 100" in printed
    assert "about 142 bytes per document (coarse index 0, vector 128, id 14)" in printed
    on_disk = sum(path.stat().st_size for path in (tmp_path / "index" / "shards").rglob("*") if path.is_file())
    assert first.facts["bytes_per_document"] * _SMALL == pytest.approx(on_disk, abs=3 * 1200)  # heads of files
    before = folders.times(tmp_path / "index")
    assert index.run(_settings(root, tmp_path / "index")) == artifacts.read(tmp_path / "index")
    assert folders.times(tmp_path / "index") == before
    assert "nothing to do" in capsys.readouterr().out


def test_what_was_asked_for_once_holds_until_it_is_asked_for_otherwise(root: Path, tmp_path: Path) -> None:
    asked = index.run(_settings(root, tmp_path, coarse_index="HNSW8", dim=24, storage="int8"))
    again = index.run(_settings(root, tmp_path, "large", shards=None))
    kept = ("space", "dim", "coarse_index", "storage", "shards")
    assert [again.identity[key] for key in kept] == [asked.identity[key] for key in kept] == ["prefix", 24, "HNSW8", "int8", 3]
    assert again.facts["plan"] == asked.facts["plan"]
    with pytest.raises(ValueError, match="coarse_index: HNSW8 there, Flat now"):
        index.run(_settings(root, tmp_path, "large", coarse_index="Flat"))
    chosen = index.run(_settings(root, tmp_path, "large", replace=True))
    assert [chosen.identity[key] for key in kept] == ["prefix", 64, "none", "float16", 3]
    verify.run(verify.Settings(folder=str(tmp_path)))


def test_another_plan_builds_nothing(root: Path, tmp_path: Path) -> None:
    index.run(_settings(root, tmp_path, coarse_index="Flat", plan=("16:50", "64:20")))
    before = folders.times(tmp_path / "shards")
    index.run(_settings(root, tmp_path, dim=16, plan=("64:20",)))
    assert IndexStore.open(tmp_path).plan.describe() == "64d keep 20"
    assert folders.times(tmp_path / "shards") == before


def test_what_int8_loses_is_said_and_kept(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = index.run(_settings(root, tmp_path, storage="int8")).facts["storage_loss"]
    assert 0 < loss["mean_score_error"] < 0.01
    assert 0.9 < loss["top_10_kept"] <= 1
    assert f"keep {loss['top_10_kept']:.1%} of the exact top 10 ({_SMALL} of {_SMALL} documents asked)" in capsys.readouterr().out
    verify.run(verify.Settings(folder=str(tmp_path)))


def test_a_projection_is_learned_once_from_texts_or_from_their_vectors(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    block = np.stack(list(_vectors(root, "small").values()))[:20]
    for name, file in (("texts", "queries.parquet"), ("vectors", "query-vectors.parquet")):
        own = {"queries": str(root / file), "dim": 16, "coarse_index": "PQ8x4fs"}
        built = index.run(_settings(root, tmp_path / name, space="projection", **own))
        assert built.identity["queries"]["num_queries"] == built.receipts[0].details["num_queries"] == 30
        found.append(IndexStore.open(tmp_path / name).searcher().search(block, 5).ids.tolist())
    assert found[0] == found[1]
    folder = tmp_path / "vectors"
    trained = folders.times(folder / "trained")
    capsys.readouterr()
    index.run(_settings(root, folder, "large"))  # another night: no queries are needed
    assert folders.times(folder / "trained") == trained
    assert "is kept as it was learned from 120 documents; there are 500 now: --replace learns it anew" in capsys.readouterr().out
    shutil.rmtree(folder / "trained")
    with pytest.raises(ValueError, match=r"--space projection: needs queries to learn from\. Pass --queries"):
        index.run(_settings(root, folder, "large"))
    index.run(_settings(root, folder, "large", queries=str(root / "query-vectors.parquet")))
    verify.run(verify.Settings(folder=str(folder)))


def test_a_lost_training_is_made_anew_with_all_shards(root: Path, tmp_path: Path) -> None:
    own = {"space": "rotation", "dim": 16, "coarse_index": "SQ8"}
    index.run(_settings(root, tmp_path, **own))
    before = folders.times(tmp_path / "shards")
    (tmp_path / "trained" / "space.npz").unlink()
    index.run(_settings(root, tmp_path, **own))
    after = folders.times(tmp_path / "shards")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)
    verify.run(verify.Settings(folder=str(tmp_path)))


def test_removed_documents_are_gone_at_once_and_stay_out(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, own = tmp_path / "index", _FUNNEL
    vector = _vectors(root, "small")["d00003"]
    made = index.run(_settings(root, folder, **own))
    answers = search.Settings(index=str(folder), queries=str(root / "queries.parquet"), output=str(tmp_path / "answers"))
    search.run(answers)
    assert "d00003" in _found(folder, vector)
    before = folders.times(folder / "shards")
    removed = index.run(_settings(root, folder, remove=str(root / "remove.parquet"), **own))
    assert "1 of 4 ids to remove are of no document (nobody)" in capsys.readouterr().out
    assert folders.times(folder / "shards") == before
    assert (removed.num_rows, removed.fingerprint != made.fingerprint) == (_SMALL - 3, True)
    assert "d00003" not in _found(folder, vector)
    with pytest.raises(ValueError, match=r"was made with other inputs or settings \(index: "):
        search.run(answers)
    verify.run(verify.Settings(folder=str(folder)))
    times = folders.times(folder)
    index.run(_settings(root, folder, remove=str(root / "remove.parquet"), **own))
    index.run(_settings(root, folder, **own))
    assert folders.times(folder) == times
    # More files touch two of the three shards, which leave the documents out; the third keeps its tombstones.
    larger = index.run(_settings(root, folder, "large", **own))
    assert larger.num_rows == _LARGE - 3
    left = sorted({f"d{number:05d}" for number in range(_LARGE)} - {"d00003", "d00004", "d00099"})
    assert sorted(_found(folder, vector, _LARGE)) == left
    verify.run(verify.Settings(folder=str(folder)))
    # The list outlives a build of another kind.
    anew = index.run(_settings(root, folder, "large", coarse_index="none", replace=True))
    assert anew.num_rows == _LARGE - 3
    assert folders.indexed_ids(folder) == left


def _refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("the driver is gone")


def _recorded_shards(folder: Path) -> list[str]:
    """Returns the keys of the shards that runs which did not finish have built."""
    keys = (receipt.key for receipt in artifacts.read_journal(folder) if receipt.files)
    return [key for key in keys if not key.startswith("removed")]


def test_an_index_answers_as_it_was_until_the_next_one_is_complete(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, undisturbed = tmp_path / "index", tmp_path / "undisturbed"
    vector = _vectors(root, "small")["d00003"]
    made = index.run(_settings(root, folder, **_FUNNEL))
    shutil.copytree(folder, undisturbed)
    before = _found(folder, vector)
    larger = {"which": "large", "remove": str(root / "remove.parquet"), **_FUNNEL}

    def is_as_it_was() -> bool:
        return _found(folder, vector) == before and artifacts.read_complete(folder, "index").fingerprint == made.fingerprint

    seen = []
    with monkeypatch.context() as patch:
        progress.interrupt(patch, {1: lambda: seen.append(is_as_it_was()), 2: _refuse})
        with pytest.raises(ConnectionError):
            index.run(_settings(root, folder, **larger))
    assert seen == [True]
    assert is_as_it_was()
    artifacts.read_complete(folder, "index").amend(folder, {"noted": True})  # as tuning does
    capsys.readouterr()
    verify.run(verify.Settings(folder=str(folder)))
    assert "an update that was begun is not finished" in capsys.readouterr().out
    recorded = _recorded_shards(folder)
    times = [folders.times(folder / "shards" / key) for key in recorded]
    assert len(times) == 2

    grown = index.run(_settings(root, folder, **larger))
    assert [folders.times(folder / "shards" / key) for key in recorded] == times
    assert "; 1 of 3 shards built" in capsys.readouterr().out
    assert grown.facts["noted"] is True
    assert grown.fingerprint == index.run(_settings(root, undisturbed, **larger)).fingerprint
    assert "d00003" not in _found(folder, vector)
    verify.run(verify.Settings(folder=str(folder)))
    assert "not finished" not in capsys.readouterr().out


def test_a_removal_that_was_begun_is_not_forgotten(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "index"
    vector = _vectors(root, "small")["d00003"]
    index.run(_settings(root, folder, **_FUNNEL))
    for number, own in enumerate(("d00004", "d00003")):
        texts.write_parquet(tmp_path / f"{own}.parquet", {"id": [own]})
        made = artifacts.read_complete(folder, "index")
        with monkeypatch.context() as patch:
            patch.setattr(artifacts.Manifest, "write", _refuse)
            with pytest.raises(ConnectionError):
                index.run(_settings(root, folder, remove=str(tmp_path / f"{own}.parquet"), **_FUNNEL))
        assert "d00003" in _found(folder, vector)
        verify.run(verify.Settings(folder=str(folder)))
        assert index.run(_settings(root, folder, **_FUNNEL)).num_rows == made.num_rows - 1 == _SMALL - 1 - number
    assert "d00003" not in _found(folder, vector)
    verify.run(verify.Settings(folder=str(folder)))


def _interrupt(settings: index.Settings, num_built: int) -> None:
    """Ends a run once so many shards are built."""
    with pytest.MonkeyPatch.context() as patch:
        progress.interrupt(patch, {num_built: _refuse})
        with pytest.raises(ConnectionError):
            index.run(settings)


def test_one_more_file_costs_no_shard_that_an_unfinished_update_has_built(root: Path, tmp_path: Path) -> None:
    index.run(_settings(root, tmp_path, **_FUNNEL))
    _interrupt(_settings(root, tmp_path, "large", **_FUNNEL), 3)
    recorded = {key: folders.times(tmp_path / "shards" / key) for key in _recorded_shards(tmp_path)}
    _interrupt(_settings(root, tmp_path, "larger", **_FUNNEL), 1)
    assert len(list((tmp_path / "shards").iterdir())) == 3 + 2 + 1  # as they were, built before, built now
    index.run(_settings(root, tmp_path, "larger", **_FUNNEL))
    kept = [key for key in recorded if (tmp_path / "shards" / key).is_dir()]
    assert len(kept) == 2
    assert [folders.times(tmp_path / "shards" / key) for key in kept] == [recorded[key] for key in kept]
    assert folders.indexed_ids(tmp_path) == sorted(_vectors(root, "larger"))


def test_shards_with_tombstones_stay_beside_new_ones_and_a_longer_list(root: Path, tmp_path: Path) -> None:
    first, second = (str(texts.write_parquet(tmp_path / f"{own}.parquet", {"id": [own]})) for own in ("d00003", "d00004"))
    folder = tmp_path / "index"
    index.run(_settings(root, folder, "large", **_FUNNEL))
    made = index.run(_settings(root, folder, "large", remove=first, **_FUNNEL))
    before = folders.times(folder / "shards")
    _interrupt(_settings(root, folder, "larger", remove=second, **_FUNNEL), 1)
    assert artifacts.read_complete(folder, "index").fingerprint == made.fingerprint
    assert folders.indexed_ids(folder) == sorted(_vectors(root, "large").keys() - {"d00003"})
    index.run(_settings(root, folder, "larger", **_FUNNEL))
    after = folders.times(folder / "shards")
    assert len([name for name in after if before.get(name) == after[name]]) == 2 * 3
    assert folders.indexed_ids(folder) == sorted(_vectors(root, "larger").keys() - {"d00003", "d00004"})
    verify.run(verify.Settings(folder=str(folder)))


def test_an_update_that_is_given_up_leaves_nothing_behind(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = index.run(_settings(root, tmp_path, **_FUNNEL))
    before = folders.times(tmp_path / "shards")
    _interrupt(_settings(root, tmp_path, "large", **_FUNNEL), 2)
    assert folders.times(tmp_path / "shards").keys() > before.keys()
    assert index.run(_settings(root, tmp_path, **_FUNNEL)).fingerprint == made.fingerprint
    assert folders.times(tmp_path / "shards") == before
    capsys.readouterr()
    index.run(_settings(root, tmp_path, **_FUNNEL))
    assert "nothing to do" in capsys.readouterr().out


def test_what_a_run_that_was_killed_behind_its_manifest_left_to_do_is_done_by_the_next_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index.run(_settings(root, tmp_path, **_FUNNEL))
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.Manifest, "write", lambda own, folder, *_: _refuse(own._publish(folder, own.fingerprint)))
        with pytest.raises(ConnectionError):
            index.run(_settings(root, tmp_path, "large", **_FUNNEL))
    assert folders.indexed_ids(tmp_path) == sorted(_vectors(root, "large"))
    assert len(list((tmp_path / "shards").iterdir())) == 6
    capsys.readouterr()
    verify.run(verify.Settings(folder=str(tmp_path)))
    assert "not finished" not in capsys.readouterr().out
    index.run(_settings(root, tmp_path, "large", **_FUNNEL))
    assert len(list((tmp_path / "shards").iterdir())) == 3
    index.run(_settings(root, tmp_path, "large", **_FUNNEL))
    assert "nothing to do" in capsys.readouterr().out


def test_a_kill_does_not_bring_removed_documents_back_while_the_index_becomes_another(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = str(root / "remove.parquet")
    index.run(_settings(root, tmp_path, remove=remove, **_FUNNEL))
    other = _settings(root, tmp_path, **{**_FUNNEL, "storage": "int8", "replace": True})
    with monkeypatch.context() as patch:
        patch.setattr(index, "_build", _refuse)
        with pytest.raises(ConnectionError):
            index.run(other)
    assert index.run(other).num_rows == _SMALL - 3
    assert "d00003" not in folders.indexed_ids(tmp_path)
    verify.run(verify.Settings(folder=str(tmp_path)))


@pytest.mark.parametrize("num_steps", range(5))  # the manifest is marked; journal, shards and training go; it is replaced
def test_a_longer_list_outlives_a_kill_at_any_step_of_clearing_the_index(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    first, second = (str(texts.write_parquet(tmp_path / f"{own}.parquet", {"id": [own]})) for own in ("d00003", "d00004"))
    folder, own = tmp_path / "index", {**_FUNNEL, "coarse_index": "SQ8"}
    index.run(_settings(root, folder, remove=first, **own))
    with monkeypatch.context() as patch:  # the longer list stands in the journal alone
        patch.setattr(artifacts.Manifest, "write", _refuse)
        with pytest.raises(ConnectionError):
            index.run(_settings(root, folder, remove=second, **own))
    other, remove, removed = _settings(root, folder, **{**own, "storage": "int8", "replace": True}), storage.remove, []

    def remove_until_killed(path: Path) -> None:
        removed.append(path)
        if len(removed) > num_steps:
            _refuse()
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", remove_until_killed)
        with pytest.raises(ConnectionError):
            index.run(other)
    with pytest.raises(ValueError, match="not finished"):
        IndexStore.open(folder)
    assert index.run(other).num_rows == _SMALL - 2
    assert not {"d00003", "d00004"} & set(folders.indexed_ids(folder))
    verify.run(verify.Settings(folder=str(folder)))


def test_what_is_to_be_removed_is_known_before_anything_is_learned(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**_FUNNEL, "coarse_index": "SQ8"}
    with monkeypatch.context() as patch:
        patch.setattr(index, "_train", _refuse)
        with pytest.raises(ConnectionError):
            index.run(_settings(root, tmp_path, remove=str(root / "remove.parquet"), **own))
    assert index.run(_settings(root, tmp_path, **own)).num_rows == _SMALL - 3


def test_a_lost_list_is_named_with_the_ways_out_and_one_without_a_manifest_counts(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index.run(_settings(root, folder, remove=str(root / "remove.parquet"), **_FUNNEL))
    (folder / "manifest.json").write_text(json.dumps({**folders.manifest(folder), "format": 0}), "utf-8")
    assert index.run(_settings(root, folder, replace=True, **_FUNNEL)).num_rows == _SMALL - 3
    next((folder / "removed").glob("ids-*.arrow")).unlink()
    for more in ({}, {"replace": True}, {"remove": str(root / "remove.parquet"), "replace": True}):
        with pytest.raises(
            ValueError, match=r"arrow: missing\. Restore it, or index into another --output, with --remove and all"
        ):
            index.run(_settings(root, folder, **_FUNNEL, **more))


def test_a_journal_that_was_altered_is_named_with_the_way_out(root: Path, tmp_path: Path) -> None:
    index.run(_settings(root, tmp_path, **_FUNNEL))
    _interrupt(_settings(root, tmp_path, "large", **_FUNNEL), 2)
    segment = next((tmp_path / "journal").iterdir())
    segment.write_text("[", "utf-8")
    with pytest.raises(
        ValueError, match=rf"not JSON .*\. Remove {tmp_path}/journal: what a run had not finished is then done again"
    ):
        index.run(_settings(root, tmp_path, "large", **_FUNNEL))
    with pytest.raises(HopelessError, match="1 faults"):
        verify.run(verify.Settings(folder=str(tmp_path)))
    assert folders.indexed_ids(tmp_path) == sorted(_vectors(root, "small"))
    shutil.rmtree(tmp_path / "journal")
    index.run(_settings(root, tmp_path, "large", **_FUNNEL))
    assert folders.indexed_ids(tmp_path) == sorted(_vectors(root, "large"))


def test_what_int8_loses_is_measured_though_the_run_that_built_the_last_shard_was_killed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = index.run(_settings(root, tmp_path, storage="int8"))
    with monkeypatch.context() as patch:
        patch.setattr(index, "_loss", _refuse)
        with pytest.raises(ConnectionError):
            index.run(_settings(root, tmp_path, "large", storage="int8"))
    loss = index.run(_settings(root, tmp_path, "large", storage="int8")).facts["storage_loss"]
    assert (made.facts["storage_loss"]["num_documents"], loss["num_documents"]) == (_SMALL, _LARGE)


def test_an_index_that_is_mended_is_not_finished_meanwhile(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    made = index.run(_settings(root, folder, **_FUNNEL))
    shutil.rmtree(next((folder / "shards").iterdir()))
    _interrupt(_settings(root, folder, **_FUNNEL), 1)
    with pytest.raises(ValueError, match="not finished"):
        IndexStore.open(folder)
    assert index.run(_settings(root, folder, **_FUNNEL)).fingerprint == made.fingerprint


def test_an_export_is_loaded_by_faiss_alone_and_costs_what_changed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import faiss

    settings = export.Settings(output=str(tmp_path / "plain"), index=str(tmp_path / "index"))
    own = {"coarse_index": "Flat", "plan": ("16:50", "64:20")}
    index.run(_settings(root, tmp_path / "index", **own))
    export.run(settings)
    times = folders.times(tmp_path / "plain")
    assert len(times) == 1 + 3 * 2
    export.run(settings)
    assert folders.times(tmp_path / "plain") == times
    assert "export: nothing to do" in capsys.readouterr().out
    index.run(_settings(root, tmp_path / "index", remove=str(root / "remove.parquet"), **own))
    assert export.run(settings).num_rows == _SMALL - 3
    kept = {name for name, time in folders.times(tmp_path / "plain").items() if times.get(name) == time}
    assert len(kept) == 2 * 1  # one of three shards has none of the removed documents
    verify.run(verify.Settings(folder=str(tmp_path / "plain")))
    total = 0
    for path in (tmp_path / "plain" / "shards").glob("*/index.faiss"):
        plain = faiss.read_index(str(path))
        ids = pq.read_table(path.with_name("ids.parquet"))["id"].to_pylist()
        assert plain.ntotal == len(ids)
        total += plain.ntotal
    assert total == _SMALL - 3


@pytest.mark.parametrize("coarse", ["Flat", "IVF4,dense"])
def test_a_full_disk_is_no_fault_of_the_index_which_is_built_once_there_is_room(
    root: Path, tmp_path: Path, small_disk: Path, coarse: str
) -> None:
    subprocess.run(["mount", "-o", "remount,size=80k", small_disk], check=True)
    more = {"which": "large", "shards": 1, "coarse_index": coarse, "dim": 16}
    with pytest.raises(OSError, match="No space left on device") as caught:
        index.run(_settings(root, small_disk / "index", **more))
    assert storage.is_out_of_space(caught.value)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    index.run(_settings(root, small_disk / "index", **more))
    undisturbed = index.run(_settings(root, tmp_path / "index", **more))
    assert artifacts.read(small_disk / "index").fingerprint == undisturbed.fingerprint


_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "queries for a rotation": ({"queries": "queries.parquet", "space": "rotation"}, "--queries goes with --space projection"),
    "a space without an index": ({"coarse_index": "none", "space": "rotation"}, "--coarse-index none compares prefixes"),
    "a projection without queries": (
        {"space": "projection", "coarse_index": "Flat"},
        "needs queries to learn from. Pass --queries",
    ),
    "a rotation of more dims than documents": ({"space": "rotation", "coarse_index": "Flat", "dim": 64, "sample": 5}, "too few"),
    "a dim that is too wide": ({"dim": 65}, "--dim 65: does not fit vectors of width 64"),
    "queries of another width": ({"queries": "wide.parquet"}, "do not have 64 numbers each. Use the index's own model"),
    "queries that are not finite": ({"queries": "nan.parquet"}, "column 'embedding', row 1: not finite. Check the model"),
    "ids in another column": ({"remove": "queries.parquet", "id_column": "name"}, "no column 'name'"),
    "too little memory": ({"memory_limit": 1e-6, "coarse_index": "Flat", "dim": 16}, "Pass --shards"),
    "parameters without an index": ({"coarse_index": "none", "plan": ("16:9:nprobe=3", "64:5")}, "and there is none. Leave them"),
    "more lists than documents": ({"coarse_index": "IVF512,dense", "dim": 16}, "needs 512 documents to learn from"),
    "lists of something else": (
        {"coarse_index": "HNSW,dense", "dim": 16},
        "is no index. Write for example dense or IVF2000,dense",
    ),
    "another parameter of lists": (
        {"coarse_index": "IVF4,dense", "plan": ("16:9:efSearch=3", "64:5")},
        "an index of kind IVF4,dense has other parameters",
    ),
    "a kind that needs more documents": ({"coarse_index": "IVF512,Flat", "dim": 16}, "needs 512 documents to learn from"),
}


@pytest.mark.parametrize("case", _BAD)
def test_index_refuses(root: Path, tmp_path: Path, case: str) -> None:
    more, message = _BAD[case]
    wide = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": wide}), tmp_path / "wide.parquet")
    rows = np.ones((2, 64), np.float32)
    rows[1, 5] = np.nan
    pq.write_table(pa.table({"embedding": pa.array(rows.tolist(), pa.list_(pa.float32()))}), tmp_path / "nan.parquet")
    shutil.copy(root / "queries.parquet", tmp_path)
    paths = {name: str(tmp_path / value) for name, value in more.items() if name in ("queries", "remove")}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        index.run(index.Settings.from_values({**_settings(root, tmp_path / "out").model_dump(), **more, **paths}, "index"))
    assert not (tmp_path / "out" / "manifest.json").exists()

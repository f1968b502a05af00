import dataclasses
from pathlib import Path

import pytest
from manifests import IDENTITY, MANIFEST, finish, tree

from matryoshka import artifacts, storage
from matryoshka.artifacts import Journal


def test_a_run_that_was_killed_is_taken_up_where_it_stood(tmp_path: Path):
    artifacts.begin(tmp_path, MANIFEST, artifacts.claim(tmp_path, "embeddings", IDENTITY, replace=False))
    for key in ("a", "b"):
        journal = Journal(tmp_path)
        journal.add(finish(tmp_path, key))
        journal.flush()
    previous = artifacts.claim(tmp_path, "embeddings", IDENTITY, replace=False)
    assert list(artifacts.finished_receipts(tmp_path, previous, ["a", "b", "c"])) == ["a", "b"]
    artifacts.begin(tmp_path, MANIFEST, previous)
    assert list(artifacts.finished_receipts(tmp_path, previous, ["b", "c"])) == ["b"]


def test_receipts_of_a_finished_run_survive_a_second_run_that_is_killed(tmp_path: Path):
    receipt = finish(tmp_path, "a")
    dataclasses.replace(MANIFEST, receipts=(receipt,), is_complete=True).write(tmp_path)
    for _ in range(3):
        previous = artifacts.claim(tmp_path, "embeddings", IDENTITY, replace=False)
        artifacts.begin(tmp_path, MANIFEST, previous)
        assert artifacts.finished_receipts(tmp_path, previous, ["a"]) == {"a": receipt}
    assert not artifacts.read(tmp_path).is_complete


def test_a_part_whose_file_is_gone_or_short_is_not_finished(tmp_path: Path):
    manifest = dataclasses.replace(MANIFEST, receipts=tuple(finish(tmp_path, key) for key in "abc"))
    (tmp_path / "units" / "a").unlink()
    (tmp_path / "units" / "b").write_bytes(b"ab")
    assert list(artifacts.finished_receipts(tmp_path, manifest, "abc")) == ["c"]


def test_the_newest_receipt_of_a_part_counts(tmp_path: Path):
    journal = Journal(tmp_path)
    for content in (b"old", b"newer"):
        journal.add(finish(tmp_path, "a", content))
        journal.flush()
    (receipt,) = artifacts.finished_receipts(tmp_path, MANIFEST, ["a"]).values()
    assert receipt.files[0].num_bytes == 5


def test_a_writer_of_the_journal_that_was_killed_does_not_stop_the_next_run(tmp_path: Path):
    artifacts.begin(tmp_path, MANIFEST, None)
    journal = Journal(tmp_path)
    journal.add(finish(tmp_path, "a"))
    journal.flush()
    (tmp_path / "journal" / f"{storage.TEMPORARY}0123456789ab-00000002.json").write_text('[{"key"')
    previous = artifacts.claim(tmp_path, "embeddings", IDENTITY, replace=False)
    assert list(artifacts.finished_receipts(tmp_path, previous, ["a"])) == ["a"]
    artifacts.begin(tmp_path, MANIFEST, previous)
    assert list(artifacts.finished_receipts(tmp_path, previous, ["a"])) == ["a"]


def test_a_complete_manifest_supersedes_the_journal_and_strangers_go(tmp_path: Path):
    receipts = [finish(tmp_path, key) for key in "abc"]
    journal = Journal(tmp_path)
    for receipt in receipts:
        journal.add(receipt)
    journal.flush()
    manifest = dataclasses.replace(MANIFEST, receipts=tuple(receipts[:2]), is_complete=True)
    manifest.write(tmp_path)
    artifacts.remove_strangers(tmp_path, "units", manifest)
    assert list(tree(tmp_path)) == ["manifest.json", "units/a", "units/b"]


@pytest.mark.parametrize("spares", [False, True])
def test_a_finished_artifact_stays_one_while_a_run_spares_its_files(tmp_path: Path, spares: bool):
    dataclasses.replace(MANIFEST, receipts=(finish(tmp_path, "a"),), is_complete=True).write(tmp_path)
    finished = artifacts.read(tmp_path)
    artifacts.begin(tmp_path, MANIFEST, finished, spares=spares)
    assert artifacts.read(tmp_path) == dataclasses.replace(finished, is_complete=spares)
    begun = dataclasses.replace(finished, is_complete=False)
    artifacts.begin(tmp_path, MANIFEST, begun, spares=spares)
    assert artifacts.read(tmp_path) == begun


def test_facts_are_added_to_a_finished_artifact_and_what_a_later_run_recorded_stays(tmp_path: Path):
    finished = dataclasses.replace(MANIFEST, receipts=(finish(tmp_path, "a"),), is_complete=True)
    finished.write(tmp_path)
    journal = Journal(tmp_path)
    journal.add(finish(tmp_path, "b"))
    journal.flush()
    finished.amend(tmp_path, {"more": 1})
    found = artifacts.read(tmp_path)
    assert (found.facts["more"], found.fingerprint, found.is_complete) == (1, finished.fingerprint, True)
    assert [receipt.key for receipt in artifacts.read_journal(tmp_path)] == ["b"]


def test_a_run_that_was_killed_before_its_first_manifest_can_be_repeated(tmp_path: Path):
    (tmp_path / f"{storage.TEMPORARY}0123456789ab-manifest.json").write_text("{")
    assert artifacts.claim(tmp_path, "embeddings", IDENTITY, replace=False) is None


@pytest.mark.parametrize("num_removed", range(2))
def test_a_run_that_was_killed_while_it_cleared_the_output_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_removed: int
):
    receipts = tuple(finish(tmp_path, key) for key in "ab")
    dataclasses.replace(MANIFEST, receipts=receipts, is_complete=True).write(tmp_path)
    (tmp_path / "more").touch()
    other = dataclasses.replace(MANIFEST, identity={**IDENTITY, "model": "n"})
    remove, list_folder, removed = storage.remove, Path.iterdir, []

    def remove_until_killed(path: Path) -> None:
        removed.append(path)
        if len(removed) > num_removed:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", remove_until_killed)
        # A folder may be listed in any order; in this one the manifest comes first.
        patch.setattr(Path, "iterdir", lambda folder: iter(sorted(list_folder(folder))))
        with pytest.raises(KeyboardInterrupt):
            artifacts.begin(tmp_path, other, None)
    artifacts.begin(tmp_path, other, artifacts.claim(tmp_path, "embeddings", other.identity, replace=True))
    assert artifacts.read(tmp_path).identity["model"] == "n"


def test_the_place_where_a_run_has_begun_is_not_cleared(tmp_path: Path):
    finish(tmp_path, "old")
    (tmp_path / ".partial-work").mkdir()
    (tmp_path / ".partial-work" / "rows").touch()
    artifacts.begin(tmp_path, MANIFEST, None, tmp_path / ".partial-work")
    assert list(tree(tmp_path)) == [".partial-work/rows", "manifest.json"]

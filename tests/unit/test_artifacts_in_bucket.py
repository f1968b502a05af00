"""An artifact in a bucket is claimed, resumed and checked as one on disk, and costs one listing however many files it has."""

import dataclasses
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest

from matryoshka import artifacts, storage
from matryoshka.artifacts import FileRecord, Journal, Manifest, Receipt
from matryoshka.storage import Place

if TYPE_CHECKING:
    from faulty_proxy import Proxy

_MANIFEST = Manifest("embeddings", {"model": "m"}, {"corpus": "c"}, {"width": 3})


@pytest.fixture
def folder(any_bucket: str) -> Place:
    """An output that is not there yet."""
    return storage.place(f"{any_bucket}/out")


def make_part(folder: Place, key: str) -> Receipt:
    """Publishes a part of one file, and returns its receipt."""
    with storage.publish(folder / "units" / key) as temporary:
        temporary.write_text(f"bytes of {key}")
        return Receipt(key, 1, (FileRecord.named(f"units/{key}", temporary),))


def make(folder: Place, *keys: str) -> Manifest:
    """Writes a finished artifact."""
    manifest = dataclasses.replace(_MANIFEST, receipts=tuple(make_part(folder, key) for key in keys), is_complete=True)
    manifest.write(folder)
    return manifest


def test_an_artifact_in_a_bucket_comes_back_as_it_was_written(folder: Place) -> None:
    manifest = make(folder, "a", "b")
    assert artifacts.read_complete(folder, "embeddings") == manifest
    assert artifacts.find_faults(folder, manifest) == []
    assert FileRecord.of(folder, folder / "units" / "a") == manifest.receipts[0].files[0]
    with pytest.raises(ValueError, match=r"://.*/none: no embeddings here.*python -m jobs\.embed"):
        artifacts.read(folder.parent / "none", "embeddings")


def test_what_was_finished_is_known_from_journal_and_listing_alone(folder: Place, store: "Proxy") -> None:
    assert artifacts.claim(folder, "embeddings", _MANIFEST.identity, replace=False) is None
    artifacts.begin(folder, _MANIFEST, None)
    journal = Journal(folder)
    for key in "abcde":
        journal.add(make_part(folder, key))
    journal.flush()
    storage.remove(folder / "units" / "b")
    storage.publish_bytes(folder / "units" / "c", b"short")
    previous = artifacts.claim(folder, "embeddings", _MANIFEST.identity, replace=False)
    before = len(store.requests)
    assert artifacts.finished_receipts(folder, previous, "abcdx").keys() == {"a", "d"}
    assert not [request for request in store.requests[before:] if "/units/" in unquote(request.path)]
    storage.publish_bytes(folder / "units" / "d", b"bytes of x")
    assert artifacts.finished_receipts(folder, previous, "abcdx").keys() == {"a", "d"}
    assert artifacts.finished_receipts(folder, previous, "abcdx", compare_digests=True).keys() == {"a"}


def test_another_identity_is_refused_and_given_up_only_if_that_is_asked(folder: Place) -> None:
    make(folder, "a")
    with pytest.raises(ValueError, match=r"://.*/out: was made with other inputs.*model: m there, n now"):
        artifacts.claim(folder, "embeddings", {"model": "n"}, replace=False)
    assert artifacts.claim(folder, "embeddings", {"model": "n"}, replace=True) is None
    artifacts.begin(folder, _MANIFEST, None)
    assert storage.names(folder) == [artifacts.MANIFEST]


def test_a_folder_that_holds_something_else_is_left_alone(folder: Place) -> None:
    storage.publish_bytes(folder / "mine.txt", b"mine")
    with pytest.raises(ValueError, match=r"out: holds files that are not an artifact"):
        artifacts.claim(folder, "embeddings", {}, replace=True)
    storage.publish_bytes(folder.parent / "file", b"mine")
    with pytest.raises(ValueError, match=r"file: is a file"):
        artifacts.claim(folder.parent / "file", "embeddings", {}, replace=True)


def test_every_fault_of_a_file_is_found(folder: Place) -> None:
    manifest = make(folder, "gone", "short", "altered", "whole")
    storage.remove(folder / "units" / "gone")
    storage.publish_bytes(folder / "units" / "short", b"1")
    storage.publish_bytes(folder / "units" / "altered", b"bytes of altereD")
    outside = Receipt("outside", 1, (FileRecord("../secret", 1, "0"),))
    manifest = dataclasses.replace(manifest, receipts=(*manifest.receipts, outside))
    assert artifacts.find_faults(folder, manifest) == [
        f"{folder}/units/gone: missing",
        f"{folder}/units/short: 1 bytes, the receipt says 14",
        f"{folder}/units/altered: its bytes were altered (another SHA-256 than the receipt's)",
        f"{folder}/../secret: leads out of the artifact's folder",
    ]
    assert len(artifacts.find_faults(folder, manifest, only_sizes={"altered"})) == 3
    messages = {"gone": "missing", "altered": "its bytes were altered", "outside": "leads out of"}
    for receipt in manifest.receipts:
        for read in (artifacts.check_file, artifacts.read_file):
            if receipt.key in messages:
                with pytest.raises(ValueError, match=rf"{messages[receipt.key]}.*Run the job that made it again with --replace"):
                    read(folder, receipt.files[0])
    whole = manifest.receipts[3].files[0]
    assert artifacts.read_file(folder, whole) == artifacts.check_file(folder, whole).read_bytes() == b"bytes of whole"


def test_what_no_receipt_names_is_removed(folder: Place) -> None:
    manifest = make(folder, "a", "b")
    make_part(folder, "old")
    artifacts.remove_strangers(folder, "units", manifest)
    assert storage.names(folder) == [artifacts.MANIFEST, "units/a", "units/b"]

"""A corpus in a bucket is what it is on disk, and a worker reads no more of it than its unit."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import texts

from matryoshka import corpus, storage
from matryoshka.corpus import Columns
from matryoshka.units import plan_units

if TYPE_CHECKING:
    from faulty_proxy import Proxy

_ROWS, _GROUPS = 10, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files with as many row groups as units, of texts that do not compress."""
    draw = random.Random(0)
    for number in range(3):
        ids = [f"d{number}-{row}" for row in range(_ROWS * _GROUPS)]
        columns = {
            "id": ids,
            "text": [draw.randbytes(3_000).hex() for _ in ids],
            "other": [draw.randbytes(3_000).hex() for _ in ids],
        }
        texts.write_parquet(tmp_path / "a" / f"part-{number}.parquet", columns, row_group_size=_ROWS)
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "part-2.parquet").rename(tmp_path / "a" / "b" / "part.parquet")
    return tmp_path / "a"


@pytest.fixture
def in_bucket(folder: Path, any_bucket: str) -> str:
    """The same files in a bucket."""
    for name in storage.names(folder):
        storage.publish_bytes(storage.place(f"{any_bucket}/a") / name, (folder / name).read_bytes())
    return f"{any_bucket}/a"


def test_a_corpus_in_a_bucket_has_the_fingerprint_it_has_on_disk(folder: Path, in_bucket: str) -> None:
    here, there = (corpus.inspect(place, Columns()) for place in (str(folder), in_bucket))
    assert (here.fingerprint, here.files) == (there.fingerprint, there.files)
    assert corpus.recall(corpus.remember(there)) == there
    for pattern in ("*.parquet", "**/*.parquet", "part-?.parquet", "part-0.parquet"):
        here, there = (corpus.inspect(f"{place}/{pattern}", Columns()) for place in (folder, in_bucket))
        assert (here.fingerprint, here.files) == (there.fingerprint, there.files)


def test_a_corpus_that_did_not_change_is_not_read_again(in_bucket: str, store: "Proxy") -> None:
    known = corpus.remember(corpus.inspect(in_bucket, Columns()))
    before = len(store.requests)
    assert corpus.inspect(in_bucket, Columns(), known) == corpus.recall(known)
    assert not [request for request in store.requests[before:] if request.path.endswith(".parquet")]


def test_a_worker_reads_the_columns_and_row_groups_of_its_unit_only(in_bucket: str, store: "Proxy") -> None:
    source = corpus.inspect(in_bucket, Columns())
    unit = plan_units(source.files, _ROWS)[_GROUPS + 3]
    before = len(store.requests)
    ids, _ = source.read(unit)
    assert ids == [f"d0-{row}" for row in range(30, 40)]
    num_bytes = sum(request.num_bytes for request in store.requests[before:])
    assert num_bytes < 3 * _ROWS * 6_000  # a row group's text, and the end of the file, which says where it is


def test_a_file_that_changed_in_a_bucket_is_refused(in_bucket: str) -> None:
    source = corpus.inspect(in_bucket, Columns())
    unit = plan_units(source.files, _ROWS)[0]
    path = source.path_of(unit.name)
    assert corpus.is_unchanged(source)
    storage.publish_bytes(path, (source.path_of(source.files[1].name)).read_bytes())
    assert not corpus.is_unchanged(source)
    with pytest.raises(ValueError, match=r"://.*\.parquet: changed since this run began\. Run the same command again"):
        source.read(unit)
    storage.remove(path)
    assert not corpus.is_unchanged(source)

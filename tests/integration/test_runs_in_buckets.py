"""From and to a bucket: the vectors, ids and scores of a local run, byte for byte, whatever goes wrong on the way."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folders
import numpy as np
import progress
import pytest
import ray
import s3_server
import texts
from faulty_proxy import Fault

from jobs import embed, export, index, search, tune, verify
from matryoshka import artifacts, storage
from matryoshka.indexing import IndexStore
from matryoshka.storage import Place

if TYPE_CHECKING:
    from faulty_proxy import Proxy

    from jobs.cluster import Session

pytestmark = pytest.mark.usefixtures("local_ray")

_PLAN = ("16:20", "64:10")


@dataclass(frozen=True)
class Home:
    """Where a run's inputs and outputs lie: on disk or in a bucket."""

    root: str

    @property
    def place(self) -> Place:
        return storage.place(self.root)

    def embed(self, **more: Any) -> embed.Settings:
        own = {"corpus": f"{self.root}/corpus", "model": f"{self.root}/model", "output": f"{self.root}/embeddings"}
        return embed.Settings(**{**own, "unit_rows": 10, "precision": "float32", "workers": 1, **more})

    def index(self, **more: Any) -> index.Settings:
        own = {"embeddings": f"{self.root}/embeddings", "output": f"{self.root}/index", "remove": f"{self.root}/gone.parquet"}
        layout = {"shards": 2, "plan": _PLAN, "coarse_index": "Flat", "space": "rotation", "filter_columns": ("number",)}
        return index.Settings(**{**own, **layout, "device": "cpu", **more})

    def search(self, **more: Any) -> search.Settings:
        own = {"index": f"{self.root}/index", "queries": f"{self.root}/queries.parquet", "output": f"{self.root}/results"}
        return search.Settings(**{**own, "with_text": True, "vector_column": "vector", "workers": 1, **more})

    def run(self) -> None:
        """Embeds, indexes and searches."""
        embed.run(self.embed())
        index.run(self.index())
        search.run(self.search())

    def contents(self) -> dict[str, bytes]:
        """Returns the bytes of all files but manifests, which name places and times, and what a run leaves of itself."""
        apart = (artifacts.MANIFEST, *storage.OF_THE_RUN)
        names = [name for name in storage.names(self.place) if not name.endswith(apart)]
        return {name: (self.place / name).read_bytes() for name in names}

    def stamps(self) -> dict[str, Any]:
        """Returns what changes with each file."""
        return self.stamps_of("")

    def stamps_of(self, folder: str) -> dict[str, Any]:
        """Returns what changes with each file of a folder."""
        names = storage.names(self.place / folder)
        return dict(zip(names, storage.stamps(self.place / folder, names), strict=True))


def _write_inputs(folder: Path, model: str) -> Path:
    for number in range(3):
        made = texts.documents(40 * number, 40 * number + 40)
        columns = {**made, "number": list(range(40))}
        texts.write_parquet(folder / "corpus" / f"part-{number}.parquet", columns, row_group_size=10)
    asked = texts.documents(0, 100)
    vectors = np.random.default_rng(0).standard_normal((100, 64)).tolist()
    texts.write_parquet(folder / "queries.parquet", {"id": asked["id"], "text": asked["text"], "vector": vectors})
    texts.write_parquet(folder / "gone.parquet", {"id": ["d00003"]})
    shutil.copytree(model, folder / "model")
    return folder


def _upload(folder: Path, place: Place) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.publish_bytes(place / path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Home:
    """A finished local run."""
    home = Home(str(_write_inputs(tmp_path_factory.mktemp("local") / "run", tiny)))
    home.run()
    return home


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """The same inputs once more."""
    return _write_inputs(tmp_path_factory.mktemp("inputs"), tiny)


@pytest.fixture
def in_bucket(bucket: str, inputs: Path) -> Home:
    """The inputs in a bucket, and nothing else."""
    home = Home(f"{bucket}/run")
    _upload(inputs, home.place)
    return home


@pytest.fixture(scope="module")
def finished(s3: "Proxy", inputs: Path, on_disk: Home) -> Home:  # noqa: ARG001 - the server must be there
    """A finished run in a bucket: what the local run made."""
    home = Home(f"{s3_server.make_bucket()}/run")
    _upload(inputs, home.place)
    home.run()
    assert home.contents() == on_disk.contents()
    for name in ("embeddings", "index", "results"):
        there, here = artifacts.read(home.place / name), artifacts.read(on_disk.place / name)
        assert (there.fingerprint, there.num_rows, there.is_complete) == (here.fingerprint, here.num_rows, True)
    return home


def test_a_run_in_a_bucket_does_nothing_the_second_time(finished: Home, s3: "Proxy", capsys: pytest.CaptureFixture[str]) -> None:
    before, num_requests = finished.stamps(), len(s3.requests)
    finished.run()
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert finished.stamps() == before
    assert {request.method for request in s3.requests[num_requests:]} <= {"GET", "HEAD"}


def test_vectors_from_and_to_google_are_those_of_a_run_on_a_disk(
    gs: "Proxy", inputs: Path, on_disk: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(f"{gs.make_bucket()}/run")
    _upload(inputs, home.place)
    faults = (
        Fault("500", "POST", "units/"), Fault("lose answer", "POST", "manifest"), Fault("429", "POST", "units/"),
        Fault("drop answer", "GET", "part-.*alt=media", times=3),
    )  # fmt: skip
    with gs.failing(*faults) as left:
        embed.run(home.embed())
    assert [fault for fault in left if fault.times] == []
    assert home.contents().items() >= {own for own in on_disk.contents().items() if own[0].startswith("embeddings/")}
    there, here = (artifacts.read(own.place / "embeddings") for own in (home, on_disk))
    assert (there.fingerprint, there.num_rows, there.is_complete) == (here.fingerprint, here.num_rows, True)
    num_requests = len(gs.requests)
    embed.run(home.embed())
    assert "nothing to do" in capsys.readouterr().out
    assert {request.method for request in gs.requests[num_requests:]} == {"GET"}


def test_what_a_run_in_a_bucket_made_is_exported_tuned_and_verified(finished: Home) -> None:
    export.run(export.Settings(index=f"{finished.root}/index", output=f"{finished.root}/export"))
    tune.run(tune.Settings(index=f"{finished.root}/index", queries=f"{finished.root}/queries.parquet", floor=0.5))
    search.run(finished.search(query="bada bife", queries=None, output=None, with_text=False, vector_column=None))
    verify.run(verify.Settings(folder=finished.root))


def _end() -> None:
    raise ConnectionError("the driver is gone")


def test_a_changed_file_costs_its_own_units_and_shards(finished: Home, tmp_path: Path, s3: "Proxy") -> None:
    columns = {**texts.documents(1000, 1040), "number": list(range(40))}
    changed = texts.write_parquet(tmp_path / "changed.parquet", columns, row_group_size=10)
    storage.publish_bytes(finished.place / "corpus" / "part-2.parquet", changed.read_bytes())
    before, made = finished.stamps(), artifacts.read(finished.place / "index")
    embed.run(finished.embed())
    with pytest.MonkeyPatch.context() as patch:
        progress.interrupt(patch, {1: _end})
        with pytest.raises(ConnectionError):
            index.run(finished.index())
    assert IndexStore.open(finished.place / "index").manifest == made
    num_requests = len(s3.requests)
    index.run(finished.index())
    assert not [own for own in s3.requests[num_requests:] if own.method == "PUT" and "/shards/" in own.path]
    after = finished.stamps()
    units = [name for name in after if name.startswith("embeddings/units/")]
    assert len(units) == 12
    assert len([name for name in units if after[name] != before.get(name)]) == 4
    assert not [name for name in after if "/journal/" in name]
    shards = [{name.split("/")[2] for name in own if name.startswith("index/shards/")} for own in (before, after)]
    assert (len(shards[1]), len(shards[0] & shards[1])) == (2, 1)


def test_an_upload_that_fails_for_good_leaves_nothing_and_other_faults_change_nothing(
    in_bucket: Home, on_disk: Home, s3: "Proxy"
) -> None:
    units = storage.names(on_disk.place / "embeddings" / "units")
    faults = (
        Fault("500", "PUT", units[0], times=10_000), Fault("500", "PUT", units[1]), Fault("drop request", "PUT", units[2]),
        Fault("drop answer", "GET", "part-", times=3), Fault("503", "GET", "part-"), Fault("drop answer", "GET", "model"),
        Fault("500", "GET", "list-type", times=2), Fault("lose answer", "PUT", "manifest"), Fault("500", "HEAD"),
    )  # fmt: skip
    message = r"1 of 12 units failed .*InternalError.*run the same command again"
    with s3.failing(*faults) as left, pytest.raises(RuntimeError, match=message):
        embed.run(in_bucket.embed(attempts=1))
    assert [fault for fault in left[1:] if fault.times] == []
    there = in_bucket.stamps_of("embeddings/units")
    assert there.keys() == set(units[1:])
    faults = (
        Fault("503", "PUT", "shards/"), Fault("drop request", "PUT", "shards/"), Fault("drop answer", "GET", "units/", times=2),
        Fault("lose answer", "PUT", "manifest", times=2), Fault("500", "POST"),
        Fault("drop answer", "GET", "index/manifest"),  # its shards are on this node already, by their digests
    )  # fmt: skip
    with s3.failing(*faults) as left:
        in_bucket.run()
    assert [fault for fault in left if fault.times] == []
    assert there.items() <= in_bucket.stamps_of("embeddings/units").items()
    assert in_bucket.contents() == on_disk.contents()


def test_a_killed_run_is_taken_up_where_it_stood(in_bucket: Home, on_disk: Home, s3: "Proxy", local_ray: "Session") -> None:
    local_ray.release()  # its workers have the CPUs
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in in_bucket.embed().model_dump(exclude_defaults=True).items()]
    there = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with s3.failing(Fault("delay", "PUT", "units/", times=1_000, delay=1.0)):
        driver = subprocess.Popen([sys.executable, "-m", "jobs.embed", *flags], env=there, stdout=subprocess.DEVNULL)
        folders.wait_until(lambda: bool(artifacts.read_journal(in_bucket.place / "embeddings")))
        driver.kill()
        driver.wait()
    kept = {f"{receipt.key}.parquet" for receipt in artifacts.read_journal(in_bucket.place / "embeddings")}
    before = in_bucket.stamps_of("embeddings/units")
    assert 0 < len(kept) < 12
    embed.run(in_bucket.embed())
    after = in_bucket.stamps_of("embeddings/units")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert {name: own for name, own in in_bucket.contents().items() if name.startswith("embeddings/")} == {
        name: own for name, own in on_disk.contents().items() if name.startswith("embeddings/")
    }


def test_verify_finds_what_was_altered_in_a_bucket(finished: Home) -> None:
    for folder in ("embeddings/units", "index/shards"):
        path = finished.place / folder / storage.names(finished.place / folder)[0]
        whole = path.read_bytes()
        storage.publish_bytes(path, bytes([*whole[:-1], whole[-1] ^ 1]))
        with pytest.raises(RuntimeError, match=rf"{path}: its bytes were altered"):
            verify.run(verify.Settings(folder=finished.root))
        storage.publish_bytes(path, whole)


def test_an_index_in_a_bucket_that_lacks_a_file_is_not_searched(finished: Home) -> None:
    path = next(finished.place / name for name in storage.names(finished.place) if name.endswith("ids.arrow"))
    whole = path.read_bytes()
    storage.remove(path)
    with pytest.raises(ValueError, match=rf"{path}: missing\. Build the index anew"):
        search.run(finished.search())
    storage.publish_bytes(path, whole)


def test_a_bucket_that_cannot_be_written_to_ends_a_run_before_a_worker_is_taken(in_bucket: Home, s3: "Proxy") -> None:
    with (
        s3.failing(Fault("403", "PUT", times=10)),
        pytest.raises(ValueError, match=r"embeddings/.*access denied \(AccessDenied\)"),
    ):
        embed.run(in_bucket.embed())
    assert not (in_bucket.place / "embeddings").exists()

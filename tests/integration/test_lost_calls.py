"""What becomes of a pool's calls where calls fail or end their worker, the disk is full, or workers stay away."""

import dataclasses
import errno
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from jobs import cluster
from jobs.cluster import EncoderRole, Encoders, EncoderWorkers, Outcome, ShardActors, ShardsLostError
from matryoshka import model
from matryoshka.artifacts import FileRecord
from matryoshka.encode import Encoder
from matryoshka.funnel import ShardFiles
from matryoshka.units import Unit

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

Pool = Callable[[int], Encoders]
_PATIENCE_SECONDS = 30


class _Worker:
    """Does with a unit what the unit's name says; leaves a file for each of its starts, and a line for each try of a unit."""

    def __init__(self) -> None:
        self._num_running = 0

    def ready(self, role: EncoderRole) -> str:
        folder = Path(role.folder)
        start = folder / f"start-{os.getpid()}"
        if start.exists():
            return ""
        is_first = not list(folder.glob("start-*"))
        start.touch()
        if is_first and (folder / "dies at first").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (folder / "cannot start").exists():
            raise OSError(errno.EIO, "the model cannot be read")
        while (folder / "hangs").exists():
            time.sleep(0.1)
        return ""

    def embed(self, role: EncoderRole, _source: None, unit: Unit, _folder: str) -> str:
        self._num_running += 1
        log = Path(role.folder) / f"try-{unit.key}"
        with log.open("a") as lines:
            lines.write(f"{self._num_running}\n")
        time.sleep(0.02)
        try:
            if not unit.name.endswith(" once") or len(log.read_text().splitlines()) == 1:
                _do(unit.name.removesuffix(" once"))
        finally:
            self._num_running -= 1
        return "done"


def _do(name: str) -> None:
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "fail":
        raise RuntimeError("the cause")
    if name == "bad input":
        raise ValueError("no such column")
    if name == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "units/x.parquet")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, local_ray: cluster.Session) -> Iterator[EncoderWorkers]:
    """Workers that are the real ones but for what they do, and that need no room."""
    local_ray.release()
    monkeypatch.setattr(cluster, "_EncoderActor", _Worker)
    monkeypatch.setattr(cluster, "worker_resources", lambda _there: {"num_cpus": 0})
    workers = EncoderWorkers()
    yield workers
    workers.close()


@pytest.fixture
def pool(tmp_path: Path, workers: EncoderWorkers) -> Pool:
    """Makes pools of these workers."""
    return lambda num_workers: Encoders(workers, _role(tmp_path), num_workers)


@pytest.fixture
def _one_place(workers: EncoderWorkers, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - it has said otherwise
    """Lets each worker take all there is, and the first one wait for no other."""
    monkeypatch.setattr(cluster, "worker_resources", lambda there: {"num_cpus": there.num_cpus})
    monkeypatch.setattr(cluster, "_GATHER_SECONDS", 0.1)


def _role(folder: Path) -> EncoderRole:
    return EncoderRole("model", str(folder), "cpu", "float32", 512, "truncate", 0, is_compiled=False)


def _units(*names: str) -> list[Unit]:
    return [Unit(name, f"{number:04d}-{name}", 0, 1) for number, name in enumerate(names)]


def _embed(pool: Encoders, units: Sequence[Unit], *, attempts: int = 3) -> dict[str, str]:
    """Returns the result or the error of each unit; each must have exactly one outcome."""
    outcomes: list[Outcome[Any]] = list(pool.embed(None, units, Path(), attempts))  # type: ignore[arg-type]
    assert Counter(outcome.key for outcome in outcomes) == Counter(unit.key for unit in units)
    return {outcome.key: outcome.result or outcome.error for outcome in outcomes}


def _tries(tmp_path: Path, unit: Unit) -> list[int]:
    """Returns, for each try of a unit, how many calls its worker was at, this one included."""
    return [int(line) for line in (tmp_path / f"try-{unit.key}").read_text().splitlines()]


def test_a_call_that_fails_is_tried_again_but_bad_input_is_not(
    tmp_path: Path, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    units = _units(*["fine"] * 5, "fail once", "bad input", "fail", "fine")
    with caplog.at_level("INFO", logger="jobs"):
        outcomes = _embed(pool(1), units)
    retried = re.findall(r"event=retry call=embed part=(.+) reason='.*the cause'", caplog.text)
    assert sorted(retried) == sorted([units[5].key, *[units[7].key] * 2])
    assert [len(_tries(tmp_path, unit)) for unit in units] == [1] * 5 + [2, 1, 3, 1]
    assert "no such column" in outcomes.pop(units[6].key)
    assert "the cause" in outcomes.pop(units[7].key)
    assert set(outcomes.values()) == {"done"}


def test_a_call_that_ends_its_worker_is_tried_alone_and_costs_no_other_call_anything(tmp_path: Path, pool: Pool) -> None:
    units = _units(*["fine"] * 4, "kill", *["fine"] * 6, "kill once", *["fine"] * 4)
    outcomes = _embed(pool(2), units)
    assert "worker was lost" in outcomes.pop(units[4].key)
    assert set(outcomes.values()) == {"done"}
    assert set(_tries(tmp_path, units[4])[1:]) == {1}
    assert set(_tries(tmp_path, units[11])[1:]) == {1}


def test_with_one_attempt_a_call_that_ends_its_worker_still_fails_alone(pool: Pool) -> None:
    units = _units("fine", "kill", *["fine"] * 4)
    outcomes = _embed(pool(1), units, attempts=1)
    assert [unit.name for unit in units if outcomes[unit.key] != "done"] == ["kill"]


def test_a_full_disk_ends_everything_at_once(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        _embed(pool(1), _units("fine", "full disk", *["fine"] * 200))
    assert len(list(tmp_path.glob("try-*"))) < 20


def test_workers_that_are_lost_again_and_again_end_everything(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_LOSSES_IN_A_ROW", 1)
    with pytest.raises(RuntimeError, match="workers are lost again and again"):
        _embed(pool(1), _units(*["kill"] * 10), attempts=100)


def test_a_worker_that_is_killed_while_it_starts_starts_again(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "dies at first").touch()
    assert set(_embed(pool(1), _units("fine", "fine")).values()) == {"done"}
    assert len(list(tmp_path.glob("start-*"))) == 2


@pytest.mark.usefixtures("_one_place")
def test_a_pool_begins_with_the_workers_that_have_a_place(
    tmp_path: Path, workers: EncoderWorkers, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders = pool(2)
    assert set(_embed(encoders, _units(*["fine"] * 10)).values()) == {"done"}
    assert "1 of 2 workers are not there yet" in capsys.readouterr().out
    calls = [actor.ready.remote(_role(tmp_path)) for actor in workers._actors]
    ((first,), _) = ray.wait(calls)
    ray.kill(workers._actors[calls.index(first)])
    assert set(_embed(encoders, _units(*["fine"] * 10)).values()) == {"done"}, "the other does not join when there is room"


def test_a_pool_starts_as_many_workers_as_there_are_calls(tmp_path: Path, workers: EncoderWorkers, pool: Pool) -> None:
    encoders = pool(3)
    for num_units, num_started in ((0, 0), (1, 1), (2, 2), (1, 2), (10, 3)):
        _embed(encoders, _units(*["fine"] * num_units))
        assert len(list(tmp_path.glob("start-*"))) == num_started
    assert encoders.start(1) == encoders.start() == 3
    assert pool(1).start() == len(workers) == 1
    assert set(_embed(pool(1), _units("fine", "fine")).values()) == {"done"}
    assert len(list(tmp_path.glob("start-*"))) == 3


def test_workers_take_another_model_where_they_are(tmp_path: Path, workers: EncoderWorkers) -> None:
    roles = [_role(tmp_path), dataclasses.replace(_role(tmp_path / "other"), precision="bf16")]
    (tmp_path / "other").mkdir()
    for role in (*roles, *roles):
        assert set(_embed(Encoders(workers, role, 1), _units("fine")).values()) == {"done"}
    (first,), (second,) = (list(folder.glob("start-*")) for folder in (tmp_path, tmp_path / "other"))
    assert first.name == second.name, "another process"


@pytest.mark.parametrize("other", [{"is_compiled": True}, {"device": "cuda"}])
def test_what_a_process_does_not_give_up_ends_with_it(tmp_path: Path, workers: EncoderWorkers, other: dict[str, Any]) -> None:
    for role in (_role(tmp_path), dataclasses.replace(_role(tmp_path), **other)):
        assert Encoders(workers, role, 1).start() == 1
    assert len(list(tmp_path.glob("start-*"))) == 2


@pytest.mark.usefixtures("_one_place")
def test_another_model_is_for_workers_that_are_there(tmp_path: Path, workers: EncoderWorkers, pool: Pool) -> None:
    assert set(_embed(pool(2), _units(*["fine"] * 10)).values()) == {"done"}
    ray.kill(workers._actors[0])  # so that the other one, if it had none, has a place
    other = dataclasses.replace(_role(tmp_path / "other"), precision="bf16")
    (tmp_path / "other").mkdir()
    assert set(_embed(Encoders(workers, other, 2), _units("fine")).values()) == {"done"}


def test_a_model_is_not_exchanged_while_it_is_used(tmp_path: Path) -> None:
    actor, closed = cluster._EncoderActor(), list[str]()

    class Model:
        notice = ""

        def __init__(self, name: str) -> None:
            self.close = lambda: closed.append(name)

    class Role(EncoderRole):
        def load(self) -> Any:
            return Model(self.fingerprint)

    first, second = (Role(**{**dataclasses.asdict(_role(tmp_path)), "fingerprint": name}) for name in ("first", "second"))
    with actor._encoder(first):
        other = threading.Thread(target=actor.ready, args=(second,))
        other.start()
        with actor._encoder(first):
            assert actor.ready(first) == ""
        other.join(0.2)
        assert (other.is_alive(), closed) == (True, [])
    other.join()
    assert closed == ["first"]


def test_a_model_that_cannot_be_loaded_ends_the_workers(tmp_path: Path, workers: EncoderWorkers, pool: Pool) -> None:
    (tmp_path / "cannot start").touch()
    with pytest.raises(RuntimeError, match=r"no worker could load the model .*the model cannot be read"):
        pool(1).start()
    assert not len(workers)


def test_vectors_are_those_of_the_model_that_is_asked_for_whoever_was_asked_before(
    tiny: str, other: str, local_ray: cluster.Session
) -> None:
    local_ray.release()
    pools = [local_ray.encoders(model.describe(folder), "float32", 512, 1) for folder in (tiny, other)]
    first, second, again = (pools[number].encode(["one text", "another"], "document") for number in (0, 1, 0))
    assert first.tobytes() == again.tobytes() != second.tobytes()
    alone = Encoder(Path(other), "cpu", "float32", 512)
    assert second.tobytes() == alone.encode(["one text", "another"], "document").vectors.tobytes()


def test_encoders_stay_where_there_is_room_beside_them(tiny: str, local_ray: cluster.Session) -> None:
    assert local_ray.encoders(model.describe(tiny), "float32", 512, 1).start() == 1
    num_others = cluster.capacity().num_cpus - 1
    if num_others:
        assert list(local_ray.run_tasks(abs, [(-1,)] * num_others)) == [1] * num_others
        assert len(local_ray._workers) == 1
        assert list(local_ray.run_tasks(abs, [(-1,)] * 9, are_short=True)) == [1] * 9
        assert len(local_ray._workers) == 1
    assert list(local_ray.run_tasks(abs, [(-1,)] * (num_others + 1))) == [1] * (num_others + 1)
    assert not len(local_ray._workers)


def test_on_several_machines_no_encoder_stays_beside_tasks(
    tiny: str, local_ray: cluster.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_ray.encoders(model.describe(tiny), "float32", 512, 1).start() == 1
    there = dataclasses.replace(cluster.capacity(), num_nodes=2)
    monkeypatch.setattr(cluster, "capacity", lambda: there)
    assert list(local_ray.run_tasks(abs, [(-1,)])) == [1]
    assert not len(local_ray._workers)


def test_few_calls_are_shared_by_the_workers(tmp_path: Path, pool: Pool) -> None:
    units = _units("fine", "fine")
    _embed(pool(2), units)
    assert [_tries(tmp_path, unit) for unit in units] == [[1], [1]]


@pytest.mark.usefixtures("_one_place")
def test_workers_that_have_no_place_are_not_waited_for_where_others_are_there(pool: Pool) -> None:
    encoders = pool(2)
    assert encoders.start(1) == 1
    assert set(_embed(encoders, _units(*["fine"] * 10)).values()) == {"done"}


def test_a_worker_that_cannot_start_again_leaves_its_calls_to_the_others(tmp_path: Path, pool: Pool) -> None:
    encoders = pool(2)
    encoders.start()
    (tmp_path / "cannot start").touch()
    assert set(_embed(encoders, _units("kill once", *["fine"] * 20)).values()) == {"done"}


def test_nobody_waits_for_a_worker_that_is_away_when_nothing_is_left_to_do(tmp_path: Path, pool: Pool) -> None:
    encoders = pool(2)
    encoders.start()
    (tmp_path / "hangs").touch()  # as on a cluster that lost the machine and has no room for the worker elsewhere
    end_of_patience = threading.Timer(_PATIENCE_SECONDS, (tmp_path / "hangs").unlink)
    end_of_patience.start()
    outcomes = _embed(encoders, _units("kill once", *["fine"] * 20))
    end_of_patience.cancel()
    assert set(outcomes.values()) == {"done"}
    assert (tmp_path / "hangs").exists(), "the end waited for the worker"


def test_where_no_worker_is_left_every_other_call_has_failed(tmp_path: Path, pool: Pool) -> None:
    encoders = pool(1)
    encoders.start()
    (tmp_path / "cannot start").touch()
    outcomes = _embed(encoders, _units("kill", *["fine"] * 5))
    assert list(outcomes.values()).count("done") <= 2, "those beside the first call may have been quicker"
    assert all(outcomes.values())


def test_a_shard_actor_that_does_not_come_back_is_waited_for_once(tmp_path: Path, local_ray: cluster.Session) -> None:
    local_ray.release()
    waits: list[int] = []

    class Counted(ShardActors):
        def _is_back(self, number: int) -> bool:
            waits.append(number)
            return super()._is_back(number)

    files = [
        ShardFiles(tmp_path, f"shard-{number}", (FileRecord(f"shards/shard-{number}/vectors.npy", 0, ""),)) for number in range(5)
    ]
    actors = Counted(files, 2)
    try:
        ray.kill(actors._actors[0])  # for good
        with pytest.raises(ShardsLostError) as caught:
            actors.caller(files)("num_allowed", [()] * len(files))
    finally:
        actors.close()
    faults = caught.value.faults
    assert [name for name in sorted(faults) if "its worker was lost" in faults[name]] == ["shard-0", "shard-2", "shard-4"]
    assert faults.keys() == {own.key for own in files}  # the others are not there, which the other actor says
    assert waits == [0]

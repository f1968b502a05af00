"""Of runs that want the same output, one gets it; who is dead, or silent for too long, keeps nobody out."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matryoshka import leases, storage
from matryoshka.leases import HeldError, Holder, Lease, LostError


def _hold(folder: Path, **changes: object) -> Holder:
    """Leaves the lease of a run on another machine."""
    holder = dataclasses.replace(Holder.here("theirs", 60.0), host="elsewhere", machine="another", **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / leases.NAME).write_bytes(holder.as_bytes())
    return holder


def test_a_second_run_is_told_who_holds_the_output_and_since_when(tmp_path: Path):
    Lease.take(tmp_path, "mine")
    with pytest.raises(HeldError, match=rf"another run is writing to it \(run mine, process {os.getpid()} on .*, since 20.*Wait"):
        Lease.take(tmp_path, "yours")


def test_a_released_output_is_free(tmp_path: Path):
    Lease.take(tmp_path, "mine").release()
    assert list(tmp_path.iterdir()) == []
    Lease.take(tmp_path, "yours")


def test_a_lease_on_another_machine_counts_until_it_runs_out(tmp_path: Path):
    _hold(tmp_path)
    with pytest.raises(HeldError, match="on elsewhere"):
        Lease.take(tmp_path, "mine")
    assert leases.is_held(tmp_path)
    _hold(tmp_path, renewed=time.time() - 61)
    assert not leases.is_held(tmp_path)
    Lease.take(tmp_path, "mine")


def test_a_lease_of_a_process_that_ended_on_this_machine_is_taken_at_once(tmp_path: Path):
    code = f"from pathlib import Path; from matryoshka.leases import Lease; Lease.take(Path({str(tmp_path)!r}), 'dead')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((tmp_path / leases.NAME).read_text())["run"] == "dead"
    assert not leases.is_held(tmp_path)
    Lease.take(tmp_path, "mine")


def test_a_process_that_has_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path):
    holder = dataclasses.replace(Holder.here("dead", 60.0), born="1")
    (tmp_path / leases.NAME).write_bytes(holder.as_bytes())
    Lease.take(tmp_path, "mine")


def test_a_renewed_lease_goes_on_and_one_that_was_taken_over_is_lost(tmp_path: Path):
    lease = Lease.take(tmp_path, "mine")
    before = Holder.from_bytes((tmp_path / leases.NAME).read_bytes())
    lease.renew()
    after = Holder.from_bytes((tmp_path / leases.NAME).read_bytes())
    assert before
    assert after
    assert (before.renewed < after.renewed, before.since) == (True, after.since)
    theirs = _hold(tmp_path)
    with pytest.raises(LostError, match="another run has taken the lease"):
        lease.renew()
    lease.release()
    assert Holder.from_bytes((tmp_path / leases.NAME).read_bytes()) == theirs, "what is another's stays"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"run": 1}'])
def test_what_is_no_lease_keeps_nobody_out(tmp_path: Path, damage: bytes):
    (tmp_path / leases.NAME).write_bytes(damage)
    Lease.take(tmp_path, "mine")


def test_an_output_is_held_with_those_that_it_lies_in_and_that_lie_in_it(tmp_path: Path):
    run, stage = tmp_path / "run", tmp_path / "run" / "embeddings"
    _hold(run)
    with pytest.raises(HeldError, match=r"run: another run"):
        Lease.take(stage, "mine", [run])
    assert not (stage / leases.NAME).exists(), "who is refused leaves no lease"


def _race(folder: str, barrier: "multiprocessing.synchronize.Barrier", won: "multiprocessing.Queue[str]") -> None:
    barrier.wait()
    try:
        Lease.take(Path(folder), "racer")
        won.put("won")
    except HeldError:
        won.put("held")
    barrier.wait()  # who won is alive until all have tried


@pytest.mark.parametrize("is_expired", [False, True])
def test_of_runs_that_begin_at_once_one_gets_the_output(tmp_path: Path, is_expired: bool):
    if is_expired:
        _hold(tmp_path, renewed=time.time() - 61)
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(6), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), barrier, won)) for _ in range(6)]
    for racer in racers:
        racer.start()
    results = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(results) == ["held"] * 5 + ["won"]
    assert [path.name for path in tmp_path.iterdir()] == [leases.NAME]


def test_an_output_in_a_bucket_is_held_and_given_back_as_one_on_a_disk(any_bucket: str):
    folder = storage.place(any_bucket) / "run"
    lease = Lease.take(folder, "mine")
    with pytest.raises(HeldError, match=r"^(s3|gs)://.*/run: another run is writing to it \(run mine"):
        Lease.take(folder, "yours")
    lease.renew()
    (folder / leases.NAME).write_bytes(dataclasses.replace(Holder.here("theirs", 60.0), renewed=time.time() - 61).as_bytes())
    with pytest.raises(LostError):
        lease.renew()
    Lease.take(folder, "yours").release()
    assert not folder.exists()


def test_a_renewal_that_was_written_without_being_heard_of_costs_nothing(tmp_path: Path):
    lease = Lease.take(tmp_path, "mine")
    own = Holder.from_bytes((tmp_path / leases.NAME).read_bytes())
    assert own
    (tmp_path / leases.NAME).write_bytes(dataclasses.replace(own, renewed=own.renewed + 10).as_bytes())
    lease.renew()
    lease.release()
    assert not (tmp_path / leases.NAME).exists()

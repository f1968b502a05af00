"""What a run says of itself: whole at any moment, and true after it was killed."""

from pathlib import Path

import pytest

from matryoshka import status
from matryoshka.status import Status


def test_a_status_comes_back_as_it_was_written(tmp_path: Path):
    own = Status.begin(tmp_path, "embed", "key")
    own.progress("embed", 3, 12, 300, "documents", 50.0)
    own.write(tmp_path)
    assert Status.read(tmp_path) == own
    assert (own.done, own.total, own.items, own.rate, own.attempts) == (3, 12, 300, 50.0, 1)


def test_the_end_is_estimated_from_the_rate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status.time, "time", lambda: 1_000_000.0)
    own = Status("embed", "key")
    own.progress("embed", 3, 12, 300, "documents", 50.0)  # nine parts of a hundred documents are left
    assert own.estimated_end == "1970-01-12T13:46:58+00:00"
    own.progress("evaluate", 0, 0, 0, "", 0.0)
    assert own.estimated_end == ""


@pytest.mark.parametrize(
    ("state", "run", "attempts"), [("running", "key", 2), ("failed", "key", 2), ("done", "key", 1), ("failed", "other", 1)]
)
def test_attempts_are_counted_until_the_run_has_come_to_its_end(tmp_path: Path, state: str, run: str, attempts: int):
    Status("embed", run, state=state).write(tmp_path)
    assert Status.begin(tmp_path, "embed", "key").attempts == attempts


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"job": "embed", "unknown": 1}'])
def test_what_is_no_status_is_as_if_there_were_none(tmp_path: Path, damage: bytes):
    (tmp_path / status.NAME).write_bytes(damage)
    assert Status.read(tmp_path) is None
    assert Status.begin(tmp_path, "embed", "key").attempts == 1


def test_a_run_that_says_it_is_running_and_holds_no_lease_is_dead():
    assert Status("embed", "key").seen(is_held=False) == "dead"
    assert Status("embed", "key").seen(is_held=True) == "running"
    assert Status("embed", "key", state="done").seen(is_held=False) == "done"

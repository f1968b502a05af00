"""What a run says of itself while nobody watches: one small file in its output, which is true also after a SIGKILL."""

import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Self

from matryoshka import shapes, storage
from matryoshka.storage import Place

NAME = storage.STATUS
RUNNING, DONE, NOTHING_TO_DO, DEAD = "running", "done", "nothing to do", "dead"


@dataclass(slots=True)
class Status:
    """Where a run stands.

    Attributes:
        job: Its name.
        run: Its key.
        state: ``running``, or how it ended: ``done``, ``nothing to do``, or the name of its exit code in small letters.
        attempts: How often the run was begun, this time included, since it last came to an end that was asked for.
        started: When this attempt began (UTC, ISO 8601).
        updated: When this was written.
        stage: What it is doing.
        done: Parts of the stage that are finished (units, shards, steps).
        total: Parts of the stage.
        items: What the finished parts hold together.
        item: What that is: ``documents``, ``pairs``.
        rate: Items a second in this stage.
        estimated_end: Of the stage, at this rate.
        last_error: The last error, of a part or of the run.
        exit_code: Of the process, once it has ended.
        host: Name of the driver's machine.
        pid: Of the driver there.
    """

    job: str
    run: str
    state: str = RUNNING
    attempts: int = 1
    started: str = field(default_factory=lambda: _iso(time.time()))
    updated: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0
    items: int = 0
    item: str = ""
    rate: float = 0.0
    estimated_end: str = ""
    last_error: str = ""
    exit_code: int | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    @classmethod
    def read(cls, folder: Place) -> Self | None:
        """Returns what the last run in an output said, or None where there is nothing that can be read."""
        try:
            value = storage.read_json(folder / NAME)
            shapes.check(value, {own.name: own.type for own in fields(cls)}, NAME)
            return cls(**value)
        except (TypeError, ValueError):
            return None

    @classmethod
    def begin(cls, folder: Place, job: str, run: str) -> Self:
        """Returns the status of a run that begins; nothing is written yet."""
        before = cls.read(folder)
        is_again = before is not None and before.run == run and before.state not in (DONE, NOTHING_TO_DO)
        return cls(job, run, attempts=before.attempts + 1 if before and is_again else 1)

    def progress(self, stage: str, done: int, total: int, items: int, item: str, rate: float) -> None:
        """Notes how far a stage is; ``rate`` in items a second."""
        self.stage, self.done, self.total, self.items, self.item, self.rate = stage, done, total, items, item, round(rate, 3)
        left = (total - done) * items / done / rate if done and items and rate > 0 else None
        self.estimated_end = _iso(time.time() + left) if left is not None else ""

    def write(self, folder: Place) -> None:
        """Writes it atomically."""
        self.updated = _iso(time.time())
        storage.publish_json(folder / NAME, asdict(self))

    def seen(self, *, is_held: bool) -> str:
        """Returns the state as it must be taken: ``dead`` for a run that still says that it is running and holds no lease."""
        return DEAD if self.state == RUNNING and not is_held else self.state


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")

"""A run as others see it: it alone writes to its output, and says there how far it is, at least every ten seconds."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from jobs import interruption, terminal
from matryoshka import artifacts, leases, status, storage
from matryoshka.artifacts import Journal
from matryoshka.leases import Lease
from matryoshka.status import Status
from matryoshka.storage import Place

_BEAT_SECONDS = 10.0
_MOST_LETTERS = 2_000  # of an error in the status
_AWAY = (OSError, RuntimeError, ValueError)  # a disk, or a bucket, that cannot be written to for now

logger = logging.getLogger("jobs")


class Watch:
    """Holds the lease on an output and keeps its status, from ``begin`` to ``end``.

    Args:
        folder: The output.
        lease: On it.
        own: What the run says of itself.
        is_new: Whether the output was free: then a run that could not begin leaves nothing there.
    """

    def __init__(self, folder: Place, lease: Lease, own: Status, *, is_new: bool) -> None:
        self._folder, self._lease, self._status, self._is_new = folder, lease, own, is_new
        self._stamp_before, self._status_before = _stamp(folder), Status.read(folder)
        self._did_parts = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._stack = contextlib.ExitStack()
        self.loss: leases.LostError | None = None

    @classmethod
    def begin(cls, folder: Place, job: str, run: str) -> Self | None:
        """Returns a watch on a run that begins now; None where the output is not ours to write to, which the job will say.

        Raises:
            HeldError: Another run is writing to it.
            OSError: The output cannot be written to.
        """
        if not artifacts.may_use(folder):
            return None
        is_new = not artifacts.is_artifact(folder)
        own = Status.begin(folder, job, run)
        was_there = folder.exists()
        try:
            watch = cls(folder, Lease.take(folder, run, artifacts.find_related(folder)), own, is_new=is_new)
        except leases.HeldError:
            if not was_there:
                _remove_empty(folder)
            raise
        try:
            own.write(folder)
            watch._stack.enter_context(terminal.heard_by(watch))
            watch._thread.start()
        except BaseException:
            watch._stack.close()
            watch._vanish()
            raise
        return watch

    def end(self, state: str, exit_code: int, error: str = "", *, is_refused: bool = False) -> None:
        """Says how the run ended, and gives the output back; a run that was refused leaves nothing in a free one."""
        self._ended.set()
        self._thread.join()
        self._stack.close()
        if self.loss:  # what stands there is another run's
            return
        try:
            if is_refused and self._is_new and not artifacts.is_artifact(self._folder):
                self._vanish()
                return
            if is_refused and self._status_before and self._status_before.job != self._status.job:
                self._status_before.write(self._folder)  # it is another job's output, and is left alone
                return
            is_idle = state == status.DONE and not self._did_parts and _stamp(self._folder) == self._stamp_before
            self._status.state = status.NOTHING_TO_DO if is_idle else state
            self._status.exit_code, self._status.last_error = exit_code, _shown(error)
            self._status.write(self._folder)
        except _AWAY as fault:
            logger.warning("%s: the status could not be written: %s", self._folder, fault)
        finally:
            self._lease.release()

    def stage_began(self, stage: str) -> None:
        """Notes what the run is doing."""
        with self._lock:
            self._status.progress(stage, 0, 0, 0, "", 0.0)

    def parts_done(self, stage: str, done: int, total: int, items: int, item: str, rate: float) -> None:
        """Notes how far it is."""
        with self._lock:
            self._did_parts = True
            self._status.progress(stage, done, total, items, item, rate)

    def failed(self, error: str) -> None:
        """Notes what went wrong with a part."""
        with self._lock:
            self._status.last_error = _shown(error)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                self._lease.renew()
                with self._lock:
                    self._status.write(self._folder)
            except leases.LostError as error:
                self.loss = error
                interruption.leave()
                return
            except _AWAY as error:  # a full disk, storage that is away: the run itself will say so if it lasts
                logger.warning("%s: the status could not be written: %s", self._folder, error)

    def _vanish(self) -> None:
        storage.remove(self._folder / status.NAME)
        self._lease.release()
        _remove_empty(self._folder)


@contextlib.contextmanager
def journal_of(output: Place) -> Iterator[Journal]:
    """Yields a journal of what is finished in an output, which is written to the end however the block ends.

    Nothing more is written once the output is another run's; of two errors, the first is the one that is told.
    """
    journal = Journal(output)
    try:
        yield journal
    except BaseException:
        with contextlib.suppress(*_AWAY):
            if not interruption.is_lost():
                journal.flush()
        raise
    journal.flush()


def _remove_empty(folder: Place) -> None:
    if isinstance(folder, Path):  # in a bucket, there are no folders
        with contextlib.suppress(OSError):  # it holds something by now
            folder.rmdir()


def _shown(error: str) -> str:
    """Returns an error as it can be written down."""
    return error[:_MOST_LETTERS].encode("utf-8", "replace").decode()


def _stamp(folder: Place) -> tuple[int, float] | None:
    """Returns size and time of the manifest, by which it is seen whether a run changed it."""
    path = folder / artifacts.MANIFEST
    found = path.stat() if path.is_file() else None
    return (found.st_size, found.st_mtime) if found else None

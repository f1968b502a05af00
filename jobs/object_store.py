"""How much Ray's object stores hold while a run lasts: plans, receipts, queries and samples pass through them, no corpus."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import ray

logger = logging.getLogger("jobs")

_RESOURCE = "object_store_memory"
_SAMPLE_SECONDS = 2.0


@dataclass(slots=True)
class Use:
    """What the stores of all nodes held at most when they were looked at (copies not counted), and their room, in bytes."""

    peak_bytes: int = 0
    limit_bytes: int = 0

    def sample(self) -> None:
        """Looks at what is held now, by whatever runs on the cluster."""
        with contextlib.suppress(Exception):  # the cluster is going away: whoever needs it says so
            free, there = (found.get(_RESOURCE, 0.0) for found in (ray.available_resources(), ray.cluster_resources()))  # type: ignore[no-untyped-call]
            self.limit_bytes = int(there)
            self.peak_bytes = max(self.peak_bytes, int(there - free))


@contextlib.contextmanager
def measured(seconds: float = _SAMPLE_SECONDS) -> Iterator[Use]:
    """Yields the use of the object store while the block runs, which is looked at every few seconds and logged in the end."""
    use, ended = Use(), threading.Event()

    def look() -> None:
        while not ended.wait(seconds):
            use.sample()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield use
        use.sample()
    finally:
        ended.set()
        thread.join(_SAMPLE_SECONDS)  # where the head is gone, a look may never end
        if use.limit_bytes:
            logger.info("event=object-store peak_bytes=%d limit_bytes=%d", use.peak_bytes, use.limit_bytes)

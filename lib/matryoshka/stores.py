"""What the clients of all object stores share: how often they try, how long they wait, and the sentences for what goes wrong.

Nothing that a server says is repeated but its error code: answers, like addresses, may hold keys.
"""

import asyncio
import errno
import os
import random
import uuid
from collections.abc import Awaitable, Callable

REQUEST_ATTEMPTS, BODY_ATTEMPTS = 8, 6
CONNECT_SECONDS, READ_SECONDS = 10, 60
PART_BYTES = 16 << 20
"""A larger file goes up in parts of so many bytes."""

_CONFLICT_ATTEMPTS = 5
_LONGEST_PAUSE = 20.0  # seconds


class ConflictError(Exception):
    """A condition on a request does not hold: the object is there already, or is no longer what it was."""


async def pause(attempt: int) -> None:
    """Waits for a random time, which may be longer after each attempt."""
    await asyncio.sleep(random.uniform(0, min(0.1 * 2**attempt, _LONGEST_PAUSE)))  # noqa: S311 - jitter


async def put_once(put: Callable[[str], Awaitable[object]], writer_of: Callable[[], Awaitable[str | None]]) -> bool:
    """Writes an object on a condition, and returns whether it was this writer that did.

    Args:
        put: Writes it under a writer's name, or raises ``ConflictError``.
        writer_of: Returns the name of who wrote what is there, or None for nothing.
    """
    writer = uuid.uuid4().hex
    for attempt in range(_CONFLICT_ATTEMPTS):
        try:
            await put(writer)
        except ConflictError:
            # Where the answer to an attempt was lost, the next one meets what that one wrote.
            there = await writer_of()
            if there is not None:
                return there == writer
            await pause(attempt)
        else:
            return True
    return False


def not_found(where: str) -> FileNotFoundError:
    """Returns the error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)


def no_credentials(where: str, reason: str, advice: str) -> ValueError:
    """Returns the error for a place that nothing gives a right to."""
    return ValueError(f"{where}: no credentials for this bucket ({reason}). {advice}")


def _and(variable: str) -> str:
    return f" and {variable}" if variable else ""


def no_bucket(where: str, endpoint: str) -> ValueError:
    """Returns the error for a place in a bucket that is not there; ``endpoint`` is the variable that may name another server."""
    name = where.partition("://")[2].partition("/")[0]
    return ValueError(f"{where}: there is no bucket '{name}'. Check its name{_and(endpoint)}, or create it.")


def denied(where: str, code: str) -> ValueError:
    """Returns the error for a right that is missing."""
    return ValueError(
        f"{where}: access denied ({code}). Check the credentials, and their rights to list, get, put and delete objects."
    )


def expired(where: str, code: str) -> RuntimeError:
    """Returns the error for credentials that were valid once."""
    return RuntimeError(f"{where}: the credentials are no longer valid ({code}). Renew them and run the same command again.")


def unanswered(where: str, reason: str, endpoint: str) -> RuntimeError:
    """Returns the error for a server that was asked often enough; ``endpoint`` is the variable that may name another."""
    return RuntimeError(
        f"{where}: the object store does not answer as it should, asked up to {REQUEST_ATTEMPTS} times ({reason}). Check the"
        f" network{_and(endpoint)}, then run the same command again."
    )


def broken(where: str) -> RuntimeError:
    """Returns the error for an answer that broke off each time."""
    return RuntimeError(
        f"{where}: the connection broke {BODY_ATTEMPTS} times while it was read. Check the network, then run the same"
        " command again."
    )

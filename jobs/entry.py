"""How every job begins and ends: settings, logging, errors, exit codes."""

import logging
import os
import sys
import time
from collections.abc import Callable
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from jobs.terminal import complain, say
from matryoshka import storage
from matryoshka.config import Field, FolderPath, JobSettings

S = TypeVar("S", bound=JobSettings)

logger = logging.getLogger("jobs")

_RAY_COPIES = "working_dir_files"


class ExitCode(IntEnum):
    """How a job ends."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    NO_GAIN = 3
    INTERRUPTED = 130


class NoGainError(Exception):
    """Everything was done, and the gain that was required is not shown: nothing is wrong, and the scheduler may branch."""


class StageSettings(JobSettings):
    """What every stage that writes an artifact has in common."""

    output: FolderPath = Field(description="Folder for the result; the same command again continues or does nothing.")
    replace: bool = Field(False, description="Discard what the output holds if it came from other inputs or settings.")


def main(name: str, settings_class: type[S], run: Callable[[S], Any]) -> None:
    """Runs a job from the command line and exits with its code."""
    sys.exit(_run(name, settings_class, run))


def _run(name: str, settings_class: type[S], run: Callable[[S], Any]) -> int:
    _set_up_logging()
    start = time.perf_counter()
    try:
        settings = settings_class.from_command_line(sys.argv[1:], f"python -m jobs.{name}")
        _refuse_lost_output(settings)
        run(settings)
    except ValueError as error:
        logger.debug("bad input", exc_info=True)
        complain(f"error: {error}")
        return ExitCode.BAD_INPUT
    except NoGainError as error:
        say(f"{name}: the gain that is required was not shown: {error}")
        return ExitCode.NO_GAIN
    except (RuntimeError, OSError) as error:
        logger.debug("failure", exc_info=True)
        advice = ". Make room, then run the same command again." if storage.is_out_of_space(error) else ""
        complain(f"error: {error}{advice}")
        return ExitCode.FAILED
    except KeyboardInterrupt:
        complain("interrupted: what is finished is kept. Run the same command again to go on.")
        return ExitCode.INTERRUPTED
    say(f"{name} took {time.perf_counter() - start:.1f} s")
    return ExitCode.DONE


def _refuse_lost_output(settings: JobSettings) -> None:
    """Refuses an output in the copy of a working directory that Ray makes for a submitted job, on the head alone.

    Raises:
        ValueError: It would be there.
    """
    output = getattr(settings, "output", None)
    if output and "://" not in output and _RAY_COPIES in Path(output).resolve().parts:
        raise ValueError(
            f"output: {output} would lie in the copy that Ray made for this submission."
            " Pass an absolute path on storage that every node mounts."
        )


def _set_up_logging() -> None:
    """Sets logging up once; LOG_LEVEL=DEBUG shows where an error came from."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logger.setLevel("DEBUG" if os.environ.get("LOG_LEVEL", "").upper() == "DEBUG" else "INFO")


def describe_run(job: str, settings: JobSettings) -> dict[str, Any]:
    """Returns the run record: job, settings, versions of what decides the outcome."""
    packages = ("torch", "transformers", "sentence-transformers", "ray", "pyarrow", "faiss-cpu", "faiss-gpu-cuvs")
    versions = {name: version for name in packages if (version := _version(name))}
    return {"job": job, "settings": settings.model_dump(mode="json"), "versions": versions, "python": sys.version.split()[0]}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

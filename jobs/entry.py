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

from jobs import interruption
from jobs.terminal import complain, say
from jobs.watch import Watch
from matryoshka import leases, storage
from matryoshka.config import Field, FolderPath, JobSettings, without_secrets

S = TypeVar("S", bound=JobSettings)

logger = logging.getLogger("jobs")

_RAY_COPIES = "working_dir_files"


class ExitCode(IntEnum):
    """How a job ends; the README's table says what a scheduler should do."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    NO_GAIN = 3
    HELD = 4
    HOPELESS = 5
    INTERRUPTED = 130
    TERMINATED = interruption.TERMINATED

    @property
    def state(self) -> str:
        """The word for it in the status."""
        return self.name.lower().replace("_", " ")


class NoGainError(Exception):
    """Everything was done, and the gain that was required is not shown: nothing is wrong, and the scheduler may branch."""


class HopelessError(RuntimeError):
    """The same command would fail again: what the error names must be mended first. What is finished is kept."""


RUN_ID = Field(None, pattern=r"^\S+$", description="Name of the run in logs and status.json; none: a key made from the settings.")
"""The option of every job that writes to a folder."""


class StageSettings(JobSettings):
    """What every stage that writes an artifact has in common."""

    output: FolderPath = Field(description="Folder for the result; the same command again continues or does nothing.")
    replace: bool = Field(False, description="Discard what the output holds if it came from other inputs or settings.")
    run_id: str | None = RUN_ID


def main(name: str, settings_class: type[S], run: Callable[[S], Any], writes: str | None = "output") -> None:
    """Runs a job from the command line and exits with its code.

    Args:
        name: Of the job.
        settings_class: Of its settings.
        run: What it does; if it returns an exit code, the process ends with that.
        writes: The setting that names the folder it writes to, which it then holds alone; None where it writes to none.
    """
    sys.exit(_run(name, settings_class, run, writes))


def _run(name: str, settings_class: type[S], run: Callable[[S], Any], writes: str | None) -> int:
    handler = _set_up_logging()
    start = time.perf_counter()
    with interruption.heeded():
        try:
            settings = settings_class.from_command_line(sys.argv[1:], f"python -m jobs.{name}")
            folder = getattr(settings, writes) if writes else None
            _refuse_lost_output(folder)
            key = run_key(name, settings)
            handler.setFormatter(logging.Formatter(_LINE.replace("%(message)s", f"run={key.replace('%', '%%')} %(message)s")))
            watch = Watch.begin(storage.place(folder), name, key) if folder else None
        except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
            return _explain(name, error)[0]
        if watch:
            logger.info("event=begin job=%s", name)
        try:
            outcome = run(settings)
            interruption.deafen()
            code, words = outcome if isinstance(outcome, ExitCode) else ExitCode.DONE, ""
        except BaseException as fault:
            interruption.deafen()
            code, words = _explain(name, (watch and watch.loss) or fault)
        if watch:
            watch.end(code.state, code, words, is_refused=code == ExitCode.BAD_INPUT)
            if watch.loss and code != ExitCode.HELD:
                code, _ = _explain(name, watch.loss)
            word, seconds = code.state.replace(" ", "-"), time.perf_counter() - start
            logger.info("event=end job=%s state=%s exit_code=%d seconds=%.1f", name, word, code, seconds)
    if code == ExitCode.DONE and not isinstance(outcome, ExitCode):
        say(f"{name} took {time.perf_counter() - start:.1f} s")
    return code


def _explain(name: str, error: BaseException) -> tuple[ExitCode, str]:
    """Says what went wrong, for a person; returns the exit code, and the error in words.

    Raises:
        BaseException: It was the error of no job.
    """
    code = next((code for kinds, code in _CODES if isinstance(error, kinds)), None)
    if code == ExitCode.INTERRUPTED and interruption.is_told():
        code = ExitCode.TERMINATED
    if code is None:
        if not isinstance(error, Exception):
            raise error
        logger.error("a defect of this program, or of a library", exc_info=error)
        code = ExitCode.HOPELESS
    logger.debug("failure", exc_info=error)
    text = _WORDS.get(code) or without_secrets(f"{error}") or type(error).__name__
    if code == ExitCode.NO_GAIN:
        say(f"{name}: the gain that is required was not shown: {text}")
    elif code in _WORDS:
        complain(text)
    else:
        advice = ". Make room, then run the same command again." if storage.is_out_of_space(error) else ""
        complain(f"error: {text}{advice}")
    return code, text


_CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], ExitCode], ...] = (
    (storage.ChangedError, ExitCode.FAILED),
    (ValueError, ExitCode.BAD_INPUT),
    (NoGainError, ExitCode.NO_GAIN),
    ((leases.HeldError, leases.LostError), ExitCode.HELD),
    (HopelessError, ExitCode.HOPELESS),
    ((RuntimeError, OSError), ExitCode.FAILED),
    (interruption.TerminatedError, ExitCode.TERMINATED),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)
_WORDS = dict.fromkeys(
    (ExitCode.TERMINATED, ExitCode.INTERRUPTED),
    "interrupted: what is finished is kept. Run the same command again to go on.",
)
_LINE = "%(asctime)s %(levelname)s %(message)s"


def run_key(name: str, settings: JobSettings) -> str:
    """Returns what names a run in logs and status: the same for the same job with the same settings, or what was asked for."""
    own = settings.model_dump(mode="json", exclude=_NOT_OF_THE_RUN)
    return getattr(settings, "run_id", None) or storage.digest_json([name, own])[:12]


_NOT_OF_THE_RUN = {"replace", "run_id"}


def _refuse_lost_output(folder: str | None) -> None:
    """Refuses an output in the copy of a working directory that Ray makes for a submitted job, on the head alone.

    Raises:
        ValueError: It would be there.
    """
    if folder and "://" not in folder and _RAY_COPIES in Path(folder).resolve().parts:
        raise ValueError(
            f"output: {folder} would lie in the copy that Ray made for this submission."
            " Pass an absolute path on storage that every node mounts."
        )


def _set_up_logging() -> logging.Handler:
    """Sets logging up once, and returns where it goes; LOG_LEVEL=DEBUG shows where an error came from."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_LINE))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger.setLevel("DEBUG" if os.environ.get("LOG_LEVEL", "").upper() == "DEBUG" else "INFO")
    return handler


def describe_run(job: str, settings: JobSettings) -> dict[str, Any]:
    """Returns the run record: job, settings, versions of what decides the outcome."""
    packages = ("torch", "transformers", "sentence-transformers", "ray", "pyarrow", "faiss-cpu", "faiss-gpu-cuvs")
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "job": job,
        "settings": settings.model_dump(mode="json", exclude={"run_id"}),
        "versions": versions,
        "python": sys.version.split()[0],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

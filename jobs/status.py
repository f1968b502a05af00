"""Says how a run stands, or how it ended, from the status in its output."""

from typing import Annotated

from jobs.entry import ExitCode, main
from jobs.terminal import say
from matryoshka import leases, status, storage
from matryoshka.config import Field, JobSettings, Positional
from matryoshka.status import Status


class Settings(JobSettings):
    """Says how the last run in an output stands, and ends with that run's exit code; 4 while it is running, 1 if it is dead.

    A dead run is one that was killed: the same command again goes on from what it finished.
    """

    folder: Annotated[str, Positional("FOLDER")] = Field(description="Output of any job, or of a whole pipeline.")


def run(settings: Settings) -> ExitCode:
    """Prints what the status says, and returns what a scheduler should make of it."""
    folder = storage.place(settings.folder)
    found = Status.read(folder)
    if found is None:
        raise ValueError(f"{settings.folder}: no {status.NAME} here. Pass the output of a job that was run.")
    state = found.seen(is_held=leases.is_held(folder))
    if state == status.DEAD:  # or it has ended between the two looks
        found = Status.read(folder) or found
        state = found.seen(is_held=leases.is_held(folder))
    tried = f", attempt {found.attempts}" if found.attempts > 1 else ""
    say(f"{found.job}, run {found.run}{tried}: {state} (process {found.pid} on {found.host}; began {found.started})")
    if found.stage:
        parts = f", {found.done} of {found.total} parts, {found.items:,} {found.item}" if found.total else ""
        rate = f", {found.rate:,.1f} {found.item}/s" if found.rate else ""
        end = f", ends about {found.estimated_end}" if found.estimated_end and state == status.RUNNING else ""
        say(f"stage {found.stage}{parts}{rate}{end}; last heard of {found.updated}")
    if found.last_error:
        say(f"last error: {found.last_error}")
    return {status.RUNNING: ExitCode.HELD, status.DEAD: ExitCode.FAILED}.get(state, ExitCode(found.exit_code or 0))


if __name__ == "__main__":
    main("status", Settings, run, writes=None)

"""Makes the page of a report that an evaluation or a pipeline wrote, for people to open in a browser."""

from jobs.entry import main
from jobs.terminal import say
from matryoshka import page, storage
from matryoshka.config import Field, FolderPath, InputPath, JobSettings


class Settings(JobSettings):
    """Makes the page of a report anew: one HTML file with everything in it, which asks no server for anything.

    The evaluate and pipeline jobs make it themselves; this makes it from the report.json of any such folder.
    """

    run: FolderPath = Field(description="Folder that the evaluate or the pipeline job wrote.")
    output: InputPath | None = Field(None, description="The file to write; none: report.html in that folder.")


def run(settings: Settings) -> None:
    """Writes the page."""
    output = storage.place(settings.output) if settings.output else None
    path = page.write(storage.place(settings.run), output)
    say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main("report", Settings, run, writes=None)

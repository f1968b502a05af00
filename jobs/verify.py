"""Checks every artifact in a folder against its manifest: files, digests, counts, ids, vectors."""

from typing import Annotated

from jobs.entry import HopelessError, main
from jobs.terminal import say
from matryoshka import indexing, storage, verification
from matryoshka.config import Field, JobSettings, Positional


class Settings(JobSettings):
    """Checks every artifact in a folder, and below it, against its manifest; ends with code 5 if anything is wrong.

    Sizes and SHA-256 of all files, counts, ids (each once), vectors (finite, unit length), documents in each index.
    """

    folder: Annotated[str, Positional("FOLDER")] = Field(description="Output of any job, or of a whole pipeline.")


def run(settings: Settings) -> None:
    """Prints a line per artifact."""
    faults = []
    for folder in verification.find_artifacts(storage.place(settings.folder)):
        manifest, found = verification.verify(folder)
        verdict = "FAULT" if found else "ok"
        is_begun = not found and manifest.kind == "index" and indexing.has_update(folder, manifest)
        also = "; an update that was begun is not finished" if is_begun else ""
        say(f"{verdict:5}  {manifest.kind:11} {folder}  ({manifest.num_rows} rows, {len(manifest.receipts)} parts){also}")
        faults += found
    if faults:
        shown = "\n  ".join(faults[:20])
        raise HopelessError(f"verify: {len(faults)} faults:\n  {shown}\nRun the job that made it again with --replace.")


if __name__ == "__main__":
    main("verify", Settings, run, writes=None)

"""Writes the option tables of the README from the jobs' own declarations: ``python -m jobs.reference README.md``."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Annotated

from jobs.entry import main
from jobs.terminal import say
from matryoshka.config import Field, JobSettings, Positional, options

JOBS = (
    *("pipeline", "prepare", "mine", "finetune", "explain", "embed", "index", "tune"),
    *("export", "search", "evaluate", "report", "verify", "status", "benchmark", "plan"),
)

_BEGIN, _END = "<!-- options -->", "<!-- end of options -->"


class Settings(JobSettings):
    """Writes the option tables of the README from the jobs' own declarations."""

    readme: Annotated[str, Positional("FILE")] = Field("README.md", description="The file whose tables are brought up to date.")


def with_tables(text: str) -> str:
    """Returns a README whose option tables say what the jobs say.

    Raises:
        ValueError: The text has no place for them.
    """
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"README: no '{_BEGIN}' and '{_END}' lines. Put both where the tables belong.")
    tables = "\n\n".join(_section(job, importlib.import_module(f"jobs.{job}").Settings) for job in JOBS)
    return re.sub(f"{_BEGIN}.*{_END}", lambda _: f"{_BEGIN}\n\n{tables}\n\n{_END}", text, flags=re.DOTALL)


def _section(job: str, settings: type[JobSettings]) -> str:
    summary = inspect.cleandoc(settings.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    rows = [
        f"| `{' '.join(filter(None, (option.flag, _cell(option.metavar))))}` | {option.default} | {option.description} |"
        for option in options(settings)
    ]
    return "\n".join(
        [f"**`python -m jobs.{job}`**: {summary}", "", "| option | default | what it does |", "| --- | --- | --- |", *rows]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def run(settings: Settings) -> None:
    """Brings the file up to date."""
    path = Path(settings.readme)
    path.write_text(with_tables(path.read_text("utf-8")), "utf-8")
    say(f"reference: option tables of {len(JOBS)} jobs in {path}")


if __name__ == "__main__":
    main("reference", Settings, run, writes=None)

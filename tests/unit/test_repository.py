"""What the repository says of itself is true."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from jobs import pipeline, reference

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_options_that_the_jobs_declare():
    text = (ROOT / "README.md").read_text("utf-8")
    assert reference.with_tables(text) == text, "run python -m jobs.reference"


def test_the_readme_has_no_placeholder_left():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert [line for line in lines if re.fullmatch(r"[A-Z_]+", line.strip())] == []


def test_every_module_stands_in_the_module_map():
    module_map = (ROOT / "README.md").read_text("utf-8").partition("## Module map")[2].partition("## Glossary")[0]
    rooms = set(re.findall(r"`([a-z0-9_]+)`", module_map))
    assert rooms >= {path.stem for path in (ROOT / "lib" / "matryoshka").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_every_direct_dependency_is_pinned(hardware):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras[hardware] + extras["demo"] + extras["dev"] + extras["bench"]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in wanted}
    lines = (ROOT / ".constraints" / f"{hardware}.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert names <= pinned


def test_the_demo_is_a_pipeline_whose_every_option_is_known():
    settings = pipeline.Settings.from_command_line(["--config", str(ROOT / "jobs" / "demo.yaml")], "demo")
    names = [name for name, _, _ in pipeline.plan(settings, has_gpu=False)]
    assert names == ["prepare", "evaluate", "finetune", "explain", "embed", "index", "search", "evaluate"]


@pytest.mark.parametrize("job", reference.JOBS)
def test_every_option_says_what_it_does(job):
    settings = importlib.import_module(f"jobs.{job}").Settings
    assert settings.__doc__
    assert all(field.description and field.description.endswith(".") for field in settings.model_fields.values())

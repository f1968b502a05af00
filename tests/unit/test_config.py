import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from matryoshka.config import Field, FolderPath, JobSettings, Option, Positional, command_line, options


class Settings(JobSettings):
    """Does a job."""

    output: FolderPath = Field(description="Folder for the result.")
    dims: tuple[int, ...] = Field((), description="Resolutions.")
    unit_rows: int = Field(20, ge=1, description="Most rows in a unit.")
    learning_rate: float | None = Field(None, gt=0, description="Rate, at most 100%.")
    precision: Literal["auto", "bf16"] = Field("auto", description="Arithmetic.")
    replace: bool = Field(False, description="Discard.")
    section: dict[str, Any] = Field({}, description="Options of another job.")
    seed: int = Field(0, description="Seed.")


class Asked(JobSettings):
    """Looks at a folder."""

    folder: Annotated[str, Positional("FOLDER")] = Field(description="Output of any job.")


def from_flags(*arguments: str) -> Settings:
    return Settings.from_command_line(["--output", "out", *arguments], "job")


def from_yaml(folder: Path, text: str, *arguments: str) -> Settings:
    (folder / "job.yaml").write_text(text, "utf-8")
    return Settings.from_command_line(["--config", str(folder / "job.yaml"), *arguments], "job")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"output": "a folder's name", "precision": "bf16"},
        {"dims": (384, 64), "unit_rows": 7, "learning_rate": 1e-4, "replace": True},
        {"section": {"model": "a, b: 'c'", "deep": {"x": [1, 2.5, None, True]}}, "seed": -3},
    ],
)
def test_the_command_of_settings_gives_these_settings(given: dict[str, Any]):
    settings = Settings.from_values({"output": "out", **given}, "job")
    program, *arguments = shlex.split(command_line("job", settings))
    assert (program, Settings.from_command_line(arguments, "job")) == ("job", settings)


def test_the_command_of_settings_says_only_what_differs_from_the_defaults():
    class Own(Settings):
        rate: float | None = Field(0.5, description="Rate.")
        has_log: bool = Field(True, description="Log.")

    assert command_line("job", Settings(output="out")) == "job --output out"
    assert command_line("job", Asked(folder="a b")) == "job 'a b'"
    own = Own(output="out", rate=None, has_log=False)
    assert command_line("job", own) == "job --output out --no-has-log  # and in a --config file: rate: null"


def test_flags_and_yaml_give_the_same_settings(tmp_path: Path):
    flags = from_flags(
        "--dims", "384, 64", "--unit-rows=7", "--learning-rate", "1e-4", "--precision", "bf16", "--replace",
        "--section", "{max_steps: 3}",
    )  # fmt: skip
    text = "output: out\ndims: [384, 64]\nunit_rows: 7\nlearning_rate: 1.0e-4\nprecision: bf16\nreplace: true\n"
    text += "section: {max_steps: 3}\n"
    assert from_yaml(tmp_path, text) == flags
    assert flags.dims == (384, 64)
    assert flags.section == {"max_steps": 3}


def test_flags_win_over_yaml_and_mappings_are_merged(tmp_path: Path):
    text = "output: there\nunit_rows: 7\nreplace: true\nsection: {a: 1, deep: {x: 1, y: 2}}\n"
    settings = from_yaml(tmp_path, text, "--output", "here", "--no-replace", "--section", "{b: 2, deep: {y: 3}}")
    assert (settings.output, settings.unit_rows, settings.replace) == ("here", 7, False)
    assert settings.section == {"a": 1, "b": 2, "deep": {"x": 1, "y": 3}}


def test_what_is_not_given_has_its_default_and_settings_do_not_change():
    settings = from_flags()
    assert settings == Settings(output="out")
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 1


def test_options_say_what_their_user_sees():
    found = {option.name: option for option in options(Settings)}
    assert found["output"] == Option("output", "--output", "FOLDER", "required", "Folder for the result.", str)
    shown = {name: (option.flag, option.metavar, option.default) for name, option in found.items()}
    assert shown["dims"] == ("--dims", "N,...", "none")
    assert shown["unit_rows"] == ("--unit-rows", "N", "20")
    assert shown["learning_rate"] == ("--learning-rate", "X", "none")
    assert shown["precision"] == ("--precision", "auto|bf16", "auto")
    assert shown["replace"] == ("--replace", "", "off")
    assert shown["section"] == ("--section", "MAPPING", "none")
    assert shown["seed"] == ("--seed", "N", "0")
    assert [option.flag for option in options(Asked)] == ["folder"]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        from_flags("--help")
    shown = capsys.readouterr().out
    assert all(option.flag in shown for option in options(Settings))
    assert "at most 100%" in shown

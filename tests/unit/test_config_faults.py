from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from matryoshka.config import Field, FolderPath, JobSettings, Positional, check_settings, read_yaml


class Settings(JobSettings):
    """Does a job."""

    output: FolderPath = Field(description="Folder for the result.")
    dims: tuple[int, ...] = Field((), description="Resolutions.")
    unit_rows: int = Field(20, ge=1, description="Most rows in a unit.")
    precision: Literal["auto", "bf16"] = Field("auto", description="Arithmetic.")
    replace: bool = Field(False, description="Discard.")
    section: dict[str, Any] = Field({}, description="Options of another job.")

    @check_settings
    def _together(self) -> "Settings":
        if self.unit_rows == 13 and self.replace:
            raise ValueError("--unit-rows 13 brings bad luck with --replace. Change one.")
        return self


class Asked(JobSettings):
    """Looks at a folder."""

    folder: Annotated[str, Positional("FOLDER")] = Field(description="Output of any job.")


def from_flags(*arguments: str) -> Settings:
    return Settings.from_command_line(["--output", "out", *arguments], "job")


FLAGS = {
    "typo": (["--unit-row", "7"], r"job: no option '--unit-row'\. Did you mean '--unit-rows'\? --help lists"),
    "typo with value": (["--precison=bf16"], r"job: no option '--precison=bf16'\. Did you mean '--precision'\?"),
    "stray word": (["word"], r"job: no option 'word'\. --help lists all"),
    "not a number": (["--unit-rows", "many"], r"job: 'unit_rows': input should be a valid integer.*'many'.*Change --unit-rows"),
    "too small": (["--unit-rows", "0"], r"job: 'unit_rows': input should be greater than or equal to 1 \(found '0'\)\. Change"),
    "not a choice": (["--precision", "fp8"],
                     r"job: 'precision': input should be 'auto' or 'bf16' \(found 'fp8'\)\. Change --precision"),
    "part of a list": (["--dims", "384,x"], r"job: 'dims\.1': .*'x'.*Change --dims"),
    "together": (["--unit-rows", "13", "--replace"], r"job: --unit-rows 13 brings bad luck with --replace\. Change one"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FLAGS)
def test_every_fault_of_a_command_line_is_named(fault: str):
    arguments, message = FLAGS[fault]
    with pytest.raises(ValueError, match=message):
        from_flags(*arguments)


def test_a_missing_setting_is_named_with_the_way_to_give_it():
    with pytest.raises(ValueError, match=r"job: 'output' is missing\. Pass --output\."):
        Settings.from_command_line([], "job")
    with pytest.raises(ValueError, match=r"job: 'folder' is missing\. Pass (?!--folder)"):
        Asked.from_command_line([], "job")
    assert Asked.from_command_line(["runs/demo"], "job").folder == "runs/demo"


@pytest.mark.parametrize("text", ["[1, 2]", "word", "{a: ", "5"])
def test_a_flag_that_is_no_mapping_is_named(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises((SystemExit, ValueError)) as error:
        from_flags("--section", text)
    assert "section" in str(error.value) + capsys.readouterr().err


YAML = {
    "unknown key": ("output: x\nunit_row: 7\n", r"job \(.*job\.yaml\): no key 'unit_row'\. Did you mean 'unit_rows'\?"),
    "flag for a key": ("output: x\nunit-rows: 7\n", r"job\.yaml\): no key 'unit-rows'\. Did you mean 'unit_rows'\?"),
    "strange key": ("output: x\n5: 7\n", r"job\.yaml\): no key '5'\."),
    "wrong type": ("output: x\nunit_rows: 2.5\n", r"job\.yaml\): 'unit_rows': .*integer.*2\.5.*Change --unit-rows"),
    "number for a list": ("output: x\ndims: 64\n", r"job\.yaml\): 'dims': .*tuple \(found 64\)\. Change --dims"),
    "list for a text": ("output: [x]\n", r"job\.yaml\): 'output': .*string.*Change --output"),
    "section is a list": ("output: x\nsection: [a]\n", r"job\.yaml\): 'section': .*dictionary.*Change --section"),
    "missing": ("unit_rows: 7\n", r"job\.yaml\): 'output' is missing\. Pass --output"),
    "empty file": ("", r"job\.yaml: holds no settings \(found NoneType\)\. Write one 'key: value' per line"),
    "a list": ("- output\n", r"job\.yaml: holds no settings \(found list\)"),
    "not YAML": ("output: [\n", r"job\.yaml: not YAML in UTF-8 \(.*\)\. Mend it"),
    "a tab": ("section:\n\ta: 1\n", r"job\.yaml: not YAML in UTF-8"),
    "no such day": ("output: 2020-13-45\n", r"job\.yaml: not YAML"),
}


@pytest.mark.parametrize("fault", YAML)
def test_every_fault_of_a_yaml_file_is_named(tmp_path: Path, fault: str):
    text, message = YAML[fault]
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Settings.from_command_line(["--config", str(tmp_path / "job.yaml")], "job")


def test_a_yaml_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"output: gr\xfc\xdfe\n")
    with pytest.raises(ValueError, match=r"latin\.yaml: not YAML in UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ValueError, match=r"gone\.yaml: cannot be read \(No such file.*Give the path of a YAML file"):
        read_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be read \(Is a directory"):
        read_yaml(tmp_path)

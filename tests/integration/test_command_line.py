"""The command line: help that names every option, flags over YAML."""

import errno
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jobs
from jobs import embed
from jobs.entry import main
from matryoshka.config import JobSettings, options

_MODULES = {name: importlib.import_module(f"jobs.{name}") for _, name, _ in pkgutil.iter_modules(jobs.__path__)}
JOBS: dict[str, type[JobSettings]] = {name: module.Settings for name, module in _MODULES.items() if hasattr(module, "Settings")}


def test_every_stage_is_a_job() -> None:
    assert {"prepare", "finetune", "embed", "index", "search", "evaluate", "pipeline", "verify"} <= JOBS.keys()


@pytest.mark.parametrize("job", JOBS)
def test_help_names_and_explains_every_option(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        JOBS[job].from_command_line(["--help"], f"python -m jobs.{job}")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m jobs.{job}" in printed
    for option in options(JOBS[job]):
        assert (option.flag if option.flag.startswith("--") else f"[{option.metavar}]") in printed
        assert option.description
        assert option.description in printed


def test_help_of_the_module_ends_with_code_0() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.embed", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--unit-rows" in done.stdout
    assert done.stderr == ""


def test_flags_win_over_the_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "embed.yaml"
    path.write_text("output: out\ncorpus: there\nunit_rows: 50\nfail_on_empty: true\n")
    arguments = ["--config", str(path), "--unit-rows", "60", "--no-fail-on-empty"]
    settings = embed.Settings.from_command_line(arguments, "embed")
    assert (settings.corpus, settings.unit_rows, settings.fail_on_empty) == ("there", 60, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unit-row", "5"], "no option '--unit-row'. Did you mean '--unit-rows'"),
        (["--unit-rows", "five"], "'unit_rows'.*--unit-rows"),
        (["--precision", "int8"], "'precision'"),
        (["--output", "out"], "'corpus' is missing. Pass --corpus"),
        (["--config", "no-such.yaml"], "no-such.yaml: cannot be read"),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed.Settings.from_command_line(arguments, "embed")


def test_a_full_disk_met_anywhere_asks_for_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: embed.Settings) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "manifest.json")

    monkeypatch.setattr(sys, "argv", ["embed", "--output", str(tmp_path), "--corpus", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main("embed", embed.Settings, run)
    assert ended.value.code == 1
    assert "No space left on device: 'manifest.json'. Make room, then run the same command again." in capsys.readouterr().err


def test_an_output_in_the_copy_that_ray_makes_for_a_submission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(sys, "argv", ["embed", "--output=runs/vectors", "--corpus=corpus"])
    with pytest.raises(SystemExit) as ended:
        main("embed", embed.Settings, embed.run)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "output: runs/vectors would lie in the copy that Ray made for this submission" in message
    assert "Pass an absolute path on storage that every node mounts." in message

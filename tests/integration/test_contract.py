"""What a scheduler can rely on: exit codes, the status, one run per output, an end in order when it is told to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import folders
import pytest
import texts

from jobs import embed, interruption, status, verify, watch
from jobs.entry import ExitCode, main
from matryoshka import artifacts

pytestmark = pytest.mark.usefixtures("local_ray")

ROOT = Path(__file__).parents[2]
_FILES, _ROWS, _UNIT_ROWS = 4, 400, 4
_UNITS = _FILES * _ROWS // _UNIT_ROWS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.write_corpus(tmp_path_factory.mktemp("corpus"), num_files=_FILES, rows_per_file=_ROWS, num_words=50)


def _flags(output: Path, corpus: Path, model: str, *more: str) -> list[str]:
    fixed = [f"--unit-rows={_UNIT_ROWS}", "--precision=float32", "--workers=1", "--tokens-per-step=512"]
    return [f"--output={output}", f"--corpus={corpus}", f"--model={model}", *fixed, *more]


def _exit_code(job: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, writes: str | None = "output") -> int:
    """Returns the exit code of a job's command, run in this process so that it shares its Ray."""
    name = job.__name__.removeprefix("jobs.")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        main(name, job.Settings, job.run, writes)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def _status(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "status.json").read_text("utf-8"))
    return found


def test_a_run_keeps_its_output_to_itself_and_ends_in_order_when_it_is_told_to(
    tmp_path: Path, corpus: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, log = tmp_path / "embeddings", tmp_path / "log.txt"
    flags = _flags(output, corpus, tiny, "--run-id=tonight")
    with log.open("wb") as sink:
        driver = subprocess.Popen([sys.executable, "-m", "jobs.embed", *flags], stdout=sink, stderr=sink)
    folders.wait_until(lambda: list((output / "journal").glob("*.json")) != [] or driver.poll() is not None)

    assert _exit_code(embed, flags, monkeypatch) == ExitCode.HELD, log.read_text()
    assert re.search(rf"another run is writing to it \(run tonight, process {driver.pid} on ", capsys.readouterr().err)
    assert _exit_code(status, [str(output)], monkeypatch, writes=None) == ExitCode.HELD
    assert "embed, run tonight: running" in capsys.readouterr().out

    told = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(folders.PATIENCE_SECONDS) == ExitCode.TERMINATED == 143, log.read_text()
    assert time.monotonic() - told < interruption.PATIENCE_SECONDS + 5
    assert "event=end job=embed state=terminated exit_code=143" in log.read_text()
    assert "run=tonight stage=embed done=" in log.read_text()
    left = _status(output)
    assert (left["state"], left["exit_code"], left["stage"], left["total"]) == ("terminated", 143, "embed", _UNITS)
    num_recorded = len(artifacts.read_journal(output))
    assert 0 < left["done"] <= num_recorded < _UNITS, "everything that was finished is recorded"
    assert not (output / "lease.json").exists()

    assert _exit_code(embed, flags, monkeypatch) == ExitCode.DONE
    done = _status(output)
    assert (done["state"], done["attempts"], done["total"]) == ("done", 2, _UNITS - num_recorded)
    assert len(folders.vectors(output)) == _FILES * _ROWS
    verify.run(verify.Settings(folder=str(output)))

    assert _exit_code(embed, flags, monkeypatch) == ExitCode.DONE
    assert _status(output)["state"] == "nothing to do"
    assert _exit_code(status, [str(output)], monkeypatch, writes=None) == ExitCode.DONE


def test_a_killed_run_is_recognised_as_dead(tmp_path: Path, corpus: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "embeddings"
    code = "import sys; from jobs.watch import Watch; from pathlib import Path; Watch.begin(Path(sys.argv[1]), 'embed', 'key')"
    subprocess.run([sys.executable, "-c", f"{code}; import os; os.kill(os.getpid(), 9)", output], check=False)
    assert _status(output)["state"] == "running"
    assert _exit_code(status, [str(output)], monkeypatch, writes=None) == ExitCode.FAILED
    assert _exit_code(embed, _flags(output, corpus, tiny, "--run-id=key"), monkeypatch) == ExitCode.DONE
    assert (_status(output)["state"], _status(output)["attempts"]) == ("done", 2)


@pytest.mark.parametrize(("end", "is_kept"), [("leave", False), ("terminate", True)])
def test_what_is_finished_is_noted_unless_the_output_is_another_runs_by_now(tmp_path: Path, end: str, *, is_kept: bool) -> None:
    code = f"""
import contextlib, time
from pathlib import Path
from jobs import interruption, watch
from matryoshka.artifacts import Receipt
with contextlib.suppress(interruption.TerminatedError), interruption.heeded(), watch.journal_of(Path("out")) as journal:
    journal.add(Receipt("unit", 1, (), {{}}))
    interruption.{end}()
    time.sleep(60)
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=50
    )
    assert [receipt.key for receipt in artifacts.read_journal(tmp_path / "out")] == ["unit"] * is_kept


def test_of_two_errors_the_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: artifacts.Journal) -> None:
        raise ValueError("access denied")

    monkeypatch.setattr(artifacts.Journal, "flush", refuse)
    with pytest.raises(interruption.TerminatedError), watch.journal_of(tmp_path):
        raise interruption.TerminatedError


def test_bad_input_leaves_nothing_in_a_free_output_and_a_word_in_one_of_ours(
    tmp_path: Path, corpus: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = _flags(tmp_path / "new", corpus / "nothing", tiny)
    assert _exit_code(embed, wrong, monkeypatch) == ExitCode.BAD_INPUT
    assert not (tmp_path / "new").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert _exit_code(embed, _flags(foreign, corpus, tiny), monkeypatch) == ExitCode.BAD_INPUT
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]

    ours = tmp_path / "ours"
    artifacts.Manifest("embeddings", {}).write(ours)
    assert _exit_code(embed, _flags(ours, corpus / "nothing", tiny), monkeypatch) == ExitCode.BAD_INPUT
    capsys.readouterr()
    assert _status(ours)["state"] == "bad input"
    assert "no Parquet files here" in _status(ours)["last_error"]
    assert _exit_code(status, [str(ours)], monkeypatch, writes=None) == ExitCode.BAD_INPUT
    assert "last error: " in capsys.readouterr().out


def test_a_defect_of_the_program_is_told_from_what_a_retry_can_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: verify.Settings) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(verify, "run", broken)
    assert _exit_code(verify, [str(tmp_path)], monkeypatch, writes=None) == ExitCode.HOPELESS
    assert "a defect of this program" in caplog.text


def test_an_input_that_changes_under_a_run_is_no_bad_input_for_the_next(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus", num_files=_FILES, rows_per_file=_ROWS, num_words=50)
    flags = _flags(tmp_path / "embeddings", corpus, tiny)
    calibrate = embed.calibrate

    def change(*args: Any, **settings: Any) -> Any:
        texts.write_parquet(max(corpus.glob("*.parquet")), {"id": ["new"], "text": ["something else"]})
        return calibrate(*args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(embed, "calibrate", change)
        assert _exit_code(embed, flags, monkeypatch) == ExitCode.FAILED
    assert "changed since this run began" in capsys.readouterr().err
    assert _exit_code(embed, flags, monkeypatch) == ExitCode.DONE


def test_the_readme_lists_every_exit_code() -> None:
    listed = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    assert [int(code) for code in listed] == [code.value for code in ExitCode]

"""The whole mission from a bucket to a bucket: killed on the way and taken up again, it makes what it makes on a disk."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3_server
import yaml

from jobs import pipeline, verify
from matryoshka import artifacts, model, storage
from matryoshka.storage import Place

ROOT = Path(__file__).parents[2]

_CHECKPOINT_STEPS, _POLL_SECONDS = 20, 0.1
# Their reports say how long things took.
_TIMED = ("candidates", "evaluation-base", "evaluation-tuned", "also-alike-base", "also-alike-tuned")

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def root(s3: Any) -> Place:  # noqa: ARG001 - the server must be there
    """A folder in a bucket of this module's own."""
    return storage.place(s3_server.make_bucket()) / "nightly"


def _upload(path: Path, place: Place) -> str:
    """Copies a file or a folder to a bucket, and returns where it is."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            storage.publish_bytes(place if file == path else place / file.relative_to(path).as_posix(), file.read_bytes())
    return str(place)


@pytest.fixture(scope="module")
def config(pipeline_config: Path, root: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's YAML file, with all that it names in the bucket."""
    local = yaml.safe_load(pipeline_config.read_text())
    base, pairs = Path(local["candidates"][0]), Path(local["prepare"]["pairs"])
    alike = Path(local["also"]["alike"]["sts"])
    own = {
        **local,
        "output": str(root / "run"),
        "candidates": [_upload(base, root / "models" / base.name)],
        "also": {"alike": {"sts": _upload(alike, root / alike.name)}},
        "prepare": {"pairs": _upload(pairs, root / "texts" / pairs.name)},
        "finetune": {**local["finetune"], "checkpoint_steps": _CHECKPOINT_STEPS},
    }
    path = tmp_path_factory.mktemp("bucket") / "pipeline.yaml"
    path.write_text(yaml.safe_dump(own), "utf-8")
    return path


def _settings(config: Path) -> pipeline.Settings:
    return pipeline.Settings.from_command_line(["--config", str(config)], "pipeline")


@pytest.fixture(scope="module")
def killed(config: Path, root: Place) -> Place:
    """The output of a run whose every process was killed when the first checkpoint was there."""
    output, log = root / "run", config.with_name("log.txt")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"}
    command = [sys.executable, "-m", "jobs.pipeline", "--config", str(config)]
    with log.open("wb") as sink:
        driver = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, cwd=config.parent, start_new_session=True)
    try:
        while not list((output / "model" / model.CHECKPOINTS).glob("step-*/state.json")):
            assert driver.poll() is None, log.read_text()
            time.sleep(_POLL_SECONDS)
    finally:
        for process in (*psutil.Process(driver.pid).children(recursive=True), driver):
            process.kill()
        driver.wait()
    assert not artifacts.read(output / "model").is_complete
    return output


@pytest.fixture(scope="module")
def finished(killed: Place, config: Path) -> Place:
    """The same output, when the same command has been given again."""
    pipeline.run(_settings(config))
    return killed


def test_a_run_that_was_killed_in_the_middle_of_fine_tuning_goes_on_from_a_checkpoint(finished: Place) -> None:
    log = storage.read_json(finished / "model" / model.TRAINING_LOG)
    assert log["summary"]["first_step"] >= _CHECKPOINT_STEPS
    assert [path.name for path in finished.rglob("*") if path.name.startswith(storage.TEMPORARY)] == []
    assert not (finished / "model" / model.CHECKPOINTS).exists()


def test_what_comes_out_in_a_bucket_is_what_the_same_run_makes_on_a_disk(finished: Place, finished_pipeline: Path) -> None:
    assert _fingerprints(finished) == _fingerprints(finished_pipeline)
    there, here = (storage.read_json(run / "report.json") for run in (finished, finished_pipeline))
    for key in ("rows", "elsewhere", "comparisons", "extremes", "searches"):
        assert there[key] == here[key], key


def _fingerprints(run: Place) -> dict[str, Any]:
    """Returns the identity of every artifact that holds no times; of the model, without the log, which tells of its processes."""
    found = storage.read_json(run / "report.json")["fingerprints"]
    own = {name: fingerprint for name, fingerprint in found.items() if name not in (*_TIMED, "model")}
    receipts = artifacts.read_complete(run / "model", "model").receipts
    return own | {receipt.key: receipt.files[0].digest for receipt in receipts if receipt.key != model.TRAINING_LOG}


def test_verify_accepts_all_of_it(finished: Place, capsys: pytest.CaptureFixture[str]) -> None:
    verify.run(verify.Settings(folder=str(finished)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(_TIMED)
    assert all(line.startswith("ok") for line in lines)


def test_the_same_command_again_writes_nothing_to_the_bucket(finished: Place, config: Path) -> None:
    before = _versions(finished)
    pipeline.run(_settings(config))
    assert _versions(finished) == before


def _versions(run: Place) -> dict[str, Any]:
    """Returns when every object below a folder was written."""
    return {str(path): path.stat().st_mtime for path in run.rglob("*") if path.is_file()}

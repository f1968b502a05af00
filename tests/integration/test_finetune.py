"""Fine-tuning under Ray Train: what comes out, what is refused, and what holds when ranks and drivers are lost on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import texts
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from jobs import finetune, prepare, training_group, verify
from jobs.entry import main
from matryoshka import artifacts, model, status

ROOT = Path(__file__).parents[2]
DIMS = (64, 32, 8)

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    path = texts.write_parquet(root / "pairs.parquet", texts.pairs(240))
    prepare.run(prepare.Settings(output=str(root / "data"), pairs=str(path)))
    return root / "data"


def _settings(output: Path, data: Path, model: str, **more: Any) -> finetune.Settings:
    small = {"batch_size": 16, "max_steps": 180, "epochs": 20, "learning_rate": 3e-3, "precision": "float32", "dims": DIMS}
    return finetune.Settings(output=str(output), data=str(data), model=model, **{**small, **more})


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny: str) -> Path:
    """The model that two ranks trained under Ray."""
    output = tmp_path_factory.mktemp("two") / "model"
    finetune.run(_settings(output, data, tiny, workers=2, tensorboard=True))
    return output


@pytest.fixture(params=[1, 2])
def trained(request: pytest.FixtureRequest, finished_pipeline: Path, two_ranks: Path) -> Path:
    """The model that one rank trained in the pipeline, and the one of two ranks."""
    return {1: finished_pipeline / "model", 2: two_ranks}[request.param]


def _log(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "training_log.json").read_text())
    return value


def _losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in _log(folder)["entries"] if "loss" in entry]


def test_the_loss_falls_on_pairs_that_can_be_learned(trained: Path) -> None:
    losses = _losses(trained)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_trained_model_loads_without_this_project(trained: Path, tiny: str) -> None:
    vectors = SentenceTransformer(str(trained), device="cpu").encode(["bada bife", "geva"])
    assert vectors.shape == (2, 64)
    assert np.isfinite(vectors).all()
    assert not np.allclose(vectors, SentenceTransformer(tiny, device="cpu").encode(["bada bife", "geva"]))


def test_the_manifest_says_what_was_trained(two_ranks: Path, data: Path) -> None:
    made = folders.manifest(two_ranks)
    assert made["is_complete"]
    assert made["identity"]["dims"] == [64, 32, 8]
    assert made["identity"]["data"] == folders.manifest(data)["fingerprint"]
    assert (made["facts"]["workers"], made["facts"]["num_steps"]) == (2, 180)
    assert set(made["facts"]["trainable"]) == {"embeddings", "layer 0", "layer 1"}
    verify.run(verify.Settings(folder=str(two_ranks)))


def test_nothing_that_only_training_needs_is_left(two_ranks: Path) -> None:
    assert not list(two_ranks.rglob(".partial-*"))
    assert not (two_ranks / "checkpoints").exists()
    assert not [path for path in two_ranks.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


def test_the_log_has_losses_and_the_dev_split_s_figures_at_every_dim(two_ranks: Path) -> None:
    entries = _log(two_ranks)["entries"]
    looked_at = [entry for entry in entries if "dev_nDCG@10" in entry]
    assert [entry["step"] for entry in looked_at] == [0, 36, 72, 108, 144, 180]
    for entry in looked_at:
        assert entry["dev_nDCG@10"] == pytest.approx(np.mean([entry[f"dev_nDCG@10_{dim}"] for dim in DIMS]))
    assert all({"loss", "learning_rate", "grad_norm"} <= entry.keys() for entry in entries if entry not in looked_at)
    assert list((two_ranks / "tensorboard").glob("events.*"))


def test_the_card_has_the_figures_before_and_after(two_ranks: Path) -> None:
    log, card = _log(two_ranks), (two_ranks / "README.md").read_text()
    by_step = {entry["step"]: entry for entry in log["entries"] if "dev_nDCG@10" in entry}
    best = by_step[log["summary"]["kept_step"]]
    assert best["dev_nDCG@10"] == max(entry["dev_nDCG@10"] for entry in by_step.values())
    for dim in DIMS:
        assert f"| {dim} | {by_step[0][f'dev_nDCG@10_{dim}']:.3f} | {best[f'dev_nDCG@10_{dim}']:.3f} |" in card


def test_the_same_finetune_command_again_does_nothing(two_ranks: Path, data: Path, tiny: str) -> None:
    before = folders.times(two_ranks)
    finetune.run(_settings(two_ranks, data, tiny, workers=1))  # how many ranks there were does not matter
    assert folders.times(two_ranks) == before


def test_finetune_refuses_an_output_of_another_recipe_and_leaves_it_as_it_is(two_ranks: Path, data: Path, tiny: str) -> None:
    before = folders.times(two_ranks)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.003 there, 0\.01 now"):
        finetune.run(_settings(two_ranks, data, tiny, learning_rate=0.01))
    assert folders.times(two_ranks) == before


def _workers() -> list[psutil.Process]:
    """Returns the processes of ranks that have loaded their model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::RayTrainWorker"):
            found.append(process)
    return found


def _kill_a_rank() -> None:
    _workers()[-1].kill()


def _once(holds: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Acts as soon as a condition holds, beside the test."""

    def wait() -> None:
        folders.wait_until(holds)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def _has_checkpoint(output: Path) -> bool:
    return bool(list((output / "checkpoints").glob("step-*")))


def test_a_run_that_loses_a_rank_ends_with_the_weights_of_one_that_does_not(
    tmp_path: Path, two_ranks: Path, data: Path, tiny: str
) -> None:
    output = tmp_path / "model"
    killer = _once(lambda: _has_checkpoint(output), _kill_a_rank)
    finetune.run(_settings(output, data, tiny, workers=2, checkpoint_steps=7))
    killer.join()
    disturbed, undisturbed = (load_file(folder / "model.safetensors") for folder in (output, two_ranks))
    assert disturbed.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        np.testing.assert_array_equal(disturbed[name], value, err_msg=name)
    assert _log(output)["entries"] == _log(two_ranks)["entries"]


def test_a_driver_that_is_told_to_end_leaves_a_checkpoint_that_the_same_command_goes_on_from(
    tmp_path: Path, data: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model"
    settings = _settings(output, data, tiny, max_steps=200, epochs=100, checkpoint_steps=10_000, evaluations=0, workers=1)
    flags = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in settings.model_dump(exclude_defaults=True).items()
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"}
    command = [sys.executable, "-m", "jobs.finetune", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
    ) as run:
        assert run.stdout
        lines = []
        for line in run.stdout:
            lines.append(line)
            if "step=16 " in line:
                run.send_signal(signal.SIGTERM)
    assert run.returncode == 143, "".join(lines)
    assert _has_checkpoint(output)
    assert "told to end; a checkpoint of step" in "".join(lines)
    assert not artifacts.read(output).is_complete
    step = int(next((output / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert step < 200
    monkeypatch.setattr(sys, "argv", ["finetune", *flags])
    for state in ("done", "nothing to do"):
        with pytest.raises(SystemExit) as ended:
            main("finetune", finetune.Settings, finetune.run)
        assert ended.value.code == 0
        assert status.Status.read(output).state == state  # type: ignore[union-attr]
        assert model.describe(str(output)).is_tuned, "what the run left beside the model is not of the model"
    verify.run(verify.Settings(folder=str(output)))
    assert [entry["step"] for entry in _log(output)["entries"]] == list(range(4, 201, 4))


def test_a_first_rank_that_was_given_up_for_lost_writes_no_more() -> None:
    mailbox: Any = ray.remote(training_group._Mailbox).options(num_cpus=0).remote()
    lost, successor = (training_group._Observer(mailbox, is_first=True) for _ in range(2))
    successor.before_writing()
    with pytest.raises(RuntimeError, match="another has taken its place"):
        lost.before_writing()


def test_an_error_of_the_run_itself_is_told_at_once_and_leaves_no_model(tmp_path: Path, data: Path, tiny: str) -> None:
    with pytest.raises(RuntimeError, match=r"the loss of step \d+ is not finite.*Its pairs \(query/document\): q-"):
        finetune.run(_settings(tmp_path / "model", data, tiny, learning_rate=1e30, workers=1))
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_fewer_pairs_than_a_batch_are_refused_before_training(tmp_path: Path, data: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"\d+ training pairs are fewer than one batch of 1000.*Bring at least 1000 pairs"):
        finetune.run(_settings(tmp_path / "model", data, tiny, batch_size=1000))
    assert not (tmp_path / "model").exists()


def test_a_batch_that_cannot_be_shared_is_refused_before_training(tmp_path: Path, data: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="--batch-size 15 cannot be shared by 2 workers"):
        _settings(tmp_path / "model", data, tiny, batch_size=15, workers=2)


def test_more_layers_than_the_model_has_are_refused_before_training(tmp_path: Path, data: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"--top-layers 3: the model has 2 layers\. Pass at most 2"):
        finetune.run(_settings(tmp_path / "model", data, tiny, top_layers=3))
    assert not (tmp_path / "model").exists()


def test_negatives_of_other_data_are_refused(tmp_path: Path, data: Path, tiny: str) -> None:
    pairs = folders.manifest(data)
    path = tmp_path / "negatives" / "pairs" / "train-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(data / "pairs").slice(0, 1), path)
    artifacts.Manifest("negatives", {"data": "another", "num_negatives": 1}, is_complete=True).write(tmp_path / "negatives")
    with pytest.raises(ValueError, match=r"negatives: was mined from other data than .*Mine from this data"):
        finetune.run(_settings(tmp_path / "model", data, tiny, negatives=str(tmp_path / "negatives")))
    assert folders.manifest(data) == pairs

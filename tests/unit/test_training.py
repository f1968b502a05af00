import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import texts
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from matryoshka import checkpoints, dev, model, training
from matryoshka.recipe import Recipe
from matryoshka.training import Job, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

DEV = small_runs.dev_set(9, 30)
# Three epochs of three steps, with everything that a step's number decides.
LONG = dataclasses.replace(
    small_runs.RECIPE, num_steps=9, dropout=0.1, evaluations=9, checkpoint_steps=4, learning_rate=1e-3, mini_batch_tokens=60
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Job:
    """A run that nobody disturbed."""
    job = small_runs.make_job(tmp_path_factory.mktemp("whole") / "run", tiny, recipe=LONG, dev=DEV)
    small_runs.train(job)
    return job


@pytest.mark.parametrize("dies_at", [1, 4, 5, 8])
def test_a_run_that_was_killed_ends_as_the_undisturbed_one_does(dies_at: int, whole: Job):
    killed = small_runs.again(whole, f"killed at {dies_at}")
    with pytest.raises(small_runs.KilledError):
        small_runs.train(killed, dies_at=dies_at)
    assert not [path for path in killed.target.rglob("*") if path.is_file()]
    resumed = small_runs.train(killed)
    kept = (dies_at - 1) // 4 * 4
    assert resumed.entries[0]["step"] == (kept + 1 if kept else 0)
    assert small_runs.are_same(small_runs.weights(whole.target), small_runs.weights(killed.target))
    assert small_runs.log(whole) == small_runs.log(killed)


def test_a_run_that_is_killed_again_and_again_goes_on_from_its_last_whole_checkpoint(whole: Job):
    killed = small_runs.again(whole, "killed often")
    for dies_at in (2, 3, 6, 7):
        with pytest.raises(small_runs.KilledError):
            small_runs.train(killed, dies_at=dies_at, wanted=frozenset({dies_at - 1}))
        if dies_at == 6:
            path = max(killed.checkpoints.glob("step-*")) / "weights.safetensors"
            path.write_bytes(path.read_bytes()[:-1])
    assert small_runs.train(killed).entries[0]["step"] == 7
    assert small_runs.are_same(small_runs.weights(whole.target), small_runs.weights(killed.target))
    assert small_runs.log(whole) == small_runs.log(killed)


def test_a_checkpoint_is_written_when_it_is_wanted_and_when_it_is_due(whole: Job):
    job = small_runs.again(whole, "asked", num_steps=6)
    watch = small_runs.train(job, wanted=frozenset({3, 5}))
    assert watch.checkpoints == [3, 4, 5]


class _Replaced(small_runs.Observer):
    """Of a run that was given up for lost after a few writes, though it goes on."""

    def __init__(self, num_writes: int) -> None:
        super().__init__()
        self._num_left = num_writes

    def before_writing(self) -> None:
        if not self._num_left:
            raise small_runs.KilledError
        self._num_left -= 1


@pytest.mark.parametrize("num_writes", range(4))
def test_a_run_that_was_replaced_writes_nothing_more(tmp_path: Path, tiny: str, num_writes: int):
    recipe = dataclasses.replace(small_runs.RECIPE, checkpoint_steps=2, evaluations=2)
    job = small_runs.make_job(tmp_path, tiny, recipe=recipe, dev=small_runs.dev_set(4, 8))
    with pytest.raises(small_runs.KilledError):
        training.train_rank(job, _Replaced(num_writes))
    assert len(list(job.checkpoints.glob("*"))) == min(num_writes, 2)  # the first, the best so far, makes room for a better one
    assert not list(job.target.glob("*"))


def test_a_long_log_is_short_and_the_same_wherever_a_run_was_taken_up(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Recipe, "log_steps", 3)
    recipe = dataclasses.replace(small_runs.RECIPE, num_steps=10, checkpoint_steps=4)
    job = small_runs.make_job(tmp_path / "whole", tiny, recipe=recipe)
    entries = small_runs.train(job).entries
    assert [entry["step"] for entry in entries] == [3, 6, 9, 10]
    monkeypatch.setattr(Recipe, "log_steps", 1)
    every = small_runs.train(small_runs.again(job, "every")).entries
    means = [np.mean([entry["loss"] for entry in every[start : start + 3]]) for start in (0, 3, 6, 9)]
    assert [entry["loss"] for entry in entries] == pytest.approx(means, rel=1e-6)
    monkeypatch.setattr(Recipe, "log_steps", 3)
    killed = small_runs.again(job, "killed")
    with pytest.raises(small_runs.KilledError):
        small_runs.train(killed, dies_at=5)
    small_runs.train(killed)
    assert small_runs.log(job) == small_runs.log(killed)


def test_a_run_that_ended_early_ends_there_again(tmp_path: Path, tiny: str):
    # With such a learning rate, nothing is better than the model that was there before.
    recipe = dataclasses.replace(LONG, patience=2, learning_rate=0.5)
    job = small_runs.make_job(tmp_path / "whole", tiny, recipe=recipe, dev=DEV)
    small_runs.train(job)
    summary = small_runs.log(job)["summary"]
    assert summary["stopped_at"] == summary["kept_step"] + 2 < 9
    killed = small_runs.again(job, "killed")
    with pytest.raises(small_runs.KilledError):
        small_runs.train(killed, dies_at=1)
    small_runs.train(killed)
    before = small_runs.log(killed)
    for path in killed.target.rglob("*.safetensors"):
        path.unlink()
    watch = small_runs.train(killed)  # killed when it had ended, before its model was written
    assert watch.entries == []
    assert small_runs.log(job) == small_runs.log(killed) == before
    assert small_runs.are_same(small_runs.weights(job.target), small_runs.weights(killed.target))


def ndcg(folder: Path) -> float:
    return small_runs.figures_by_hand(folder, DEV, LONG.dims)["dev_nDCG@10"]


def test_the_kept_model_is_the_best_of_all_that_were_looked_at(whole: Job, tiny: str):
    found = small_runs.log(whole)
    scores = {entry["step"]: entry[dev.DEV] for entry in found["entries"] if dev.DEV in entry}
    assert sorted(scores) == list(range(10))
    best = max(scores, key=lambda step: (scores[step], -step))
    assert found["summary"]["kept_step"] == best
    assert ndcg(whole.target) == pytest.approx(scores[best], abs=1e-9)
    assert ndcg(Path(tiny)) == pytest.approx(scores[0], abs=1e-9)


def test_a_last_step_that_is_worse_than_an_earlier_one_is_not_kept(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch):
    # The learning rate jumps after eight good steps.
    monkeypatch.setattr(Recipe, "rate_at", lambda _, step: 1.0 if step < 8 else 1_000.0)
    recipe = dataclasses.replace(LONG, num_steps=12, evaluations=12, dropout=0.0, mini_batch_tokens=None)
    job = small_runs.make_job(tmp_path, tiny, texts.pairs(30), recipe, dev=DEV)
    small_runs.train(job)
    found = small_runs.log(job)
    scores = {entry["step"]: entry[dev.DEV] for entry in found["entries"] if dev.DEV in entry}
    kept = found["summary"]["kept_step"]
    assert 0 < kept <= 8
    assert scores[12] < scores[kept]
    assert ndcg(job.target) == pytest.approx(scores[kept], abs=1e-9)


def test_where_no_step_is_better_the_untouched_model_comes_out(tmp_path: Path, tiny: str):
    recipe = dataclasses.replace(LONG, num_steps=3, evaluations=1, learning_rate=1.0)
    job = small_runs.make_job(tmp_path, tiny, recipe=recipe, dev=DEV)
    small_runs.train(job)
    assert small_runs.log(job)["summary"]["kept_step"] == 0
    one, other = (SentenceTransformer(str(folder), device="cpu").encode(texts.WORDS[:20]) for folder in (tiny, job.target))
    np.testing.assert_array_equal(one, other)


def test_best_weights_that_are_damaged_are_an_error_and_no_model(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch):
    job = small_runs.make_job(tmp_path, tiny, recipe=dataclasses.replace(LONG, num_steps=1, evaluations=1), dev=DEV)
    monkeypatch.setattr(checkpoints, "best", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"checkpoints: the best checkpoint is damaged\. Pass --replace to train anew"):
        small_runs.train(job)
    assert not list(job.target.rglob("*.safetensors"))


def test_without_a_dev_set_the_last_weights_are_kept(tmp_path: Path, tiny: str):
    job = small_runs.make_job(tmp_path, tiny, recipe=dataclasses.replace(LONG, num_steps=2))
    small_runs.train(job)
    assert small_runs.log(job)["summary"]["kept_step"] == 2
    assert [entry["step"] for entry in small_runs.log(job)["entries"]] == [1, 2]


def test_a_loss_that_is_not_finite_names_its_step_and_pairs_and_writes_nothing(tmp_path: Path, tiny: str):
    recipe = dataclasses.replace(small_runs.RECIPE, learning_rate=1e30, checkpoint_steps=2)
    job = small_runs.make_job(tmp_path, tiny, recipe=recipe)
    with pytest.raises(
        TrainingError, match=r"the loss of step 2 is not finite \(nan\)\. Its pairs \(query/document\): q\d+/d\d+, "
    ):
        small_runs.train(job)
    assert not [path for path in job.target.rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("step-*")), "a checkpoint of such a step would make every later run fail"


def test_a_model_that_is_broken_from_the_start_is_named_at_its_first_step(tmp_path: Path, minilm_copy: Any):
    base = minilm_copy(config={"num_hidden_layers": 1})
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weights["encoder.layer.0.output.dense.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    job = small_runs.make_job(tmp_path / "run", base, recipe=dataclasses.replace(small_runs.RECIPE, dims=(384, 64)))
    with pytest.raises(TrainingError, match=r"the loss of step 1 is not finite"):
        small_runs.train(job)
    assert not [path for path in job.target.rglob("*") if path.is_file()]


def test_weights_that_are_no_longer_finite_after_the_last_step_are_an_error_and_no_model(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Recipe, "rate_at", lambda *_: float("nan"))
    job = small_runs.make_job(tmp_path, tiny, recipe=dataclasses.replace(small_runs.RECIPE, num_steps=1))
    with pytest.raises(TrainingError, match=r"the weights are not finite after training\. Pass a lower --learning-rate"):
        small_runs.train(job)
    assert not list(job.target.rglob("*.safetensors"))


def test_a_checkpoint_of_another_model_is_refused_by_name_and_left_alone(whole: Job):
    job = small_runs.again(whole, "foreign")
    with pytest.raises(small_runs.KilledError):
        small_runs.train(job, dies_at=5)
    before = sorted(job.checkpoints.rglob("*"))
    with pytest.raises(ValueError, match=r"step-00000004: a checkpoint of another model, other data or another recipe"):
        small_runs.train(dataclasses.replace(job, identity="of another model"))
    assert sorted(job.checkpoints.rglob("*")) == before


def test_fewer_pairs_than_a_batch_are_refused_with_the_number_that_is_needed(tmp_path: Path, tiny: str):
    job = small_runs.make_job(tmp_path, tiny, texts.pairs(7))
    with pytest.raises(ValueError, match=r"7 training pairs do not fill one batch\. Bring at least 8 pairs"):
        small_runs.train(job)


def test_fewer_labels_than_a_batch_are_refused(tmp_path: Path, tiny: str):
    labelled = {**texts.pairs(24), "label": [f"label {number % 5}" for number in range(24)]}
    with pytest.raises(ValueError, match=r"--batch-size 8: the training pairs have 5 labels.*Pass at most 5\."):
        small_runs.train(small_runs.make_job(tmp_path, tiny, labelled))


def test_a_trained_model_keeps_its_window_prompts_and_dropout_and_has_what_its_base_has(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
):
    base = tmp_path / "base"
    network = model.load(Path(tiny), "cpu")
    network.prompts = {"query": "query: ", "document": "passage: "}
    network.save_pretrained(str(base), create_model_card=False)
    capsys.readouterr()
    recipe = dataclasses.replace(small_runs.RECIPE, max_tokens=6, dropout=0.3)
    job = small_runs.make_job(tmp_path / "run", base, recipe=recipe)
    small_runs.train(job)
    assert capsys.readouterr().out == ""
    tuned = model.load(job.target, "cpu")
    assert tuned.max_seq_length == network.max_seq_length
    assert {role: tuned.prompts[role] for role in ("query", "document")} == network.prompts
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"):
        assert json.loads((job.target / name).read_text()) == json.loads((base / name).read_text()), name
    assert model.TRAINING_LOG in {path.name for path in job.target.iterdir()}


def test_the_facts_of_a_run_stand_in_its_log(tmp_path: Path, tiny: str):
    job = small_runs.make_job(tmp_path, tiny, recipe=dataclasses.replace(small_runs.RECIPE, top_layers=1, num_steps=1))
    small_runs.train(job)
    found = small_runs.log(job)
    pairs = small_runs.open_pairs(job)
    assert found["summary"]["steps_per_epoch"] == 3
    assert found["summary"]["num_ranks"] == 1
    assert found["summary"]["tokens_per_step"] == round(pairs.lengths.mean() * 8)
    assert set(found["summary"]["trainable"]) == {"layer 1"}
    assert found["summary"]["notices"] == []
    assert found["recipe"] == json.loads(json.dumps(dataclasses.asdict(job.recipe)))
    assert set(found["entries"][0]) == {"step", "loss", "learning_rate", "grad_norm"}


def test_labelled_pairs_with_prompts_and_a_real_model_lower_the_loss(tmp_path: Path, minilm_copy: Any):
    base = minilm_copy(config={"num_hidden_layers": 1})
    labelled = {**texts.pairs(24), "label": [f"label {number % 8}" for number in range(24)]}
    recipe = dataclasses.replace(small_runs.RECIPE, dims=(384, 64), num_steps=6, learning_rate=3e-4)
    losses = [entry["loss"] for entry in small_runs.train(small_runs.make_job(tmp_path / "run", base, labelled, recipe)).entries]
    assert np.mean(losses[3:]) < np.mean(losses[:3])


def test_a_seed_decides_everything_and_another_decides_otherwise(whole: Job):
    again, other = small_runs.again(whole, "again"), small_runs.again(whole, "other", seed=8)
    for job in (again, other):
        small_runs.train(job)
    assert small_runs.are_same(small_runs.weights(whole.target), small_runs.weights(again.target))
    assert small_runs.log(other)["entries"] != small_runs.log(whole)["entries"]

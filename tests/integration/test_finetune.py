"""Fine-tuning with one rank and with two: the same mathematics, a model that any tool loads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import ranks
import texts
from sentence_transformers import SentenceTransformer

from jobs import finetune, prepare, verify
from matryoshka import training
from matryoshka.recipe import Recipe

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    path = texts.write_parquet(root / "pairs.parquet", texts.pairs(240))
    prepare.run(prepare.Settings(output=str(root / "data"), pairs=str(path)))
    return root / "data"


def _settings(output: Path, data: Path, model: str, **more: Any) -> finetune.Settings:
    small = {"batch_size": 16, "max_steps": 60, "epochs": 20, "dropout": 0.0, "learning_rate": 3e-3, "precision": "float32"}
    return finetune.Settings(output=str(output), data=str(data), model=model, **{**small, **more})


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny: str) -> Path:
    """The model that two ranks trained under Ray."""
    output = tmp_path_factory.mktemp("two") / "model"
    finetune.run(_settings(output, data, tiny, workers=2, dims=(64, 32, 8)))
    return output


@pytest.fixture(params=[1, 2])
def trained(request: pytest.FixtureRequest) -> Path:
    """The model that one rank trained in the pipeline, and the one of two ranks."""
    if request.param == 1:
        return Path(request.getfixturevalue("finished_pipeline")) / "model"
    return Path(request.getfixturevalue("two_ranks"))


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
    assert made["identity"]["workers"] == 2
    assert made["identity"]["data"] == folders.manifest(data)["fingerprint"]
    assert made["facts"]["num_steps"] == 60
    verify.run(verify.Settings(folder=str(two_ranks)))
    assert not list(two_ranks.rglob(".partial-*"))


def test_the_same_finetune_command_again_does_nothing(two_ranks: Path, data: Path, tiny: str) -> None:
    before = folders.times(two_ranks)
    finetune.run(_settings(two_ranks, data, tiny, workers=2, dims=(64, 32, 8)))
    assert folders.times(two_ranks) == before


def test_finetune_refuses_an_output_of_another_recipe_and_leaves_it_as_it_is(two_ranks: Path, data: Path, tiny: str) -> None:
    before = folders.times(two_ranks)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.003 there, 0\.01 now"):
        finetune.run(_settings(two_ranks, data, tiny, workers=2, dims=(64, 32, 8), learning_rate=0.01))
    assert folders.times(two_ranks) == before


def _losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "training_log.json").read_text())]


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", left, right) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def test_two_ranks_do_what_one_process_does_on_the_same_batches(tmp_path: Path, tiny: str) -> None:
    # As many pairs as a batch: every step sees all of them, so all runs see the same batches, in whatever order.
    pairs = texts.pairs(16)
    whole = Recipe((64, 32, 8), 6, 16, None, 1e-3, 0.1, None, 0.0, 7)
    recipes = {tmp_path / "whole": whole, tmp_path / "cached": dataclasses.replace(whole, mini_batch_size=4)}
    alone = tmp_path / "alone"
    training.train_rank(Path(tiny), pairs, whole, "float32", alone, lambda _: None)
    digests = ranks.train_two(Path(tiny), pairs, recipes)

    untrained, one = (SentenceTransformer(str(folder), device="cpu").encode(pairs["query"]) for folder in (tiny, alone))
    assert _cosines(untrained, one).max() < 0.999, "training moved less than the tolerance below allows"
    for target in recipes:
        first, second = digests[target]
        assert first == second, "the replicas drifted apart"
        # The order of summation differs: float32 rounding, carried through six steps.
        np.testing.assert_allclose(_losses(target), _losses(alone), rtol=1e-3)
        # Adam makes full steps of gradients that are zero but for rounding, so weights differ more than losses do.
        two = SentenceTransformer(str(target), device="cpu").encode(pairs["query"])
        assert _cosines(one, two).min() > 0.9995


def test_a_training_that_diverges_leaves_no_model(tmp_path: Path, tiny: str) -> None:
    recipe = Recipe((64, 32), 4, 16, None, 1e38, 0.0, None, 0.0, 7)
    with pytest.raises(RuntimeError, match="the weights are not finite"):
        training.train_rank(Path(tiny), texts.pairs(16), recipe, "float32", tmp_path / "model", lambda _: None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_fewer_pairs_than_a_batch_are_refused_before_training(tmp_path: Path, data: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"\d+ training pairs are fewer than one batch of 1000"):
        finetune.run(_settings(tmp_path / "model", data, tiny, batch_size=1000))
    assert not (tmp_path / "model").exists()


def test_a_batch_that_cannot_be_shared_is_refused_before_training(tmp_path: Path, data: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="--batch-size 15 cannot be shared by 2 workers"):
        _settings(tmp_path / "model", data, tiny, batch_size=15, workers=2)

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from matryoshka import model, training
from matryoshka.nested import shrink
from matryoshka.recipe import Recipe

PAIRS = {
    "query": ["sort a list in place", "open a file for reading", "train a network", "number of dimensions"],
    "positive": ["list.sort orders its items", "open(path) returns a file", "fit weights to data", "ndarray.ndim is a count"],
}
RECIPE = Recipe(
    dims=(384, 64), num_steps=1, batch_size=4, mini_batch_size=None, learning_rate=1e-4, warmup=0.0, max_tokens=None,
    dropout=0.0, seed=7,
)  # fmt: skip
PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture
def small_model(minilm_copy: Callable[..., Path]) -> Path:
    """The first of the model's six layers, which trains in a second."""
    model.quieten()
    return minilm_copy(config={"num_hidden_layers": 1}, config_sentence_transformers={"prompts": PROMPTS})


def train(folder: Path, target: Path, recipe: Recipe) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = []
    training.train_rank(folder, PAIRS, recipe, "float32", target, entries.append)
    return entries


def loss_by_hand(folder: Path, dims: tuple[int, ...]) -> float:
    """Cross-entropy of each query over all documents of the batch, cosines times 20, summed over dims.

    Source: Henderson et al. 2017, arXiv:1705.00652, equation 6; Kusupati et al. 2022, arXiv:2205.13147, equation 1.
    """
    network = model.load(folder, "cpu")
    queries = network.encode([PROMPTS["query"] + text for text in PAIRS["query"]])
    documents = network.encode([PROMPTS["document"] + text for text in PAIRS["positive"]])
    total = 0.0
    for dim in dims:
        scores = 20 * shrink(queries, dim).astype(np.float64) @ shrink(documents, dim).T
        total += float(np.mean(np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)))
    return total


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_the_first_loss_is_what_its_definition_gives(tmp_path: Path, small_model: Path, mini_batch_size: int | None):
    recipe = dataclasses.replace(RECIPE, mini_batch_size=mini_batch_size)
    (entry,) = train(small_model, tmp_path / "out", recipe)
    assert entry["step"] == 1
    # Two float32 forward passes with different padding, cosines times 20.
    assert entry["loss"] == pytest.approx(loss_by_hand(small_model, RECIPE.dims), rel=1e-4)


def test_training_lowers_the_loss_and_leaves_a_whole_model(tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "out"
    entries = train(small_model, target, dataclasses.replace(RECIPE, num_steps=3, max_tokens=16))
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert loss_by_hand(target, RECIPE.dims) < entries[0]["loss"]
    assert json.loads((target / training.LOG).read_text()) == entries
    tuned = model.load(target, "cpu")
    assert tuned.max_seq_length == 256
    assert {role: tuned.prompts[role] for role in PROMPTS} == PROMPTS
    assert model.describe(str(target)).fingerprint != model.describe(str(small_model)).fingerprint
    assert capsys.readouterr().out == ""


def test_the_same_recipe_gives_the_same_model(tmp_path: Path, small_model: Path):
    first, again = (train(small_model, tmp_path / name, RECIPE) for name in ("one", "two"))
    assert first == again
    assert model.describe(str(tmp_path / "one")).fingerprint == model.describe(str(tmp_path / "two")).fingerprint


def test_weights_that_are_no_longer_finite_are_an_error_and_no_model(tmp_path: Path, small_model: Path):
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, num_steps=3)
    with pytest.raises(RuntimeError, match=r"finetune: the weights are not finite after training\. Pass a lower --learning-rate"):
        train(small_model, tmp_path / "out", recipe)
    assert not list((tmp_path / "out").rglob("*.safetensors"))

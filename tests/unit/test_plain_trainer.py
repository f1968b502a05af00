"""The plain script trains on what it is given, in order, by the loss that models are judged by."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import texts

from matryoshka import model
from matryoshka.plain_trainer import Script, held_out_loss
from matryoshka.recipe import Recipe

BATCH = 8
RECIPE = Recipe(dims=(64, 16), num_steps=2, batch_size=BATCH, learning_rate=1e-4, max_tokens=12)
PROMPTS = {"query": "baba ", "document": "dede "}


@pytest.fixture
def prompted(tiny: str, tmp_path: Path) -> Path:
    """The tiny model, with prompts."""
    folder = tmp_path / "prompted"
    shutil.copytree(tiny, folder)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": PROMPTS}))
    return folder


def loss_by_hand(folder: Path, pairs: dict[str, list[str]]) -> float:
    """Cross-entropy of each query over all documents, cosines times 20, summed over dims."""
    network = model.load(folder, "cpu")
    network.max_seq_length = RECIPE.max_tokens
    queries = network.encode([PROMPTS["query"] + text for text in pairs["query"]])
    documents = network.encode([PROMPTS["document"] + text for text in pairs["positive"]])
    total = 0.0
    for dim in RECIPE.dims:
        left, right = (part[:, :dim] / np.linalg.norm(part[:, :dim], axis=1, keepdims=True) for part in (queries, documents))
        scores = 20 * left.astype(np.float64) @ right.T
        total += float(np.mean(np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)))
    return total


def test_the_held_out_loss_is_the_mean_over_whole_batches(prompted: Path):
    pairs = texts.pairs(2 * BATCH + 3)
    by_hand = [loss_by_hand(prompted, {name: own[first : first + BATCH] for name, own in pairs.items()}) for first in (0, BATCH)]
    # Sums of float32 in another order, cosines times 20.
    assert held_out_loss(prompted, "cpu", RECIPE, pairs) == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_the_script_takes_the_pairs_in_order_by_the_same_loss_and_saves_a_better_model(prompted: Path, tmp_path: Path):
    pairs = texts.pairs(2 * BATCH)
    first = {name: own[:BATCH] for name, own in pairs.items()}
    steps: list[int] = []
    losses: list[float] = []
    script = Script(prompted, RECIPE, "float32", in_order=True)
    script.train(pairs, tmp_path / "tuned", steps.append, losses.append)
    assert steps == [0, 1]
    assert losses[0] == pytest.approx(loss_by_hand(prompted, first), rel=1e-4)
    assert held_out_loss(tmp_path / "tuned", "cpu", RECIPE, first) < losses[0]

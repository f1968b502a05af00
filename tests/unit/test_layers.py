import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import texts
import tiny_model
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from matryoshka import layers, model
from matryoshka.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = dataclasses.replace(small_runs.RECIPE, num_steps=2)
GROUPS = ["embeddings", "head", "layer 0", "layer 1"]
FAMILIES = ["bert", "distilbert", "electra", "modernbert", "mpnet", "qwen3", "roberta"]

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def made(family: str = "bert", **options: Any) -> Any:
        return model.load(tiny_model.save(tmp_path / family, seed=3, family=family, **options), "cpu")

    return made


def rates(network: Any, recipe: Recipe) -> dict[str, float]:
    """Returns the learning rate of every parameter that has one."""
    names = {id(own): name for name, own in network.named_parameters()}
    return {names[id(own)]: group["lr"] for group in layers.optimiser_groups(network, recipe) for own in group["params"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_below_the_layers_in_one_of_them_or_above(family: str, load: Load):
    network = load(family)
    groups = layers.group_of_parameters(network)
    assert list(groups) == [name for name, _ in network.named_parameters()]
    assert set(groups.values()) <= set(GROUPS)
    for name, group in groups.items():
        number = next((part for part in name.split(".") if part.isdecimal() and part != "0"), "0")
        is_layer = ".layer." in name or ".layers." in name
        assert (group == f"layer {number}") == is_layer, name
        if not is_layer:
            assert (group == "embeddings") == ("embed" in name or "relative_attention_bias" in name), name


def test_modules_after_the_transformer_are_its_head(load: Load):
    groups = layers.group_of_parameters(load(tail=[Dense(tiny_model.WIDTH, 8)]))
    assert {group for name, group in groups.items() if name.startswith("2.")} == {"head"}


def test_a_model_without_layers_is_refused():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"finetune: Linear has no layers to choose from\. Leave --top-layers out"):
        layers.find_layers(network)


@pytest.mark.parametrize(("top_layers", "trained"), [(None, GROUPS), (2, GROUPS[1:]), (1, ["head", "layer 1"]), (0, ["head"])])
def test_the_top_layers_and_what_stands_above_them_are_trained(top_layers: int | None, trained: list[str], load: Load):
    network = load()
    layers.choose(network, dataclasses.replace(RECIPE, top_layers=top_layers))
    assert sorted(layers.count_trainable(network)) == trained
    counts = layers.count_trainable(network)
    assert sum(counts.values()) == sum(own.numel() for own in network.parameters() if own.requires_grad)


def test_more_top_layers_than_the_model_has_are_refused(load: Load):
    with pytest.raises(ValueError, match=r"--top-layers 3: the model has 2 layers\. Pass at most 2\."):
        layers.choose(load(), dataclasses.replace(RECIPE, top_layers=3))


def test_each_layer_learns_at_the_rate_of_the_one_above_it_times_the_decay(load: Load):
    network = load()
    groups = layers.group_of_parameters(network)
    wanted = {"head": 1e-3, "layer 1": 1e-3, "layer 0": 5e-4, "embeddings": 2.5e-4}
    found = rates(network, dataclasses.replace(RECIPE, layer_decay=0.5))
    assert found == pytest.approx({name: wanted[group] for name, group in groups.items()})
    assert set(rates(network, RECIPE).values()) == {1e-3}


def test_what_is_frozen_has_no_learning_rate(load: Load):
    network = load()
    layers.choose(network, dataclasses.replace(RECIPE, top_layers=1))
    groups = layers.group_of_parameters(network)
    assert {groups[name] for name in rates(network, RECIPE)} == {"head", "layer 1"}


def test_parameters_that_no_vector_depends_on_are_frozen_and_leave_no_gradients(load: Load):
    network = load()
    layers.freeze_unused(network, lambda: network(network.preprocess(["bada"]))["sentence_embedding"])
    frozen = {name for name, own in network.named_parameters() if not own.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if "pooler" in name}
    assert all(own.grad is None for own in network.parameters())


def test_a_recipe_that_leaves_nothing_to_train_is_refused(tmp_path: Path, tiny: str):
    job = small_runs.make_job(tmp_path, tiny, recipe=dataclasses.replace(RECIPE, top_layers=0))
    with pytest.raises(ValueError, match=r"--top-layers 0: nothing stands above the model's layers.*Pass at least 1\."):
        small_runs.train(job)
    assert not (job.target).exists()


@pytest.mark.parametrize("top_layers", [0, 1, 2])
def test_training_leaves_frozen_weights_bit_for_bit_and_moves_the_others(top_layers: int, tmp_path: Path):
    base = tiny_model.save(tmp_path / "base", seed=3, tail=[Dense(tiny_model.WIDTH, 64)])
    groups = layers.group_of_parameters(model.load(base, "cpu"))
    recipe = dataclasses.replace(RECIPE, top_layers=top_layers)
    job = small_runs.make_job(tmp_path / "run", base, recipe=recipe)
    small_runs.train(job)
    before, after = (dict(model.load(folder, "cpu").named_parameters()) for folder in (base, job.target))
    trained = {"head", *(f"layer {number}" for number in range(2 - top_layers, 2))}
    for name, group in groups.items():
        is_same = torch.equal(before[name], after[name])
        assert is_same == (group not in trained or "pooler" in name), name
    summary = small_runs.log(job)["summary"]
    assert set(summary["trainable"]) == trained


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet", "qwen3"])
def test_merging_low_rank_additions_leaves_the_vectors_as_they_are(family: str, load: Load):
    network = load(family)
    plain = network.encode(texts.WORDS[:9])
    layers.choose(network, dataclasses.replace(RECIPE, lora_rank=4))
    np.testing.assert_array_equal(network.encode(texts.WORDS[:9]), plain)  # they begin as nothing
    with torch.no_grad():
        for own in network.parameters():
            if own.requires_grad:
                own.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    unmerged = network.encode(texts.WORDS[:9])
    assert np.abs(unmerged - plain).max() > 0.01
    layers.merge_low_rank(network)
    np.testing.assert_allclose(network.encode(texts.WORDS[:9]), unmerged, atol=2e-5)
    assert not [name for name, _ in network.named_modules() if "lora" in name]


@pytest.mark.parametrize("top_layers", [None, 1])
def test_low_rank_training_changes_linear_weights_of_its_layers_alone_and_saves_a_plain_model(
    top_layers: int | None, tmp_path: Path, tiny: str
):
    recipe = dataclasses.replace(RECIPE, lora_rank=4, top_layers=top_layers, learning_rate=1e-2)
    job = small_runs.make_job(tmp_path, tiny, recipe=recipe)
    small_runs.train(job)
    before, after = small_runs.weights(Path(tiny)), small_runs.weights(job.target)
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    trained = ("layer.1.",) if top_layers == 1 else ("layer.0.", "layer.1.")
    wanted = {name for name in before if any(part in name for part in trained) and name.endswith("weight") and "Norm" not in name}
    assert moved == wanted
    assert SentenceTransformer(str(job.target), device="cpu").encode("bada").shape == (tiny_model.WIDTH,)
    assert not [path for path in job.target.rglob("*") if "adapter" in path.name]
    configs = [path for path in job.target.rglob("*.json") if path.name not in ("tokenizer.json", "training_log.json")]
    assert not [path for path in configs if "lora" in path.read_text() or "peft" in path.read_text()]
    assert {str(path.relative_to(tiny)) for path in Path(tiny).rglob("*")} == {
        str(path.relative_to(job.target)) for path in job.target.rglob("*") if path.name != "training_log.json"
    }


def test_low_rank_additions_and_their_optimiser_state_survive_a_kill(tmp_path: Path, tiny: str):
    recipe = dataclasses.replace(RECIPE, lora_rank=4, num_steps=4, checkpoint_steps=2, learning_rate=1e-2)
    job = small_runs.make_job(tmp_path / "whole", tiny, recipe=recipe)
    small_runs.train(job)
    killed = small_runs.again(job, "killed")
    with pytest.raises(small_runs.KilledError):
        small_runs.train(killed, dies_at=3)
    small_runs.train(killed)
    assert small_runs.are_same(small_runs.weights(job.target), small_runs.weights(killed.target))

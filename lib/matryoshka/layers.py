"""What of a model is trained: everything, its top layers, or low-rank additions to them; and how fast each layer learns.

The only room that knows peft.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matryoshka.recipe import Recipe

_LORA_SCALE = 2  # alpha over rank, as is usual


def find_layers(network: Any) -> torch.nn.ModuleList:
    """Returns the transformer's layers, lowest first.

    Raises:
        ValueError: It has no list of layers.
    """
    lists = [part for part in network[0].modules() if isinstance(part, torch.nn.ModuleList)]
    if not lists:
        raise ValueError(f"finetune: {type(network[0]).__name__} has no layers to choose from. Leave --top-layers out.")
    return max(lists, key=len)


def group_of_parameters(network: Any) -> dict[str, str]:
    """Returns the layer group of every parameter: ``embeddings`` (and what lies between them and the layers), ``layer 0``
    and so on, or ``head`` (what comes after).
    """
    owners = {id(own): f"layer {number}" for number, layer in enumerate(find_layers(network)) for own in layer.parameters()}
    tables = (part for part in network[0].modules() if isinstance(part, torch.nn.Embedding))
    embedded = {id(own) for table in tables for own in table.parameters()}  # MPNet has one behind its layers
    groups: dict[str, str] = {}
    is_below = True
    for name, own in network.named_parameters():
        is_below = is_below and id(own) not in owners
        groups[name] = owners.get(id(own)) or ("embeddings" if is_below or id(own) in embedded else "head")
    return groups


def choose(network: Any, recipe: Recipe) -> None:
    """Freezes what a recipe does not train; with a rank, gives the layers that it does train low-rank additions.

    Raises:
        ValueError: More layers are asked for than there are.
    """
    layers = find_layers(network)
    if recipe.top_layers is not None and recipe.top_layers > len(layers):
        raise ValueError(f"--top-layers {recipe.top_layers}: the model has {len(layers)} layers. Pass at most {len(layers)}.")
    lowest = 0 if recipe.top_layers is None else len(layers) - recipe.top_layers
    if recipe.lora_rank:
        _add_low_rank(network, layers, lowest, recipe.lora_rank)
    elif recipe.top_layers is not None:
        frozen = {"embeddings", *(f"layer {number}" for number in range(lowest))}
        groups = group_of_parameters(network)
        for name, own in network.named_parameters():
            own.requires_grad_(groups[name] not in frozen)


def check_low_rank() -> None:
    """Checks that low-rank additions can be trained.

    Raises:
        ValueError: The package is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora-rank needs the lora extra. Run pip install --editable '.[lora]' in the clone.")


def _add_low_rank(network: Any, layers: torch.nn.ModuleList, lowest: int, rank: int) -> None:
    """Adds trainable low-rank products to the linear parts of layers; everything else is frozen.

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
    """
    from peft import LoraConfig

    trained = {id(part) for layer in layers[lowest:] for part in layer.modules() if isinstance(part, torch.nn.Linear)}
    transformer = network[0].auto_model
    names = [name for name, part in transformer.named_modules() if id(part) in trained]
    config = LoraConfig(r=rank, lora_alpha=_LORA_SCALE * rank, lora_dropout=0.0, target_modules=names)
    network.requires_grad_(False)
    transformer.add_adapter(config)


def merge_low_rank(network: Any) -> None:
    """Adds low-rank products to the weights that they stand beside, so that the model is a plain one again."""
    transformer = network[0].auto_model
    for name, part in list(transformer.named_modules()):
        if hasattr(part, "base_layer") and hasattr(part, "merge"):
            part.merge()
            owner, _, own_name = name.rpartition(".")
            setattr(transformer.get_submodule(owner), own_name, part.get_base_layer())
    if getattr(transformer, "_hf_peft_config_loaded", False):
        transformer._hf_peft_config_loaded = False
        del transformer.peft_config


def freeze_unused(network: Any, embed: Callable[[], Tensor]) -> None:
    """Freezes the parameters that no vector depends on, such as a pooler that is not used: ranks would wait for their gradients.

    Args:
        network: The model.
        embed: Gives some vectors of it.

    Raises:
        ValueError: No vector depends on anything that is trained.
    """
    vectors = embed()
    if not vectors.requires_grad:
        raise ValueError("--top-layers 0: nothing stands above the model's layers that could be trained. Pass at least 1.")
    vectors.sum().backward()  # type: ignore[no-untyped-call]
    for own in network.parameters():
        own.requires_grad_(own.requires_grad and own.grad is not None)
    network.zero_grad(set_to_none=True)


def count_trainable(network: Any) -> dict[str, int]:
    """Returns how many numbers are trained in each layer group that has any."""
    counts: dict[str, int] = {}
    groups = group_of_parameters(network)
    for name, own in network.named_parameters():
        if own.requires_grad:
            counts[groups[name]] = counts.get(groups[name], 0) + own.numel()
    return counts


def optimiser_groups(network: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """Returns the trained parameters with their learning rates: each layer's is that of the one above it times ``layer_decay``.

    Source: Howard and Ruder 2018, ULMFiT, arXiv:1801.06146, section 3.2 (discriminative fine-tuning).
    """
    num_layers = len(find_layers(network))
    depths = {"head": 0, "embeddings": num_layers, **{f"layer {number}": num_layers - 1 - number for number in range(num_layers)}}
    groups = group_of_parameters(network)
    by_depth: dict[int, list[torch.nn.Parameter]] = {}
    for name, own in network.named_parameters():
        if own.requires_grad:
            by_depth.setdefault(depths[groups[name]], []).append(own)
    return [{"params": own, "lr": recipe.learning_rate * recipe.layer_decay**depth} for depth, own in sorted(by_depth.items())]

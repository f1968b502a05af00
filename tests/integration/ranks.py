"""Ranks of a gloo group outside Ray, to see what ``train_rank`` leaves in the memory of each process."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from matryoshka import model, training
from matryoshka.recipe import Recipe


def train_two(folder: Path, pairs: Mapping[str, list[str]], recipes: Mapping[Path, Recipe]) -> dict[Path, list[str]]:
    """Trains every recipe into its folder with two ranks; returns the digests of the weights that each rank ended with."""
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_run_rank, args=(Path(meeting), folder, pairs, recipes), nprocs=2)
        return {target: [(Path(meeting) / f"{target.name}-{rank}").read_text() for rank in range(2)] for target in recipes}


def _run_rank(rank: int, meeting: Path, folder: Path, pairs: Mapping[str, list[str]], recipes: Mapping[Path, Recipe]) -> None:
    # The trainer reads these, as under Ray Train; the ranks meet in a file, so that no port is needed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=2)
    loaded: list[Any] = []
    load = model.load

    def load_and_remember(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    model.load = load_and_remember
    for target, recipe in recipes.items():
        training.train_rank(folder, pairs, recipe, "float32", target, lambda _: None)
        (meeting / f"{target.name}-{rank}").write_text(_digest(loaded[-1]))
    torch.distributed.destroy_process_group()


def _digest(network: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()

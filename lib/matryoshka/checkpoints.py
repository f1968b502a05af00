"""Checkpoints of a training run: trained weights, the optimiser's state, and where the run stood, whole or not at all.

Each is a folder with the digests of its files, which appears by a rename, or in a bucket file by file, its state last; one that
does not fit its digests is passed over.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka import storage
from matryoshka.storage import Place

_STEP, _BEST = "step-", "best-"
_STATE, _WEIGHTS, _OPTIMISER = "state.json", "weights.safetensors", "optimiser.safetensors"
_KEPT = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder, the steps that were done, and whatever else the run wrote down."""

    folder: Place
    step: int
    notes: Mapping[str, Any]

    def load(self, network: Any, optimiser: torch.optim.Optimizer | None = None) -> None:
        """Gives a model its weights, and an optimiser its state, as they were.

        Raises:
            RuntimeError: The weights in the model are not those that were written.
        """
        files = storage.local(self.folder)
        weights = load_file(files / _WEIGHTS)
        trained = dict(network.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                trained[name].copy_(value)
        if digest_of({name: trained[name] for name in weights}) != self.notes["weights_digest"]:
            raise RuntimeError(f"{self.folder}: the weights that were loaded are not those that were written. Run it again.")
        if optimiser:
            _load_optimiser(optimiser, network, load_file(files / _OPTIMISER))


def trained_weights(network: Any) -> dict[str, Tensor]:
    """Returns the parameters that are trained, by name, on the host."""
    return {name: own.detach().cpu().contiguous() for name, own in network.named_parameters() if own.requires_grad}


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Returns the identity of weights: equal numbers under equal names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(
    folder: Place, name: str, network: Any, optimiser: torch.optim.Optimizer | None, step: int, notes: Mapping[str, Any]
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        folder: Of all checkpoints.
        name: Of this one; one of that name is replaced.
        network: Its trained weights are written.
        optimiser: Its state is written as well, where it is given.
        step: Steps that were done.
        notes: More to remember, as JSON.
    """
    weights = trained_weights(network)
    with storage.publish(folder / name, last=_STATE) as temporary:
        temporary.mkdir()
        save_file(weights, temporary / _WEIGHTS)
        if optimiser:
            save_file(_optimiser_tensors(optimiser, network), temporary / _OPTIMISER)
        digests = {path.name: storage.digest_file(path) for path in temporary.iterdir()}
        state = {**notes, "step": step, "weights_digest": digest_of(weights), "digests": digests}
        (temporary / _STATE).write_text(json.dumps({**state, "digest": storage.digest_json(state)}))


def write_step(folder: Place, network: Any, optimiser: torch.optim.Optimizer, step: int, notes: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a step, and removes all but the last two: should the last be damaged, there is another.

    Args:
        folder: Of all checkpoints.
        network: As ``write``.
        optimiser: As ``write``.
        step: As ``write``.
        notes: As ``write``; ``best_step`` names a best checkpoint that is kept as long as this one.
    """
    name = f"{_STEP}{step:08d}"
    write(folder, name, network, optimiser, step, notes)
    kept = sorted(path for path in folder.glob(f"{_STEP}*") if path.name <= name)[-_KEPT:]
    best_steps = set(map(_best_step, kept)) - {None}
    needed = {path.name for path in kept} | {f"{_BEST}{best_step:08d}" for best_step in best_steps}
    for path in [*folder.glob(f"{_STEP}*"), *folder.glob(f"{_BEST}*")]:
        if path.name not in needed:
            storage.remove(path)


def _best_step(path: Place) -> int | None:
    try:
        found: int | None = json.loads((path / _STATE).read_bytes()).get("best_step")
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):  # no other: what is needed must not be removed
        return None
    return found


def write_best(folder: Place, network: Any, step: int, notes: Mapping[str, Any]) -> None:
    """Writes the weights of a step that was the best so far; the best of a checkpoint from before it stays."""
    write(folder, f"{_BEST}{step:08d}", network, None, step, notes)


def best(folder: Place, step: int, identity: str) -> Checkpoint | None:
    """Returns the weights that ``write_best`` wrote for a step, or None, with a warning, where they are damaged.

    Raises:
        ValueError: They are of another run.
    """
    return read(folder / f"{_BEST}{step:08d}", identity)


def latest(folder: Place, identity: str) -> Checkpoint | None:
    """Returns the last whole checkpoint of a run whose best weights are whole as well, or None where there is none.

    Raises:
        ValueError: It is of another run.
    """
    paths: list[Place] = sorted(folder.glob(f"{_STEP}*"), key=lambda path: path.name, reverse=True)
    for path in paths:
        found = read(path, identity)
        best_step = found.notes.get("best_step") if found else None
        if found and (best_step is None or best(folder, best_step, identity)):
            return found
    return None


def read(path: Place, identity: str) -> Checkpoint | None:
    """Returns the checkpoint in a folder, or None, with a warning, where it is damaged.

    Args:
        path: The folder.
        identity: Of the run, as its notes have it.

    Raises:
        ValueError: It is of another run: of another model, other data or another recipe.
    """
    if not path.is_dir():
        return None
    files = storage.local(path)  # whatever is there of it; a bucket that cannot be reached is no damage
    try:
        state = json.loads((files / _STATE).read_bytes())
        is_whole = state.pop("digest") == storage.digest_json(state)
        is_whole = is_whole and all(storage.digest_file(files / name) == digest for name, digest in state["digests"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        logger.warning("%s: a damaged checkpoint is passed over", path)
        return None
    if state.get("identity") != identity:
        raise ValueError(
            f"{path}: a checkpoint of another model, other data or another recipe. Take it out, or pass --replace to begin anew."
        )
    return Checkpoint(path, int(state["step"]), state)


def _optimiser_tensors(optimiser: torch.optim.Optimizer, network: Any) -> dict[str, Tensor]:
    names = {id(own): name for name, own in network.named_parameters()}
    return {
        f"{kind}/{names[id(own)]}": value.detach().cpu().contiguous()
        for own, state in optimiser.state.items()
        for kind, value in state.items()
    }


def _load_optimiser(optimiser: torch.optim.Optimizer, network: Any, tensors: Mapping[str, Tensor]) -> None:
    trained = dict(network.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        own = trained[name]
        # Fused optimisers count steps on the device.
        optimiser.state[own][kind] = value.to(own.device)

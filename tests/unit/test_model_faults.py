import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from matryoshka import model, storage

Copy = Callable[..., Path]


def write_folder(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / name
        path = path.with_suffix(".safetensors" if name == "model" else ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "vocab.txt").touch()
    return folder


FAULTS = {
    "no model": ({"notes": {}}, r": no model here \(no modules\.json or config\.json\)\. Pass a sentence-transformers folder"),
    "no weights": ({"config": {"hidden_size": 64}}, r": no \*\.safetensors weights .*Save the model as safetensors"),
    "no width": ({"config": {}, "model": {}}, r": no width found .*Pass a text embedding model"),
    "modules are no list": ({"modules": {"a": 1}, "model": {}}, r"modules\.json"),
    "modules without path": ({"modules": [{"idx": 0}], "model": {}}, r"modules\.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_no_usable_model_is_named(tmp_path: Path, fault: str):
    files, message = FAULTS[fault]
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}" if message.startswith(":") else message):
        model.describe(str(write_folder(tmp_path, **files)))


def test_a_model_that_changes_while_it_is_fetched_is_not_called_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def change(place: Path) -> Path:
        raise storage.ChangedError(f"{place}: changed while it was read.")

    monkeypatch.setattr(storage, "local", change)
    with pytest.raises(storage.ChangedError, match="changed while it was read"):
        model.load(tmp_path, "cpu")


def test_pickled_weights_are_not_loaded(tmp_path: Path):
    write_folder(tmp_path, config={"hidden_size": 64})
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no \*\.safetensors weights \(pickled ones are not loaded\)"):
        model.describe(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere/to/be/found", "no-such-owner/no-such-model", "spaces are no name"])
def test_a_model_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"{name}: no such folder, and not to be had from the hub \(.*\)\. Pass a model folder"):
        model.describe(name)


def cut_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()[:100_000]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(weights)


def test_a_model_without_tokenizer_is_named(tmp_path: Path):
    # Without one every word would become the same unknown token, and every text about the same vector.
    (write_folder(tmp_path, config={"hidden_size": 64}, model={}) / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}: no tokenizer .*Save the model with its tokenizer"):
        model.describe(str(tmp_path))


DAMAGES = {
    "cut weights": cut_weights,
    "no pooling": lambda folder: (folder / "1_Pooling" / "config.json").unlink(),
    "no architecture": lambda folder: (folder / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_by_name(minilm_copy: Copy, damage: str):
    folder = minilm_copy()
    DAMAGES[damage](folder)
    with pytest.raises(ValueError, match=rf"{folder}: "):
        model.load(folder, "cpu")

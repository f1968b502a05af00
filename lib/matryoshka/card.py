"""The card of a tuned model: what it was made from, how, and what the dev split says of it, for people and for model hubs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matryoshka import storage
from matryoshka.artifacts import Manifest
from matryoshka.dev import DEV, HEADLINE
from matryoshka.model import ModelInfo
from matryoshka.recipe import Recipe
from matryoshka.storage import Place

NAME = "README.md"

Entries = Sequence[Mapping[str, float]]

_HEADER = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- matryoshka
---
"""


def conclude(entries: Entries, summary: Mapping[str, Any]) -> str:
    """Returns in one sentence what the dev split says, and whose weights were kept."""
    before, after = _before_and_after(entries, summary)
    if not before or not after:
        return f"the weights of step {summary['kept_step']}, the last, are kept: no dev split was looked at"
    kept = "no step was better than the untouched model, which is kept" if not summary["kept_step"] else (
        f"the best weights, those of step {summary['kept_step']}, are kept"
    )  # fmt: skip
    early = f" after an early end at step {summary['stopped_at']}" if summary["stopped_at"] is not None else ""
    return f"on dev, mean {HEADLINE} over all dims went from {before[DEV]:.3f} to {after[DEV]:.3f}; {kept}{early}"


def _before_and_after(entries: Entries, summary: Mapping[str, Any]) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Returns the dev split's figures of the untouched model and of the weights that were kept."""
    by_step = {entry["step"]: entry for entry in entries if DEV in entry}
    return by_step.get(0, {}), by_step.get(summary["kept_step"], {})


def write(path: Place, base: ModelInfo, data: Manifest, recipe: Recipe, entries: Entries, summary: Mapping[str, Any]) -> None:
    """Writes a model's card.

    Args:
        path: The file.
        base: The model that was tuned.
        data: Manifest of the dataset.
        recipe: How it was tuned.
        entries: The log of the run.
        summary: What the run says of itself.
    """
    dims = ", ".join(map(str, recipe.dims))
    lines = [
        _HEADER,
        f"# {base.folder.name}, tuned for {dims} dims",
        "",
        f"A sentence-transformers model of {base.width} dims whose vectors may be cut to any of {dims}: take the first so many",
        "numbers and bring them back to unit length.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("path/to/this/folder", truncate_dim={recipe.dims[-1]})',
        'queries, documents = model.encode_query(["a question"]), model.encode_document(["a document"])',
        "print(model.similarity(queries, documents))",
        "```",
        "",
        "## Quality on the dev split",
        "",
        *_quality(recipe, entries, summary),
        "## Training",
        "",
        *_training(base, data, recipe, summary),
    ]
    storage.publish_bytes(path, ("\n".join(lines) + "\n").encode())


def _quality(recipe: Recipe, entries: Entries, summary: Mapping[str, Any]) -> list[str]:
    before, after = _before_and_after(entries, summary)
    if not before or not after:
        return ["It was not measured while training.", ""]
    rows = [f"| {dim} | {before[f'{DEV}_{dim}']:.3f} | {after[f'{DEV}_{dim}']:.3f} |" for dim in recipe.dims]
    note = f"{HEADLINE} in a pool of documents, before and after; figures in a whole corpus are lower."
    return [note, "", "| dim | before | after |", "| ---: | ---: | ---: |", *rows, ""]


def _training(base: ModelInfo, data: Manifest, recipe: Recipe, summary: Mapping[str, Any]) -> list[str]:
    counts = data.facts["queries"]
    facts = {
        "base": f"`{base.folder.name}`, fingerprint `{base.fingerprint[:16]}`",
        "data": f"fingerprint `{data.fingerprint[:16]}`, {counts.get('train', 0):,} train queries",
        "loss": f"multiple negatives ranking at {', '.join(map(str, recipe.dims))} dims",
        "steps": f"{recipe.num_steps} of {recipe.batch_size} pairs, {summary['tokens_per_step']:,} tokens each",
        "hard negatives": f"{recipe.num_negatives} per pair",
        "learning rate": f"{recipe.learning_rate:g}, {recipe.warmup:.0%} of the steps rising, layer decay {recipe.layer_decay:g}",
        "trained": ", ".join(f"{group}: {count:,}" for group, count in summary["trainable"].items()),
        "weights kept": f"those of step {summary['kept_step']}",
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())]

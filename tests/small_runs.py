"""Training runs without Ray: small pairs made into jobs, an observer that can be told to die, and what a run left behind."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import texts
from safetensors.numpy import load_file

from matryoshka import examples, metrics, model, nested, training, units
from matryoshka.dev import DevSet
from matryoshka.examples import Examples
from matryoshka.recipe import Recipe
from matryoshka.training import Job

RECIPE = Recipe(dims=(64, 16), num_steps=4, batch_size=8, learning_rate=1e-3, warmup=0.0)


class KilledError(Exception):
    """Stands for the end of a process, where a real one would take too long."""


@dataclass
class Observer:
    """Remembers the log; dies before the step after ``dies_at`` steps, as a killed process does: without another word."""

    dies_at: int | None = None
    wanted: frozenset[int] = frozenset()
    entries: list[dict[str, float]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def begin(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)

    def log(self, entry: Mapping[str, float]) -> None:
        self.entries.append(dict(entry))

    def wants_checkpoint(self, step: int) -> bool:
        if step == self.dies_at:
            raise KilledError
        return step in self.wanted

    def before_writing(self) -> None:
        pass

    def checkpointed(self, step: int) -> None:
        self.checkpoints.append(step)


def write_pairs(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Writes pairs, with ids if they have none, and returns the path."""
    numbers = range(len(columns["query"]))
    ids = {"query_id": [f"q{number}" for number in numbers], "document_id": [f"d{number}" for number in numbers]}
    return texts.write_parquet(path, {**ids, **columns})


def tokenise(folder: Path, base: Path, columns: Mapping[str, Sequence[Any]], num_parts: int = 2, **options: Any) -> Any:
    """Returns (pair files, parts) of some pairs below a folder, dealt out to several files.

    Args:
        folder: Where to.
        base: The model whose tokeniser is used.
        columns: ``query``, ``positive`` and so on.
        num_parts: How many files.
        options: ``num_negatives``, ``max_tokens``.
    """
    tokeniser = training.make_tokeniser(model.load(base, "cpu"), options.get("max_tokens"))
    edges = [len(columns["query"]) * number // num_parts for number in range(num_parts + 1)]
    files = [
        write_pairs(
            folder / f"pairs-{number}.parquet",
            {name: values[edges[number] : edges[number + 1]] for name, values in columns.items()},
        )
        for number in range(num_parts)
    ]
    parts = [folder / "parts" / str(number) for number in range(num_parts)]
    for file, part in zip(files, parts, strict=True):
        examples.tokenise_part(file, part, tokeniser, options.get("num_negatives", 0))
    return tuple(files), tuple(parts)


def make_job(
    folder: Path, base: str | Path, columns: Mapping[str, Sequence[Any]] | None = None, recipe: Recipe = RECIPE, **more: Any
) -> Job:
    """Returns a job in float32 whose files are below a folder; ``more`` is of the job.

    Args:
        folder: Of its own.
        base: The model.
        columns: Of the pairs; some that can be learned, if not given.
        recipe: What to do.
        more: Further attributes.
    """
    columns = columns or texts.pairs(24)
    files, parts = tokenise(folder, Path(base), columns, num_negatives=recipe.num_negatives, max_tokens=recipe.max_tokens)
    named = {"precision": "float32", "identity": "this run", "output": folder, "target": folder / "model"}
    return Job(base=Path(base), parts=parts, pair_files=files, recipe=recipe, **{**named, **more})


def dev_set(num_queries: int, num_documents: int, *, is_chunked: bool = False) -> DevSet:
    """Returns queries each with the document that answers it, and other documents; chunked, each is cut into two."""
    made = texts.pairs(num_documents)
    documents = {f"d{number}": text for number, text in enumerate(made["positive"])}
    if is_chunked:
        halves = ((name, text, len(text) // 2) for name, text in documents.items())
        cuts = ((name, text, edges) for name, text, half in halves for edges in ((0, half), (half, len(text))))
        documents = {units.chunk_id(name, *edges): text[slice(*edges)] for name, text, edges in cuts}
    # The last ones, so that a model for which all texts are the same finds nothing: where scores are equal, ids decide.
    numbers = range(num_documents - num_queries, num_documents)
    queries = {f"q{number}": made["query"][number] for number in numbers}
    qrels = {f"q{number}": {f"d{number}": 1, f"d{num_documents // 2}": 1} for number in numbers}
    return DevSet(queries, documents, qrels, is_chunked)


def figures_by_hand(base: str | Path, dev: DevSet, dims: Sequence[int]) -> dict[str, float]:
    """Returns nDCG@10 of a model on a dev set, per dim and on average: each document counts with its best chunk."""
    network = model.load(Path(base), "cpu")
    queries, documents = (network.encode(list(part.values())) for part in (dev.queries, dev.documents))
    found: dict[str, float] = {}
    for dim in dims:
        rankings = []
        for scores in nested.shrink(queries, dim) @ nested.shrink(documents, dim).T:
            best: dict[str, float] = {}
            for name, score in zip(dev.documents, scores.tolist(), strict=True):
                owner = units.document_of(name) if dev.is_chunked else name
                best[owner] = max(score, best.get(owner, -2))
            rankings.append(sorted(best, key=lambda name: (-best[name], name))[: metrics.SHALLOW])
        found[f"dev_nDCG@10_{dim}"] = metrics.measure(dev.qrels, list(dev.queries), rankings)["nDCG@10"]
    return {**found, "dev_nDCG@10": float(np.mean(list(found.values())))}


def again(job: Job, name: str, **changes: Any) -> Job:
    """Returns the job with another output beside its own, and changes to its recipe."""
    output = job.output.with_name(name)
    return replace(job, output=output, target=output / "model", recipe=replace(job.recipe, **changes))


def train(job: Job, **observer: Any) -> Observer:
    """Trains alone, and returns what was observed."""
    watch = Observer(**observer)
    training.train_rank(job, watch)
    return watch


def open_pairs(job: Job) -> Examples:
    """Returns the pairs of a job as a rank sees them."""
    return Examples.open(job.parts, job.recipe.num_negatives)


def log(job: Job) -> dict[str, Any]:
    """Returns the log that a run left beside its model, but for where its last process began."""
    found: dict[str, Any] = json.loads((job.target / model.TRAINING_LOG).read_text())
    found["summary"].pop("first_step")
    return found


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Returns all weights of a saved model, by file and name."""
    return {
        f"{path.relative_to(folder)}/{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def furthest(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference between two models' weights."""
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def are_same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    """Returns whether two models have the same weights, bit for bit."""
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def _is_same(left: str, right: str) -> bool:
    return " ".join(left.split()).casefold() == " ".join(right.split()).casefold()


def masked_by_hand(
    columns: Mapping[str, Sequence[Any]], rows: Sequence[int], all_rows: Sequence[int], num_negatives: int
) -> np.ndarray:
    """Asks for every query and every document: is it known to answer the query, of its label, or not there at all?"""
    documents: list[str | None] = [columns["positive"][row] for row in all_rows]
    for number in range(num_negatives):
        lists = [columns["negatives"][row] or [] for row in all_rows]
        documents += [own[number] if number < len(own) else None for own in lists]
    mask = np.zeros((len(rows), len(documents)), dtype=bool)
    for place, row in enumerate(rows):
        query, label = columns["query"][row], columns.get("label", [None] * len(columns["query"]))[row]
        answers = [text for own, text in zip(columns["query"], columns["positive"], strict=True) if _is_same(own, query)]
        siblings = [
            text
            for kind in ("query", "positive")
            for text, own in zip(columns[kind], columns.get("label", []), strict=False)
            if own == label
        ]
        for number, text in enumerate(documents):
            mask[place, number] = text is None or any(_is_same(text, known) for known in [*answers, *siblings])
        mask[place, all_rows.index(row)] = False
    return mask

"""What lies behind a report: how the model was trained, where the time of embedding went, and what ran on which machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from matryoshka import artifacts, model, storage
from matryoshka.clock import PHASES
from matryoshka.dev import DEV
from matryoshka.storage import Place

_DEV = "dev_"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A figure of the dev split while training; ``dim`` is None for the mean over all dims."""

    step: int
    metric: str
    dim: int | None
    value: float


@dataclass(frozen=True, slots=True)
class Training:
    """How a model was trained.

    Attributes:
        curves: Entries of the log: step, mean loss since the last one, learning rate, norm of the gradient.
        evaluations: Of the dev split.
        kept_step: Whose weights were kept.
        num_steps: Taken.
        num_pairs: Seen, each as often as it was.
        num_ranks: That shared the work.
        seconds: Of the run that finished; one that it went on from is not counted.
    """

    curves: tuple[Mapping[str, float], ...]
    evaluations: tuple[Evaluation, ...]
    kept_step: int
    num_steps: int
    num_pairs: int
    num_ranks: int
    seconds: float | None

    @classmethod
    def read(cls, folder: Place) -> Self:
        """Returns how the model in a folder was trained.

        Raises:
            ValueError: This project did not train it, or its log cannot be read.
        """
        manifest = artifacts.read_complete(folder, "model")
        record = storage.read_json(folder / model.TRAINING_LOG)
        summary, recipe, entries = record["summary"], record["recipe"], record["entries"]
        num_steps = recipe["num_steps"] if summary["stopped_at"] is None else summary["stopped_at"]
        return cls(
            tuple(entry for entry in entries if "loss" in entry),
            tuple(figure for entry in entries for figure in _evaluations(entry)),
            summary["kept_step"],
            num_steps,
            num_steps * recipe["batch_size"],
            summary["num_ranks"],
            manifest.facts.get("train_seconds"),
        )


def _evaluations(entry: Mapping[str, float]) -> list[Evaluation]:
    """Returns the figures of the dev split in an entry of the log: ``dev_nDCG@10_64`` and so on."""
    found = []
    for name, value in entry.items():
        if name.startswith(DEV):
            dim = name.removeprefix(DEV).removeprefix("_")
            found.append(Evaluation(int(entry["step"]), DEV.removeprefix(_DEV), int(dim) if dim else None, value))
    return found


@dataclass(frozen=True, slots=True)
class Embedding:
    """Where the time of embedding went.

    Attributes:
        seconds: Of all workers together, by phase; where phases overlap, an instant belongs to the first: ``compute``, ``read``
            (with tokenising), ``write``, ``idle``.
        documents: How many.
        tokens: Real ones.
        padding: Share of the computed tokens that were none.
    """

    seconds: Mapping[str, float]
    documents: int
    tokens: int
    padding: float

    @classmethod
    def read(cls, folder: Place) -> Self:
        """Returns where the time of the embeddings in a folder went, over all runs that made them.

        Raises:
            ValueError: There are none, or they are not finished.
        """
        receipts = artifacts.read_complete(folder, "embeddings").receipts

        def total(name: str) -> float:
            return float(sum(receipt.details.get(name, 0) for receipt in receipts))

        seconds = {phase: round(total(f"{phase}_seconds"), 3) for phase in PHASES}
        tokens, computed = int(total("num_tokens")), total("num_padded_tokens")
        documents = sum(receipt.num_rows for receipt in receipts)
        return cls(seconds, documents, tokens, round(1 - tokens / computed, 4) if computed else 0.0)


@dataclass(frozen=True, slots=True)
class Environment:
    """What ran, and on what.

    Attributes:
        versions: Of the packages that decide the outcome.
        python: Its version.
        hardware: Of the machine that the report was written on.
        commands: The stages, each as it can be run by itself.
    """

    versions: Mapping[str, str]
    python: str
    hardware: Mapping[str, Any]
    commands: Sequence[str]

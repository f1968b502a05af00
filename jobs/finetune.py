"""Fine-tunes a model with distributed data parallel and a Matryoshka loss, so that short prefixes are good to search with."""

import dataclasses
from pathlib import Path
from typing import Literal

from jobs import cluster, training_group
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say
from matryoshka import artifacts, corpus, model, nested, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, FolderPath, check_settings
from matryoshka.pairs import DatasetStore
from matryoshka.recipe import Recipe, count_steps


class Settings(StageSettings):
    """Fine-tunes a model on the training pairs of a dataset with a Matryoshka loss: one vector, useful at every prefix.

    Every other document of a batch is a negative for a query. With several workers, batches are spread over them and
    negatives are shared among them.
    """

    data: FolderPath = Field(description="Folder that the prepare job wrote.")
    model: str = Field("minilm", description="Model to start from: folder, hub name, or minilm (the demo extra's model).")
    dims: tuple[int, ...] = Field((), description="Resolutions to train for; none: full width and the usual ones below it.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training pairs.")
    max_steps: int | None = Field(None, ge=1, description="Most optimiser steps.")
    batch_size: int = Field(64, ge=2, description="Pairs per step, over all workers together.")
    mini_batch_size: int | None = Field(None, ge=1, description="Pairs in memory at once (slower); none: the whole batch.")
    learning_rate: float = Field(5e-5, gt=0, description="Highest learning rate; it rises, then falls linearly to 0.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    max_tokens: int | None = Field(None, ge=8, description="Cut longer texts while training; none: the model's own window.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout while training; none: the model's own rates.")
    seed: int = Field(7, description="Seed of shuffling and dropout.")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="auto: bf16 where a measurement says it pays.")
    workers: int | None = Field(None, ge=1, description="Training ranks; none: one per GPU, or a single one on CPUs.")

    @check_settings
    def _whole_batches(self) -> "Settings":
        if self.workers and self.batch_size % self.workers:
            raise ValueError(f"--batch-size {self.batch_size} cannot be shared by {self.workers} workers. Pass a multiple of it.")
        return self


def run(settings: Settings) -> Manifest:
    """Trains the model, unless the output already holds it."""
    output = storage.local_path(settings.output)
    data = DatasetStore.open(storage.local_path(settings.data))
    info = model.describe(settings.model)
    storage.keep_apart(output, data.folder, info.folder)
    dims = nested.check_dims(settings.dims or nested.default_dims(info.width), info.width, settings.model)
    chosen = settings.model_dump(exclude={"output", "replace", "data", "model", "dims", "workers"})
    known = artifacts.peek(output, "model")
    workers = settings.workers or (known.identity.get("workers") if known else None)
    identity = {"data": data.manifest.fingerprint, "base": info.fingerprint, "dims": dims, "workers": workers, **chosen}
    previous = artifacts.claim(output, "model", identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        say(f"finetune: nothing to do, {output} is complete")
        return previous
    pairs = corpus.read_rows(data.pair_files())
    num_steps = count_steps(data.num_pairs, settings.batch_size, settings.epochs, settings.max_steps)
    with cluster.connected() as session:
        session.release()
        capacity = cluster.capacity()
        workers = cluster.check_workers(workers) or max(capacity.num_gpus, 1)
        if settings.batch_size % workers:
            raise ValueError(
                f"--batch-size {settings.batch_size} cannot be shared by {workers} GPUs. Pass a multiple of {workers}."
            )
        recipe = Recipe(
            dims, num_steps, settings.batch_size, settings.mini_batch_size, settings.learning_rate, settings.warmup,
            settings.max_tokens, settings.dropout, settings.seed,
        )  # fmt: skip
        precision = session.choose_precision(settings.precision)
        facts = {
            "base": str(info.folder),
            "precision": precision,
            "num_steps": num_steps,
            "run": describe_run("finetune", settings),
        }
        manifest = Manifest("model", {**identity, "workers": workers}, facts=facts)
        artifacts.begin(output, manifest, None)
        say(
            f"finetune: {num_steps} steps of {settings.batch_size} pairs ({settings.batch_size - 1} negatives per query),"
            f" dims {', '.join(map(str, dims))}, {workers} worker(s), {precision}"
        )
        group = training_group.Group(workers, capacity)
        seconds = group.train(info.folder, pairs, recipe, precision, output.resolve())
    manifest = dataclasses.replace(manifest, receipts=_receipts(output), facts={**facts, "train_seconds": round(seconds, 1)})
    dataclasses.replace(manifest, is_complete=True).write(output)
    rate = num_steps * settings.batch_size / seconds
    say(f"finetune: model in {output}; {seconds:.0f} s, {rate:.1f} pairs/s")
    return manifest


def _receipts(output: Path) -> tuple[Receipt, ...]:
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != artifacts.MANIFEST)
    return tuple(Receipt(record.path, 0, (record,)) for record in (FileRecord.of(output, path) for path in files))


if __name__ == "__main__":
    main("finetune", Settings, run)

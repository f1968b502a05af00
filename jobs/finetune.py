"""Fine-tunes a model with distributed data parallel and a Matryoshka loss, so that short prefixes are good to search with."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from jobs import cluster
from jobs.cluster import Session
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say
from matryoshka import artifacts, card, corpus, curves, dev, examples, model, nested, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.batches import BatchPlan
from matryoshka.config import Field, FolderPath, check_settings
from matryoshka.dev import DevSet
from matryoshka.mining import NegativesStore
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.recipe import Recipe, count_steps
from matryoshka.storage import Place

_PARTS = f"{storage.TEMPORARY}pairs"
_APART = {"output", "replace", "run_id", "data", "model", "dims", "negatives"}
_WITHOUT_EFFECT = {"workers", "mini_batch_tokens", "attempts", "checkpoint_steps", "tensorboard"}


class Settings(StageSettings):
    """Fine-tunes a model on the training pairs of a dataset with a Matryoshka loss: one vector, useful at every prefix.

    Every other document of a batch is a negative for a query, unless it is known to answer it. With several workers, batches
    are spread over them and negatives are shared among them. A run that was killed goes on from its last checkpoint.
    """

    data: FolderPath = Field(description="Folder that the prepare job wrote.")
    model: str = Field("minilm", description="Model to start from: folder, hub name, or minilm (the demo extra's model).")
    negatives: FolderPath | None = Field(None, description="Folder that the mine job wrote from this data: hard negatives.")
    num_negatives: int | None = Field(
        None,
        ge=0,
        description="Hard negatives of each pair that take part; none: those mined, or one that the data brings.",
    )
    dims: tuple[int, ...] = Field((), description="Resolutions to train for; none: full width and the usual ones below it.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training pairs.")
    max_steps: int | None = Field(None, ge=1, description="Most optimiser steps.")
    batch_size: int = Field(64, ge=2, description="Pairs per step, over all workers together.")
    mini_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in memory at once, by gradient caching (slower); none: those of the whole batch."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate; it rises, then falls linearly to 0.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    max_tokens: int | None = Field(None, ge=8, description="Cut longer texts while training; none: the model's own window.")
    dropout: float | None = Field(
        0.0, ge=0, lt=1, description="Dropout while training; null in YAML: the model's own rates. Slower with any."
    )
    top_layers: int | None = Field(None, ge=0, description="Train only so many layers, from the top; none: the whole model.")
    layer_decay: float = Field(1.0, gt=0, le=1, description="Learning rate of a layer over that of the layer above it.")
    lora_rank: int | None = Field(
        None, ge=1, description="Train low-rank additions of this rank, merged at the end (needs the lora extra); none: weights."
    )
    evaluations: int = Field(5, ge=0, description="How often the dev split is looked at; the best weights are kept. 0: never.")
    patience: int | None = Field(None, ge=1, description="End after so many evaluations without a better figure; none: never.")
    dev_split: str = Field("dev", description="Split that decides which weights are kept; where there is none, the last are.")
    dev_queries: int = Field(500, ge=1, description="Most queries of the dev split to look at, chosen by hash.")
    dev_documents: int = Field(2_000, ge=1, description="Documents that they are searched in, with those that answer them.")
    seed: int = Field(7, description="Seed of shuffling and dropout.")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="auto: bf16 where a measurement says it pays.")
    workers: int | None = Field(None, ge=1, description="Training ranks; none: one per GPU, or a single one on CPUs.")
    attempts: int = Field(3, ge=1, description="How often training is begun, should ranks or machines be lost on the way.")
    checkpoint_steps: int = Field(100, ge=1, description="Steps between two checkpoints.")
    tensorboard: bool = Field(False, description="Write TensorBoard's event files below the output (needs that extra).")

    @check_settings
    def _whole_batches(self) -> "Settings":
        if self.workers and self.batch_size % self.workers:
            raise ValueError(f"--batch-size {self.batch_size} cannot be shared by {self.workers} workers. Pass a multiple of it.")
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    """What a run is made from, checked."""

    data: DatasetStore
    info: ModelInfo
    pair_files: tuple[Place, ...]
    recipe: Recipe
    identity: Mapping[str, Any]


def run(settings: Settings) -> Manifest:
    """Trains the model, unless the output already holds it."""
    output = storage.place(settings.output)
    inputs = _check(settings, output)
    previous = artifacts.claim(output, "model", inputs.identity, settings.replace)
    if previous and previous.is_complete:
        faults = artifacts.find_faults(output, previous)
        if not faults:
            say(f"finetune: nothing to do, {output} is complete")
            return previous
        if not settings.replace:
            raise ValueError(f"{faults[0]}. Restore it, or pass --replace to train anew.")
        previous = None
    num_steps = plan_steps(settings, inputs.data.num_pairs, inputs.pair_files)
    inputs = dataclasses.replace(inputs, recipe=dataclasses.replace(inputs.recipe, num_steps=num_steps))
    dev_set = _choose_dev(settings, inputs.data)
    # These bring torch and sentence-transformers, which take seconds: whoever has nothing to train does without.
    from jobs import training_group
    from matryoshka.training import Job

    with cluster.connected() as session:
        session.release()
        capacity = cluster.capacity()
        workers = cluster.check_workers(settings.workers) or max(capacity.num_gpus, 1)
        if settings.batch_size % workers:
            raise ValueError(
                f"--batch-size {settings.batch_size} cannot be shared by {workers} GPUs. Pass a multiple of {workers}."
            )
        begun_in = previous.facts.get("precision") if previous else None
        precision = begun_in or session.choose_precision(settings.precision)
        facts = {"base": str(inputs.info.folder), "precision": precision, "run": describe_run("finetune", settings)}
        manifest = Manifest("model", inputs.identity, facts={**facts, "num_steps": inputs.recipe.num_steps})
        artifacts.begin(output, manifest, previous)
        parts = _tokenise(session, inputs, output.resolve())
        job = Job(
            inputs.info.folder, parts, inputs.pair_files, inputs.recipe, precision, storage.digest_json(dict(inputs.identity)),
            output.resolve(), output.resolve() / f"{storage.TEMPORARY}model", capacity.device, dev_set,
        )  # fmt: skip
        _announce(inputs.recipe, workers, precision)
        group = training_group.Group(workers, capacity, settings.attempts)
        with curves.Curves(output if settings.tensorboard else None) as drawn:
            seconds = group.train(job, drawn.add)
    cost = {"workers": workers, "device": capacity.device, "num_devices": group.num_devices}
    return _finish(output, manifest, inputs, seconds, cost)


def _check(settings: Settings, output: Place) -> _Inputs:
    """Returns what the settings name, before anything is taken or written.

    Raises:
        ValueError: Something is missing, does not belong together, or does not fit.
    """
    data = DatasetStore.open(storage.place(settings.data))
    info = model.describe(settings.model)
    negatives = NegativesStore.open(storage.place(settings.negatives)) if settings.negatives else None
    storage.keep_apart(output, data.folder, info.folder, negatives.folder if negatives else None)
    if negatives and negatives.data != data.manifest.fingerprint:
        raise ValueError(f"--negatives {negatives.folder}: was mined from other data than {data.folder}. Mine from this data.")
    dims = nested.check_dims(settings.dims or nested.default_dims(info.width), info.width, settings.model)
    check_recipe(settings, info)
    pair_files = tuple(path.resolve() for path in (negatives or data).pair_files())
    num_negatives = _count_negatives(settings, negatives, pair_files[0])
    recipe = Recipe(
        dims=dims, num_steps=0, num_negatives=num_negatives,
        **{name: getattr(settings, name) for name in _SHARED},
    )  # fmt: skip
    chosen = {**settings.model_dump(exclude=_APART | _WITHOUT_EFFECT), "num_negatives": num_negatives}
    mined = negatives.manifest.fingerprint if negatives else None
    identity = {"data": data.manifest.fingerprint, "base": info.fingerprint, "negatives": mined, "dims": dims, **chosen}
    return _Inputs(data, info, pair_files, recipe, identity)


def _count_negatives(settings: Settings, negatives: NegativesStore | None, pair_file: Place) -> int:
    """Returns how many negatives of each pair take part.

    Raises:
        ValueError: More are asked for than there are.
    """
    has_some = corpus.has_column(pair_file, "negatives")
    there = negatives.num_negatives if negatives else int(has_some)
    wanted = settings.num_negatives
    if wanted and not has_some:
        raise ValueError(
            f"--num-negatives {wanted}: {pair_file} has none. Mine them (python -m jobs.mine), and pass --negatives."
        )
    if wanted and negatives and wanted > there:
        raise ValueError(f"--num-negatives {wanted}: {there} per pair were mined. Pass at most {there}, or mine more.")
    return there if wanted is None else wanted


def check_recipe(settings: Settings, info: ModelInfo) -> None:
    """Checks what can be checked of a recipe without its data.

    Raises:
        ValueError: It asks for more layers than the model has, for nothing to train, or for a package that is not there.
    """
    model.check_layers(info.folder, settings.top_layers)
    if settings.lora_rank:
        from matryoshka import layers

        layers.check_low_rank()
    if settings.lora_rank and settings.top_layers == 0:
        raise ValueError("--top-layers 0 leaves --lora-rank no layer to add to. Pass at least 1, or leave one of them out.")
    if settings.tensorboard:
        curves.check()


def plan_steps(settings: Settings, num_pairs: int, pair_files: Sequence[Place]) -> int:
    """Returns how many steps a run takes.

    Raises:
        ValueError: The pairs do not fill one batch, or have fewer labels than a batch has pairs.
    """
    num_steps = count_steps(num_pairs, settings.batch_size, settings.epochs, settings.max_steps)
    labels = examples.read_labels(pair_files)
    if labels is None:
        return num_steps
    per_epoch = BatchPlan(len(labels), settings.batch_size, settings.seed, labels).steps_per_epoch
    return count_steps(num_pairs, settings.batch_size, settings.epochs, settings.max_steps, per_epoch)


_SHARED = (
    "batch_size", "learning_rate", "warmup", "seed", "max_tokens", "dropout", "mini_batch_tokens", "top_layers", "layer_decay",
    "lora_rank", "evaluations", "patience", "checkpoint_steps",
)  # fmt: skip


def _choose_dev(settings: Settings, data: DatasetStore) -> DevSet | None:
    if settings.evaluations and settings.dev_split in data.splits:
        return dev.choose(data, settings.dev_split, settings.dev_queries, settings.dev_documents)
    if settings.evaluations:
        say(f"finetune: no split '{settings.dev_split}', so the last step's weights are kept, whatever they are worth")
    return None


def _tokenise(session: Session, inputs: _Inputs, output: Place) -> tuple[Place, ...]:
    """Has the pairs tokenised, one file per task; returns the folders that hold them."""
    parts = tuple(output / _PARTS / f"{number:05d}" for number in range(len(inputs.pair_files)))
    named = (inputs.info.folder, inputs.recipe.max_tokens, inputs.recipe.num_negatives)
    calls = [(path, part, *named) for path, part in zip(inputs.pair_files, parts, strict=True)]
    for _ in session.run_tasks(_tokenise_file, calls):
        pass
    return parts


def _tokenise_file(path: Place, part: Place, folder: Place, max_tokens: int | None, num_negatives: int) -> int:
    from matryoshka import training

    model.quieten()
    tokeniser = training.make_tokeniser(model.load(folder, "cpu"), max_tokens)
    return examples.tokenise_part(path, part, tokeniser, num_negatives)


def _announce(recipe: Recipe, workers: int, precision: str) -> None:
    num_others = recipe.batch_size * (1 + recipe.num_negatives) - 1
    say(
        f"finetune: {recipe.num_steps} steps of {recipe.batch_size} pairs ({num_others} negatives per query), dims"
        f" {', '.join(map(str, recipe.dims))}, {workers} worker(s), {precision}"
    )


def _finish(output: Place, manifest: Manifest, inputs: _Inputs, seconds: float, cost: Mapping[str, Any]) -> Manifest:
    record = storage.read_json(output / model.TRAINING_LOG)
    summary = {**record["summary"], "train_seconds": round(seconds, 1)}
    card.write(output / card.NAME, inputs.info, inputs.data.manifest, inputs.recipe, record["entries"], summary)
    facts = {**manifest.facts, **summary, **cost}
    manifest = dataclasses.replace(manifest, receipts=_receipts(output), facts=facts, is_complete=True)
    storage.remove(output / model.CHECKPOINTS)  # not before: hashing a large model takes a while
    manifest.write(output)
    for notice in summary["notices"]:
        say(f"finetune: {notice}")
    say(f"finetune: {card.conclude(record['entries'], summary)}")
    num_steps = (inputs.recipe.num_steps if summary["stopped_at"] is None else summary["stopped_at"]) - summary["first_step"]
    rate = num_steps * inputs.recipe.batch_size / seconds
    say(f"finetune: model in {output}; {seconds:.0f} s, {rate:.1f} pairs/s")
    return manifest


def _receipts(output: Place) -> tuple[Receipt, ...]:
    """Returns a receipt for every file of the model; its card, which people write to, and TensorBoard's files are not of it."""
    apart = {artifacts.MANIFEST, card.NAME, curves.FOLDER, model.CHECKPOINTS, *storage.OF_THE_RUN}
    every = sorted(map(PurePosixPath, storage.names(output)))
    names = [str(path) for path in every if path.parts[0] not in apart and not path.name.startswith(storage.TEMPORARY)]
    return tuple(Receipt(name, 0, (FileRecord.named(name, output / name),)) for name in names)


if __name__ == "__main__":
    main("finetune", Settings, run)

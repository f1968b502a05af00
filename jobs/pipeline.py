"""Runs the whole mission from one YAML file: prepare, evaluate, finetune, embed, index, search, evaluate, report."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import cluster, embed, evaluate, finetune, index, prepare, search, verify
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say, show_table
from matryoshka import artifacts, model, nested, report, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, JobSettings
from matryoshka.pairs import DatasetStore
from matryoshka.recipe import count_steps


class Settings(StageSettings):
    """Runs the whole mission: prepare data, evaluate the untouched model, fine-tune it, embed the corpus, build the index,
    search it with the test queries, and evaluate again.

    Each section holds options of the job of that name, written with underscores. Paths between jobs need not be given.
    """

    model: str = Field("minilm", description="Model to start from: folder, hub name, or minilm (the demo extra's model).")
    prepare: dict[str, Any] = Field({}, description="Options of the prepare job.")
    finetune: dict[str, Any] = Field({}, description="Options of the finetune job.")
    embed: dict[str, Any] = Field({}, description="Options of the embed job.")
    index: dict[str, Any] = Field({}, description="Options of the index job.")
    search: dict[str, Any] = Field({}, description="Options of the search job.")
    evaluate: dict[str, Any] = Field({}, description="Options of the evaluate job, for both evaluations.")
    verify: bool = Field(True, description="Check every artifact of the run at the end, as the verify job does.")
    without_gpu: dict[str, dict[str, Any]] = Field({}, description="Sections whose options apply where there is no GPU.")


Stage = tuple[str, Callable[[Any], Any], JobSettings]

_SECTIONS = ("prepare", "finetune", "embed", "index", "search", "evaluate")


def plan(settings: Settings, *, has_gpu: bool) -> list[Stage]:
    """Returns the stages in order, each with its settings, all of them checked.

    Raises:
        ValueError: A section, or an option in one, is unknown or unusable.
    """
    root = Path(settings.output)
    split = str(settings.evaluate.get("split", "test"))
    data, tuned, vectors, built = (str(root / name) for name in ("data", "model", "embeddings", "index"))
    before, after = str(root / "evaluation-base"), str(root / "evaluation-tuned")
    wired: list[tuple[str, Any, dict[str, Any]]] = [
        ("prepare", prepare, {"output": data, "model": settings.model}),
        ("evaluate", evaluate, {"output": before, "data": data, "model": settings.model, "system": "base"}),
        ("finetune", finetune, {"output": tuned, "data": data, "model": settings.model}),
        ("embed", embed, {"output": vectors, "corpus": f"{data}/corpus", "model": tuned}),
        ("index", index, {"output": built, "embeddings": vectors}),
        ("search", search, {"output": str(root / "results"), "index": built, "queries": f"{data}/queries/{split}.parquet"}),
        ("evaluate", evaluate, {"output": after, "data": data, "model": tuned, "embeddings": vectors, "index": built,
                                "compare": before, "system": "tuned"}),
    ]  # fmt: skip
    _refuse_unknown_sections(settings.without_gpu)
    dims = _section(settings, "finetune", has_gpu=has_gpu).get("dims")
    stages = []
    for name, job, wiring in wired:
        own = _section(settings, name, has_gpu=has_gpu)
        fixed = sorted(own.keys() & {*wiring, "replace"})
        if fixed:
            raise ValueError(f"pipeline, section '{name}': '{fixed[0]}' is set by the pipeline itself. Take it out.")
        defaults = {"dims": dims} if name == "evaluate" and dims else {}
        values = {**defaults, **wiring, "replace": settings.replace, **own}
        stages.append((name, job.run, job.Settings.from_values(values, f"pipeline, section '{name}'")))
    return stages


def _section(settings: Settings, name: str, *, has_gpu: bool) -> dict[str, Any]:
    return {**getattr(settings, name), **({} if has_gpu else settings.without_gpu.get(name, {}))}


def _refuse_unknown_sections(sections: Mapping[str, Any]) -> None:
    unknown = [name for name in sections if name not in _SECTIONS]
    if unknown:
        raise ValueError(f"pipeline, without_gpu: no section '{unknown[0]}'. Use one of {', '.join(_SECTIONS)}.")


def _refuse_early(settings: Settings) -> None:
    """Refuses now what a later stage would refuse after hours of work.

    Raises:
        ValueError: The model, or an option of any section, is unusable.
    """
    info = model.describe(settings.model)
    for has_gpu in (True, False):
        for name, _, stage in plan(settings, has_gpu=has_gpu):
            place = f"pipeline, section '{name}'"
            if isinstance(stage, finetune.Settings | evaluate.Settings) and stage.dims:
                nested.check_dims(stage.dims, info.width, place)
            if isinstance(stage, index.Settings):
                index.check_plan(stage, nested.default_dims(info.width), info.width)


def _refuse_data(folder: str, stages: Sequence[JobSettings]) -> None:
    """Refuses data that a later stage would refuse, before the first document is embedded.

    Raises:
        ValueError: There are too few training pairs, or the split to evaluate has no queries or judgements.
    """
    data = DatasetStore.open(storage.local_path(folder))
    for stage in stages:
        if isinstance(stage, finetune.Settings):
            count_steps(data.num_pairs, stage.batch_size, stage.epochs, stage.max_steps)
        if isinstance(stage, evaluate.Settings):
            data.queries(stage.split)
            data.qrels(stage.split)


def run(settings: Settings) -> None:
    """Runs every stage that is not done yet, and writes the report."""
    output = storage.local_path(settings.output)
    _refuse_early(settings)
    previous = artifacts.claim(output, "run", {}, settings.replace)
    with cluster.connected():
        stages = plan(settings, has_gpu=cluster.capacity().num_gpus > 0)
        if previous is None:
            artifacts.begin(output, Manifest("run", {}), None)
        for name, run_stage, stage in stages:
            start = time.perf_counter()
            run_stage(stage)
            say(f"{name} took {time.perf_counter() - start:.1f} s\n")
            if isinstance(stage, prepare.Settings):
                _refuse_data(stage.output, [later for _, _, later in stages])
    _finish(output, previous, describe_run("pipeline", settings))
    if settings.verify:
        verify.run(verify.Settings(folder=settings.output))


def _finish(output: Path, previous: Manifest | None, run: dict[str, Any]) -> None:
    """Writes the report of the whole run, if it changed: the last evaluation's figures, and the fingerprints behind them."""
    rows = report.read_rows(output / "evaluation-tuned")
    stages = ("data", "evaluation-base", "model", "embeddings", "index", "results", "evaluation-tuned")
    fingerprints = {name: artifacts.read(output / name).fingerprint for name in stages}
    manifest = Manifest("run", {}, fingerprints, {"run": run}, is_complete=True)
    is_current = previous and (previous.inputs, previous.facts) == (fingerprints, manifest.facts)
    if not (previous and is_current) or artifacts.find_faults(output, previous):
        report.write(output, "Before and after fine-tuning", rows, run["settings"], fingerprints)
        records = tuple(FileRecord.of(output, output / name) for name in (report.JSON, report.MARKDOWN))
        dataclasses.replace(manifest, receipts=(Receipt("report", len(rows), records),)).write(output)
    for metric, table in report.tables(rows).items():
        show_table(metric, table)
    say(report.conclude(rows))
    say(f"report: {output / report.MARKDOWN} and {output / report.JSON}; index: {output / 'index'}")


if __name__ == "__main__":
    main("pipeline", Settings, run)

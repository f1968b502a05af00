"""Runs the whole mission from one YAML file, from texts to an index and a report on it."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from jobs import cluster, embed, evaluate, explain, finetune, index, measurement, mine, prepare, search, tune, verify
from jobs.entry import NoGainError, StageSettings, describe_run, main
from jobs.terminal import begin_stage, say, show_table
from matryoshka import anatomy, artifacts, comparison, config, model, nested, page, report, storage, verdict
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, JobSettings, check_settings
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.provenance import Embedding, Environment, Training
from matryoshka.report import Report
from matryoshka.storage import Place


class Settings(StageSettings):
    """Runs the whole mission: prepare data, choose the best of several models if they are given, evaluate it untouched, mine hard
    negatives if asked to, fine-tune it and say what that did to it, embed the corpus, build the index, find its cheapest good
    plan if asked to, search it with the test queries, and evaluate again.

    Each section holds options of the job of that name, written with underscores. Paths between jobs need not be given. BM25
    stands beside both models unless the section evaluate says bm25: false.
    """

    model: str = Field("minilm", description="Model to start from: folder, hub name, or minilm (the demo extra's model).")
    candidates: tuple[str, ...] = Field(
        (),
        description="Models of which the best on dev (or else on train, if judged) is started from, in place of --model.",
    )
    prepare: dict[str, Any] = Field({}, description="Options of the prepare job.")
    mine: dict[str, Any] | None = Field(None, description="Options of the mine job; none: no hard negatives are mined.")
    finetune: dict[str, Any] = Field({}, description="Options of the finetune job.")
    explain: dict[str, Any] | None = Field({}, description="Options of the explain job; null: it is left out.")
    embed: dict[str, Any] = Field({}, description="Options of the embed job.")
    index: dict[str, Any] = Field({}, description="Options of the index job.")
    tune: dict[str, Any] | None = Field(None, description="Options of the tune job; none: the index keeps its plan.")
    search: dict[str, Any] = Field({}, description="Options of the search job.")
    evaluate: dict[str, Any] = Field({}, description="Options of the evaluate job, for both evaluations.")
    also: dict[str, dict[str, Any]] = Field(
        {},
        description="Other data on which both models are evaluated, for what tuning cost there: name: {beir: or sts: or data:}.",
    )
    require_gain: float | None = Field(
        None,
        description="Stop before the index, with code 3, unless tuning shows this gain in nDCG@10: the base model is to be kept.",
    )
    verify: bool = Field(True, description="Check every artifact of the run at the end, as the verify job does.")
    without_gpu: dict[str, dict[str, Any]] = Field({}, description="Sections whose options apply where there is no GPU.")

    @check_settings
    def _one_start(self) -> "Settings":
        if self.candidates and "model" in self.model_fields_set:
            raise ValueError("give either --model or --candidates.")
        return self


Stage = tuple[str, Callable[[Any], Any], JobSettings]

_SECTIONS = ("prepare", "mine", "finetune", "explain", "embed", "index", "tune", "search", "evaluate")
_BEFORE, _GAIN, _AFTER = "evaluation-base", "evaluation-gain", "evaluation-tuned"
_BASE, _TUNED = "base", "tuned"
_CANDIDATES, _NEGATIVES, _ANATOMY = "candidates", "negatives", "anatomy"
_NAME = re.compile(r"[\w.-]+")


def plan(settings: Settings, *, has_gpu: bool, winner: str | None = None) -> list[Stage]:
    """Returns the stages in order, each with its settings, all of them checked; the choice among candidates is not among them.

    Args:
        settings: Of the pipeline.
        has_gpu: Whether there is a GPU.
        winner: The name of the candidate to start from.

    Raises:
        ValueError: A section, or an option in one, is unknown or unusable.
    """
    root = storage.place(settings.output)
    split = str(settings.evaluate.get("split", "test"))
    data, tuned, vectors, built = (str(root / name) for name in ("data", "model", "embeddings", "index"))
    before = str(root / _BEFORE)
    after = {
        "data": data,
        "model": tuned,
        "embeddings": vectors,
        "compare": before,
        "system": _TUNED,
        "require_gain": settings.require_gain,
    }
    base, known, there = settings.model, {}, f"{before}/embeddings"
    if winner:
        base = evaluate.named_models(settings.candidates)[winner]
        there = str(evaluate.embeddings_of(evaluate.folder_of(root / _CANDIDATES, winner)))
        known = {"embeddings": there}
    negatives: dict[str, Any] = {"negatives": str(root / _NEGATIVES)} if settings.mine is not None else {}
    _refuse_unknown_names(settings)
    if settings.tune is not None and _section(settings, "tune", has_gpu=has_gpu).get("split", "dev") == split:
        raise ValueError(f"pipeline, section 'tune': split '{split}' is the one that is evaluated. Tune on another one.")
    wired: list[tuple[str, Any, dict[str, Any]]] = [
        ("prepare", prepare, {"output": data, "model": base}),
        ("evaluate", evaluate, {"output": before, "data": data, "model": base, "system": _BASE, **known}),
        *(_also(settings, name, _BASE, base) for name in settings.also),
        *(("mine", mine, {"output": own, "data": data, "model": base, "embeddings": there}) for own in negatives.values()),
        ("finetune", finetune, {"output": tuned, "data": data, "model": base, **negatives}),
        *_explain(settings, {"output": str(root / _ANATOMY), "data": data, "base": base, "model": tuned, "split": split}),
        ("embed", embed, {"output": vectors, "corpus": f"{data}/corpus", "model": tuned}),
        *((("evaluate", evaluate, {**after, "output": str(root / _GAIN)}),) if settings.require_gain is not None else ()),
        ("index", index, {"output": built, "embeddings": vectors}),
        *((("tune", tune, {"index": built, "data": data}),) if settings.tune is not None else ()),
        ("search", search, {"output": str(root / "results"), "index": built, "queries": f"{data}/queries/{split}.parquet"}),
        ("evaluate", evaluate, {**after, "output": str(root / _AFTER), "index": built}),
        *(_also(settings, name, _TUNED, tuned) for name in settings.also),
    ]  # fmt: skip
    return [(name, job.run, _stage_settings(settings, name, job, wiring, has_gpu=has_gpu)) for name, job, wiring in wired]


def _explain(settings: Settings, wiring: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Returns the stage that says what fine-tuning did, unless it is left out."""
    return [] if settings.explain is None else [("explain", explain, wiring)]


def _also(settings: Settings, name: str, system: str, base: str) -> tuple[str, Any, dict[str, Any]]:
    """Returns the evaluation of one of both models on other data."""
    before, after = (str(_folder_of(settings, name, system)) for system in ("base", "tuned"))
    wiring = {"output": before if system == "base" else after, "model": base, "system": system, "verdict": False}
    return f"also.{name}", evaluate, wiring | ({"compare": before} if system == "tuned" else {})


def _folder_of(settings: Settings, name: str, system: str) -> Place:
    return storage.place(settings.output) / f"also-{name}-{system}"


def _stage_settings(settings: Settings, name: str, job: Any, wiring: dict[str, Any], *, has_gpu: bool) -> Any:
    """Returns the settings of a stage: what its section says, and what the pipeline wires.

    Raises:
        ValueError: An option of the section is unknown or unusable, or set by the pipeline itself.
    """
    own = _section(settings, name, has_gpu=has_gpu)
    if job is evaluate:  # words are searched once
        bm25 = own.pop("bm25", name == "evaluate") and "compare" not in wiring
        wiring = wiring | {"bm25": bm25}
    of_job = {"models", "embeddings", "index", "compare", "require_gain"} if job is evaluate else set()
    reserved = {*wiring, "replace", "run_id", *of_job}
    fixed = sorted(own.keys() & reserved)
    if fixed:
        raise ValueError(f"pipeline, section '{name}': '{fixed[0]}' is set by the pipeline itself. Take it out.")
    dims = _section(settings, "finetune", has_gpu=has_gpu).get("dims")
    defaults = {"dims": dims} if job is evaluate and dims else {}
    values = {**defaults, **wiring, "replace": settings.replace, **own}
    return job.Settings.from_values(values, f"pipeline, section '{name}'")


def _section(settings: Settings, name: str, *, has_gpu: bool) -> dict[str, Any]:
    if name.startswith("also."):
        return dict(settings.also[name.removeprefix("also.")])
    return {**(getattr(settings, name) or {}), **({} if has_gpu else settings.without_gpu.get(name, {}))}


def _refuse_unknown_names(settings: Settings) -> None:
    unknown = [name for name in settings.without_gpu if name not in _SECTIONS]
    if unknown:
        raise ValueError(f"pipeline, without_gpu: no section '{unknown[0]}'. Use one of {', '.join(_SECTIONS)}.")
    nameless = [name for name in settings.also if not _NAME.fullmatch(name)]
    if nameless:
        raise ValueError(f"pipeline, also: '{nameless[0]}' cannot name a folder. Use letters, digits, '.', '_' and '-'.")


def choose(settings: Settings, split: str, *, has_gpu: bool) -> evaluate.Settings:
    """Returns the settings of the stage that ranks the candidates."""
    root, own = storage.place(settings.output), _section(settings, "evaluate", has_gpu=has_gpu)
    dims = own.get("dims") or _section(settings, "finetune", has_gpu=has_gpu).get("dims", ())
    values = {"output": str(root / _CANDIDATES), "data": str(root / "data"), "models": settings.candidates, "split": split,
              "dims": dims, "workers": own.get("workers"), "replace": settings.replace}  # fmt: skip
    return evaluate.Settings.from_values(values, "pipeline, candidates")


def choosing_split(settings: Settings, data: DatasetStore, *, has_gpu: bool) -> str:
    """Returns the split on which candidates are ranked: never the one that the final figures come from.

    Raises:
        ValueError: There is none.
    """
    final = _section(settings, "evaluate", has_gpu=has_gpu).get("split", "test")
    split = next((split for split in _CHOOSING_SPLITS if split in data.judged_splits and split != final), None)
    if split is None:
        found = ", ".join(data.judged_splits) or "none"
        raise ValueError(f"{data.folder}: no split to rank candidates on (with judgements: {found}). Prepare a dev split.")
    return split


_CHOOSING_SPLITS = ("dev", "train")


def _refuse_early(settings: Settings) -> None:
    """Refuses now what a later stage would refuse after hours of work.

    Raises:
        ValueError: A model, or an option of any section, is unusable.
    """
    candidates = evaluate.named_models(settings.candidates)
    starts: list[tuple[str | None, str]] = [*candidates.items()] or [(None, settings.model)]
    for winner, location in starts:
        info = model.describe(location)
        if settings.require_gain is not None and info.is_tuned:
            raise ValueError(f"pipeline, require_gain: {location} is tuned already, so no gain is that of tuning. Leave it out.")
        for has_gpu in (True, False):
            for name, _, stage in plan(settings, has_gpu=has_gpu, winner=winner):
                _refuse_stage(f"pipeline, section '{name}', model {location}", stage, info)
    for has_gpu in (True, False) if settings.candidates else ():
        evaluate.check_models(choose(settings, "dev", has_gpu=has_gpu))
    for name in settings.also:
        evaluate.check_data(_stage_settings(settings, *_also(settings, name, "base", settings.model), has_gpu=True))


def _refuse_stage(place: str, stage: JobSettings, info: ModelInfo) -> None:
    if isinstance(stage, finetune.Settings | evaluate.Settings) and stage.dims:
        nested.check_dims(stage.dims, info.width, place)
    if isinstance(stage, finetune.Settings):
        finetune.check_recipe(stage, info)
    if isinstance(stage, index.Settings):
        index.check_plan(stage, info.width)


def _refuse_data(folder: str, stages: Sequence[JobSettings]) -> None:
    """Refuses data that a later stage would refuse, before the first document is embedded.

    Raises:
        ValueError: There are too few training pairs, or the split to evaluate has no queries or judgements.
    """
    data = DatasetStore.open(storage.place(folder))
    for stage in stages:
        if isinstance(stage, finetune.Settings):
            finetune.plan_steps(stage, data.num_pairs, data.pair_files())
        if isinstance(stage, mine.Settings):
            mine.check_window(stage, data)
        if isinstance(stage, tune.Settings):
            tune.check_data(stage, data)
        if isinstance(stage, explain.Settings):
            anatomy.check_size(data)
        if isinstance(stage, evaluate.Settings) and stage.data == folder:
            data.queries(stage.split)
            data.qrels(stage.split)


def run(settings: Settings) -> None:
    """Runs every stage that is not done yet, and writes the report."""
    output = storage.place(settings.output)
    _refuse_early(settings)
    previous = artifacts.claim(output, "run", {}, settings.replace)
    with cluster.connected():
        has_gpu = cluster.capacity().num_gpus > 0
        first, *stages = plan(settings, has_gpu=has_gpu)
        if previous is None:
            artifacts.begin(output, Manifest("run", {}), None)
        _run_stage(first)
        done = [first]
        data = str(output / "data")
        _refuse_data(data, [stage for _, _, stage in stages])
        if settings.candidates:
            split = choosing_split(settings, DatasetStore.open(storage.place(data)), has_gpu=has_gpu)
            choice: Stage = ("choose", evaluate.run, choose(settings, split, has_gpu=has_gpu))
            _run_stage(choice)
            _, *stages = plan(settings, has_gpu=has_gpu, winner=report.read_best(output / _CANDIDATES))
            done.append(choice)
        ran, missed = _run_stages(stages)
    _finish(output, previous, settings, [*done, *ran], _GAIN if missed and missed[0] == _GAIN else _AFTER)
    if settings.verify:
        verify.run(verify.Settings(folder=settings.output))
    if missed:
        raise missed[1]


def _run_stages(stages: Sequence[Stage]) -> tuple[list[Stage], tuple[str, NoGainError] | None]:
    """Runs stages to the end, or until the gain that is required is not shown.

    Returns the stages that ran, and where the gain was missed, and what was said.
    """
    ran: list[Stage] = []
    missed: tuple[str, NoGainError] | None = None
    for stage in stages:
        ran.append(stage)
        try:
            _run_stage(stage)
        except NoGainError as error:
            missed = PurePosixPath(getattr(stage[2], "output", "")).name, error
            if missed[0] == _GAIN:
                say("pipeline: stops before the index, keep the base model")
                break
    return ran, missed


def _run_stage(stage: Stage) -> None:
    name, run_stage, settings = stage
    start = time.perf_counter()
    begin_stage(name)
    run_stage(settings)
    say(f"{name} took {time.perf_counter() - start:.1f} s\n")


def _finish(output: Place, previous: Manifest | None, settings: Settings, stages: Sequence[Stage], last: str) -> None:
    """Writes the report of the whole run, if it changed: the last evaluation's figures, and the fingerprints behind them."""
    run, made = describe_run("pipeline", settings), _collect(output, settings, last)
    manifest = Manifest("run", {}, made.fingerprints, {"run": run}, is_complete=True)
    is_current = previous and (previous.inputs, previous.facts) == (made.fingerprints, manifest.facts)
    if not (previous and is_current) or artifacts.find_faults(output, previous):
        report.write(output, dataclasses.replace(made, settings=run["settings"], sections=_sections(output, run, stages)))
        page.write(output)
        records = tuple(FileRecord.of(output, output / name) for name in (report.JSON, report.MARKDOWN))
        dataclasses.replace(manifest, receipts=(Receipt("report", len(made.rows), records),)).write(output)
    else:
        page.restore(output)
    for metric, table in report.tables(made.rows, report.SHOWN).items():
        show_table(metric, table)
    for name, rows in made.elsewhere.items():
        for metric, table in report.change_tables(rows, report.SHOWN).items():
            show_table(f"{name}: {metric}", table)
    for sentence in made.sentences:
        say(sentence)
    built = f"; index: {output / 'index'}" if last == _AFTER else ""
    say(f"report: {output / page.HTML}, {output / report.MARKDOWN} and {output / report.JSON}{built}")


def _sections(output: Place, run: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """Returns what stands in the report beside the figures: what fine-tuning did, and what lies behind all of it."""
    commands = [config.command_line(f"python -m {type(stage).__module__}", stage) for _, _, stage in stages]
    hardware = measurement.describe_hardware(measurement.choose_device(None))
    return {
        "anatomy": _read_anatomy(output) if any(isinstance(stage, explain.Settings) for _, _, stage in stages) else None,
        "training": dataclasses.asdict(Training.read(output / "model")),
        "embedding": dataclasses.asdict(Embedding.read(output / "embeddings")),
        "environment": dataclasses.asdict(Environment(run["versions"], run["python"], hardware, commands)),
    }


def _read_anatomy(output: Place) -> dict[str, Any]:
    return dict(storage.read_json(output / _ANATOMY / anatomy.NAME))


def _collect(output: Place, settings: Settings, last: str) -> Report:
    """Returns what all evaluations of the run found."""
    is_whole = last == _AFTER
    elsewhere = {name: report.read(_folder_of(settings, name, _TUNED)) for name in settings.also if is_whole}
    also = [f"also-{name}-{system}" for name in elsewhere for system in (_BASE, _TUNED)]
    chosen = [_CANDIDATES] if settings.candidates else []
    mined = [_NEGATIVES] if settings.mine is not None else []
    built = ["index", "results"] if is_whole else []
    explained = [_ANATOMY] if settings.explain is not None else []
    stages = ("data", *chosen, _BEFORE, *mined, "model", *explained, "embeddings", *built, last, *also)
    told = [sentence for _ in explained for sentence in _read_anatomy(output)["sentences"]]
    before, found = report.read(output / _BEFORE), report.read(output / last)
    forgotten = (
        verdict.forgotten_on(name, comparison.find(own.comparisons, _BASE, _TUNED), own.rows, _BASE, _TUNED)
        for name, own in elsewhere.items()
    )
    return dataclasses.replace(
        found,
        title="Before and after fine-tuning",
        verdict=dataclasses.replace(found.verdict, forgotten=tuple(filter(None, forgotten))) if found.verdict else None,
        remarks=(
            *(f"Base model: {sentence}" for name in chosen for sentence in report.read_sentences(output / name)),
            *dict.fromkeys((*before.remarks, *found.remarks)),
            *told,
        ),
        elsewhere={name: own.rows for name, own in elsewhere.items()},
        fingerprints={name: artifacts.read(output / name).fingerprint for name in stages},
    )


if __name__ == "__main__":
    main("pipeline", Settings, run)

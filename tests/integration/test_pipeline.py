"""The whole mission from one YAML file, on a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import folders
import pytest

from jobs import evaluate, pipeline, verify
from jobs.entry import NoGainError
from matryoshka import model, page
from matryoshka.artifacts import Manifest, Receipt
from matryoshka.indexing import IndexStore
from matryoshka.pairs import DatasetStore

pytestmark = pytest.mark.usefixtures("local_ray")

_STAGES = ("data", "candidates", "evaluation-base", "model", "anatomy", "embeddings", "index", "results", "evaluation-tuned",
           "also-alike-base", "also-alike-tuned")  # fmt: skip


@pytest.mark.parametrize("stage", ["data", "model", "anatomy", "embeddings", "index"])
def test_the_name_of_a_run_is_no_part_of_what_it_makes(finished_pipeline: Path, stage: str) -> None:
    assert "run_id" not in folders.manifest(finished_pipeline / stage)["identity"]


def test_the_report_compares_base_tuned_and_funnel(finished_pipeline: Path) -> None:
    rows = json.loads((finished_pipeline / "report.json").read_text())["rows"]
    assert all(set(row) == {"system", "dim", "metric", "value", "low", "high"} for row in rows)
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows)
    systems = dict.fromkeys(row["system"] for row in rows)
    by_system = {system: {row["dim"] for row in rows if row["system"] == system} for system in systems}
    # Every tuned dim stands beside its untuned self, and words beside both.
    assert by_system == {"bm25": {None}, "base": {64, 32, 16}, "tuned": {64, 32, 16}, "tuned+funnel": {16}}
    shallow = {"nDCG@10", "Recall@10", "MRR@10", "Success@1"}
    by_funnel = {row["metric"] for row in rows if row["system"] == "tuned+funnel"}
    assert (by_funnel, {row["metric"] for row in rows}) == (shallow, shallow | {"Recall@100", "MAP@100"})


def test_the_verdict_has_the_gain_what_it_cost_and_what_became_of_the_model_elsewhere(finished_pipeline: Path) -> None:
    report = json.loads((finished_pipeline / "report.json").read_text())
    values = {(row["system"], row["dim"]): row["value"] for row in report["rows"] if row["metric"] == "nDCG@10"}
    found = report["verdict"]
    assert found["gain"] == pytest.approx(values["tuned", 64] - values["base", 64])
    assert (found["decision"], found["is_small"], found["required_gain"]) == ("fine-tune", False, 0.01)
    facts = folders.manifest(finished_pipeline / "model")["facts"]
    hours = facts["train_seconds"] * facts["num_devices"] / 3600
    assert found["training"] == {
        "device": "cpu", "device_hours": pytest.approx(hours, abs=1e-4), "num_devices": facts["num_devices"],
    }  # fmt: skip
    elsewhere = {(row["system"], row["dim"]): row["value"] for row in report["elsewhere"]["alike"]}
    (forgotten,) = found["forgotten"]
    assert (forgotten["data"], forgotten["metric"], forgotten["dim"]) == ("alike", "Spearman", 64)
    assert forgotten["change"] == pytest.approx(elsewhere["tuned", 64] - elsewhere["base", 64])
    assert (finished_pipeline / "report.md").read_text().startswith("# Before and after fine-tuning\n\nVerdict: fine-tune. ")
    assert {one["after"] for one in report["comparisons"]} == {"base", "tuned", "tuned+funnel"}
    # What became of the model on data that it was not tuned for is no answer to whether tuning was worth it.
    assert json.loads((finished_pipeline / "also-alike-tuned" / "report.json").read_text())["verdict"] is None
    steps = report["searches"]["queries"][0]["funnel"]
    assert [step["dim"] for step in steps] == [16, 64]


def test_a_gain_that_is_not_shown_stops_the_pipeline_before_the_index_and_keeps_the_base_model(
    finished_pipeline: Path, pipeline_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_pipeline, tmp_path / "run")
    for made in ("index", "results", "evaluation-tuned"):
        shutil.rmtree(run / made)
    settings = pipeline.Settings.from_command_line(["--config", str(pipeline_config)], "pipeline")
    settings = settings.model_copy(update={"output": str(run), "require_gain": 1.5})
    pages = [run / name / page.HTML for name in (".", "candidates", "evaluation-base")]
    seen = []
    for _ in range(2):
        for path in pages:
            path.unlink()  # the second time nothing else is left to do
        with pytest.raises(NoGainError, match=r"do not bother\. nDCG@10 at 64 dims"):
            pipeline.run(settings)
        assert "stops before the index, keep the base model" in capsys.readouterr().out
        assert all(path.is_file() for path in pages)
        seen.append({name: when for name, when in folders.times(run).items() if not name.endswith(page.HTML)})
    assert seen[0] == seen[1]
    assert not (run / "index").exists()
    report = json.loads((run / "report.json").read_text())
    assert list(report["fingerprints"])[-4:] == ["model", "anatomy", "embeddings", "evaluation-gain"]
    assert (report["verdict"]["required_gain"], report["verdict"]["forgotten"]) == (1.5, [])
    ran = [command.split()[2] for command in report["environment"]["commands"]]
    assert ran[-2:] == ["jobs.embed", "jobs.evaluate"]
    assert not {"jobs.index", "jobs.search"} & set(ran)


def test_only_the_data_that_a_model_is_tuned_for_have_a_verdict(tmp_path: Path) -> None:
    own = pipeline.Settings(output=str(tmp_path), prepare={"python_docs": True}, require_gain=0.0, also={"other": {"beir": "x"}})
    stages = [stage for _, _, stage in pipeline.plan(own, has_gpu=False)]
    unjudged = {Path(stage.output).name for stage in stages if isinstance(stage, evaluate.Settings) and not stage.verdict}
    assert unjudged == {"also-other-base", "also-other-tuned"}


def test_a_gain_is_not_required_of_tuning_a_model_that_is_tuned_already(finished_pipeline: Path, tmp_path: Path) -> None:
    own = pipeline.Settings(
        output=str(tmp_path), prepare={"python_docs": True}, model=str(finished_pipeline / "model"), require_gain=0.01
    )
    with pytest.raises(ValueError, match=r"model is tuned already, so no gain is that of tuning\. Leave it out"):
        pipeline.run(own)


def test_words_are_searched_once_unless_they_are_not_wanted(tmp_path: Path) -> None:
    def searched(**more: Any) -> list[bool]:
        own = pipeline.Settings(output=str(tmp_path), prepare={"python_docs": True}, **more)
        stages = pipeline.plan(own, has_gpu=False)
        return [stage.bm25 for name, _, stage in stages if name == "evaluate" or name.startswith("also.")]

    assert searched() == [True, False]
    assert searched(evaluate={"bm25": False}) == [False, False]
    assert searched(require_gain=0.0, also={"other": {"beir": "x", "bm25": True}}) == [True, True, False, False, False]
    with pytest.raises(ValueError, match="'require_gain' is set by the pipeline itself"):
        searched(evaluate={"require_gain": 0.1})


def test_training_pays_on_pairs_that_can_be_learned(finished_pipeline: Path) -> None:
    rows = json.loads((finished_pipeline / "report.json").read_text())["rows"]
    headline = {(row["system"], row["dim"]): row["value"] for row in rows if row["metric"] == "nDCG@10"}
    assert headline["tuned", 64] > headline["base", 64] + 0.1


def test_manifests_chain_from_the_data_to_the_report(finished_pipeline: Path) -> None:
    made = {name: folders.manifest(finished_pipeline / name) for name in _STAGES}
    prints = {name: manifest["fingerprint"] for name, manifest in made.items()}
    tuned = model.describe(str(finished_pipeline / "model")).fingerprint
    assert made["model"]["identity"]["data"] == prints["data"]
    assert made["evaluation-base"]["identity"]["data"] == prints["data"]
    assert made["evaluation-base"]["identity"]["model"] == made["model"]["identity"]["base"]
    assert made["embeddings"]["identity"]["model"] == made["index"]["identity"]["model"] == tuned
    assert made["index"]["inputs"] == {"embeddings": prints["embeddings"]}
    assert made["results"]["identity"]["index"] == prints["index"]
    last = made["evaluation-tuned"]["identity"]
    assert (last["model"], last["index"], last["compare"]) == (tuned, prints["index"], prints["evaluation-base"])
    assert json.loads((finished_pipeline / "report.json").read_text())["fingerprints"] == prints


def test_the_report_says_what_happened_on_other_data(finished_pipeline: Path) -> None:
    report = json.loads((finished_pipeline / "report.json").read_text())
    rows = report["elsewhere"]["alike"]
    assert [(row["system"], row["dim"], row["metric"]) for row in rows] == [
        (system, dim, "Spearman") for system in ("base", "tuned") for dim in (64, 32, 16)
    ]
    full = {row["system"]: f"{row['value']:.3f}" for row in rows if row["dim"] == 64}
    said = [sentence for sentence in report["sentences"] if sentence.startswith("On alike, Spearman at 64 dims went from")]
    assert len(said) == 1
    assert f"from {full['base']} to {full['tuned']}: " in said[0]
    assert said[0] in (finished_pipeline / "report.md").read_text()


def test_the_model_to_start_from_is_the_best_candidate_on_dev(finished_pipeline: Path, tiny: str) -> None:
    chosen = json.loads((finished_pipeline / "candidates" / "report.json").read_text())
    assert chosen["ranking"]["best"] == "tiny"
    assert folders.manifest(finished_pipeline / "candidates")["identity"]["split"] == "dev"
    assert folders.manifest(finished_pipeline / "model")["identity"]["base"] == model.describe(tiny).fingerprint
    # What was embedded to choose is not embedded again.
    assert not (finished_pipeline / "evaluation-base" / "embeddings").exists()
    assert any(line.startswith("Base model: tiny is the best of 1") for line in _sentences(finished_pipeline))


def _sentences(run: Path) -> list[str]:
    return list(json.loads((run / "report.json").read_text())["sentences"])


def test_verify_accepts_what_the_pipeline_made(finished_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.run(verify.Settings(folder=str(finished_pipeline)))
    lines = capsys.readouterr().out.splitlines()
    # The stages, the candidate's evaluation and the embeddings in it, and the run itself.
    assert len(lines) == len(_STAGES) + 3
    assert all(line.startswith("ok") for line in lines)


def test_the_same_command_again_writes_no_file(finished_pipeline: Path, pipeline_config: Path) -> None:
    before = folders.times(finished_pipeline)
    pipeline.run(pipeline.Settings.from_command_line(["--config", str(pipeline_config)], "pipeline"))
    after = folders.times(finished_pipeline)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []


def test_another_list_of_candidates_ranks_anew_and_keeps_what_was_done(
    finished_pipeline: Path, pipeline_config: Path, other: str, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_pipeline, tmp_path / "run")
    settings = pipeline.Settings.from_command_line(["--config", str(pipeline_config)], "pipeline")
    more = settings.model_copy(update={"output": str(run), "candidates": (*settings.candidates, other)})
    before = folders.times(run / "candidates" / "evaluation-tiny")
    choice = pipeline.choose(more, "dev", has_gpu=False)
    evaluate.run(choice)
    assert folders.times(run / "candidates" / "evaluation-tiny") == before
    ranked = json.loads((run / "candidates" / "report.json").read_text())["ranking"]
    assert set(ranked["means"]) == {"tiny", "other"}
    # A run that would now start from another model is refused by name, or there is nothing more to do.
    stages = pipeline.plan(more, has_gpu=False, winner="other")
    with pytest.raises(ValueError, match="evaluation-base: was made with other inputs or settings \\(model: "):
        evaluate.run(next(stage for name, _, stage in stages if name == "evaluate"))


@pytest.mark.parametrize(
    ("splits", "final", "chosen"),
    [
        (("train", "dev", "test"), "test", "dev"),
        (("train", "test"), "test", "train"),
        (("train", "dev"), "dev", "train"),
        (("dev", "test"), "dev", None),
        (("test",), "test", None),
    ],
)
def test_candidates_are_ranked_on_dev_or_else_on_train_and_never_on_what_is_reported(
    tmp_path: Path, splits: tuple[str, ...], final: str, chosen: str | None
) -> None:
    counts = {f"queries/{split}": 3 for split in splits} | {f"qrels/{split}": 3 for split in splits}
    counts |= {"queries/empty": 0, "queries/dev": 3}  # labelled text: queries without judgements
    receipts = tuple(Receipt(key, count, ()) for key, count in counts.items())
    data = DatasetStore(tmp_path, Manifest("dataset", {}, receipts=receipts))
    settings = pipeline.Settings(output="out", candidates=("minilm",), evaluate={"split": final})
    if chosen:
        assert pipeline.choosing_split(settings, data, has_gpu=False) == chosen
    else:
        with pytest.raises(ValueError, match=r"no split to rank candidates on \(with judgements: "):
            pipeline.choosing_split(settings, data, has_gpu=False)


def test_an_index_is_tuned_between_being_built_and_being_searched(tmp_path: Path) -> None:
    def stages(**more: Any) -> list[str]:
        own = pipeline.Settings(output=str(tmp_path), prepare={"python_docs": True}, **more)
        return [name for name, _, _ in pipeline.plan(own, has_gpu=False)]

    assert "tune" not in stages()
    assert stages(tune={})[-4:] == ["index", "tune", "search", "evaluate"]
    _, _, settings = pipeline.plan(
        pipeline.Settings(output=str(tmp_path), prepare={"python_docs": True}, tune={"floor": 0.99}), has_gpu=False
    )[-3]
    assert (settings.index, settings.data, settings.split) == (str(tmp_path / "index"), str(tmp_path / "data"), "dev")
    for more in ({"tune": {"split": "test"}}, {"tune": {}, "evaluate": {"split": "dev"}}):
        with pytest.raises(
            ValueError, match=r"section 'tune': split '(test|dev)' is the one that is evaluated\. Tune on another"
        ):
            stages(**more)
    with pytest.raises(ValueError, match=r"section 'tune': 'index' is set by the pipeline itself"):
        stages(tune={"index": "elsewhere"})


def test_a_tuned_index_is_what_is_searched_and_evaluated(finished_pipeline: Path, pipeline_config: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_pipeline, tmp_path / "run")
    for made in ("results", "evaluation-tuned"):
        shutil.rmtree(run / made)
    settings = pipeline.Settings.from_command_line(["--config", str(pipeline_config)], "pipeline")
    tuning = {"split": "train", "batch": 32, "floor": 0.9}
    pipeline.run(settings.model_copy(update={"output": str(run), "tune": tuning, "also": {}}))
    plan = IndexStore.open(run / "index").plan
    assert folders.manifest(run / "index")["facts"]["tuned"]["plans"]["balanced"]["plan"] == plan.parts
    assert folders.manifest(run / "results")["identity"]["plan"] == plan.describe()
    assert folders.manifest(run / "evaluation-tuned")["identity"]["plan"] == plan.describe()

"""The whole mission from one YAML file, on a tiny model."""

import json
from pathlib import Path

import folders
import pytest

from jobs import pipeline, verify
from matryoshka import model

pytestmark = pytest.mark.usefixtures("local_ray")

_STAGES = ("data", "evaluation-base", "model", "embeddings", "index", "results", "evaluation-tuned")


def test_the_report_compares_base_tuned_and_funnel(finished_pipeline: Path) -> None:
    rows = json.loads((finished_pipeline / "report.json").read_text())["rows"]
    assert all(set(row) == {"system", "dim", "metric", "value"} for row in rows)
    assert all(0 <= row["value"] <= 1 for row in rows)
    by_system = {system: {row["dim"] for row in rows if row["system"] == system} for system in ("base", "tuned", "tuned+funnel")}
    assert {row["system"] for row in rows} == set(by_system)
    # Every tuned dim stands beside its untuned self.
    assert by_system == {"base": {64, 32, 16}, "tuned": {64, 32, 16}, "tuned+funnel": {16}}
    assert {row["metric"] for row in rows} == {"nDCG@10", "Recall@10", "MRR@10"}


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


def test_verify_accepts_what_the_pipeline_made(finished_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.run(verify.Settings(folder=str(finished_pipeline)))
    lines = capsys.readouterr().out.splitlines()
    # The stages, the embeddings inside the first evaluation, and the run itself.
    assert len(lines) == len(_STAGES) + 2
    assert all(line.startswith("ok") for line in lines)


def test_the_same_command_again_writes_no_file(finished_pipeline: Path, pipeline_config: Path) -> None:
    before = folders.times(finished_pipeline)
    pipeline.run(pipeline.Settings.from_command_line(["--config", str(pipeline_config)], "pipeline"))
    after = folders.times(finished_pipeline)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []

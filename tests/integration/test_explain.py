"""What fine-tuning did, over real local Ray: measured once, refused by name, part of a run's report."""

import json
import shutil
from pathlib import Path
from typing import Any

import folders
import pytest
import texts
import tiny_model
from small_data import write_dataset

from jobs import cluster, explain, pipeline, verify
from matryoshka import weights
from matryoshka.artifacts import Manifest
from matryoshka.pairs import DatasetStore

_DOCUMENTS, _QUERIES = 50, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DatasetStore:
    """Labelled documents, of which the first answer a query each."""
    columns = texts.documents(0, _DOCUMENTS)
    documents = dict(zip(columns["id"], columns["text"], strict=True))
    labels = {name: f"label {number % 4}" for number, name in enumerate(documents)}
    queries = {f"q{number}": " ".join(text.split()[:5]) for number, text in enumerate(columns["text"][:_QUERIES])}
    judged = {split: [(f"q{number}", columns["id"][number], 1) for number in range(_QUERIES)] for split in ("dev", "test")}
    folder = tmp_path_factory.mktemp("explain") / "data"
    return write_dataset(folder, documents, dict.fromkeys(judged, queries), judged, [], labels=labels)


def _settings(data: DatasetStore, output: Path, base: str | None, model: str, **more: Any) -> explain.Settings:
    return explain.Settings(output=str(output), data=str(data.folder), base=base, model=model, **more)


@pytest.fixture(scope="module")
def explained(data: DatasetStore, tiny: str, other: str, local_ray: cluster.Session) -> Path:  # noqa: ARG001
    output = data.folder.parent / "anatomy"
    explain.run(_settings(data, output, tiny, other, layer_documents=30))
    return output


def _read(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "anatomy.json").read_text()))


def test_everything_is_measured_of_both_models(explained: Path, tiny: str, other: str) -> None:
    found = _read(explained)
    assert [layer["layer"] for layer in found["layers"]] == ["embeddings", "layer 0", "layer 1", "head"]
    changes = weights.measure_changes(Path(tiny), Path(other)).by_layer
    measured = {layer["layer"]: layer["weight_change"] for layer in found["layers"]}
    assert measured == pytest.approx({**changes, "head": None}, abs=1e-4)
    assert all(-1 <= layer["cka"] <= 1 for layer in found["layers"])
    for space in found["by_system"].values():
        assert 0 < space["alignment"] < 4
        assert space["uniformity"] < 0
        assert space["energy"][0] == [64, 1.0]
        assert [dim for dim, _ in space["silhouette"]] == [dim for dim, _ in space["query_silhouette"]] == [64, 32]
    assert set(found["by_system"]) == {"base", "tuned"}
    drawn = found["map"]
    assert (drawn["method"], drawn["clusters"], set(drawn["labels"])) == ("t-SNE", None, {f"label {n}" for n in range(4)})
    assert {len(drawn[name]) for name in ("ids", "labels", "texts", "before", "after")} == {_DOCUMENTS}
    assert len(found["sentences"]) == 3


def test_verify_accepts_it(explained: Path) -> None:
    verify.run(verify.Settings(folder=str(explained)))


def test_a_model_has_not_changed_from_itself_and_layers_are_left_to_their_weights_where_asked_to(
    data: DatasetStore, tiny: str, tmp_path: Path, local_ray: cluster.Session
) -> None:
    assert local_ray
    twin = shutil.copytree(tiny, tmp_path / "twin")
    few = {"documents": 20, "pairs": 10, "layer_documents": 0}
    explain.run(_settings(data, tmp_path / "out", tiny, str(twin), map_method="PCA", **few))
    found = _read(tmp_path / "out")
    assert [(layer["weight_change"], layer["cka"]) for layer in found["layers"]] == [(0, None)] * 3
    assert found["by_system"]["base"] == found["by_system"]["tuned"]
    assert found["map"]["before"] == found["map"]["after"]


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose job turns to Ray before it refuses."""
    monkeypatch.setattr(cluster, "connected", lambda: pytest.fail("a worker was asked for before the input was refused"))


@pytest.mark.usefixtures("no_workers")
def test_the_same_command_again_does_nothing_and_other_settings_are_refused_by_name(
    explained: Path, data: DatasetStore, tiny: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folders.times(explained)
    explain.run(_settings(data, explained, tiny, other, layer_documents=30))
    assert f"nothing to do, {explained} is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"anatomy: was made with other inputs or settings \(seed: 7 there, 8 now\)"):
        explain.run(_settings(data, explained, tiny, other, layer_documents=30, seed=8))
    assert folders.times(explained) == before


@pytest.mark.usefixtures("no_workers")
def test_models_of_another_architecture_are_refused(data: DatasetStore, tiny: str, tmp_path: Path) -> None:
    deeper = tiny_model.save(tmp_path / "deeper", seed=1, num_hidden_layers=3)
    message = (
        rf"^{deeper}: is another architecture than {tiny} \(bert, 3 layers of 64, vectors of 64 dims; bert, 2 layers of 64,"
        r" vectors of 64 dims there\)\. Compare a model with the one that it was tuned from\.$"
    )
    with pytest.raises(ValueError, match=message):
        explain.run(_settings(data, tmp_path / "out", tiny, str(deeper)))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_workers")
def test_a_model_that_does_not_say_what_it_was_tuned_from_needs_a_base(data: DatasetStore, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny: does not say what it was tuned from\. Pass --base\.$"):
        explain.run(_settings(data, tmp_path / "out", None, tiny))
    tuned = shutil.copytree(tiny, tmp_path / "tuned")
    for base, fingerprint in ((tmp_path / "gone", "as it was"), (Path(tiny), "another one")):
        Manifest("model", {"dims": [64], "base": fingerprint}, facts={"base": str(base)}, is_complete=True).write(tuned)
        with pytest.raises(ValueError, match=rf"tuned: the model that it was tuned from is no longer at {base}\. Pass --base\.$"):
            explain.run(_settings(data, tmp_path / "out", None, str(tuned)))


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "exam"}, r"data: no split 'exam' \(found: dev, test\)\. Pass --split"),
        ({"layer_documents": 3}, r"--layer-documents 3: too few\. Pass 4 or more, or 0\.$"),
        ({"documents": 3}, r"'documents': input should be greater than or equal to 4 \(found 3\)\. Change --documents"),
        ({"map_method": "UMAP"}, r"'map_method': input should be 't-SNE' or 'PCA'"),
    ],
)
def test_explain_refuses(data: DatasetStore, tiny: str, other: str, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    values = {"output": str(tmp_path / "out"), "data": str(data.folder), "base": tiny, "model": other, **given}
    with pytest.raises(ValueError, match=message):
        explain.run(explain.Settings.from_values(values, "explain"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_workers")
def test_an_output_that_holds_an_input_is_refused(data: DatasetStore, tiny: str, other: str) -> None:
    with pytest.raises(ValueError, match="lie in each other"):
        explain.run(_settings(data, data.folder / "anatomy", tiny, other))


def test_a_run_s_report_says_what_fine_tuning_did_and_what_lies_behind_it(finished_pipeline: Path) -> None:
    report = json.loads((finished_pipeline / "report.json").read_text())
    assert report["anatomy"] == _read(finished_pipeline / "anatomy")
    assert set(report["anatomy"]["sentences"]) <= set(report["sentences"])
    spaces = report["anatomy"]["by_system"]
    assert spaces["tuned"]["uniformity"] < spaces["base"]["uniformity"]
    assert report["training"]["curves"][-1]["loss"] < report["training"]["curves"][0]["loss"]
    assert {own["dim"] for own in report["training"]["evaluations"]} == {64, 32, 16, None}
    assert report["embedding"]["documents"] == folders.manifest(finished_pipeline / "data")["facts"]["documents"]
    assert report["embedding"]["seconds"]["compute"] > 0
    commands = report["environment"]["commands"]
    jobs = ["prepare", "evaluate", "evaluate", "finetune", "explain", "embed", "index", "search", "evaluate"]
    assert [command.split()[2] for command in commands if "also-" not in command] == [f"jobs.{job}" for job in jobs]
    assert report["environment"]["hardware"]["cores"] > 0


def test_a_run_leaves_it_out_where_asked_to(tmp_path: Path) -> None:
    settings = pipeline.Settings(output=str(tmp_path), prepare={"python_docs": True}, explain=None)
    assert "explain" not in [name for name, _, _ in pipeline.plan(settings, has_gpu=False)]

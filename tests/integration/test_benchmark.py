"""The benchmark says what it measured: every system with its figures, ratios that follow from them, and what was left out."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import texts
import torch

from jobs import benchmark, cluster
from matryoshka import peers

_ROWS = 60


def _settings(root: Path, model: str, **more: Any) -> benchmark.Settings:
    own = {
        "output": str(root / "out" / "report.json"),
        "corpus": str(root / "corpus"),
        "documents": _ROWS,
        "rounds": 1,
        "compile": "off",
    }
    return benchmark.Settings(work="encode", model=model, **{**own, **more})


def _without_int8(name: str, _device: str) -> str:
    return "left out of this test" if peers.PEERS[name].packages else ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of which two rows, one of them among the first 60, have no text."""
    root = tmp_path_factory.mktemp("benchmark")
    texts.write_corpus(root / "corpus")
    for number, row in ((1, 3), (2, 5)):
        columns = texts.documents(number * 40, number * 40 + 40)
        columns["text"][row] = None
        texts.write_parquet(root / "corpus" / f"part-{number}.parquet", columns)
    return root


@pytest.fixture(scope="module")
def report(root: Path, tiny: str, local_ray: cluster.Session) -> dict[str, Any]:  # noqa: ARG001 - the session must be there
    """What a benchmark of one round and the two peers that are always there measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "why_not", _without_int8)
        return benchmark.run(_settings(root, tiny, workers=1, precision="float32"))


def test_the_report_is_on_disk_and_nothing_else(root: Path, report: dict[str, Any]) -> None:
    assert json.loads((root / "out" / "report.json").read_text("utf-8")) == json.loads(json.dumps(report))
    assert [path.name for path in (root / "out").iterdir()] == ["report.json"]


def test_every_system_has_its_figures(report: dict[str, Any]) -> None:
    assert list(report["systems"]) == ["ours", "default", "tuned"]
    for system in report["systems"].values():
        assert len(system["seconds"]) == 1
        assert system["median_seconds"] == statistics.median(system["seconds"]) > 0
        assert system["documents_per_second"] == pytest.approx((_ROWS - 1) / system["median_seconds"])
        assert system["peak_bytes"] > 100e6  # torch alone takes as much
        assert system["processes"] == 1
        assert system["threads"] >= 1
        # The tuned peer may run in bf16, which keeps 8 bits of each value.
        assert 0.999 < system["cosine_min"] <= system["cosine_mean"] <= 1 + 1e-9
    assert report["systems"]["ours"]["precision"] == "float32"
    assert report["systems"]["default"]["batch_size"] == 32


def test_ratios_follow_from_the_medians(report: dict[str, Any]) -> None:
    systems, ratios = report["systems"], report["ratios"]
    for name in ("default", "tuned"):
        assert ratios[name] == pytest.approx(systems[name]["median_seconds"] / systems["ours"]["median_seconds"])
    assert ratios["pipeline_share"] == pytest.approx(
        systems["ours"]["tokens_per_second"] / report["forward"]["tokens_per_second"]
    )
    assert 0 < ratios["ceiling_share"] < 1
    assert set(ratios) == {"default", "tuned", "pipeline_share", "ceiling_share"}


def test_the_report_says_what_it_rests_on(report: dict[str, Any]) -> None:
    assert report["documents"]["num_documents"] == _ROWS - 1
    assert report["documents"]["num_tokens"] > 12 * (_ROWS - 1)  # twelve words each, and special tokens
    assert report["documents"]["num_units"] >= 4
    assert report["not_run"] == dict.fromkeys(("onnx_int8", "openvino_int8"), "left out of this test")
    assert "--rounds 1: a median of fewer than 3 says little" in report["notes"]
    assert report["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert {"torch", "sentence-transformers", "ray"} <= report["versions"].keys()
    assert report["settings"]["documents"] == _ROWS
    assert report["date"]


@pytest.mark.usefixtures("local_ray")
def test_rows_without_any_text_are_refused(tmp_path: Path, tiny: str) -> None:
    columns = texts.documents(0, 10)
    columns["text"][:5] = [None] * 5
    texts.write_parquet(tmp_path / "corpus" / "part-0.parquet", columns)
    with pytest.raises(ValueError, match="no text in the first 5 rows"):
        benchmark.run(_settings(tmp_path, tiny, documents=5))


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose job turns to Ray before it refuses."""

    def refuse() -> None:
        pytest.fail("a worker was asked for before the input was refused")

    monkeypatch.setattr(cluster, "connected", refuse)


@pytest.mark.usefixtures("no_workers")
def test_an_output_that_is_a_folder_is_refused(root: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"corpus: is a folder\. Pass a file"):
        benchmark.run(_settings(root, tiny, output=str(root / "corpus")))


@pytest.mark.usefixtures("no_workers")
def test_an_output_that_is_no_json_file_is_refused(root: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"Pass --output .*part-0\.json"):
        benchmark.run(_settings(root, tiny, output=str(root / "corpus" / "part-0.parquet")))


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("content", ['{"hidden_size": 64}', "[]", "no JSON"])
def test_a_file_that_is_no_report_is_not_overwritten(root: Path, tiny: str, tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=r"config\.json: "):
        benchmark.run(_settings(root, tiny, output=str(path)))
    assert path.read_text("utf-8") == content


@pytest.mark.usefixtures("no_workers")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(root: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here"):
        benchmark.run(_settings(root, tiny, device="cuda"))


@pytest.mark.usefixtures("no_workers")
def test_a_cluster_is_refused(root: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match="RAY_ADDRESS is set"):
        benchmark.run(_settings(root, tiny))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index"], "'work': input should be 'encode', 'finetune' or 'search' .found 'index'"),
        ([], "'work' is missing"),
        (["finetune"], r"benchmark finetune: no pairs\. Pass --pairs PATH"),
        (["finetune", "--pairs", "pairs"], r"--corpus: says nothing to benchmark finetune\. Leave it out"),
        (["encode", "--batch-size", "8"], r"--batch-size: says nothing to benchmark encode\. Leave it out"),
        (["encode", "--rounds", "0"], "'rounds': input should be greater than or equal to 1"),
        (["encode", "--device", "tpu"], "'device': input should be 'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.Settings.from_command_line(
            [*arguments, "--corpus", "corpus", "--output", "report.json"], "python -m jobs.benchmark"
        )

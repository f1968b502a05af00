"""The benchmark of training says what it measured, and shows that a plain script learns the same from the same batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import texts

from jobs import benchmark, benchmark_finetune

_STEPS, _BATCH = 2, 8
_NEEDED = (3 + _STEPS + 1 + 4) * _BATCH  # to warm up, timed, the last, held out


def _settings(root: Path, model: str, **more: Any) -> benchmark.Settings:
    own = {
        "output": str(root / "out" / "report.json"),
        "pairs": str(root / "pairs"),
        "steps": _STEPS,
        "batch_size": _BATCH,
        "dims": (64, 16),
        "rounds": 1,
        "device": "cpu",
        "precision": "float32",
        "learning_rate": 1e-3,
    }
    return benchmark.Settings(work="finetune", model=model, **{**own, **more})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with just enough pairs, in two files, and some that say the same again or nothing."""
    root = tmp_path_factory.mktemp("benchmark-finetune")
    pairs = texts.pairs(_NEEDED)
    first, rest = ({name: own[part] for name, own in pairs.items()} for part in (slice(0, 20), slice(20, None)))
    again = {"query": [first["query"][0].upper(), None, "new"], "positive": ["another", "lonely", ""]}
    texts.write_parquet(root / "pairs" / "part-0.parquet", {name: [*first[name], *again[name]] for name in first})
    texts.write_parquet(root / "pairs" / "part-1.parquet", rest)
    return root


@pytest.fixture(scope="module")
def report(root: Path, tiny: str) -> dict[str, Any]:
    """What one round of two systems measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_finetune, "_SYSTEMS", ("ours", "plain_trainer"))
        return benchmark.run(_settings(root, tiny))


def test_the_report_is_on_disk_and_nothing_else(root: Path, report: dict[str, Any]) -> None:
    assert json.loads((root / "out" / "report.json").read_text("utf-8")) == json.loads(json.dumps(report))
    assert [path.name for path in (root / "out").iterdir()] == ["report.json"]


def test_ours_and_the_plain_script_learn_the_same(report: dict[str, Any]) -> None:
    ours, script = report["systems"]["ours"], report["systems"]["plain_trainer"]
    # Packed and padded float32 passes differ in the order of their sums.
    assert ours["losses"] == pytest.approx(script["losses"], rel=1e-3)
    assert len(ours["losses"]) == 3 + _STEPS + 1
    assert ours["held_out_loss"] == pytest.approx(script["held_out_loss"], rel=1e-3)
    assert ours["held_out_loss"] < report["model"]["held_out_loss"]


def test_every_system_has_its_figures(report: dict[str, Any]) -> None:
    for system in report["systems"].values():
        assert len(system["seconds"]) == 1
        assert system["pairs_per_second"] == pytest.approx(_STEPS * _BATCH / system["median_seconds"])
        assert system["peak_bytes"] > 100e6  # torch alone takes as much
        assert system["peak_gpu_bytes"] is None
        assert (system["dims"], system["dropout"], system["processes"]) == ((64, 16), 0.0, 1)


def test_ratios_follow_from_the_medians(report: dict[str, Any]) -> None:
    systems = report["systems"]
    ratio = systems["plain_trainer"]["median_seconds"] / systems["ours"]["median_seconds"]
    assert report["ratios"] == {"plain_trainer": pytest.approx(ratio)}


def test_the_report_says_what_it_rests_on(report: dict[str, Any]) -> None:
    assert report["pairs"]["num_timed_steps"] == _STEPS
    assert report["pairs"]["num_held_out"] == 4 * _BATCH
    # Four words of a query, four of its document, and two special tokens each; some words have more tokens.
    assert report["pairs"]["num_timed_tokens"] >= 12 * _STEPS * _BATCH
    assert report["precision"] == "float32"
    assert "--rounds 1: a median of fewer than 3 says little" in report["notes"]
    assert {"torch", "sentence-transformers", "datasets"} <= report["versions"].keys()
    assert report["hardware"]["device"] == "cpu"


def test_too_few_pairs_are_refused_with_what_is_needed(root: Path, tiny: str) -> None:
    message = rf"{_NEEDED} pairs with texts of their own, but 7 steps of 8 and a held-out part take {_NEEDED + _BATCH}"
    with pytest.raises(ValueError, match=message):
        benchmark.run(_settings(root, tiny, steps=_STEPS + 1))


def test_two_ranks_meet_where_the_report_has_a_relative_path(
    root: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_finetune, "_SYSTEMS", ("ours",))
    monkeypatch.chdir(tmp_path)
    ours = benchmark.run(_settings(root, tiny, workers=2, output="report.json"))["systems"]["ours"]
    assert ours["processes"] == 2


def test_a_batch_that_workers_cannot_share_is_refused(root: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="--batch-size 8 cannot be shared by 3 workers"):
        benchmark.run(_settings(root, tiny, workers=3))


def test_dims_above_the_width_are_refused(root: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="dims 65 do not fit a model of width 64"):
        benchmark.run(_settings(root, tiny, dims=(65,)))


def test_pairs_without_positives_are_refused(tmp_path: Path, tiny: str) -> None:
    texts.write_parquet(tmp_path / "pairs" / "part-0.parquet", {"query": ["a"], "text": ["b"]})
    with pytest.raises(ValueError, match=r"part-0\.parquet: no column 'positive'"):
        benchmark.run(_settings(tmp_path, tiny))

"""A plan says what a corpus costs; held against what the run left, it is as near as it can be."""

import json
from pathlib import Path
from typing import Any

import pytest
import texts

from jobs import cluster, embed, index, measurement, plan, plan_pace
from matryoshka import corpus, model

_ROWS, _EMPTY = 117, 3


def _plan(root: Path, model: str, **more: Any) -> plan.Settings:
    own: dict[str, Any] = {"corpus": str(root / "corpus"), "model": model, "unit_rows": 20, "workers": 1, "precision": "float32"}
    return plan.Settings(**{**own, **more})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 120 rows, three without text."""
    root = tmp_path_factory.mktemp("plan")
    texts.write_corpus(root / "corpus")
    columns = texts.documents(80, 120)
    columns["text"][:_EMPTY] = [None, "", " "]
    texts.write_parquet(root / "corpus" / "part-2.parquet", columns)
    return root


@pytest.fixture(scope="module")
def report(root: Path, tiny: str, local_ray: cluster.Session) -> dict[str, Any]:  # noqa: ARG001 - the session must be there
    """A plan whose pace is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_pace, "_MEASURED_SECONDS", (0.0, 0.1))
        return plan.run(_plan(root, tiny, output=str(root / "plan.json"), price_per_hour=3.0, memory=8.0))


@pytest.fixture(scope="module")
def finished(root: Path, tiny: str, report: dict[str, Any]) -> dict[str, Any]:
    """What was planned, done; returns the plan."""
    source, vectors = str(root / "corpus"), str(root / "vectors")
    embed.run(embed.Settings(output=vectors, corpus=source, model=tiny, unit_rows=20, workers=1, precision="float32"))
    index.run(index.Settings(output=str(root / "index"), embeddings=vectors))
    return report


def test_a_small_corpus_is_counted_as_it_is(report: dict[str, Any]) -> None:
    size = report["size"]
    assert (size["num_rows"], size["num_units"], size["num_sampled"]) == (120, 6, 120)
    assert size["documents"] == {"value": _ROWS, "low": _ROWS, "high": _ROWS}
    assert size["tokens"]["low"] == size["tokens"]["value"] == size["tokens"]["high"] > 12 * _ROWS


def test_the_pace_is_measured_and_everything_else_follows(report: dict[str, Any]) -> None:
    pace, cost = report["pace"], report["embedding"]
    assert pace["source"] == "measured now, 1 at once, float32"
    assert cost["work_seconds"]["value"] == pytest.approx(report["size"]["tokens"]["value"] / pace["tokens_per_second"])
    assert pace["load_seconds"] > 0
    assert report["price"]["value"] > 0
    assert report["hardware"]["device"] == cluster.capacity().device
    assert [limit["needed"] > 0 for limit in report["limits"]] == [True] * len(report["limits"])
    assert report["notes"] == []


def test_the_plan_is_on_disk_as_it_was_returned(root: Path, report: dict[str, Any]) -> None:
    assert json.loads((root / "plan.json").read_text("utf-8")) == json.loads(json.dumps(report))


def test_the_plan_is_held_against_what_was_done(root: Path, finished: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folders = (str(root / "vectors"), str(root / "index"))
    found = plan.run(plan.Settings(estimate=str(root / "plan.json"), compare=folders))
    assert set(found) == {"embeddings", "index"}
    for kind, name in (("embeddings", "documents"), ("embeddings", "tokens"), ("embeddings", "units"), ("index", "documents")):
        assert found[kind][name]["error"] == 0, name
        assert found[kind][name]["taken"] == finished["compared"][kind][name]
    assert set(found["embeddings"]) == set(finished["compared"]["embeddings"])
    assert "estimated" in capsys.readouterr().out


@pytest.mark.usefixtures("finished")
def test_an_estimate_beyond_the_tolerance_ends_the_job_by_name(root: Path, tmp_path: Path) -> None:
    wrong = json.loads((root / "plan.json").read_text("utf-8"))
    wrong["compared"]["embeddings"]["tokens"] *= 2
    (tmp_path / "plan.json").write_text(json.dumps(wrong), "utf-8")
    settings = plan.Settings(estimate=str(tmp_path / "plan.json"), compare=(str(root / "vectors"),), tolerance=1e-9)
    with pytest.raises(RuntimeError, match=r"plan: off by more than 0% \(.*embeddings: tokens \+100\.0%"):
        plan.run(settings)


@pytest.mark.usefixtures("finished")
def test_what_the_plan_is_not_of_is_refused(root: Path, tiny: str, tmp_path: Path) -> None:
    strange = {**json.loads((root / "plan.json").read_text("utf-8")), "model": {"fingerprint": "of another"}}
    (tmp_path / "plan.json").write_text(json.dumps(strange), "utf-8")
    for folder, estimate, message in (
        ("vectors", tmp_path / "plan.json", "was made with another model than the plan"),
        ("vectors", Path(tiny) / "config.json", r"config\.json: holds something else than a plan's report"),
        ("corpus", root / "plan.json", "corpus: no artifact here"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.run(plan.Settings(estimate=str(estimate), compare=(str(root / folder),)))


@pytest.mark.usefixtures("local_ray")
def test_a_pace_that_is_given_is_used(root: Path, tiny: str) -> None:
    by_tokens = plan.run(_plan(root, tiny, tokens_per_second=1_300.0, documents=1_000_000, workers=64))
    assert by_tokens["size"]["num_units"] == 50_000
    assert by_tokens["size"]["documents"]["low"] < 975_000 < by_tokens["size"]["documents"]["high"]
    assert by_tokens["size"]["documents"]["value"] == pytest.approx(975_000)
    assert by_tokens["embedding"]["num_workers"] == 64
    per_document = by_tokens["size"]["tokens"]["value"] / 975_000
    by_documents = plan.run(_plan(root, tiny, documents_per_second=1_300.0 / per_document, documents=1_000_000, workers=64))
    assert by_documents["embedding"]["work_seconds"] == pytest.approx(by_tokens["embedding"]["work_seconds"])


def _benchmark(tiny: str, **hardware: Any) -> dict[str, Any]:
    """Returns what a report of benchmark encode has of what a plan looks at."""
    return {
        "job": "benchmark",
        "date": "2026-11-26",
        "settings": {"workers": 4},
        "model": {"fingerprint": model.describe(tiny).fingerprint},
        "hardware": {**measurement.describe_hardware("cpu"), **hardware},
        "systems": {"ours": {"tokens_per_second": 8_000.0, "is_compiled": True}},
    }


@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif("cluster.capacity().device == 'cuda'", reason="the report is one of a CPU")
def test_a_benchmark_is_used_where_it_fits_and_named_where_it_does_not(
    root: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(_benchmark(tiny)), "utf-8")
    settings = _plan(root, tiny, benchmark=str(path))
    fitting = plan.run(settings)
    assert fitting["pace"]["tokens_per_second"] == 2_000.0
    assert fitting["pace"]["source"] == f"{path} of 2026-11-26"
    assert fitting["notes"] == ["the benchmark's model was compiled, and this run is too short for that: leave --benchmark out"]
    monkeypatch.setattr(plan_pace, "_MEASURED_SECONDS", (0.0,))
    path.write_text(json.dumps({**_benchmark(tiny, cpu="Abacus"), "model": {"fingerprint": "f"}}), "utf-8")
    strange = plan.run(settings)
    assert strange["pace"]["source"].startswith("measured now")
    assert "its cpu is Abacus, here it is " in strange["notes"][0]
    assert strange["notes"][0].endswith("; it is of another model): the pace was measured now")


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose job turns to Ray before it refuses."""

    def refuse() -> None:
        pytest.fail("a worker was asked for before the input was refused")

    monkeypatch.setattr(cluster, "connected", refuse)


@pytest.mark.usefixtures("no_workers")
def test_a_corpus_without_text_is_refused(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="no Parquet files here"):
        plan.run(_plan(tmp_path, tiny))
    texts.write_parquet(tmp_path / "corpus" / "a.parquet", {"id": ["a", "b"], "text": ["", None]})
    with pytest.raises(ValueError, match=r"corpus: no text in 2 of 2 rows\. Check --text-column"):
        plan.run(_plan(tmp_path, tiny))
    with pytest.raises(ValueError, match=r"--documents 1: the corpus has 2 rows"):
        plan.run(_plan(tmp_path, tiny, documents=1))


@pytest.mark.usefixtures("local_ray")
def test_one_row_is_planned_for_but_stands_for_no_other(tmp_path: Path, tiny: str) -> None:
    texts.write_parquet(tmp_path / "corpus" / "a.parquet", texts.documents(0, 1))
    assert plan.run(_plan(tmp_path, tiny, tokens_per_second=100.0))["size"]["documents"]["value"] == 1
    with pytest.raises(ValueError, match="a sample of 1 row cannot speak for 50"):
        plan.run(_plan(tmp_path, tiny, tokens_per_second=100.0, documents=50))


@pytest.mark.usefixtures("local_ray")
def test_a_benchmark_of_something_else_is_refused(root: Path, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"job": "benchmark", "systems": {"ours": {"pairs_per_second": 3.0}}}), "utf-8")
    with pytest.raises(ValueError, match="not a report of benchmark encode"):
        plan.run(_plan(root, tiny, benchmark=str(path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass --corpus to make a plan, or --estimate and --compare to judge one"),
        (["--corpus", "c", "--tokens-per-second", "0"], "'tokens_per_second': input should be greater than 0"),
        (["--corpus", "c", "--documents-per-second", "-1"], "'documents_per_second': input should be greater than 0"),
        (["--corpus", "c", "--price-per-hour", "-2"], "'price_per_hour': input should be greater than or equal to 0"),
        (["--corpus", "c", "--benchmark", "b.json", "--tokens-per-second", "5"], "both say how fast a worker is"),
        (["--corpus", "c", "--compare", "f"], "go together"),
        (["--corpus", "c", "--tolerance", "0.25"], "--tolerance: says nothing without --compare"),
        (["--corpus", "c", "--estimate", "e.json", "--compare", "f"], "pass --corpus to make a plan, or"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.Settings.from_command_line(arguments, "python -m jobs.plan")


def test_a_sample_tells_how_long_ids_are(root: Path) -> None:
    sample = plan_pace.Sample.read(corpus.survey(str(root / "corpus"), corpus.Columns()))
    assert sample.id_bytes == 6.0
    assert sorted(sample.shuffled()) == sorted(text for place in sample.texts for text in place)
    assert sum(sample.num_rows) == 120

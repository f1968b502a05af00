"""Models are ranked on the user's own data, similarity is measured, chunks count as documents, losses are said."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import folders
import ir_measures
import pytest
import texts
import tiny_model

from jobs import embed, evaluate, index, verify
from jobs.entry import ExitCode, main
from matryoshka import artifacts, corpus, model, pairs
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.pairs import DatasetStore

pytestmark = pytest.mark.usefixtures("local_ray")


def _report(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return value


def _figures(folder: Path) -> dict[tuple[str, int, str], float]:
    return {(row["system"], row["dim"], row["metric"]): row["value"] for row in _report(folder)["rows"]}


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.write_beir(tmp_path_factory.mktemp("beir") / "beir")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of half the width, whose dims are others too."""
    return tiny_model.save(tmp_path_factory.mktemp("narrow") / "narrow", seed=3, tail=[_halving()])


def _halving() -> Any:
    from sentence_transformers.sentence_transformer.modules import Dense

    return Dense(tiny_model.WIDTH, tiny_model.WIDTH // 2)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, beir: Path, tiny: str, narrow: Path) -> evaluate.Settings:
    output = tmp_path_factory.mktemp("ranked") / "out"
    settings = evaluate.Settings(output=str(output), beir=str(beir), models=(tiny, str(narrow)), workers=1)
    evaluate.run(settings)
    return settings


def test_no_leaks_are_searched_where_nothing_is_trained(ranked: evaluate.Settings) -> None:
    assert artifacts.read_complete(Path(ranked.output) / "data", "dataset").identity["near_duplicates"] == 0


def test_models_are_ranked_each_at_the_dims_that_it_has_with_size_and_speed(ranked: evaluate.Settings, narrow: Path) -> None:
    made = _report(Path(ranked.output))
    assert {(row["system"], row["dim"]) for row in made["rows"]} == {("tiny", 64), ("tiny", 32), ("narrow", 32)}
    assert made["ranking"]["dims"] == [32]
    means = {system: _figures(Path(ranked.output))[system, 32, "nDCG@10"] for system in ("tiny", "narrow")}
    assert made["ranking"]["means"] == pytest.approx(means)
    assert made["ranking"]["best"] == max(means, key=means.__getitem__)
    profiles = {profile["system"]: profile for profile in made["models"]}
    assert [profiles[name]["width"] for name in ("tiny", "narrow")] == [64, 32]
    assert profiles["narrow"]["num_bytes"] == sum(path.stat().st_size for path in narrow.rglob("*.safetensors"))
    assert profiles["narrow"]["num_parameters"] == profiles["tiny"]["num_parameters"] + 64 * 32 + 32
    assert all(profile["documents_per_second"] > 0 and profile["queries_per_second"] > 0 for profile in profiles.values())
    assert made["sentences"][0].startswith(f"{made['ranking']['best']} is the best of 2")
    verify.run(verify.Settings(folder=ranked.output))


def test_a_model_that_is_added_costs_only_itself_and_the_same_command_nothing(
    ranked: evaluate.Settings, other: str, tmp_path: Path
) -> None:
    output = shutil.copytree(ranked.output, tmp_path / "out")
    before = folders.times(output)
    (output / "report.html").unlink()
    evaluate.run(ranked.model_copy(update={"output": str(output)}))
    again = folders.times(output)  # nothing but the page that was missing
    assert {**again, "report.html": before["report.html"]} == before
    evaluate.run(ranked.model_copy(update={"output": str(output), "models": (*ranked.models, f"third={other}")}))
    after = folders.times(output)
    kept = {name for name in before if name.startswith(("evaluation-", "data/"))}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert set(_report(output)["ranking"]["means"]) == {"tiny", "narrow", "third"}
    assert (output / "evaluation-third" / "embeddings" / "manifest.json").is_file()


def test_similarity_is_a_report_like_the_others_and_ranks_models_as_well(tiny: str, other: str, tmp_path: Path) -> None:
    path = texts.write_sts(tmp_path / "sts.csv")
    settings = evaluate.Settings(output=str(tmp_path / "out"), sts=str(path), models=(tiny, other), dims=(64, 8))
    evaluate.run(settings)
    figures = _figures(tmp_path / "out")
    assert {key[1:] for key in figures} == {(64, "Spearman"), (8, "Spearman")}
    # Sentences that share more words are more alike, even to random weights.
    assert all(figures[name, 64, "Spearman"] > 0.5 for name in ("tiny", "other"))
    before = folders.times(tmp_path / "out")
    evaluate.run(settings)
    assert folders.times(tmp_path / "out") == before
    path.write_text(path.read_text() + "a\tb\tc\td\tnone\tx\ty\n")
    with pytest.raises(ValueError, match="data: "):
        evaluate.run(settings)


@pytest.fixture(scope="module")
def tuned(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow model, with what this project leaves in the models that it tuned."""
    folder = Path(shutil.copytree(narrow, tmp_path_factory.mktemp("tuned") / "narrow"))
    Manifest("model", {"dims": [32]}, is_complete=True).write(folder)
    return folder


@pytest.fixture(scope="module")
def compared(ranked: evaluate.Settings, tiny: str, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and BM25, one evaluation after the other."""
    root, folder = Path(ranked.output), tmp_path_factory.mktemp("compared")
    for system, name in (("base", "tiny"), ("tuned", "narrow")):
        own: dict[str, Any] = {"bm25": True, "quantised": ("int8",)} if system == "base" else {"compare": str(folder / "base")}
        evaluate.run(
            evaluate.Settings(
                output=str(folder / system), data=str(root / "data"), model=tiny if system == "base" else str(tuned),
                dims=(32,), system=system, embeddings=str(root / f"evaluation-{name}" / "embeddings"), **own,
            )
        )  # fmt: skip
    return folder


def test_a_comparison_has_a_verdict_and_the_figures_that_each_model_was_ranked_by(
    compared: Path, ranked: evaluate.Settings
) -> None:
    made, figures, ranked_by = _report(compared / "tuned"), _figures(compared / "tuned"), _figures(Path(ranked.output))
    for system, name in (("base", "tiny"), ("tuned", "narrow")):
        assert figures[system, 32, "nDCG@10"] == ranked_by[name, 32, "nDCG@10"]
    assert {row["system"] for row in made["rows"]} == {"bm25", "base", "base+int8", "tuned"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in made["rows"])
    found = made["verdict"]
    # Queries and documents have no word in common, and the models are untrained: there is nothing to gain.
    assert figures["bm25", None, "nDCG@10"] == 0
    assert (found["decision"], found["num_queries"], found["is_small"]) == ("not enough evidence", 30, True)
    assert found["gain"] == pytest.approx(figures["tuned", 32, "nDCG@10"] - figures["base", 32, "nDCG@10"])
    assert made["sentences"][0].startswith("Verdict: not enough evidence. nDCG@10 at 32 dims changed by ")
    assert made["sentences"][0] in (compared / "tuned" / "report.md").read_text().split("\n\n")[1]
    assert [profile["system"] for profile in made["models"]] == ["base", "tuned"]
    verify.run(verify.Settings(folder=str(compared)))


def test_where_nothing_was_tuned_or_nobody_asks_models_are_compared_without_a_verdict(
    compared: Path, narrow: Path, tmp_path: Path
) -> None:
    settings = evaluate.Settings(**_report(compared / "tuned")["settings"])
    for number, more in enumerate(({"model": str(narrow)}, {"verdict": False})):
        output = tmp_path / str(number)
        evaluate.run(settings.model_copy(update={"output": str(output), **more}))
        made = _report(output)
        assert made["verdict"] is None
        assert ("base", "tuned") in {(one["before"], one["after"]) for one in made["comparisons"]}
        assert made["sentences"][0].startswith("nDCG@10 at 32 dims went from ")
    with pytest.raises(ValueError, match=r"--require-gain: nothing to gain on\. Pass a model that this project tuned"):
        evaluate.run(settings.model_copy(update={"output": str(tmp_path / "no"), "model": str(narrow), "require_gain": 0.1}))
    third = {"output": str(tmp_path / "no"), "system": "third", "compare": str(tmp_path / "0"), "verdict": True}
    assert evaluate._has_verdict(settings.model_copy(update=third), model.describe(settings.model))
    with pytest.raises(ValueError, match="--no-verdict"):
        evaluate.Settings(output="out", data=".", compare=".", require_gain=0.1, verdict=False)


def test_the_runs_of_an_evaluation_give_its_figures_to_ir_measures(compared: Path) -> None:
    qrels = DatasetStore.open(Path(_report(compared / "base")["settings"]["data"])).qrels("test")
    for (system, dim, metric), value in _figures(compared / "base").items():
        run = list(ir_measures.read_trec_run(str(compared / "base" / "runs" / f"{system}{f'-{dim}' if dim else ''}.trec")))
        theirs = ir_measures.parse_measure(metric.replace("MRR", "RR").replace("Recall", "R").replace("MAP", "AP"))
        assert ir_measures.calc_aggregate([theirs], qrels, run)[theirs] == pytest.approx(value, abs=1e-4)


def test_a_gain_that_is_required_and_not_shown_ends_with_code_3_every_time(
    compared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = _report(compared / "tuned")["settings"]
    arguments = [
        "evaluate", *(f"--{name}={settings[name]}" for name in ("data", "model", "embeddings", "compare", "system")),
        "--dims=32", f"--output={tmp_path / 'out'}", "--require-gain=0.01",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    for said in ("report in ", "nothing to do"):
        with pytest.raises(SystemExit) as ended:
            main("evaluate", evaluate.Settings, evaluate.run)
        assert ended.value.code == ExitCode.NO_GAIN == 3
        printed = capsys.readouterr().out
        assert said in printed
        assert "the gain that is required was not shown: not enough evidence. nDCG@10" in printed
    evaluate.run(evaluate.Settings(**{**settings, "output": str(tmp_path / "free")}))


def test_systems_of_one_name_and_words_are_evaluated_once(compared: Path) -> None:
    settings = evaluate.Settings(**_report(compared / "tuned")["settings"])
    for more, message in (
        ({"system": "base"}, "has a system 'base' as well"),
        ({"bm25": True}, "has BM25 already. Leave out --bm25"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.run(settings.model_copy(update={"output": str(compared / "again"), **more}))


def test_an_evaluation_of_an_earlier_version_cannot_be_compared_with(compared: Path, tmp_path: Path) -> None:
    old = shutil.copytree(compared / "base", tmp_path / "old")
    (old / "per_query.parquet").unlink()
    made = artifacts.read(old)
    kept = tuple(receipt for receipt in made.receipts if receipt.files[0].path != "per_query.parquet")
    dataclasses.replace(made, receipts=kept).write(old)
    settings = evaluate.Settings(**_report(compared / "tuned")["settings"])
    with pytest.raises(ValueError, match=r"says nothing of single queries .* Evaluate anew, with --replace"):
        evaluate.run(settings.model_copy(update={"output": str(tmp_path / "new"), "compare": str(old)}))
    assert not (tmp_path / "new").exists()


def test_models_that_are_ranked_beside_words_are_held_against_the_first_untouched_one(
    ranked: evaluate.Settings, tmp_path: Path
) -> None:
    output = shutil.copytree(ranked.output, tmp_path / "out")
    evaluate.run(ranked.model_copy(update={"output": str(output), "bm25": True, "replace": True}))
    made = _report(output)
    assert {row["system"] for row in made["rows"]} == {"bm25", "tiny", "narrow"}
    assert ("tiny", "narrow") in {(one["before"], one["after"]) for one in made["comparisons"]}
    assert made["ranking"]["means"].keys() == {"tiny", "narrow"}
    assert (output / "runs" / "bm25.trec").is_file()


def _chunked(data: Path, folder: Path, num_chunks: int) -> Path:
    """Writes a dataset whose every document is cut into chunks of the same text."""
    store = pairs.DatasetStore.open(data)
    source = corpus.inspect(store.corpus, corpus.Columns())
    ids, words = corpus.read_texts(source)
    rows = [(f"{name}#{start}-{start + 9}", text) for name, text in zip(ids, words, strict=True) for start in range(num_chunks)]
    shutil.copytree(data, folder)
    (path,) = (folder / "corpus").glob("*.parquet")
    corpus.write_rows(path, {"id": [name for name, _ in rows], "text": [text for _, text in rows]})
    receipts = [
        Receipt(receipt.key, len(rows) if receipt.key.startswith("corpus/") else receipt.num_rows,
                (FileRecord.of(folder, folder / receipt.files[0].path),))
        for receipt in store.manifest.receipts
    ]  # fmt: skip
    facts = {**store.manifest.facts, "is_chunked": True, "documents": len(rows)}
    Manifest("dataset", {"chunks": num_chunks}, {}, facts, tuple(receipts), is_complete=True).write(folder)
    return folder


def test_chunks_count_as_the_document_that_they_were_cut_from(ranked: evaluate.Settings, tiny: str, tmp_path: Path) -> None:
    """Twelve equal chunks of each document fill the first ten places; the figures are those of whole documents."""
    made = {"whole": Path(ranked.output) / "data", "cut": _chunked(Path(ranked.output) / "data", tmp_path / "data", 12)}
    vectors, built = ({name: str(tmp_path / f"{name}-{what}") for name in made} for what in ("vectors", "index"))
    common = {"model": tiny, "workers": 1}
    for name, data in made.items():
        embed.run(embed.Settings(output=vectors[name], corpus=f"{data}/corpus", precision="float32", unit_rows=100, **common))
    for name in made:
        index.run(index.Settings(output=built[name], embeddings=vectors[name], shards=2, plan=("32:720", "64:720")))
    for name, data in made.items():
        evaluate.run(
            evaluate.Settings(
                output=str(tmp_path / name), data=str(data), embeddings=vectors[name], index=built[name], system="base", **common
            )
        )
    assert _figures(tmp_path / "cut") == _figures(tmp_path / "whole")
    assert "720 chunks of documents" in _report(tmp_path / "cut")["title"]


def test_a_split_without_judgements_is_refused(ranked: evaluate.Settings, tiny: str, tmp_path: Path) -> None:
    data = Path(shutil.copytree(Path(ranked.output) / "data", tmp_path / "data"))
    path, settings = data / "qrels" / "test.parquet", evaluate.Settings(output=str(tmp_path / "out"), data=str(data), model=tiny)
    for found, message in ({"a": 0}, "split 'test' is empty"), ({"stranger": 1}, "no query of split 'test' has judgements"):
        names = [name for name, count in found.items() if count]
        corpus.write_rows(path, {"query_id": names, "document_id": names, "grade": [1] * len(names)})
        made, own = artifacts.read(data), Receipt("qrels/test", len(names), (FileRecord.of(data, path),))
        receipts = tuple(own if receipt.key == own.key else receipt for receipt in made.receipts)
        dataclasses.replace(made, receipts=receipts).write(data)
        with pytest.raises(ValueError, match=message):
            evaluate.run(settings)
    assert not (tmp_path / "out").exists()


def test_a_model_in_a_bucket_has_the_name_of_its_folder_or_the_one_that_it_is_given() -> None:
    named = evaluate.named_models(("s3://bucket/night=1/minilm", "mine=s3://bucket/other", "far/away"))
    assert named == {"minilm": "s3://bucket/night=1/minilm", "mine": "s3://bucket/other", "away": "far/away"}

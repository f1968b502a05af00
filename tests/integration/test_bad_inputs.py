"""Everything that a user can get wrong is refused by name, before a worker is taken, and nothing is touched."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
import torch

from jobs import cluster, embed, evaluate, finetune, index, mine, pipeline, prepare, search, verify


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose job turns to Ray before it refuses."""

    def refuse() -> None:
        pytest.fail("a worker was asked for before the input was refused")

    monkeypatch.setattr(cluster, "connected", refuse)


def _embed(root: Path, model: str, **more: Any) -> embed.Settings:
    return embed.Settings(output=str(root / "out"), corpus=str(root / "corpus"), model=model, precision="float32", **more)


def _prepare(root: Path, **more: Any) -> prepare.Settings:
    return prepare.Settings(output=str(root / "out"), pairs=str(root / "pairs.parquet"), **more)


def _not_utf8() -> pa.Array:
    return pa.array([b"good", b"caf\xe9"]).view(pa.string())


_BAD_CORPORA: dict[str, tuple[dict[str, Any] | None, str]] = {
    "nothing there": (None, "no Parquet files here"),
    "no id column": (
        {"key": ["a"], "text": ["x"]},
        r"part-7\.parquet: no column 'id' \(found: 'key', 'text'\)\. Pass --id-column",
    ),
    "no text column": ({"id": ["a"], "body": ["x"]}, r"part-7\.parquet: no column 'text'.*Pass --text-column"),
    "text is a list": ({"id": ["a"], "text": [["x"]]}, r"part-7\.parquet: column 'text' is list<.*>, not text"),
    "ids are fractions": ({"id": [1.5], "text": ["x"]}, r"part-7\.parquet: column 'id' is double, not text"),
    "an id is null": ({"id": ["a", None], "text": ["x", "y"]}, r"part-7\.parquet: column 'id', row 1: no id"),
    "no rows": ({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}, r"no row with text \(rows: 0\)"),
    "no text in any row": ({"id": ["a", "b", "c"], "text": ["", None, " \n"]}, r"no row with text \(rows: 3\)"),
    "an id twice in a file": ({"id": ["a", "b", "a"], "text": ["x", "y", "z"]}, r"part-7\.parquet: 1 ids.*'a'"),
    "not UTF-8": ({"id": ["a", "b"], "text": _not_utf8()}, r"part-7\.parquet: column 'text', row 1: not UTF-8"),
}


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("case", _BAD_CORPORA)
def test_embed_refuses_a_corpus_with(tmp_path: Path, tiny: str, case: str) -> None:
    columns, message = _BAD_CORPORA[case]
    (tmp_path / "corpus").mkdir()
    if columns:
        texts.write_parquet(tmp_path / "corpus" / "part-7.parquet", columns)
    with pytest.raises(ValueError, match=message):
        embed.run(_embed(tmp_path, tiny))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_workers")
def test_embed_names_an_id_that_stands_in_two_files(tmp_path: Path, tiny: str) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus")
    texts.write_parquet(corpus / "part-7.parquet", texts.documents(35, 40))
    with pytest.raises(ValueError, match=r"part-0\.parquet, .*part-7\.parquet: 5 ids .*'d00035'"):
        embed.run(_embed(tmp_path, tiny))


@pytest.mark.usefixtures("no_workers")
def test_embed_names_a_file_that_is_a_copy_of_another(tmp_path: Path, tiny: str) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus")
    (corpus / "part-7.parquet").write_bytes((corpus / "part-1.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"part-7\.parquet: is a copy of .*part-1\.parquet"):
        embed.run(_embed(tmp_path, tiny))


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    "damage", [folders.truncate, lambda path: path.write_bytes(b"id,text\n1,a\n"), lambda path: path.write_bytes(b"")]
)
def test_embed_names_a_damaged_file_and_harms_no_other(tmp_path: Path, tiny: str, damage: folders.Damage) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus")
    damage(corpus / "part-1.parquet")
    before = folders.contents(corpus)
    with pytest.raises(ValueError, match=r"part-1\.parquet: not a readable Parquet file"):
        embed.run(_embed(tmp_path, tiny))
    assert folders.contents(corpus) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_file_that_is_damaged_later_leaves_the_finished_embeddings_as_they_are(tmp_path: Path, tiny: str) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus")
    embed.run(_embed(tmp_path, tiny))
    before = folders.times(tmp_path / "out")
    folders.truncate(corpus / "part-1.parquet")
    with pytest.raises(ValueError, match=r"part-1\.parquet"):
        embed.run(_embed(tmp_path, tiny))
    assert folders.times(tmp_path / "out") == before


@pytest.mark.usefixtures("local_ray")
def test_embed_leaves_out_and_counts_rows_without_text(tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"id": ["a", "b", "c", "d", "e"], "text": ["bada", None, "", " \t\n", "geva"]}
    texts.write_parquet(tmp_path / "corpus" / "part-0.parquet", columns)
    embed.run(_embed(tmp_path, tiny))
    assert sorted(folders.vectors(tmp_path / "out")) == ["a", "e"]
    assert "3 rows had no text" in capsys.readouterr().out
    verify.run(verify.Settings(folder=str(tmp_path / "out")))


@pytest.mark.usefixtures("no_workers")
def test_embed_refuses_rows_without_text_where_asked_to(tmp_path: Path, tiny: str) -> None:
    texts.write_parquet(tmp_path / "corpus" / "part-0.parquet", {"id": ["a", "b"], "text": ["bada", None]})
    with pytest.raises(ValueError, match=r"1 rows have no text.*--fail-on-empty"):
        embed.run(_embed(tmp_path, tiny, fail_on_empty=True))
    assert not (tmp_path / "out").exists()


_BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "no query column": (
        {"question": ["a"], "positive": ["x"]},
        r"pairs\.parquet: no column 'query' \(found: 'question', 'positive'\)",
    ),
    "numbers for a document": ({"query": ["a"], "positive": [0.5]}, r"pairs\.parquet: column 'positive' is double, not text"),
    "no rows": (
        {"query": pa.array([], pa.string()), "positive": pa.array([], pa.string())},
        r"no pair with text is left \(left out: nothing\)",
    ),
    "no text in any row": ({"query": ["", None], "positive": ["x", None]}, "no pair"),
    "not UTF-8": ({"query": ["a", "b"], "positive": _not_utf8()}, r"pairs\.parquet: column 'positive', row 1: not UTF-8"),
}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("case", _BAD_PAIRS)
def test_prepare_refuses_pairs_with(tmp_path: Path, case: str) -> None:
    columns, message = _BAD_PAIRS[case]
    texts.write_parquet(tmp_path / "pairs.parquet", columns)
    with pytest.raises(ValueError, match=message):
        prepare.run(_prepare(tmp_path))
    assert not (tmp_path / "out").exists()


def test_prepare_refuses_a_file_of_pairs_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs\.parquet: no Parquet, CSV or JSONL files here"):
        prepare.run(_prepare(tmp_path))


@pytest.mark.usefixtures("local_ray")
def test_prepare_counts_pairs_that_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = texts.pairs(30)
    made["query"][3], made["positive"][5], made["positive"][7] = "", " ", made["positive"][8]
    texts.write_parquet(tmp_path / "pairs.parquet", made)
    prepare.run(_prepare(tmp_path))
    out = capsys.readouterr().out
    assert "27 documents" in out
    assert re.search(r"left out: .*2 empty", out)
    # Two questions about one document both stay, be it in two splits.
    queries = out.partition("queries: ")[2].partition(";")[0]
    assert sum(map(int, re.findall(r"(\d+) (?:test|dev|train)\b", queries))) == 28


@pytest.mark.usefixtures("local_ray")
def test_prepare_refuses_pairs_without_text_where_asked_to(tmp_path: Path) -> None:
    texts.write_parquet(tmp_path / "pairs.parquet", {"query": ["a", ""], "positive": ["x", "y"]})
    with pytest.raises(ValueError, match="1 rows have no text"):
        prepare.run(_prepare(tmp_path, fail_on_empty=True))
    assert not (tmp_path / "out").exists()


def _spoil(path: Path, text: bytes) -> Callable[[Path], None]:
    return lambda beir: (beir / path).write_bytes(text) and None


_BAD_BEIR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no corpus": (lambda beir: (beir / "corpus.jsonl").unlink(), r"corpus\.jsonl: cannot be read"),
    "no queries": (_spoil(Path("queries.jsonl"), b""), r"queries\.jsonl: no text at all"),
    "a broken line": (_spoil(Path("corpus.jsonl"), b'{"_id": "d0", "text": "x"}\n{"_id": '), r"corpus\.jsonl: line 2"),
    "an id twice": (
        _spoil(Path("corpus.jsonl"), b'{"_id": "d0", "text": "x"}\n' * 2),
        r"corpus\.jsonl: line 1 and line 2: id 'd0' stands more than once",
    ),
    "a corpus that is not UTF-8": (
        _spoil(Path("corpus.jsonl"), b'{"_id": "d0", "text": "caf\xe9"}'),
        r"corpus\.jsonl: not UTF-8",
    ),
    "judgements that are not UTF-8": (_spoil(Path("qrels/test.tsv"), b"q1\td\xe9\t1\n"), r"test\.tsv: not UTF-8"),
    "judgements without a grade": (_spoil(Path("qrels/test.tsv"), b"q1\td1\t1\nq1\td1\n"), r"test\.tsv: line 2"),
    "judgements of other queries": (_spoil(Path("qrels/test.tsv"), b"x1\td1\t1\n"), r"test\.tsv: judges no query"),
}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("case", _BAD_BEIR)
def test_prepare_refuses_a_beir_folder_with(tmp_path: Path, case: str) -> None:
    spoil, message = _BAD_BEIR[case]
    beir = texts.write_beir(tmp_path / "beir")
    spoil(beir)
    with pytest.raises(ValueError, match=message):
        prepare.run(prepare.Settings(output=str(tmp_path / "out"), beir=str(beir)))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, local_ray: "cluster.Session") -> Path:  # noqa: ARG001
    root = tmp_path_factory.mktemp("dataset")
    texts.write_parquet(root / "pairs.parquet", texts.pairs(60))
    prepare.run(_prepare(root))
    return root / "out"


@pytest.mark.usefixtures("no_workers")
def test_finetune_refuses_dims_larger_than_the_model(tmp_path: Path, dataset: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"dims 128, 96 do not fit a model of width 64\. Choose from 1 to 64"):
        finetune.run(finetune.Settings(output=str(tmp_path / "out"), data=str(dataset), model=tiny, dims=(96, 64, 128)))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_workers")
def test_evaluate_refuses_dims_larger_than_the_model(tmp_path: Path, dataset: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match="dims 65 do not fit a model of width 64"):
        evaluate.run(evaluate.Settings(output=str(tmp_path / "out"), data=str(dataset), model=tiny, dims=(65,)))


@pytest.mark.usefixtures("no_workers")
def test_evaluate_refuses_a_split_that_the_data_does_not_have(tmp_path: Path, dataset: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"no split 'exam' \(found: dev, test, train\)\. Pass --split"):
        evaluate.run(evaluate.Settings(output=str(tmp_path / "out"), data=str(dataset), model=tiny, split="exam"))


_BAD_EVALUATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "two models of one name": (
        {"models": ("a/model", "b/model")},
        r"two are named 'model' \(a/model, b/model\)\. Write another-name=",
    ),
    "a name that is a path": ({"models": ("a/b=c",)}, "'a/b' cannot name a folder"),
    "a candidate that is no model": ({"models": ("TINY", "x=DATA")}, "no model here"),
    "a candidate that is nowhere": ({"models": ("TINY", "no-such-model")}, "no-such-model: no such folder"),
    "dims that no model has": ({"models": ("TINY",), "dims": (65, 64)}, "none of them has 65 dims"),
    "dims of which a model has none": ({"models": ("TINY",), "dims": (65,)}, "dims 65 do not fit a model of width 64"),
    "a model and several": ({"models": ("TINY",), "model": "TINY"}, "--model cannot be used with --models"),
    "an index of several models": (
        {"models": ("TINY",), "index": "index"},
        "--index cannot be used with --models: it goes with one",
    ),
    "no data": ({"data": None}, "--data .*, --beir or --sts, one of them"),
    "two kinds of data": ({"sts": "sts.csv"}, "--data .*, --beir or --sts, one of them"),
    "a split of sentences": ({"data": None, "sts": "sts.csv", "split": "dev"}, "--split cannot be used with --sts"),
    "words and sentences": ({"data": None, "sts": "sts.csv", "bm25": True}, "--bm25 cannot be used with --sts"),
    "a gain of nothing and sentences": (
        {"data": None, "sts": "sts.csv", "compare": "base", "require_gain": 0.0},
        "--require-gain cannot be used with --sts",
    ),
    "a gain on nothing": ({"require_gain": 0.1}, "--require-gain: nothing to gain on. Pass an evaluation of the untouched model"),
    "a gain of untouched models": ({"models": ("TINY",), "require_gain": 0.1}, "Name a tuned model and an untouched one"),
    "a floor of nothing": ({"floor": 0}, "'floor'.*--floor"),
    "vectors of two bits": ({"quantised": ("int2",)}, "'quantised"),
    "sentences that are nowhere": ({"data": None, "sts": "sts.csv"}, r"sts\.csv: cannot be read"),
}


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("case", _BAD_EVALUATIONS)
def test_evaluate_refuses(tmp_path: Path, dataset: Path, tiny: str, case: str) -> None:
    given, message = _BAD_EVALUATIONS[case]
    names = [name.replace("TINY", tiny).replace("DATA", str(dataset)) for name in given.get("models", ())]
    values = {"output": str(tmp_path / "out"), "data": str(dataset), **given, "models": tuple(names)}
    with pytest.raises(ValueError, match=message):
        evaluate.run(evaluate.Settings.from_values(values, "evaluate"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plan", [("16:50", "96:20"), ("128:50",)])
def test_index_refuses_a_funnel_wider_than_the_vectors(finished_pipeline: Path, tmp_path: Path, plan: tuple[str, ...]) -> None:
    settings = index.Settings(output=str(tmp_path / "out"), embeddings=str(finished_pipeline / "embeddings"), plan=plan)
    with pytest.raises(ValueError, match="do not fit a model of width 64"):
        index.run(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("factory", "message"),
    [("IVF4096,Flat", "needs 4096 documents to learn from, and there are"), ("Nonsense", "not a FAISS factory string")],
)
def test_index_refuses_a_coarse_index_that_it_cannot_build(
    finished_pipeline: Path, tmp_path: Path, factory: str, message: str
) -> None:
    settings = index.Settings(
        output=str(tmp_path / "out"), embeddings=str(finished_pipeline / "embeddings"), coarse_index=factory
    )
    with pytest.raises(ValueError, match=message):
        index.run(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (("16:50", "96:20"), "vectors have 64 dims, the plan is"),
        (("32:50:nprobe=3", "64:20"), "has parameters of a coarse index, which this index has for 16 dims"),
        (("16:50:nprobe=3", "64:20"), "has no parameter 'nprobe'"),
        (("16",), "'16' is not dim:keep"),
    ],
)
def test_search_refuses_a_funnel_that_does_not_fit_the_index(
    finished_pipeline: Path, plan: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search.run(search.Settings(index=str(finished_pipeline / "index"), query="bada", plan=plan))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_search_refuses_a_gpu_that_is_not_there(finished_pipeline: Path, tmp_path: Path) -> None:
    path = texts.write_parquet(tmp_path / "queries.parquet", {"id": ["q0"], "text": ["bada"]})
    given = {"index": str(finished_pipeline / "index"), "queries": str(path), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"--device cuda: the cluster has no GPU\. Pass --device cpu"):
        search.run(search.Settings(**given, device="cuda"))


_BAD_QUERIES: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}, r"queries\.parquet: no row with text"),
    "no text in any row": ({"id": ["q0", "q1"], "text": ["", None]}, r"queries\.parquet: no row with text"),
    "an id twice": ({"id": ["q0", "q0"], "text": ["a", "b"]}, r"queries\.parquet: 1 ids.*'q0'"),
    "no text column": ({"id": ["q0"], "query": ["a"]}, r"queries\.parquet: no column 'text'"),
}


@pytest.mark.parametrize("case", _BAD_QUERIES)
def test_search_refuses_a_query_file_with(finished_pipeline: Path, tmp_path: Path, case: str) -> None:
    columns, message = _BAD_QUERIES[case]
    path = texts.write_parquet(tmp_path / "queries.parquet", columns)
    settings = search.Settings(index=str(finished_pipeline / "index"), queries=str(path), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        search.run(settings)
    assert not (tmp_path / "out").exists()


def test_search_refuses_an_index_that_is_not_there_and_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no index here.*python -m jobs\.index"):
        search.run(search.Settings(index=str(tmp_path), query="bada"))


def test_index_refuses_a_folder_of_another_kind(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 'dataset', not 'embeddings'"):
        index.run(index.Settings(output=str(tmp_path / "out"), embeddings=str(dataset)))


def _make_no_model(folder: Path, kind: str) -> None:
    folder.mkdir()
    if kind == "without weights":
        (folder / "config.json").write_text("{}")
    if kind == "with pickled weights":
        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"x")
    if kind == "of text files":
        (folder / "notes.txt").write_text("my notes")


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("that is empty", "no model here"),
        ("of text files", "no model here"),
        ("without weights", r"no \*\.safetensors weights"),
        ("with pickled weights", "pickled ones are not loaded"),
    ],
)
def test_a_model_folder_is_refused(tmp_path: Path, dataset: Path, kind: str, message: str) -> None:
    folder = tmp_path / "no-model"
    _make_no_model(folder, kind)
    texts.write_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match=f"no-model: {message}|no-model: .*{message}"):
        embed.run(_embed(tmp_path, str(folder)))
    with pytest.raises(ValueError, match=message):
        finetune.run(finetune.Settings(output=str(tmp_path / "out"), data=str(dataset), model=str(folder)))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_workers")
def test_a_model_that_is_nowhere_is_refused_by_its_name(tmp_path: Path) -> None:
    texts.write_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match="no-such-model: no such folder"):
        embed.run(_embed(tmp_path, "no-such-model"))


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "job", ["prepare", "mine", "embed", "finetune", "index", "search", "evaluate", "evaluate-beir", "pipeline"]
)
@pytest.mark.parametrize("foreign", ["notes.txt", "manifest.json"])
def test_an_output_folder_of_something_else_is_not_touched(
    tmp_path: Path, dataset: Path, tiny: str, finished_pipeline: Path, foreign: str, job: str, replace: bool
) -> None:
    output = tmp_path / "thesis"
    (output / "chapters").mkdir(parents=True)
    (output / "chapters" / "one.tex").write_text("Call me Ishmael.")
    # Many tools write a manifest.json: browser extensions, dbt, web apps.
    (output / foreign).write_text('{"name": "thesis", "version": 3}')
    before = folders.times(output)
    settings = _with_output(job, output, tmp_path, dataset, tiny, finished_pipeline, replace)
    module = sys.modules[type(settings).__module__]
    with pytest.raises(ValueError, match=re.escape(str(output))):
        module.run(settings)
    assert folders.times(output) == before


def _with_output(job: str, output: Path, root: Path, dataset: Path, model: str, done: Path, replace: bool) -> Any:
    common = {"output": str(output), "replace": replace}
    pairs, questions = str(root / "pairs.parquet"), str(dataset / "queries" / "test.parquet")
    texts.write_parquet(Path(pairs), texts.pairs(60))
    corpus, beir = str(texts.write_corpus(root / "corpus")), str(texts.write_beir(root / "beir"))
    settings: dict[str, Callable[[], Any]] = {
        "prepare": lambda: prepare.Settings(pairs=pairs, **common),
        "mine": lambda: mine.Settings(data=str(dataset), model=model, window="0:20", **common),
        "embed": lambda: embed.Settings(corpus=corpus, model=model, **common),
        "finetune": lambda: finetune.Settings(data=str(dataset), model=model, batch_size=16, **common),
        "index": lambda: index.Settings(embeddings=str(done / "embeddings"), **common),
        "search": lambda: search.Settings(index=str(done / "index"), queries=questions, **common),
        "evaluate": lambda: evaluate.Settings(data=str(dataset), model=model, **common),
        "evaluate-beir": lambda: evaluate.Settings(beir=beir, model=model, **common),
        "pipeline": lambda: pipeline.Settings(model=model, prepare={"pairs": pairs}, finetune={"batch_size": 16}, **common),
    }
    return settings[job]()


@pytest.mark.usefixtures("no_workers")
def test_an_output_that_is_a_file_is_not_touched(tmp_path: Path, tiny: str) -> None:
    texts.write_corpus(tmp_path / "corpus")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        embed.run(_embed(tmp_path, tiny, replace=True))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.usefixtures("no_workers")
def test_an_output_with_an_artifact_of_another_kind_is_not_touched(dataset: Path, tmp_path: Path, tiny: str) -> None:
    texts.write_corpus(tmp_path / "corpus")
    before = folders.times(dataset)
    with pytest.raises(ValueError, match="holds 'dataset', not 'embeddings'"):
        embed.run(_embed(tmp_path, tiny, replace=True).model_copy(update={"output": str(dataset)}))
    assert folders.times(dataset) == before


@pytest.mark.usefixtures("no_workers")
def test_a_url_is_refused_with_what_to_do(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"hf://: no such kind of storage \(known: s3://"):
        embed.run(_embed(tmp_path, tiny).model_copy(update={"corpus": "hf://bucket/corpus"}))


def _yaml(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "job.yaml"
    path.write_text(text, "utf-8")
    return ["--config", str(path)]


_BAD_YAML: dict[str, tuple[str, str]] = {
    "an unknown key": ("output: out\npipelin: {}\nmodle: minilm\n", "no key 'pipelin'"),
    "a misspelt key": ("output: out\nmodle: minilm\n", "no key 'modle'. Did you mean 'model'"),
    "a value of the wrong type": ("output: out\nprepare: [1, 2]\n", "'prepare'"),
    "no output": ("model: minilm\n", "'output' is missing"),
    "a list": ("- output\n- model\n", "holds no settings"),
    "broken syntax": ("output: [out\n", "not YAML"),
    "a model and candidates": ("output: out\nmodel: minilm\ncandidates: [minilm]\n", "either --model or --candidates"),
}


@pytest.mark.parametrize("case", _BAD_YAML)
def test_the_pipeline_refuses_a_yaml_file_with(tmp_path: Path, case: str) -> None:
    text, message = _BAD_YAML[case]
    with pytest.raises(ValueError, match=message):
        pipeline.Settings.from_command_line(_yaml(tmp_path, text), "pipeline")


_BAD_SECTIONS: dict[str, tuple[str, str]] = {
    "an unknown key": ("embed: {unit_row: 5}", r"section 'embed': no key 'unit_row'\. Did you mean 'unit_rows'"),
    "a value of the wrong type": ("finetune: {batch_size: many}", r"section 'finetune': 'batch_size'"),
    "a value out of range": ("embed: {unit_rows: 0}", r"section 'embed': 'unit_rows'.*greater than or equal to 1"),
    "dims that are too large": ("finetune: {dims: [64, 4096]}", "4096"),
    "a funnel that is too wide": ("index: {plan: ['16:50', '4096:20']}", "4096"),
    "a path that the pipeline sets": ("index: {output: elsewhere}", r"section 'index': 'output' is set by the pipeline itself"),
    "candidates that are no models": ("candidates: [jobs, lib]", "jobs: no model here"),
    "candidates of one name": ("candidates: [a/model, b/model]", "two are named 'model'"),
    "other data that is not there": ("also: {alike: {sts: no-such.csv}}", r"no-such\.csv: cannot be read"),
    "other data without its split": ("also: {far: {beir: tests}}", r"tests/qrels/test\.tsv: not there"),
    "other data of no kind": ("also: {far: {split: dev}}", r"section 'also\.far': give the data as"),
    "other data with a path that the pipeline sets": (
        "also: {far: {model: minilm}}",
        r"section 'also\.far': 'model' is set by the",
    ),
    "other data of no name": ("also: {far/away: {beir: tests}}", "also: 'far/away' cannot name a folder"),
    "two sources": ("prepare: {pairs: a, beir: b}", "exactly one source"),
    "an unknown key without a GPU": ("without_gpu: {embed: {unit_row: 5}}", r"no key 'unit_row'\. Did you mean 'unit_rows'"),
    "an unknown section without a GPU": ("without_gpu: {embd: {unit_rows: 5}}", r"no section 'embd'"),
}


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("case", _BAD_SECTIONS)
def test_the_pipeline_refuses_before_any_stage_a_section_with(tmp_path: Path, tiny: str, case: str) -> None:
    section, message = _BAD_SECTIONS[case]
    source = "" if section.startswith("prepare") else "prepare: {pairs: pairs.parquet}\n"
    start = "" if section.startswith("candidates") else f"model: {tiny}\n"
    text = f"output: {tmp_path / 'out'}\n{start}{source}{section}\n"
    settings = pipeline.Settings.from_command_line(_yaml(tmp_path, text), "pipeline")
    with pytest.raises(ValueError, match=message):
        pipeline.run(settings)
    assert not (tmp_path / "out").exists()


def _start(job: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def test_bad_input_on_the_command_line_ends_with_code_2_and_one_line(tmp_path: Path, tiny: str, finished_pipeline: Path) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus")
    folders.truncate(corpus / "part-1.parquet")
    index_folder, output = str(finished_pipeline / "index"), str(tmp_path / "out")
    started = {
        "part-1.parquet: not a readable Parquet file": _start(
            "embed", f"--output={output}", f"--corpus={corpus}", f"--model={tiny}"
        ),
        "no option '--quary'. Did you mean '--query'?": _start("search", f"--index={index_folder}", "--quary", "bada"),
        "give exactly one source": _start("prepare", f"--output={output}"),
    }
    for message, process in started.items():
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 2
        told = [line for line in complaint.splitlines() if not re.search(r" INFO run=\w+ event=(begin|end) job=", line)]
        assert len(told) == 1
        assert told[0].startswith("error: ")
        assert message in told[0]


def test_an_edited_manifest_is_refused(finished_pipeline: Path, tmp_path: Path) -> None:
    made = folders.manifest(finished_pipeline / "embeddings")
    made["identity"]["precision"] = "bf16"
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"manifest\.json: was altered"):
        index.run(index.Settings(output=str(tmp_path / "out"), embeddings=str(tmp_path / "embeddings")))


def test_an_output_inside_its_corpus_is_refused_before_it_could_be_read_as_input(tmp_path: Path, tiny: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["some text"]}), corpus / "part.parquet")
    with pytest.raises(ValueError, match="lie in each other"):
        embed.run(embed.Settings(output=str(corpus / "vectors"), corpus=str(corpus), model=tiny))
    assert [path.name for path in corpus.iterdir()] == ["part.parquet"]


@pytest.mark.usefixtures("local_ray")
def test_more_workers_than_the_machine_has_are_refused_instead_of_waited_for(tmp_path: Path, tiny: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["some text"]}), corpus / "part.parquet")
    with pytest.raises(ValueError, match=r"--workers 1000: this machine has \d+ [CG]PUs"):
        embed.run(embed.Settings(output=str(tmp_path / "out"), corpus=str(corpus), model=tiny, workers=1000))


@pytest.mark.usefixtures("local_ray")
def test_the_pipeline_refuses_too_few_pairs_before_it_embeds_anything(tmp_path: Path, tiny: str) -> None:
    pairs = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"query": [f"q{i}" for i in range(40)], "positive": [f"answer {i}" for i in range(40)]}), pairs)
    settings = pipeline.Settings(
        output=str(tmp_path / "run"), model=tiny, prepare={"pairs": str(pairs)}, finetune={"batch_size": 64}
    )
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        pipeline.run(settings)
    assert not (tmp_path / "run" / "evaluation-base").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_funnel_that_does_not_fit_the_index_costs_no_earlier_answers(
    tmp_path: Path, finished_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = str(finished_pipeline / "data" / "queries" / "test.parquet")
    settings = search.Settings(index=str(finished_pipeline / "index"), queries=queries, output=str(tmp_path / "answers"))
    search.run(settings)
    before = folders.times(tmp_path / "answers")
    with pytest.raises(ValueError, match="vectors have 64 dims, the plan is"):
        search.run(settings.model_copy(update={"plan": ("16:50", "96:20"), "replace": True}))
    assert folders.times(tmp_path / "answers") == before
    assert "queries answered" in capsys.readouterr().out

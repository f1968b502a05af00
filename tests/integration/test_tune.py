"""An index is tuned on real queries, with judgements or without, and searched by the name of a quality."""

import json
import shutil
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_data
import texts

from jobs import embed, index, search, tune, verify
from matryoshka import vectors
from matryoshka.answers import JUDGED, UNJUDGED
from matryoshka.indexing import IndexStore
from matryoshka.pairs import DatasetStore

pytestmark = pytest.mark.usefixtures("local_ray", "one_thread")

_DOCUMENTS, _QUERIES = 160, 100


def _write(root: Path, *, is_chunked: bool = False) -> DatasetStore:
    """Writes a dataset whose queries are the first words of documents, which answer them."""
    columns = texts.documents(0, _DOCUMENTS)
    documents = dict(zip(columns["id"], columns["text"], strict=True))
    queries = {f"q-{name}": " ".join(text.split()[:5]) for name, text in [*documents.items()][:_QUERIES]}
    judged = [(query, query.removeprefix("q-"), 1) for query in queries]
    few = dict([*queries.items()][:10])
    return small_data.write_dataset(
        root / "data",
        documents,
        {"dev": queries, "test": few, "train": few},
        {"dev": judged, "test": judged[:10], "train": []},
        [],
        is_chunked=is_chunked,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A dataset, its index and queries in other forms."""
    root = tmp_path_factory.mktemp("tune")
    data = _write(root)
    embed.embed_dataset(root / "embeddings", data, tiny, None, replace=False)
    index.run(_index(root))
    ids, questions = data.queries("dev")
    texts.write_parquet(root / "queries.parquet", {"id": ids, "text": questions})
    own = np.random.default_rng(0).standard_normal((_QUERIES, 64)).astype(np.float16)
    vectors.write_unit(root / "vectors.parquet", ids, own)
    pq.write_table(pq.read_table(root / "vectors.parquet").rename_columns({"id": "name"}), root / "vectors.parquet")
    vectors.write_unit(root / "twice.parquet", [ids[0], *ids[:-1]], own)
    vectors.write_unit(root / "narrow.parquet", ids, own[:, :32])
    return root


def _index(root: Path) -> index.Settings:
    return index.Settings(output=str(root / "index"), embeddings=str(root / "embeddings"), shards=2, plan=("16:40", "64:10"))


@pytest.fixture(scope="module")
def tuned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an index that was tuned by judgements."""
    root = _copy(made, tmp_path_factory.mktemp("tuned"))
    tune.run(_settings(root))
    return root


def _copy(made: Path, root: Path) -> Path:
    """Returns a folder with the same data and an index of its own."""
    for path in made.iterdir():
        if path.name != "index":
            (root / path.name).symlink_to(path)
    shutil.copytree(made / "index", root / "index")
    return root


def _settings(root: Path, **more: Any) -> tune.Settings:
    return tune.Settings(**{"index": str(root / "index"), "data": str(root / "data"), "batch": 32, "floor": 0.9, **more})


def _tuned(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / "index" / "manifest.json").read_text("utf-8"))["facts"]["tuned"]
    return value


_SAMPLED = 80


def test_a_tuned_index_is_searched_with_the_cheapest_plan_that_holds_the_floor(tuned: Path) -> None:
    found, store = _tuned(tuned), IndexStore.open(tuned / "index")
    assert found["measure"] == JUDGED
    assert found["num_choosing"] + found["num_confirming"] == _QUERIES
    assert found["exact"]["plan"] == ["64:10"]
    assert found["plans"]["balanced"]["plan"] == store.plan.parts
    speeds = [own["queries_per_second"] for own in found["frontier"]]
    assert speeds == sorted(speeds, reverse=True)
    assert {"date", "hardware", "split", "floor"} <= found.keys()
    verify.run(verify.Settings(folder=str(tuned / "index")))


@pytest.mark.parametrize("source", ["beir", "queries.parquet", "vectors.parquet", "chunks"])
def test_an_index_is_tuned_with_queries_from(made: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = _copy(made, tmp_path)
    before = folders.times(root / "index")
    if source == "beir":
        own = {"data": None, "beir": str(_write_beir(made, tmp_path))}
    elif source == "chunks":
        own = {"data": str(_write(tmp_path / "chunked", is_chunked=True).folder)}
    else:
        own = {"data": None, "queries": str(root / source), "id_column": "name" if source == "vectors.parquet" else "id"}
    count = _SAMPLED if source == "vectors.parquet" else _QUERIES
    tune.run(_settings(root, dry_run=True, max_queries=count, **own))
    assert folders.times(root / "index") == before
    said = capsys.readouterr().out
    assert (JUDGED if source == "beir" else UNJUDGED) in said
    assert "balanced (at least 0.9): " in said
    assert f"plans compared on {count} queries; {root / 'index'} is left as it was" in said


def _write_beir(made: Path, root: Path) -> Path:
    ids, questions = DatasetStore.open(made / "data").queries("dev")
    columns = texts.documents(0, _DOCUMENTS)
    named = {"corpus": (columns["id"], columns["text"]), "queries": (ids, questions)}
    for name, (own_ids, own) in named.items():
        rows = [{"_id": one, "text": text} for one, text in zip(own_ids, own, strict=True)]
        texts.write_json_lines(root / "beir" / f"{name}.jsonl", rows)
    (root / "beir" / "qrels").mkdir()
    lines = [f"{name}\t{name.removeprefix('q-')}\t1\n" for name in ids]
    (root / "beir" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return root / "beir"


def test_the_same_command_does_nothing_and_another_floor_measures_again(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _copy(tuned, tmp_path)
    before = folders.times(root / "index")
    tune.run(_settings(root))
    assert folders.times(root / "index") == before
    assert "tune: nothing to do" in capsys.readouterr().out
    tune.run(_settings(root, floor=0.8))
    assert _tuned(root)["floor"] == 0.8


def test_a_later_build_keeps_the_tuning_unless_it_is_asked_for_another_plan(tuned: Path, tmp_path: Path) -> None:
    root = _copy(tuned, tmp_path)
    before = folders.times(root / "index")
    index.run(_index(root))
    assert folders.times(root / "index") == before
    index.run(_index(root).model_copy(update={"plan": ("16:41", "64:10")}))
    assert IndexStore.open(root / "index").plan.parts == ["16:41", "64:10"]


def test_a_quality_is_searched_by_name(made: Path, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(root: Path, **more: Any) -> str:
        search.run(search.Settings(index=str(root / "index"), query="bada bife", results=3, **more))
        return capsys.readouterr().out

    assert "funnel 64d keep 10" in ask(made, quality="exact")
    with pytest.raises(ValueError, match=r"not tuned, so it has no plan named 'fast'"):
        ask(made, quality="fast")
    plans, store = {name: own["plan"] for name, own in _tuned(tuned)["plans"].items()}, IndexStore.open(tuned / "index")
    for name in ("fast", "balanced", "high"):
        assert store.plan_for(name).parts == plans[name]
        assert store.plan_for(name).describe() in ask(tuned, quality=name)
    assert store.plan_for("balanced").describe() in ask(tuned)


_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no judged query in the split": ({"split": "train"}, r"split 'train' is empty|no query of split 'train' has judgements"),
    "too few queries": ({"split": "test"}, r"30 of each are needed\. Give more queries: at least 90"),
    "too few queries asked for": ({"max_queries": 20}, r"30 of each are needed"),
    "no such split": ({"split": "elsewhere"}, r"no split 'elsewhere' \(found: dev, test, train\)\. Pass --split"),
    "narrow vectors": ({"data": None, "queries": "narrow.parquet"}, r"do not have 64 numbers each\. Use the index's own model"),
    "an id that stands twice": ({"data": None, "queries": "twice.parquet"}, r"1 ids stand more than once \(first: 'q-"),
    "another model": ({"model": "other"}, r"is not the model that .*index was made with"),
    "no index": ({"index": "data"}, r"holds 'dataset', not 'index'"),
}


@pytest.mark.parametrize("fault", _BAD)
def test_tune_refuses(made: Path, other: str, fault: str) -> None:
    more, message = _BAD[fault]
    if "model" in more:
        more = {"model": other}
    paths = {name: str(made / value) for name, value in more.items() if name in ("queries", "index")}
    before = folders.times(made)
    with pytest.raises(ValueError, match=message):
        tune.run(_settings(made, **{**more, **paths}))
    assert folders.times(made) == before


def test_queries_without_text_are_refused(made: Path, tmp_path: Path) -> None:
    path = texts.write_parquet(tmp_path / "queries.parquet", {"id": ["a", "b"], "text": ["", None]})
    with pytest.raises(ValueError, match=r"no row with text"):
        tune.run(_settings(made, data=None, queries=str(path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--floor", "0"], r"'floor'.*\(found '0'\)\. Change --floor"),
        (["--floor", "1.5"], r"'floor'.*\(found '1\.5'\)\. Change --floor"),
        (["--queries", "q"], r"give the queries as --data \(from the prepare job\), --beir or --queries, one of them"),
    ],
)
def test_settings_that_say_too_much_or_nonsense_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune.Settings.from_command_line(["--index", "i", "--data", "d", *arguments], "tune")


def test_a_plan_and_a_quality_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"--plan and --quality both choose the funnel\. Give one of them\."):
        search.Settings.from_command_line(["--index", "i", "--query", "q", "--plan", "64:5", "--quality", "fast"], "search")

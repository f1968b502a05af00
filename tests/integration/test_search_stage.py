"""The search job: queries as texts or vectors, in parts; restricted by conditions; with shards that are lost or damaged."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
from ray import cloudpickle

from jobs import cluster, embed, index, search, verify
from matryoshka.encode import Encoder
from matryoshka.indexing import IndexStore

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

pytestmark = pytest.mark.usefixtures("local_ray")

_DOCUMENTS, _QUERIES, _RESULTS, _SHARDS = 120, 21, 6, 3
_YEARS = (2019, 2022, 2025)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """An index of three shards with a column to filter by; queries as texts and as vectors, in two files each."""
    root = tmp_path_factory.mktemp("stage")
    columns = texts.documents(0, _DOCUMENTS)
    columns |= {"year": [_YEARS[row % 3] for row in range(_DOCUMENTS)], "kind": ["ab"[row % 2] for row in range(_DOCUMENTS)]}
    texts.write_parquet(root / "corpus" / "part-0.parquet", columns)
    files = {"output": str(root / "embeddings"), "corpus": str(root / "corpus")}
    embed.run(embed.Settings(**files, model=tiny, unit_rows=20, precision="float32", workers=1))
    plan, kept = ("16:20", "64:10"), ("year", "kind")
    files = {"output": str(root / "index"), "embeddings": str(root / "embeddings")}
    index.run(index.Settings(**files, shards=_SHARDS, plan=plan, coarse_index="Flat", filter_columns=kept))
    ids = [f"q{number}" for number in range(_QUERIES)]
    questions = [" ".join(text.split()[:6]) for text in texts.documents(5, 5 + _QUERIES)["text"]]
    vectors = Encoder(Path(tiny), "cpu", "float32").encode(questions, "query").vectors
    for number, rows in enumerate((slice(0, 12), slice(12, _QUERIES))):
        own = {"id": ids[rows], "text": questions[rows]}
        texts.write_parquet(root / "queries" / f"{number}.parquet", own)
        texts.write_parquet(root / "vectors" / f"{number}.parquet", {"id": ids[rows], "embedding": vectors[rows].tolist()})
    return root


def _settings(made: Path, output: Path, **more: Any) -> search.Settings:
    fixed = {
        "index": str(made / "index"),
        "queries": str(made / "vectors"),
        "vector_column": "embedding",
        "results": _RESULTS,
        "workers": 1,
    }
    return search.Settings(output=str(output), **(fixed | more))


def _rows(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "results.parquet").to_pylist()


def _expected(made: Path, where: str | None = None, missing: tuple[str, ...] = ()) -> list[tuple[str, int, str]]:
    table = pa.concat_tables(pq.read_table(made / "vectors" / f"{number}.parquet") for number in (0, 1))
    store = IndexStore.open(made / "index").without(missing)
    found = store.searcher().search(np.asarray(table["embedding"].to_pylist()), _RESULTS, where)
    lists = zip(table["id"].to_pylist(), found.ids.tolist(), strict=True)
    return [(query, rank, name) for query, own in lists for rank, name in enumerate(own, 1) if name]


def _found(output: Path) -> list[tuple[str, int, str]]:
    return [(row["query_id"], row["rank"], row["document_id"]) for row in _rows(output)]


@pytest.fixture(scope="module")
def answered(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the queries that are vectors."""
    output = tmp_path_factory.mktemp("answered") / "results"
    search.run(_settings(made, output))
    return output


def test_vectors_are_answered_in_their_order_without_a_model(made: Path, answered: Path) -> None:
    assert _found(answered) == _expected(made)
    assert list(_rows(answered)[0]) == ["query_id", "rank", "document_id", "score"]
    verify.run(verify.Settings(folder=str(answered)))


def test_texts_are_answered_like_their_vectors_however_they_are_cut(
    made: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_PART_QUERIES", 5)
    monkeypatch.setattr(search, "_MOST_QUERIES", 2)
    search.run(_settings(made, tmp_path / "out", queries=str(made / "queries"), vector_column=None))
    assert _found(tmp_path / "out") == _found(answered)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "results.parquet", "results.trec"}


def test_a_condition_and_texts_go_with_the_results(made: Path, tmp_path: Path) -> None:
    where = "year >= 2020 AND kind = 'a'"
    search.run(_settings(made, tmp_path / "out", where=where, with_text=True))
    rows = _rows(tmp_path / "out")
    corpus = {row["id"]: row for row in pq.read_table(made / "corpus" / "part-0.parquet").to_pylist()}
    assert _found(tmp_path / "out") == _expected(made, where)
    assert all(corpus[row["document_id"]]["kind"] == "a" and corpus[row["document_id"]]["year"] >= 2020 for row in rows)
    assert all(row["text"] == corpus[row["document_id"]]["text"] for row in rows)
    with pytest.raises(ValueError, match=r"where: year >= 2020 .* there, None now"):
        search.run(_settings(made, tmp_path / "out", with_text=True))


def test_a_question_is_restricted_by_a_condition(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    (text,) = texts.documents(42, 43)["text"]
    for where, is_found in (("kind = 'a'", True), ("kind <> 'a'", False)):
        search.run(search.Settings(index=str(made / "index"), query=text, where=where))
        assert ("d00042" in capsys.readouterr().out) == is_found


_BAD_CONDITIONS = {
    "colour = 'red'": r"--where: no column 'colour' \(the index has 'year', 'kind'\)\. Name another",
    "year = 'x'": r"--where: column 'year' is integer, and 'x' is not",
    "year =": r"--where: character 7 of 'year =' should be a constant \(found the end\)",
}


@pytest.mark.parametrize("where", _BAD_CONDITIONS)
def test_search_refuses_a_condition(made: Path, tmp_path: Path, where: str) -> None:
    with pytest.raises(ValueError, match=_BAD_CONDITIONS[where]):
        search.run(_settings(made, tmp_path / "out", where=where))
    assert not (tmp_path / "out").exists()


def test_search_refuses_vectors_of_another_width_before_anything_is_asked(made: Path, tmp_path: Path) -> None:
    path = texts.write_parquet(tmp_path / "q.parquet", {"id": ["q0"], "embedding": [[1.0] * 32]})
    with pytest.raises(ValueError, match=r"q\.parquet: .* not of the index's 64 dims \(first: query 'q0'; 32 found\)"):
        search.run(_settings(made, tmp_path / "out", queries=str(path)))
    assert not (tmp_path / "out").exists()


def test_texts_of_a_corpus_that_changed_are_not_given(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    manifest = tmp_path / "made" / "index" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made / "corpus"), str(tmp_path / "made" / "corpus")))
    texts.write_parquet(tmp_path / "made" / "corpus" / "part-1.parquet", texts.documents(900, 901))
    (tmp_path / "made" / "corpus" / "part-0.parquet").unlink()
    with pytest.raises(ValueError, match=r"--with-text: the corpus is not what the index was made from\. Leave it out"):
        search.run(_settings(tmp_path / "made", tmp_path / "out", with_text=True))


def _damaged(made: Path, tmp_path: Path, name: str) -> tuple[Path, str]:
    """Returns a copy of what was made whose second shard has an altered file, and the key of that shard."""
    root = Path(shutil.copytree(made, tmp_path / "made"))
    path = sorted((root / "index" / "shards").glob(f"*/{name}"))[1]
    folders.flip_byte(path)
    return root, path.parent.name


def test_a_damaged_shard_is_refused_or_left_out_and_comes_back_once_it_is_mended(
    made: Path, answered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, key = _damaged(made, tmp_path, "columns.arrow")
    with pytest.raises(ValueError, match=f"{key}/columns.arrow: its bytes were altered"):
        search.run(_settings(root, tmp_path / "out"))
    settings = _settings(root, tmp_path / "out", allow_partial=True)
    search.run(settings)
    assert _found(tmp_path / "out") == _expected(made, missing=(key,))
    assert {row["coverage"] for row in _rows(tmp_path / "out")} == {2 / 3}
    assert f"without shard {key} (40 documents)" in (out := capsys.readouterr().out)
    assert "66.67% of the documents were searched" in out
    shutil.copytree(made / "index", root / "index", dirs_exist_ok=True)
    search.run(settings)
    assert _found(tmp_path / "out") == _found(answered)
    assert {row["coverage"] for row in _rows(tmp_path / "out")} == {1.0}


def test_a_question_is_asked_of_what_is_left(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, key = _damaged(made, tmp_path, "coarse.faiss")
    search.run(search.Settings(index=str(root / "index"), query="bada bife", allow_partial=True))
    assert f"without shard {key} (40 documents)" in capsys.readouterr().out


def test_an_index_of_damaged_shards_only_is_refused(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "made"))
    for path in (root / "index" / "shards").glob("*/ids.arrow"):
        folders.truncate(path)
    with pytest.raises(ValueError, match="none of its 3 shards can be searched"):
        search.run(_settings(root, tmp_path / "out", allow_partial=True))


class _FragileActor(cluster._ShardActor):
    """Is ended in the middle of a search by its second shard: once, or every time."""

    def call(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        folder = self._files[number].folder
        marks = folder.parents[1]
        if method == "score" and folder.name.startswith("00001") and (marks / "fragile").exists():
            if (marks / "fragile").read_text() == "once":
                (marks / "fragile").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().call(number, method, arguments)


@pytest.fixture
def fragile(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was made, whose shards are held by actors that can be ended."""
    monkeypatch.setattr(cluster, "_ShardActor", _FragileActor)
    return Path(shutil.copytree(made, tmp_path / "made"))


def test_an_actor_that_is_lost_comes_back_and_loses_nothing(fragile: Path, answered: Path, tmp_path: Path) -> None:
    (fragile / "index" / "fragile").write_text("once")
    search.run(_settings(fragile, tmp_path / "out"))
    assert not (fragile / "index" / "fragile").exists(), "no actor was ended"
    assert _found(tmp_path / "out") == _found(answered)


def test_a_shard_that_ends_its_actor_every_time_is_named_or_left_out(
    made: Path, fragile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_SHARD_ATTEMPTS", 2)
    (fragile / "index" / "fragile").write_text("always")
    key = IndexStore.open(made / "index").shards[1].folder.name
    with pytest.raises(RuntimeError, match=rf"shard {key}: its worker was lost .*pass --allow-partial to search the others"):
        search.run(_settings(fragile, tmp_path / "out"))
    assert not (tmp_path / "out" / "results.parquet").exists()
    search.run(_settings(fragile, tmp_path / "partial", allow_partial=True))
    assert _found(tmp_path / "partial") == _expected(made, missing=(key,))
    assert {row["coverage"] for row in _rows(tmp_path / "partial")} == {2 / 3}
    assert f"without shard {key} (40 documents): its worker was lost" in capsys.readouterr().out


class _BlindActor(cluster._ShardActor):
    """Finds the files of its second shard gone when it opens them."""

    def call(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        if self._files[number].folder.name.startswith("00001"):
            (self._files[number].folder / "vectors.npy").unlink(missing_ok=True)
        return super().call(number, method, arguments)


def test_a_shard_whose_files_vanish_is_named(fragile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ShardActor", _BlindActor)
    with pytest.raises(RuntimeError, match=r"shard 00001-\w+: .*No such file.*vectors\.npy"):
        search.run(_settings(fragile, tmp_path / "out"))

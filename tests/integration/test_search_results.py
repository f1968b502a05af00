"""Search results: as good as brute force where the funnel keeps all, and the same however the index is sharded."""

from pathlib import Path

import folders
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import texts

from jobs import embed, index, search, verify
from matryoshka.encode import Encoder
from matryoshka.indexing import IndexStore
from matryoshka.nested import FunnelPlan

pytestmark = pytest.mark.usefixtures("local_ray")

_DOCUMENTS, _QUERIES, _RESULTS = 160, 25, 10
_EVERYTHING = (f"16:{_DOCUMENTS}", f"64:{_DOCUMENTS}")
_NARROW = ("16:12", "32:6", "64:5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """Indexes of one, two and three shards; a quarter of the documents have a twin with the same text in another file."""
    root = tmp_path_factory.mktemp("search")
    columns = texts.documents(0, _DOCUMENTS)
    columns["text"][-_DOCUMENTS // 8 :] = columns["text"][: _DOCUMENTS // 8]
    for number in range(4):
        rows = slice(number * _DOCUMENTS // 4, (number + 1) * _DOCUMENTS // 4)
        texts.write_parquet(root / "corpus" / f"part-{number}.parquet", {name: own[rows] for name, own in columns.items()})
    questions = [" ".join(text.split()[:6]) for text in texts.documents(5, 5 + _QUERIES)["text"]]
    texts.write_parquet(root / "queries.parquet", {"id": [f"q{number}" for number in range(_QUERIES)], "text": questions})
    embed.run(
        embed.Settings(
            output=str(root / "embeddings"), corpus=str(root / "corpus"), model=tiny, unit_rows=20, precision="float32", workers=1
        )
    )
    columns = {"id": ["[bold]a[/bold]", "b:key:c"], "text": ["bada [red] bife :smile: [/]", "geva"]}
    texts.write_parquet(root / "odd-corpus" / "part-0.parquet", columns)
    embed.run(embed.Settings(output=str(root / "odd"), corpus=str(root / "odd-corpus"), model=tiny, precision="float32"))
    index.run(index.Settings(output=str(root / "odd-index"), embeddings=str(root / "odd")))
    for shards in (1, 2, 3):
        built = index.run(
            index.Settings(
                output=str(root / f"index-{shards}"),
                embeddings=str(root / "embeddings"),
                shards=shards,
                plan=_EVERYTHING,
                coarse_index="Flat",
            )
        )
        assert len(built.receipts) == shards
    return root


@pytest.fixture(scope="module")
def queries(made: Path, tiny: str) -> npt.NDArray[np.float16]:
    """Vectors of the queries: [Q, D]."""
    return (
        Encoder(Path(tiny), "cpu", "float32").encode(pq.read_table(made / "queries.parquet")["text"].to_pylist(), "query").vectors
    )


def _all_scores(made: Path, queries: npt.NDArray[np.float16]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Returns the ids, sorted, and the cosine of every query with every document."""
    vectors = folders.vectors(made / "embeddings")
    ids = sorted(vectors)
    full = np.stack([np.frombuffer(vectors[name], np.float16) for name in ids]).astype(np.float64)
    asked = queries.astype(np.float64)
    return ids, (asked @ full.T) / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(full, axis=1)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_funnel_that_keeps_everything_equals_brute_force(made: Path, queries: npt.NDArray[np.float16], shards: int) -> None:
    ids, exact = _all_scores(made, queries)
    order = np.argsort(-exact.round(6), axis=1, kind="stable")[:, :_RESULTS]  # twins tie, and stand in the order of their ids
    found = IndexStore.open(made / f"index-{shards}").searcher().search(queries, _RESULTS)
    # The index computes in float32, brute force in float64.
    np.testing.assert_allclose(found.scores, np.take_along_axis(exact, order, axis=1), atol=1e-5)
    assert found.ids.tolist() == np.asarray(ids, dtype=object)[order].tolist()


@pytest.mark.parametrize("plan", [_EVERYTHING, _NARROW, ("16:10",)])
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_do_not_change_the_results(
    made: Path, queries: npt.NDArray[np.float16], shards: int, plan: tuple[str, ...]
) -> None:
    one, many = (
        IndexStore.open(made / f"index-{number}").searcher(FunnelPlan.parse(plan)).search(queries, _RESULTS)
        for number in (1, shards)
    )
    assert many.ids.tolist() == one.ids.tolist()
    np.testing.assert_array_equal(many.scores, one.scores)


@pytest.fixture(scope="module")
def answered(made: Path) -> Path:
    """Results of the query file over three shards in Ray actors."""
    search.run(_search(made, 3))
    return made / "results-3"


def _search(made: Path, shards: int) -> search.Settings:
    return search.Settings(
        index=str(made / f"index-{shards}"), queries=str(made / "queries.parquet"), output=str(made / f"results-{shards}"),
        results=_RESULTS,
    )  # fmt: skip


def test_a_query_file_is_answered_over_ray_as_by_brute_force(
    answered: Path, made: Path, queries: npt.NDArray[np.float16]
) -> None:
    ids, exact = _all_scores(made, queries)
    rows = pq.read_table(answered / "results.parquet").to_pylist()
    assert len(rows) == _QUERIES * _RESULTS
    for number in range(_QUERIES):
        own = [row for row in rows if row["query_id"] == f"q{number}"]
        assert [row["rank"] for row in own] == list(range(1, _RESULTS + 1))
        assert len({row["document_id"] for row in own}) == _RESULTS
        expected = np.sort(exact[number])[::-1][:_RESULTS]
        scores = {name: exact[number, position] for position, name in enumerate(ids)}
        # Workers may use another number of threads than this process, so a float16 of a query vector may round the other way.
        np.testing.assert_allclose([row["score"] for row in own], expected, atol=1e-3)
        np.testing.assert_allclose([scores[row["document_id"]] for row in own], expected, atol=1e-3)


def test_the_trec_file_says_the_same_as_the_parquet_file(answered: Path) -> None:
    rows = pq.read_table(answered / "results.parquet").to_pylist()
    lines = [line.split() for line in (answered / "results.trec").read_text().splitlines()]
    assert [(query, name, int(rank)) for query, _, name, rank, _, _ in lines] == [
        (row["query_id"], row["document_id"], row["rank"]) for row in rows
    ]
    assert {(line[1], line[5]) for line in lines} == {("Q0", "matryoshka")}
    np.testing.assert_allclose([float(line[4]) for line in lines], [row["score"] for row in rows], atol=1e-6)  # six decimals


def test_results_are_an_artifact_that_is_verified_and_not_made_twice(answered: Path, made: Path) -> None:
    verify.run(verify.Settings(folder=str(answered)))
    before = folders.times(answered)
    search.run(_search(made, 3))
    assert folders.times(answered) == before


def test_other_results_are_not_mixed_with_those_there(answered: Path, made: Path) -> None:
    before = folders.times(answered)
    with pytest.raises(ValueError, match="results: 10 there, 5 now"):
        search.run(_search(made, 3).model_copy(update={"results": 5}))
    assert folders.times(answered) == before


def test_a_question_prints_the_best_documents_with_their_texts(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    (text,) = texts.documents(42, 43)["text"]
    search.run(search.Settings(index=str(made / "index-2"), query=text, results=4))
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0] == ["1", "1.000", "d00042", text]
    assert f"{_DOCUMENTS} documents, 2 shards" in printed


@pytest.mark.parametrize("shown", ["[bold]a[/bold]", "b:key:c", "bada [red] bife :smile: [/]", "what of [this]?"])
def test_ids_texts_and_questions_are_shown_as_they_are(
    made: Path, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    search.run(search.Settings(index=str(made / "odd-index"), query="what of [this]?"))
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("question", ["[/]", "a [/b] c", ":smile: [red]"])
def test_a_question_may_hold_any_character(made: Path, question: str, capsys: pytest.CaptureFixture[str]) -> None:
    search.run(search.Settings(index=str(made / "odd-index"), query=question))
    assert question in capsys.readouterr().out


def test_more_results_than_documents_give_all_documents(made: Path, queries: npt.NDArray[np.float16]) -> None:
    found = IndexStore.open(made / "index-3").searcher().search(queries[:2], _DOCUMENTS + 50)
    assert [len(set(ids) - {""}) for ids in found.ids.tolist()] == [_DOCUMENTS, _DOCUMENTS]

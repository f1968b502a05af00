"""Artifacts of different models are never mixed: every stage refuses, and says which key differs."""

import shutil
from pathlib import Path

import folders
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts

from jobs import embed, evaluate, index, prepare, search

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str, other: str) -> Path:
    """Embeddings of one dataset by two models, an index of the first, and embeddings that the second took over."""
    root = tmp_path_factory.mktemp("made")
    prepare.run(prepare.Settings(output=str(root / "data"), beir=str(texts.write_beir(root / "beir"))))
    for name, model in (("tiny", tiny), ("other", other)):
        embed.run(_embed(root / name, root, model))
    shutil.copytree(root / "tiny", root / "taken-over")
    embed.run(_embed(root / "taken-over", root, other).model_copy(update={"replace": True}))
    index.run(_index(root / "index", root / "tiny"))
    return root


def _embed(output: Path, root: Path, model: str) -> embed.Settings:
    return embed.Settings(output=str(output), corpus=str(root / "data" / "corpus"), model=model, precision="float32")


def _index(output: Path, embeddings: Path) -> index.Settings:
    return index.Settings(output=str(output), embeddings=str(embeddings), shards=1, plan=("16:50", "64:20"))


def test_embed_refuses_an_output_of_another_model_and_leaves_it_as_it_is(made: Path, other: str) -> None:
    before = folders.times(made / "tiny")
    with pytest.raises(ValueError, match=r"model: \w+\.\.\. there, \w+\.\.\. now.*Pass another --output, or --replace"):
        embed.run(_embed(made / "tiny", made, other))
    assert folders.times(made / "tiny") == before


def test_embed_with_replace_takes_the_output_over(made: Path) -> None:
    output = made / "taken-over"
    assert folders.manifest(output)["identity"] == folders.manifest(made / "other")["identity"]
    assert folders.vectors(output) == folders.vectors(made / "other")
    assert folders.vectors(output) != folders.vectors(made / "tiny")


def test_index_refuses_an_output_of_another_model_and_leaves_it_as_it_is(made: Path) -> None:
    before = folders.times(made / "index")
    with pytest.raises(ValueError, match=r"model: \w+\.\.\. there"):
        index.run(_index(made / "index", made / "other"))
    assert folders.times(made / "index") == before


def test_index_with_replace_takes_the_output_over(made: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(made / "index", tmp_path / "index"))
    index.run(_index(output, made / "other").model_copy(update={"replace": True}))
    assert folders.manifest(output)["identity"]["model"] == folders.manifest(made / "other")["identity"]["model"]
    assert folders.indexed_ids(output) == folders.indexed_ids(made / "index")
    assert len(list((output / "shards").iterdir())) == 1


def test_search_refuses_another_model_than_the_index_was_made_with(made: Path, other: str) -> None:
    with pytest.raises(ValueError, match="is not the model that"):
        search.run(search.Settings(index=str(made / "index"), query="bada", model=other))


def test_search_takes_the_same_model_from_another_place(
    made: Path, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(tiny, tmp_path / "moved")
    search.run(search.Settings(index=str(made / "index"), query="bada", model=str(moved)))
    assert "60 documents" in capsys.readouterr().out


def test_evaluate_refuses_embeddings_of_another_model(made: Path, other: str, tmp_path: Path) -> None:
    settings = evaluate.Settings(
        output=str(tmp_path / "out"), data=str(made / "data"), model=other, embeddings=str(made / "tiny")
    )
    with pytest.raises(ValueError, match=r"--embeddings .*another model"):
        evaluate.run(settings)
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_an_index_of_another_model(made: Path, other: str, tmp_path: Path) -> None:
    settings = evaluate.Settings(output=str(tmp_path / "out"), data=str(made / "data"), model=other, index=str(made / "index"))
    with pytest.raises(ValueError, match=r"--index .*another model"):
        evaluate.run(settings)
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_an_index_of_another_corpus(made: Path, tiny: str, tmp_path: Path) -> None:
    prepare.run(prepare.Settings(output=str(tmp_path / "data"), beir=str(texts.write_beir(tmp_path / "beir", num_pairs=20))))
    settings = evaluate.Settings(output=str(tmp_path / "out"), data=str(tmp_path / "data"), model=tiny, index=str(made / "index"))
    with pytest.raises(ValueError, match="was not made from"):
        evaluate.run(settings)


def test_embed_refuses_an_output_of_another_column_and_says_which(made: Path, tiny: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    titles, bodies = ["first title", "second title"], ["a body", "another body"]
    pq.write_table(pa.table({"id": ["a", "b"], "title": titles, "body": bodies}), corpus / "part.parquet")
    settings = _embed(tmp_path / "out", made, tiny).model_copy(update={"corpus": str(corpus), "text_column": "title"})
    embed.run(settings)
    with pytest.raises(ValueError, match="text_column: title there, body now"):
        embed.run(settings.model_copy(update={"text_column": "body"}))


def test_evaluate_tells_embeddings_of_one_model_apart(made: Path, tiny: str, tmp_path: Path) -> None:
    first = evaluate.Settings(output=str(tmp_path / "out"), data=str(made / "data"), model=tiny, embeddings=str(made / "tiny"))
    evaluate.run(first)
    again = tmp_path / "again"
    embed.run(_embed(again, made, tiny).model_copy(update={"unit_rows": 7}))
    with pytest.raises(ValueError, match="embeddings: "):
        evaluate.run(first.model_copy(update={"embeddings": str(again)}))

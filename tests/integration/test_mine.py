"""Hard negatives over real local Ray: what the rules allow, done once, taken up after a kill, refused by name."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import texts
from small_data import pair_rows, write_dataset

from jobs import embed, mine, pipeline, verify
from matryoshka import mining, storage
from matryoshka.artifacts import Receipt
from matryoshka.encode import Encoder
from matryoshka.mining import NegativesStore
from matryoshka.pairs import DatasetStore

pytestmark = pytest.mark.usefixtures("local_ray")

_DOCUMENTS, _PAIRS = 90, 40
_RULES = {"negatives": 2, "window": "3:40", "relative_margin": 0.02}


@pytest.fixture(scope="module", autouse=True)
def _small_units() -> Iterator[None]:
    """Makes several units of the corpus, of which there can be several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_SMALL_UNIT_ROWS", 20)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DatasetStore:
    """Pairs in two files, every eighth with a negative of its own; a sixth of the documents stand twice."""
    columns = texts.documents(0, _DOCUMENTS)
    documents = dict(zip(columns["id"], columns["text"], strict=True))
    names = list(documents)
    documents |= {f"twin-{name}": f" {documents[name]}" for name in names[::6]}
    questions = {f"q{number}": " ".join(columns["text"][number].split()[:5]) for number in range(_PAIRS)}
    asked = {"train": questions, "test": {"x0": questions["q0"].upper()}}
    judged = [(f"q{number}", names[number]) for number in range(_PAIRS)]
    qrels = {"train": [(*own, 1) for own in judged], "test": [("x0", names[-1], 1)]}
    rows = pair_rows(questions, documents, judged)
    rows["negative_ids"] = [names[number + 1 : number + 2] if number % 8 == 0 else [] for number in range(_PAIRS)]
    rows["negatives"] = [[documents[name] for name in own] for own in rows["negative_ids"]]
    halves = [{name: own[half] for name, own in rows.items()} for half in (slice(0, 25), slice(25, _PAIRS))]
    return write_dataset(tmp_path_factory.mktemp("mine") / "data", documents, asked, qrels, halves)


def _settings(data: DatasetStore, output: Path, model: str, **more: Any) -> mine.Settings:
    return mine.Settings(output=str(output), data=str(data.folder), model=model, **{"workers": 1, **_RULES, **more})


@pytest.fixture(scope="module")
def mined(data: DatasetStore, tiny: str) -> Path:
    output = data.folder.parent / "negatives"
    mine.run(_settings(data, output, tiny))
    return output


def _rows(output: Path) -> list[dict[str, Any]]:
    return [row for path in NegativesStore.open(output).pair_files() for row in pq.read_table(path).to_pylist()]


def test_relative_paths_are_those_of_whoever_began_the_run(
    mined: Path, data: DatasetStore, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mined.parent)  # workers stay where they are
    mine.run(_settings(DatasetStore.open(Path(data.folder.name)), Path("relative"), tiny))
    assert _rows(Path("relative")) == _rows(mined)


def test_negatives_mined_in_a_bucket_are_those_mined_on_a_disk(mined: Path, data: DatasetStore, tiny: str, bucket: str) -> None:
    there = storage.place(bucket) / "night"
    for name in storage.names(data.folder):
        storage.publish_bytes(there / "data" / name, (data.folder / name).read_bytes())
    for _ in range(2):  # the second time there is nothing to do
        made = mine.run(mine.Settings(output=str(there / "negatives"), data=str(there / "data"), model=tiny, **_RULES))
    assert made.fingerprint == NegativesStore.open(mined).manifest.fingerprint
    assert [path.parent for path in NegativesStore.open(there / "negatives").pair_files()] == [there / "negatives" / "pairs"] * 2
    assert not (there / "negatives" / "work").exists()


def test_every_pair_comes_out_with_its_columns_in_its_file(mined: Path, data: DatasetStore) -> None:
    store = NegativesStore.open(mined)
    assert (store.data, store.num_negatives) == (data.manifest.fingerprint, 2)
    assert [path.name for path in store.pair_files()] == [path.name for path in data.pair_files()]
    for source, found in zip(data.pair_files(), store.pair_files(), strict=True):
        names = ["query_id", "document_id", "query", "positive"]
        assert pq.read_table(found, columns=names).equals(pq.read_table(source, columns=names))
    verify.run(verify.Settings(folder=str(mined)))
    assert {path.name for path in mined.iterdir() if path.is_dir()} == {"embeddings", "pairs"}  # no index, no work


def test_what_is_mined_holds_to_the_rules(mined: Path, data: DatasetStore, tiny: str) -> None:
    documents = dict(zip(*pq.read_table(data.corpus).to_pydict().values(), strict=True))
    vectors = folders.vectors(mined / "embeddings")
    ids = sorted(vectors)
    full = np.stack([np.frombuffer(vectors[name], np.float16) for name in ids]).astype(np.float64)
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    rows = _rows(mined)
    asked = Encoder(Path(tiny), "cpu", "float32").encode([row["query"] for row in rows], "query").vectors.astype(np.float64)
    scores = asked @ full.T / np.linalg.norm(asked, axis=1, keepdims=True)
    assert sum(len(row["negatives"]) for row in rows) > _PAIRS
    for row, own in zip(rows, scores, strict=True):
        score_of = dict(zip(ids, own.tolist(), strict=True))
        known = {row["positive"], documents[ids[-1]] if row["query_id"] == "q0" else ""}
        brought = 1 if int(row["query_id"][1:]) % 8 == 0 else 0
        assert [documents[name] for name in row["negative_ids"]] == row["negatives"]
        assert not {" ".join(text.split()) for text in row["negatives"]} & known
        for name in row["negative_ids"][brought:]:
            # Workers may run in another precision than this process: scores agree within rounding of float16 and bf16.
            assert score_of[name] <= 0.98 * score_of[row["document_id"]] + 0.02
            assert sum(score > score_of[name] + 0.02 for score in own) <= 40 + 20  # the window, and twins in it
        assert len(row["negatives"]) <= 2


def test_the_manifest_says_how_much_was_mined(mined: Path) -> None:
    rows, facts = _rows(mined), NegativesStore.open(mined).manifest.facts["mined"]
    counts = [len(row["negatives"]) for row in rows]
    assert facts["num_pairs"] == _PAIRS
    assert facts["num_given"] == _PAIRS // 8
    assert facts["num_mined"] == sum(counts) - _PAIRS // 8
    assert facts["full_share"] == round(counts.count(2) / _PAIRS, 4)
    assert facts["some_share"] == round(counts.count(1) / _PAIRS, 4)
    assert facts["mined_share"] == round(facts["num_mined"] / sum(counts), 4)
    assert facts["num_known"] >= _PAIRS // 2  # an untrained model ranks some positives beyond the window
    assert facts["negative_score"] < facts["positive_score"]


def test_the_same_command_again_does_nothing(mined: Path, data: DatasetStore, tiny: str) -> None:
    before = folders.times(mined)
    mine.run(_settings(data, mined, tiny))
    assert folders.times(mined) == before


def test_other_rules_are_refused_and_replace_keeps_the_vectors(
    mined: Path, data: DatasetStore, tiny: str, tmp_path: Path
) -> None:
    output = shutil.copytree(mined, tmp_path / "negatives")
    with pytest.raises(ValueError, match="num_negatives: 2 there, 1 now"):
        mine.run(_settings(data, output, tiny, negatives=1))
    kept = folders.times(output / "embeddings")
    mine.run(_settings(data, output, tiny, negatives=1, replace=True))
    assert max(len(row["negatives"]) for row in _rows(output)) == 1
    assert folders.times(output / "embeddings") == kept


def test_a_killed_run_is_taken_up_after_its_last_file(
    mined: Path, data: DatasetStore, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "negatives", mine._finish
    settings = _settings(data, output, tiny, embeddings=str(mined / "embeddings"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine, "_finish", die)
    with pytest.raises(KeyboardInterrupt):
        mine.run(settings)
    first, second = (output / path.relative_to(mined) for path in NegativesStore.open(mined).pair_files())
    with pytest.raises(ValueError, match="not finished"):
        NegativesStore.open(output)
    second.unlink()
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(mine, "_finish", real)
    mine.run(settings)
    assert first.stat().st_mtime_ns == before
    assert folders.contents(output / "pairs") == folders.contents(mined / "pairs")
    assert not (output / "work").exists()


def test_other_shards_and_batches_over_the_same_vectors_mine_the_same(
    mined: Path, data: DatasetStore, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "_ROWS_PER_SHARD", 30)
    monkeypatch.setattr(mining, "_BATCH_ROWS", 7)
    monkeypatch.setattr(mine.Session, "run_tasks", _in_shards)  # so that the size of a batch reaches the work
    mine.run(_settings(data, tmp_path / "negatives", tiny, embeddings=str(mined / "embeddings")))
    assert not (tmp_path / "negatives" / "embeddings").exists()
    found, expected = (_rows(folder) for folder in (tmp_path / "negatives", mined))
    assert found == expected


def _in_shards(_: object, function: Any, arguments: list[tuple[Any, ...]], **_options: bool) -> list[Receipt]:
    if function is mining.mine_file:
        assert all(len(sources.index.shards) > 2 for sources, *_ in arguments)
    return [function(*own) for own in arguments]


def test_vectors_of_another_model_or_corpus_are_refused(
    mined: Path, data: DatasetStore, tiny: str, other: str, tmp_path: Path
) -> None:
    embeddings = str(mined / "embeddings")
    with pytest.raises(ValueError, match=r"was made with another model than .*other"):
        mine.run(_settings(data, tmp_path / "out", other, embeddings=embeddings))
    documents = {f"d{number}": f"text {number}" for number in range(50)}
    pairs = [pair_rows({"q0": "why"}, documents, [("q0", "d0")])]
    strange = write_dataset(tmp_path / "data", documents, {"train": {"q0": "why"}}, {"train": [("q0", "d0", 1)]}, pairs)
    with pytest.raises(ValueError, match=r"embeddings: was not made from .*corpus\. Pass one made from this data"):
        mine.run(_settings(strange, tmp_path / "out", tiny, embeddings=embeddings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("40:3", r"--window 40:3 has no room for 2 negatives"),
        ("3:4", r"--window 3:4 has no room for 2 negatives"),
        ("3", r"--window 3 is not FIRST:LAST"),
        ("a:b", r"--window a:b is not FIRST:LAST"),
        ("0:200", r"data: 105 documents, the window 0:200 ends beyond them\. Pass a --window that ends at 105 or before"),
    ],
)
def test_a_window_is_refused(data: DatasetStore, tiny: str, tmp_path: Path, window: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mine.run(mine.Settings.from_values({**_settings(data, tmp_path / "out", tiny).model_dump(), "window": window}, "mine"))
    assert not (tmp_path / "out").exists()


def test_data_without_training_pairs_and_a_model_that_is_none_are_refused(data: DatasetStore, tiny: str, tmp_path: Path) -> None:
    bare = write_dataset(tmp_path / "bare", {"d0": "text"}, {"test": {"q0": "why"}}, {"test": [("q0", "d0", 1)]}, [])
    with pytest.raises(ValueError, match="bare: no training pairs"):
        mine.run(_settings(bare, tmp_path / "out", tiny))
    with pytest.raises(ValueError, match="no model here"):
        mine.run(_settings(data, tmp_path / "out", str(tmp_path / "bare")))
    assert not (tmp_path / "out").exists()


def test_the_pipeline_mines_after_the_first_evaluation_and_hands_on_to_finetune(tmp_path: Path) -> None:
    values = {"output": str(tmp_path), "prepare": {"pairs": "x"}, "mine": {"negatives": 2}}
    stages = pipeline.plan(pipeline.Settings(**values), has_gpu=False)
    assert [name for name, _, _ in stages][:4] == ["prepare", "evaluate", "mine", "finetune"]
    wired, tuned = stages[2][2].model_dump(), stages[3][2].model_dump()
    assert (wired["embeddings"], wired["negatives"]) == (str(tmp_path / "evaluation-base" / "embeddings"), 2)
    assert tuned["negatives"] == wired["output"] == str(tmp_path / "negatives")
    del values["mine"]
    plain = pipeline.plan(pipeline.Settings(**values), has_gpu=False)
    assert "mine" not in [name for name, _, _ in plain]
    assert plain[2][2].model_dump()["negatives"] is None


def test_the_pipeline_refuses_a_window_beyond_the_corpus_before_anything_is_embedded(tmp_path: Path, tiny: str) -> None:
    texts.write_parquet(tmp_path / "pairs.parquet", texts.pairs(60))
    sections = {"prepare": {"pairs": str(tmp_path / "pairs.parquet")}, "mine": {"window": "0:70"}, "finetune": {"batch_size": 8}}
    with pytest.raises(ValueError, match=re.escape("60 documents, the window 0:70 ends beyond them")):
        pipeline.run(pipeline.Settings(output=str(tmp_path / "run"), model=tiny, **sections))
    assert not (tmp_path / "run" / "evaluation-base").exists()

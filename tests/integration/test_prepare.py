"""Whatever a team has becomes a dataset in one command, and a run that was killed begins again without a trace."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import pytest
import texts

from jobs import cluster, prepare, verify
from matryoshka import storage
from matryoshka.pairs import DatasetStore

pytestmark = pytest.mark.usefixtures("local_ray")

_BANKING = Path(__file__).parents[3] / "shared" / "data" / "banking77"


def _prepare(output: Path, **more: Any) -> DatasetStore:
    prepare.run(prepare.Settings(output=str(output), **more))
    verify.run(verify.Settings(folder=str(output)))
    return DatasetStore.open(output)


def test_titles_and_bodies_of_json_lines_are_pairs(tmp_path: Path) -> None:
    made = texts.pairs(40)
    rows = [{"title": query, "body": text} for query, text in zip(made["query"], made["positive"], strict=True)]
    texts.write_json_lines(tmp_path / "in" / "posts.jsonl", rows)
    store = _prepare(tmp_path / "out", titled=str(tmp_path / "in"))
    queries = [text for split in store.splits for text in store.queries(split)[1]]
    assert sorted(queries) == sorted(made["query"])


def test_relative_paths_are_those_of_whoever_began_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts.write_beir(tmp_path / "beir", num_pairs=6)
    texts.write_parquet(tmp_path / "pairs.parquet", texts.pairs(20))
    monkeypatch.chdir(tmp_path)  # workers stay where they are
    assert _prepare(Path("from-beir"), beir="beir").num_pairs == 3
    assert sum(_prepare(Path("from-pairs"), pairs="pairs.parquet").manifest.facts["queries"].values()) == 20


def test_files_named_by_split_keep_their_splits_in_one_command(tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = [f'"{split} text, {number}",label {number % 3}' for number in range(9)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,category", *lines]))
    (tmp_path / "categories.json").write_text("[]")
    store = _prepare(tmp_path / "out", labelled=str(tmp_path / "*.csv"), label_column="category")
    assert store.splits == ("test", "train")
    assert sorted(store.queries("test")[1]) == [f"test text, {number}" for number in range(9)]
    assert store.num_pairs == 9


def test_folders_named_by_split_give_the_splits_and_those_above_the_input_do_not(tmp_path: Path) -> None:
    for split, rows in (("train", slice(9)), ("test", slice(9, 18))):
        part = {name: values[rows] for name, values in texts.pairs(18).items()}
        texts.write_parquet(tmp_path / "dev" / "in" / split / "0000.parquet", part)
    store = _prepare(tmp_path / "out", pairs=str(tmp_path / "dev" / "in"))
    assert store.manifest.facts["queries"] == {"test": 9, "train": 9}


def test_hashes_split_files_in_spite_of_their_names_where_asked_to(tmp_path: Path) -> None:
    for split in ("train", "test"):
        texts.write_parquet(tmp_path / "in" / f"{split}.parquet", texts.pairs(60))
    store = _prepare(tmp_path / "out", pairs=str(tmp_path / "in"), split_by="hash")
    assert store.splits == ("test", "dev", "train")
    assert store.manifest.facts["dropped"]["duplicate"] == 60


def test_chunks_of_the_models_own_tokens_are_cut(tmp_path: Path, tiny: str) -> None:
    made = texts.pairs(20)
    made["positive"] = [f"{text.capitalize()}. {text}. {text.upper()}." for text in made["positive"]]
    texts.write_parquet(tmp_path / "pairs.parquet", made)
    store = _prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.parquet"), chunk_tokens=8, model=tiny)
    assert store.is_chunked
    assert store.manifest.facts["chunks"] > store.manifest.facts["documents"] == 20


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What a kill would have left behind: copies of the output after every pass, and while files were moved into place."""
    copies: list[Path] = []

    def keep() -> None:
        copies.append(tmp_path / f"killed-{len(copies)}")
        shutil.copytree(tmp_path / "out", copies[-1])

    run_tasks, move = cluster.Session.run_tasks, storage.move

    def run_and_keep(self: cluster.Session, *arguments: Any) -> Iterator[Any]:
        yield from run_tasks(self, *arguments)
        keep()

    def move_and_keep(path: Path, target: Path) -> None:
        move(path, target)
        keep()

    with monkeypatch.context() as patch:
        patch.setattr(cluster.Session, "run_tasks", run_and_keep)
        patch.setattr(storage, "move", move_and_keep)
        texts.write_parquet(tmp_path / "pairs.parquet", texts.pairs(60))
        prepare.run(prepare.Settings(output=str(tmp_path / "out"), pairs=str(tmp_path / "pairs.parquet")))
    return copies


def test_a_killed_run_begins_again_and_gives_the_same_bytes(tmp_path: Path, killed: list[Path]) -> None:
    undisturbed = _bytes(tmp_path / "out")
    assert len(killed) > 10
    for copy in killed[1::5]:
        _prepare(copy, pairs=str(tmp_path / "pairs.parquet"))
        assert _bytes(copy) == undisturbed
        assert not list(copy.rglob(f"{storage.TEMPORARY}*"))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    texts.write_parquet(tmp_path / "pairs.parquet", texts.pairs(30))
    _prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.parquet"))
    before = folders.times(tmp_path / "out")
    leftover = tmp_path / "out" / f"{storage.TEMPORARY}of-a-killed-replace-prepare"
    leftover.mkdir()
    _prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.parquet"))
    assert folders.times(tmp_path / "out") == before
    assert not leftover.exists()


def test_bad_data_leaves_the_old_dataset_as_it_is_even_with_replace(tmp_path: Path) -> None:
    texts.write_parquet(tmp_path / "pairs.parquet", texts.pairs(30))
    _prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.parquet"))
    before = folders.times(tmp_path / "out")
    lines = [{"query": "one", "positive": "a", "bad": "b"}, {"query": "two", "positive": "b", "bad": "b"}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"new\.jsonl: line 2: the same text answers 'two' and does not"):
        _prepare(tmp_path / "out", pairs=str(tmp_path / "new.jsonl"), negatives_column="bad", replace=True)
    assert folders.times(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"titled": "x"}, "give exactly one source"),
        ({"chunk_tokens": 32, "chunk_overlap": 32}, r"--chunk-overlap 32 leaves no room in a chunk of 32 tokens\. Lower it"),
        ({"chunk_overlap": 3}, r"--chunk-overlap is for --chunk-tokens\. Pass both"),
        ({"test_fraction": 0.9}, "leave nothing to train on"),
        ({"negatives_column": "x", "pairs": None, "titled": "y"}, r"--negatives-column is for --pairs\. Leave it out"),
        (
            {"pairs": None, "beir": "y", "split_column": "x"},
            r"--split-column is for --pairs and --titled and --labelled\. Leave it out",
        ),
        ({"pairs": None, "beir": "y", "min_characters": 3}, r"--min-characters is for --pairs and .*\. Leave it out"),
        ({"pairs": None, "labelled": "y", "chunk_tokens": 32}, r"--chunk-tokens is for --pairs and .*\. Leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare.Settings.from_values({"output": "out", "pairs": "in", **more}, "prepare")


def test_chunks_beyond_the_models_window_are_refused_before_anything_is_read(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"--chunk-tokens 4096: the window of .* has \d+ tokens"):
        _prepare(tmp_path / "out", pairs=str(tmp_path / "nowhere"), chunk_tokens=4096, model=tiny)


@pytest.mark.skipif(not _BANKING.is_dir(), reason=f"Banking77 is not at {_BANKING}")
def test_banking77_is_prepared_in_one_command(tmp_path: Path) -> None:
    settings = prepare.Settings(output=str(tmp_path), labelled=str(_BANKING), label_column="category", near_duplicates=0)
    prepare.run(settings)
    store = DatasetStore.open(tmp_path)
    assert store.manifest.facts["queries"] == {"test": 3079, "train": 9992}  # of 3,080 and 10,003
    assert store.manifest.facts["dropped"] == {"duplicate": 5, "in another split": 7}
    assert store.num_pairs == store.manifest.facts["documents"] == 9992

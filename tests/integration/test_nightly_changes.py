"""A nightly run costs what changed: input files come, change and go, and only what they touch is done again."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import folders
import pytest
import texts

from jobs import embed, index, search, verify

pytestmark = pytest.mark.usefixtures("local_ray")

_ROWS, _UNIT_ROWS, _SHARDS = 40, 10, 3


@dataclass(frozen=True)
class Night:
    """What the folders hold after one night's run."""

    embeddings: Path
    index: Path
    ids: list[str]

    @property
    def units(self) -> dict[str, int]:
        """Times of the unit files."""
        return folders.times(self.embeddings / "units")

    @property
    def shards(self) -> dict[str, int]:
        """Times of the files of the shards."""
        return folders.times(self.index / "shards")


def _ids(*parts: tuple[int, int]) -> list[str]:
    return [name for first, stop in parts for name in texts.documents(first, stop)["id"]]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, Night]:
    """The folders as each night left them. All nights embed before the first one indexes: that keeps the workers busy."""
    root = tmp_path_factory.mktemp("nights")
    corpus, output, built = root / "corpus", root / "embeddings", root / "index"
    part = [corpus / f"part-{number}.parquet" for number in range(4)]
    own = {"unit_rows": _UNIT_ROWS, "precision": "float32", "workers": 1}
    settings = embed.Settings(output=str(output), corpus=str(corpus), model=tiny, **own)

    def embed_tonight(night: str) -> Path:
        embed.run(settings)
        return Path(shutil.copytree(output, root / night / "embeddings"))

    texts.write_corpus(corpus, num_files=3, rows_per_file=_ROWS)
    after = {"first": embed_tonight("first")}
    texts.write_parquet(part[1], texts.documents(500, 540))
    after["changed"] = embed_tonight("changed")
    texts.write_parquet(part[3], texts.documents(600, 620))
    after["added"] = embed_tonight("added")
    part[0].unlink()
    after["removed"] = embed_tonight("removed")
    part[2].rename(corpus / "part-9.parquet")
    texts.write_parquet(part[2], texts.documents(700, 740))
    after["renamed"] = embed_tonight("renamed")

    ids = {
        "first": _ids((0, 120)),
        "changed": _ids((0, 40), (500, 540), (80, 120)),
        "added": _ids((0, 40), (500, 540), (80, 120), (600, 620)),
        "removed": _ids((500, 540), (80, 120), (600, 620)),
        "renamed": _ids((500, 540), (80, 120), (600, 620), (700, 740)),
    }
    done = {}
    for night, embeddings in after.items():
        own = {"shards": _SHARDS, "plan": ("16:100", "64:20"), "coarse_index": "Flat"}
        index.run(index.Settings(output=str(built), embeddings=str(embeddings), **own))
        done[night] = Night(embeddings, Path(shutil.copytree(built, root / night / "index")), sorted(ids[night]))
    return done


@pytest.mark.parametrize("night", ["first", "changed", "added", "removed", "renamed"])
def test_every_night_holds_exactly_the_documents_of_its_corpus(nights: dict[str, Night], night: str) -> None:
    assert sorted(folders.vectors(nights[night].embeddings)) == nights[night].ids
    assert folders.indexed_ids(nights[night].index) == nights[night].ids
    verify.run(verify.Settings(folder=str(nights[night].embeddings.parent)))


def _kept(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in after if before.get(name) == after[name]}


def test_a_changed_file_costs_its_own_units_and_its_own_shard(nights: dict[str, Night]) -> None:
    before, after = nights["first"], nights["changed"]
    assert len(before.units) == len(after.units) == 12
    assert len(_kept(before.units, after.units)) == 8
    # Three files of equal size in three shards: each shard is one file.
    assert len(after.shards) == 3 * _SHARDS
    assert len(_kept(before.shards, after.shards)) == 3 * (_SHARDS - 1)


def test_an_added_file_costs_its_own_units_and_one_shard(nights: dict[str, Night]) -> None:
    before, after = nights["changed"], nights["added"]
    assert len(after.units) == 14
    assert _kept(before.units, after.units) == before.units.keys()
    # Its units go to the emptiest shard together, so the three files of each of the two others stay as they are.
    assert len(_kept(before.shards, after.shards)) == 6


def test_a_removed_file_takes_its_units_and_its_shard_along(nights: dict[str, Night]) -> None:
    before, after = nights["added"], nights["removed"]
    assert after.units.keys() < before.units.keys()
    assert len(after.units) == 10
    assert _kept(before.units, after.units) == after.units.keys()
    gone = set(texts.documents(0, 40)["id"])
    assert gone.isdisjoint(folders.vectors(after.embeddings))
    assert gone.isdisjoint(folders.indexed_ids(after.index))


def test_a_renamed_file_is_not_embedded_again(nights: dict[str, Night]) -> None:
    before, after = nights["removed"], nights["renamed"]
    assert _kept(before.units, after.units) == before.units.keys()
    assert len(after.units) == 14


def _ask(question: str, night: Night, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    search.run(search.Settings(index=str(night.index), query=question, results=3))
    return capsys.readouterr().out


def test_search_finds_added_documents_and_no_removed_ones(
    nights: dict[str, Night], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (added,), (removed,) = (texts.documents(number, number + 1)["text"] for number in (605, 5))
    assert "d00605" not in _ask(added, nights["changed"], capsys, monkeypatch)
    assert "d00605" in _ask(added, nights["added"], capsys, monkeypatch)
    assert "d00005" in _ask(removed, nights["added"], capsys, monkeypatch)
    assert "d00005" not in _ask(removed, nights["removed"], capsys, monkeypatch)

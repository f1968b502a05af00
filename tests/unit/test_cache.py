"""The node's cache holds its limit, gives up what was not used for longest, and never what is in use."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from matryoshka import cache, storage

if TYPE_CHECKING:
    from faulty_proxy import Proxy

_SIZE = 1_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with room for three entries."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv(cache.LIMIT, str(3 * _SIZE / 1e9))
    with cache.borrowing():
        yield tmp_path / "cache"


def hold(key: str, made: list[str] | None = None, size: int = _SIZE) -> Path:
    def make(path: Path) -> None:
        path.write_bytes(bytes(size))
        (made if made is not None else []).append(key)

    return cache.hold(key, lambda: size, make)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_what_is_there_is_made_once(own_cache: Path) -> None:
    made: list[str] = []
    with cache.borrowing():
        assert hold("a", made) == hold("a", made) == own_cache / "a"
    assert hold("a", made).stat().st_size == _SIZE
    assert made == ["a"]


def test_what_was_not_used_for_longest_goes_first(own_cache: Path) -> None:
    for key in "abca":
        with cache.borrowing():
            hold(key)
    hold("d")
    assert entries(own_cache) == {"a", "c", "d"}


def test_what_is_in_use_stays_and_what_finds_no_room_is_refused(own_cache: Path) -> None:
    with cache.borrowing():
        for key in "abc":
            hold(key)
        with pytest.raises(RuntimeError, match=r"cache: no room for .* GB beside what is in use .*Raise MATRYOSHKA_CACHE_GB"):
            hold("d")
    assert entries(own_cache) == {"a", "b", "c"}
    hold("d")
    assert entries(own_cache) == {"b", "c", "d"}


def test_what_another_process_uses_stays(own_cache: Path) -> None:
    code = (
        "import sys; from matryoshka import cache\n"
        f"cache.hold('a', lambda: {_SIZE}, lambda path: path.write_bytes(bytes({_SIZE})) and None)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin
    assert other.stdout
    assert other.stdout.readline() == b"held\n"
    for key in "bcde":
        with cache.borrowing():
            hold(key)
    assert entries(own_cache) == {"a", "d", "e"}
    other.kill()
    other.wait()
    hold("f")
    hold("g")
    assert "a" not in entries(own_cache)


def test_a_copy_that_fails_leaves_nothing_and_is_made_the_next_time(own_cache: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        cache.hold("a", lambda: _SIZE, fail)
    assert entries(own_cache) == set()
    assert hold("a").stat().st_size == _SIZE


def test_what_a_killed_process_left_half_made_is_made_anew(own_cache: Path) -> None:
    own_cache.mkdir()
    (own_cache / ".made-a").write_bytes(b"half")
    (own_cache / "a.lock").write_text(str(_SIZE))
    assert hold("a").stat().st_size == _SIZE
    assert entries(own_cache) == {"a"}


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(cache.LIMIT, text)
    with pytest.raises(ValueError, match=r"MATRYOSHKA_CACHE_GB: not a positive number"):
        hold("a")


def test_a_file_is_fetched_once_by_its_digest_and_an_altered_one_is_refused(any_bucket: str, store: "Proxy") -> None:
    place, digest = storage.place(f"{any_bucket}/x"), storage.digest_of([b"right"])
    storage.publish_bytes(place, b"right")
    assert storage.local(place, digest).read_bytes() == b"right"
    before = len(store.requests)
    assert storage.local(place, digest).read_bytes() == b"right"
    assert len(store.requests) == before
    with pytest.raises(ValueError, match=r"x: its bytes were altered .*--replace"):
        storage.local(place, "0" * 64)


def test_a_folder_is_fetched_whole_and_anew_once_something_changes(any_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.LIMIT)
    folder = storage.place(f"{any_bucket}/model")
    for name, text in (("config.json", "1"), ("1_Pooling/config.json", "2")):
        storage.publish_bytes(folder / name, text.encode())
    first = storage.local(folder)
    assert (first / "1_Pooling" / "config.json").read_text() == "2"
    storage.publish_bytes(folder / storage.STATUS, b"{}")
    assert storage.local(folder) == first, "what its run says of itself is no part of it"
    storage.publish_bytes(folder / "config.json", b"3")
    assert (storage.local(folder) / "config.json").read_text() == "3"
    with pytest.raises(FileNotFoundError):
        storage.local(storage.place(f"{any_bucket}/nothing"))

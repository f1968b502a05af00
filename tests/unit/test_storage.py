from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import storage

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


class Killed(BaseException):
    """Stands for anything that ends a writer."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_file_is_there_at_once_and_whole(tmp_path: Path):
    target = tmp_path / "below" / "file"
    with storage.publish(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["file"]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, Killed, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_all_as_it_was(tmp_path: Path, old: str | None, error: type[BaseException]):
    target = tmp_path / "file"
    if old:
        target.write_text(old)

    def write_half() -> None:
        with storage.publish(target) as temporary:
            temporary.write_text("ha")
            raise error

    with pytest.raises(error):
        write_half()
    assert (target.read_text() if target.exists() else None) == old
    assert names(tmp_path) == (["file"] if old else [])


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path: Path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()

    def write_half() -> None:
        with storage.publish(target) as temporary:
            temporary.mkdir()
            (temporary / "new").touch()
            raise Killed

    with pytest.raises(Killed):
        write_half()
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["old"]


def test_a_folder_whose_last_move_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, move, moves = tmp_path / "folder", Path.replace, []
    target.mkdir()
    (target / "old").touch()

    def move_but_fail_once(source: Path, destination: Path) -> Path:
        if destination == target:
            moves.append(source)
            if len(moves) == 1:
                raise OSError("no space left")
        return move(source, destination)

    def publish() -> None:
        with storage.publish(target) as temporary:
            temporary.mkdir()
            (temporary / "new").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move_but_fail_once)
        with pytest.raises(OSError, match="no space left"):
            publish()
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["old"]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError), storage.publish(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_a_published_folder_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path):
    for content in ("old", "new"):
        with storage.publish(tmp_path / "folder") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / content).write_text(content)
    assert names(tmp_path / "folder" / "inner") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_leftovers_of_killed_writers_are_removed_at_any_depth_and_nothing_else(tmp_path: Path):
    for name in ("a/keep", "a/.partial-1-x/inner/.partial-2-y", "b/.partial-3-z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    storage.remove_leftovers(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/keep", "b"]


def test_remove_takes_a_link_and_leaves_what_it_points_to(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage.remove(tmp_path / "link")
    storage.remove(tmp_path / "never was")
    assert names(tmp_path) == ["real"]
    assert names(tmp_path / "real") == ["file"]


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), json_values, max_size=5))
def test_digests_of_json_do_not_depend_on_the_order_of_keys(value: dict[str, object]):
    backwards = dict(reversed(value.items()))
    assert storage.digest_json(backwards) == storage.digest_json(value)


def test_digests_tell_values_apart():
    values = [{}, [], None, 0, "0", {"a": 1}, {"a": "1"}, {"b": 1}, [1, 2], [2, 1], [[1], 2]]
    assert len({storage.digest_json(value) for value in values}) == len(values)


def test_json_comes_back_as_it_was_written(tmp_path: Path):
    value = {"dims": [384, 64], "text": "gr\u00f6\u00dfer \U0001f600", "none": None}
    storage.publish_json(tmp_path / "value.json", value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.publish_json(tmp_path / "infinite.json", {"gain": float("inf")})
    assert not (tmp_path / "infinite.json").exists()
    assert storage.read_json(tmp_path / "value.json") == value


def test_as_json_gives_what_a_file_would():
    assert storage.as_json({"dims": (1, 2), 3: None}) == {"dims": [1, 2], "3": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"value\.json: cannot be read \(No such file.*Check the path"), (b"{", r"value\.json: not JSON \(.*Restore it"),
     (b"\xff", r"value\.json: not JSON")],
)  # fmt: skip
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        storage.read_json(tmp_path / "value.json")


@pytest.mark.parametrize(
    ("output", "place"), [("a", "a"), ("a", "a/b"), ("a/b/c", "a"), ("a", "a/b/file"), ("a/b/file", "a/b/file")]
)
def test_an_output_that_holds_an_input_or_lies_in_one_is_refused(tmp_path: Path, output: str, place: str):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    with pytest.raises(
        ValueError, match=rf"{tmp_path / output}: .*input {tmp_path / place} lie in each other\. Pass another --output"
    ):
        storage.keep_apart(tmp_path / output, None, tmp_path / place)


def test_an_output_beside_its_inputs_is_kept_apart(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    storage.keep_apart(tmp_path / "a b", tmp_path / "a", None, tmp_path / "file", tmp_path / "a b-2")


def test_digest_of_a_file_is_its_sha256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert storage.digest_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_workspace_is_gone_after_an_error_and_so_is_a_folder_that_only_held_it(tmp_path: Path):
    folder = tmp_path / "out"

    def fail() -> None:
        with storage.workspace(folder, "work") as work:
            (work / "rows").touch()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert not folder.exists()


def test_what_was_moved_out_of_a_workspace_stays(tmp_path: Path):
    with storage.workspace(tmp_path / "out", "work") as work:
        (work / "a.txt").write_text("x")
        storage.move(work / "a.txt", tmp_path / "out" / "deep" / "b.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["deep"]
    assert (tmp_path / "out" / "deep" / "b.txt").read_text() == "x"


def test_a_workspace_replaces_what_a_killed_run_left_and_has_a_path_of_its_own(tmp_path: Path):
    with storage.workspace(tmp_path, "work") as first:
        with storage.workspace(tmp_path, "other") as other:
            assert other != first
        with storage.workspace(tmp_path, "work") as second:
            assert second != first
            assert not first.exists()
    assert list(tmp_path.iterdir()) == []

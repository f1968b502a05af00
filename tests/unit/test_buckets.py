"""Places in a bucket behave as paths do, are written whole or not at all, and say clearly what is wrong."""

import dataclasses
import hashlib
import io
import os
import pickle
import threading
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from faulty_proxy import Fault
from google.oauth2.credentials import Credentials

from matryoshka import buckets, storage, stores
from matryoshka.buckets import BucketPath

if TYPE_CHECKING:
    from faulty_proxy import Proxy

_MEGABYTE = 1 << 20


@pytest.fixture
def root(store: "Proxy") -> BucketPath:
    """An empty folder in a bucket of each store."""
    return buckets.parse(f"{store.make_bucket()}/run")


@pytest.fixture
def s3_root(bucket: str) -> BucketPath:
    """An empty folder in a bucket of S3."""
    return buckets.parse(f"{bucket}/run")


@pytest.fixture
def gs_root(gs: "Proxy") -> BucketPath:
    """An empty folder in a bucket of Google's."""
    return buckets.parse(f"{gs.make_bucket()}/run")


@pytest.fixture(params=["disk", "s3", "gs"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An empty folder on disk, and one in a bucket of each store: what holds of one must hold of the others."""
    return tmp_path if request.param == "disk" else buckets.parse(f"{request.getfixturevalue(request.param).make_bucket()}/run")


def held(folder: Any) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in storage.sizes(folder)}


def fill(folder: Any, **files: str) -> None:
    for name, text in files.items():
        storage.publish_bytes(folder / name.replace("__", "/"), text.encode())


@pytest.mark.parametrize("bucket", ["s3://bucket", "gs://bucket"])
def test_a_path_in_a_bucket_has_the_parts_of_a_path(bucket: str) -> None:
    place = storage.place(f"{bucket}/a/b.txt")
    assert (str(place), place.name, place.stem, str(place.parent)) == (f"{bucket}/a/b.txt", "b.txt", "b", f"{bucket}/a")
    assert str(place.parent / "c" / "d") == f"{bucket}/a/c/d"
    assert (place.parent / "c" / "d").relative_to(place.parent).as_posix() == "c/d"
    assert place == storage.place(f"{bucket}/a/b.txt/")
    assert pickle.loads(pickle.dumps(place)) == place
    assert not storage.is_local(place)


def test_a_file_url_is_a_path() -> None:
    assert storage.place("file:///tmp/x") == Path("/tmp/x")
    assert storage.place("a b/c") == Path("a b/c")


def test_files_and_folders_are_told_apart(anywhere: Any) -> None:
    fill(anywhere, a__x="1", a__deep__y="2", ab="3")
    found = {name: ((anywhere / name).is_file(), (anywhere / name).is_dir(), (anywhere / name).exists())
             for name in ("a", "a/x", "a/deep", "ab", "b", "a/x/no")}  # fmt: skip
    folder, file, nothing = (False, True, True), (True, False, True), (False, False, False)
    assert found == {"a": folder, "a/x": file, "a/deep": folder, "ab": file, "b": nothing, "a/x/no": nothing}


def test_folders_are_listed_alike(anywhere: Any) -> None:
    fill(anywhere, a__x="1", a__deep__y="22", b="3")
    assert sorted(path.name for path in anywhere.iterdir()) == ["a", "b"]
    assert sorted(path.relative_to(anywhere).as_posix() for path in anywhere.rglob("*")) == [
        "a",
        "a/deep",
        "a/deep/y",
        "a/x",
        "b",
    ]
    assert sorted(path.name for path in (anywhere / "a").glob("[xy]*")) == ["x"]
    assert sorted(path.name for path in anywhere.glob("*/x")) == ["x"]
    assert storage.sizes(anywhere) == {"a/x": 1, "a/deep/y": 2, "b": 1}
    assert list((anywhere / "nowhere").glob("*")) == []


def test_what_another_writer_adds_or_takes_is_seen_at_once(root: BucketPath) -> None:
    assert not (root / "x").exists()
    assert storage.sizes(root) == {}
    fill(root, x="1")
    assert (root / "x").exists()
    assert [path.name for path in root.iterdir()] == ["x"]
    storage.remove(root / "x")
    assert not root.exists()


def test_an_empty_folder_that_a_console_made_is_empty(root: BucketPath) -> None:
    root.fs.pipe_file(f"{root.path}/empty/", b"")
    assert (root / "empty").is_dir()
    assert list((root / "empty").iterdir()) == []
    assert storage.sizes(root / "empty") == {}


def test_a_file_reads_like_one_on_disk(anywhere: Any) -> None:
    fill(anywhere, lines="a\nb\n\ngr\u00f6\u00dfer")
    with (anywhere / "lines").open(encoding="utf-8", newline="\n") as lines:
        assert list(lines) == ["a\n", "b\n", "\n", "gr\u00f6\u00dfer"]
    with (anywhere / "lines").open("rb") as file:
        assert (file.seek(-3, io.SEEK_END), file.read(2), file.tell(), file.read(), file.read()) == (10, b"\x9fe", 12, b"r", b"")
    assert storage.digest_file(anywhere / "lines") == hashlib.sha256("a\nb\n\ngr\u00f6\u00dfer".encode()).hexdigest()
    with pytest.raises(FileNotFoundError):
        (anywhere / "nothing").open("rb")


def test_a_file_in_a_bucket_is_not_written_piece_by_piece(root: BucketPath) -> None:
    with pytest.raises(ValueError, match=r"x: cannot be opened for writing.*publish"):
        (root / "x").open("wb")


def test_a_published_folder_replaces_what_was_there(anywhere: Any) -> None:
    for name in ("old", "new"):
        with storage.publish(anywhere / "folder") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / name).write_text(name)
            (temporary / "same").write_text(name)
    assert held(anywhere) == {"folder/inner/new": b"new", "folder/same": b"new"}


def test_a_writer_that_fails_leaves_nothing(anywhere: Any) -> None:
    def fail() -> None:
        with storage.publish(anywhere / "x") as temporary:
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert held(anywhere) == {}


def test_an_upload_that_fails_leaves_nothing_of_a_folder(
    root: BucketPath, store: "Proxy", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matryoshka.stores.REQUEST_ATTEMPTS", 2)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a client of its own")
    fill(root, folder__kept="old")

    def publish() -> None:
        with storage.publish(root / "folder") as temporary:
            temporary.mkdir()
            for number in range(4):
                (temporary / str(number)).write_text("new")

    faults = Fault("500", store.write, "folder/2", times=2)
    with store.failing(faults), pytest.raises(RuntimeError, match=r"folder/2.*\((InternalError|HTTP 500)\)"):
        publish()
    assert held(root) == {"folder/kept": b"old"}


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(
    root: BucketPath, store: "Proxy", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matryoshka.stores.PART_BYTES", 5 * _MEGABYTE)
    monkeypatch.setattr("matryoshka.buckets._RANGE_BYTES", 3 * _MEGABYTE)
    data = os.urandom(11 * _MEGABYTE)
    faults = (
        Fault("drop request", "PUT", "partNumber=2|upload_id"), Fault("500", "PUT", "partNumber=1|upload_id"),
        Fault("drop answer", "GET", "big", times=2),
    )  # fmt: skip
    with store.failing(*faults) as left:
        with storage.publish(root / "big") as temporary:
            temporary.write_bytes(data)
        assert storage.local(root / "big").read_bytes() == data
        assert [fault.times for fault in left] == [0, 0, 0]
    reads = {request.range for request in store.requests if request.method == "GET" and "run/big" in unquote(request.path)}
    assert len(reads - {None}) == 4
    assert storage.digest_file(root / "big") == hashlib.sha256(data).hexdigest()


def test_what_a_server_keeps_of_a_part_it_is_not_sent_again(
    gs_root: BucketPath, gs: "Proxy", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matryoshka.stores.PART_BYTES", 300 << 10)  # of which the server keeps 256 KiB
    data = os.urandom(700 << 10)
    with gs.failing(Fault("lose answer", "PUT"), Fault("delay", "PUT", times=2), Fault("lose answer", "PUT")) as left:
        with storage.publish(gs_root / "big") as temporary:
            temporary.write_bytes(data)
        assert [fault.times for fault in left] == [0, 0, 0]
    assert (gs_root / "big").read_bytes() == data


def test_a_server_that_keeps_nothing_of_an_upload_is_given_up(
    gs_root: BucketPath, gs: "Proxy", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matryoshka.stores.PART_BYTES", 200 << 10)  # less than the server keeps
    before = len(gs.requests)
    with (
        pytest.raises(RuntimeError, match=r"run/big: .*keeps nothing of an upload"),
        storage.publish(gs_root / "big") as temporary,
    ):
        temporary.write_bytes(bytes(700 << 10))
    assert gs.requests[-1].method == "DELETE"
    assert len(gs.requests) - before == 10
    assert not (gs_root / "big").exists()


def test_an_upload_that_fails_for_good_is_ended(root: BucketPath, store: "Proxy", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matryoshka.stores.PART_BYTES", 5 * _MEGABYTE)
    monkeypatch.setattr("matryoshka.stores.REQUEST_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another client of its own")

    def publish() -> None:
        with storage.publish(root / "big") as temporary:
            temporary.write_bytes(bytes(11 * _MEGABYTE))

    fault = Fault("500", "PUT", "partNumber=2|upload_id")
    with store.failing(fault), pytest.raises(RuntimeError, match=r"run/big.*(InternalError|HTTP 500)"):
        publish()
    assert store.requests[-1].method == "DELETE"
    assert not (root / "big").exists()
    assert root.fs.abort_uploads(root.path) == 0


def test_leftovers_of_killed_writers_are_removed(s3_root: BucketPath) -> None:
    fill(s3_root, **{".partial-1-x__rows": "1", "kept": "2", "units__kept": "3"})
    s3_root.fs.call_s3("create_multipart_upload", Bucket=s3_root.parts[0].rstrip("/"), Key="run/units/half")
    s3_root.fs.call_s3("create_multipart_upload", Bucket=s3_root.parts[0].rstrip("/"), Key="another/half")
    storage.remove_leftovers(s3_root)
    assert held(s3_root) == {"kept": b"2", "units/kept": b"3"}
    left = s3_root.fs.call_s3("list_multipart_uploads", Bucket=s3_root.parts[0].rstrip("/"))
    assert [upload["Key"] for upload in left["Uploads"]] == ["another/half"]


_READS = {"s3": "run/x", "gs": "alt=media"}
_OWN_FAULTS = {
    "s3": [Fault("500", "HEAD"), Fault("500", "POST"), Fault("503", "PUT")],
    "gs": [Fault("429", "POST"), Fault("500", "DELETE"), Fault("lose answer", "DELETE")],
}


def test_errors_and_throttling_are_waited_out(root: BucketPath, store: "Proxy") -> None:
    faults = (
        Fault("500", store.write, times=2), Fault("drop request", store.write), Fault("503", "GET"),
        Fault("drop answer", "GET", _READS[store.scheme]), Fault("delay", "GET", delay=0.1),
        *(dataclasses.replace(fault) for fault in _OWN_FAULTS[store.scheme]),
    )  # fmt: skip
    with store.failing(*faults) as left:
        storage.publish_json(root / "x", {"a": 1})
        assert (root / "x").is_file()
        assert storage.read_json(root / "x") == {"a": 1}
        storage.remove(root)
        assert storage.sizes(root) == {}
        assert [fault for fault in left if fault.times] == []


def test_of_many_that_create_a_file_one_does(anywhere: Any) -> None:
    done: list[bool] = []
    threads = [
        threading.Thread(target=lambda own=own: done.append(storage.create(anywhere / "lease", own)))
        for own in (b"1", b"2", b"3")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False, False, True]
    assert (anywhere / "lease").read_bytes() in (b"1", b"2", b"3")
    assert storage.sizes(anywhere) == {"lease": 1}


def test_a_file_is_swapped_only_for_what_was_seen(anywhere: Any) -> None:
    lease = anywhere / "lease"
    assert not storage.swap(lease, b"new", b"")
    assert storage.create(lease, b"old")
    assert not storage.swap(lease, b"new", b"another")
    assert storage.swap(lease, b"new", b"old")
    assert not storage.swap(lease, b"newer", b"old")
    assert lease.read_bytes() == b"new"


def test_of_many_that_swap_a_file_one_does(anywhere: Any) -> None:
    storage.create(anywhere / "lease", b"old")
    done: list[bool] = []
    threads = [
        threading.Thread(target=lambda own=own: done.append(storage.swap(anywhere / "lease", own, b"old")))
        for own in (b"1", b"2", b"3")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False, False, True]


def test_who_never_hears_that_it_wrote_first_learns_it(root: BucketPath, store: "Proxy") -> None:
    with store.failing(Fault("lose answer", store.write, "lease")):
        assert storage.create(root / "lease", b"1")
    with store.failing(Fault("lose answer", store.write, "lease")):
        assert storage.swap(root / "lease", b"2", b"1")
    assert (root / "lease").read_bytes() == b"2"


def test_a_file_that_changes_while_it_is_read_is_noticed(root: BucketPath) -> None:
    fill(root, x="12345678")
    with (root / "x").source() as file:
        assert file.read(2) == b"12"
        fill(root, x="abcdefgh")
        with pytest.raises(storage.ChangedError, match=r"run/x: changed while it was read\. Run the same command again"):
            file.read(2)


def test_an_object_that_comes_in_another_length_than_it_has_is_refused(gs_root: BucketPath) -> None:
    fill(gs_root, x="12345678")
    with pytest.raises(ValueError, match=r"run/x: comes as other bytes than it has \(8 for 20\)\. .*Content-Encoding"):
        gs_root.fs.read_range(f"{gs_root.path}/x", 0, 20)


def test_stamps_change_with_the_bytes(anywhere: Any) -> None:
    fill(anywhere, x="1", y="2")
    before = storage.stamps(anywhere, ["x", "y", "z"])
    assert before[2] is None
    assert storage.stamps(anywhere, ["x"]) == before[:1]
    fill(anywhere, x="3")
    after = storage.stamps(anywhere, ["x", "y", "z"])
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_workspace_lies_beside_the_output_and_is_gone_at_the_end(anywhere: Any) -> None:
    with storage.workspace(anywhere / "out", "work") as work:
        fill(work, rows="1")
        assert (work.parent, work.name[:9]) == (anywhere / "out", ".partial-")
        with storage.workspace(anywhere / "out", "work") as second:
            assert second != work
            assert not (work / "rows").exists()
        fill(work, rows="2")
        storage.move(work / "rows", anywhere / "out" / "deep" / "rows")
    assert held(anywhere) == {"out/deep/rows": b"2"}


def test_scratch_is_local_and_gone_at_the_end(anywhere: Any) -> None:
    with storage.scratch(anywhere) as folder:
        (folder / "rows").write_text("1")
    assert isinstance(folder, Path)
    assert not folder.exists()
    assert storage.sizes(anywhere) == {}


def test_a_listing_of_many_pages_is_whole(gs_root: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = gs_root.fs._call_list_objects
    monkeypatch.setattr(gs_root.fs, "_call_list_objects", lambda *own, **more: ask(*own, **{**more, "maxResults": 2}))
    fill(gs_root, **{f"x{number}__y": str(number) for number in range(7)})
    assert storage.sizes(gs_root) == {f"x{number}/y": 1 for number in range(7)}
    assert [path.name for path in gs_root.iterdir()] == [f"x{number}" for number in range(7)]


def test_names_may_hold_what_has_a_meaning_in_an_address(anywhere: Any) -> None:
    for name in ("a b", "50%", "a#1", "a?b", "gr\u00f6\u00dfer", "a+b&c=d"):
        storage.publish_bytes(anywhere / "deep" / name, name.encode())
        assert (anywhere / "deep" / name).read_bytes() == name.encode()
    assert held(anywhere) == {f"deep/{own}": own.encode() for own in ("a b", "50%", "a#1", "a?b", "gr\u00f6\u00dfer", "a+b&c=d")}
    storage.remove(anywhere)
    assert storage.names(anywhere) == []


def test_bytes_that_look_like_the_end_of_an_upload_are_kept(root: BucketPath) -> None:
    data = b"\r\n--==0==--\r\n\n--boundary\r\n\r\n\x00\r\n"
    storage.publish_bytes(root / "x", data)
    assert (root / "x").read_bytes() == data


def test_outputs_and_inputs_in_buckets_are_kept_apart(store: "Proxy", tmp_path: Path) -> None:
    place, bucket = storage.place, store.make_bucket()
    fill(place(f"{bucket}/a"), b="1")
    storage.keep_apart(place(f"{bucket}/c"), place(f"{bucket}/a"), tmp_path, None)
    storage.keep_apart(place(f"{bucket}/ab"), place(f"{bucket}/a"))
    for output, given in (("a", "a"), ("a", "a/b"), ("a/b/c", "a")):
        with pytest.raises(ValueError, match="lie in each other"):
            storage.keep_apart(place(f"{bucket}/{output}"), place(f"{bucket}/{given}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s4://bucket/x", r"s4://: no such kind of storage \(known: .*s3://.*Check the spelling"),
        ("https://host/x?Signature=secret", r"https://: no such kind of storage"),
        ("s3:/bucket/x", r"s3:/: not the beginning of a place\. Write s3://"),
        ("file://host/x", r"file://: not the beginning of a place"),
        ("s3:///x", r"s3:///x: no bucket\. Write s3://bucket/folder"),
        ("s3://key:secret@bucket/x", r"s3://: the address holds a key or a query\. Pass the bucket's name"),
        ("s3://key:secret/more@bucket/x", r"s3://: the address holds a key or a query"),
        ("s3://bucket/x?X-Amz-Signature=secret", r"s3://: the address holds a key or a query"),
        ("gs:///x", r"gs:///x: no bucket\. Write gs://bucket/folder"),
        ("gs://bucket/x?X-Goog-Signature=secret", r"gs://: the address holds a key or a query"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_its_secrets_are_not_repeated(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        storage.place(text)
    assert "secret" not in str(caught.value)


def test_a_pattern_with_a_question_mark_is_no_query() -> None:
    assert str(storage.place("s3://bucket/part-??.parquet")) == "s3://bucket/part-??.parquet"


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    advice = r"is not installed\. Run pip install --editable '\.\[{}\]' in the clone"
    with pytest.raises(ValueError, match=f"s3://bucket/x: s3fs {advice.format('s3')}"):
        storage.place("s3://bucket/x")
    with pytest.raises(ValueError, match=f"gs://bucket/x: gcsfs {advice.format('gs')}"):
        storage.place("gs://bucket/x")


def test_a_bucket_that_is_not_there_is_named(store: "Proxy") -> None:
    place = storage.place(f"{store.scheme}://no-such-bucket/run/x")
    asking = (place.exists, place.is_dir, place.read_bytes, lambda: storage.sizes(place), lambda: storage.check_writable(place))
    for ask in asking:
        with pytest.raises(ValueError, match=r"://no-such-bucket.*: there is no bucket 'no-such-bucket'\. Check its name"):
            ask()


def test_the_variable_for_another_server_is_named_where_there_is_one() -> None:
    assert str(stores.no_bucket("gs://b/x", "")) == "gs://b/x: there is no bucket 'b'. Check its name, or create it."
    assert "network and AWS_ENDPOINT_URL, then" in str(stores.unanswered("s3://b/x", "503", "AWS_ENDPOINT_URL"))


def test_missing_credentials_for_google_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    for name, value in {"NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": str(tmp_path), "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"gs://: no credentials for this bucket.*GOOGLE_APPLICATION_CREDENTIALS"):
        storage.read_json(storage.place("gs://bucket/x"))


def test_credentials_of_google_that_are_no_longer_valid_are_named(
    gs_root: BucketPath, gs: "Proxy", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "a client of its own")
    with gs.failing(Fault("401", "GET")), pytest.raises(ValueError, match=r"run/x: no credentials.*\(HTTP 401\)"):
        (gs_root / "x").read_bytes()
    client = buckets.parse(str(gs_root)).fs
    client.credentials.credentials = Credentials("not-to-be-shown")
    with gs.failing(Fault("401", "GET")), pytest.raises(RuntimeError, match=r"no longer valid \(HTTP 401\)") as caught:
        client.read_whole(f"{gs_root.path}/x")
    assert "shown" not in str(caught.value)
    client.credentials.credentials = Credentials("not-to-be-shown", expiry=datetime(2020, 1, 1))
    with pytest.raises(RuntimeError, match=r"run/x: the credentials are no longer valid \(RefreshError\)\. Renew them"):
        client.read_whole(f"{gs_root.path}/x")


def test_missing_credentials_are_named(s3_root: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=r"run/x: no credentials for this bucket.*Set AWS_ACCESS_KEY_ID"):
        storage.read_json(buckets.parse(str(s3_root / "x")))


def test_a_right_that_is_missing_is_named_and_nothing_that_the_server_said(
    root: BucketPath, store: "Proxy", caplog: pytest.LogCaptureFixture
) -> None:
    match = r"access denied \((AccessDenied|HTTP 403)\)\. Check"
    with store.failing(Fault("403", store.write)), pytest.raises(ValueError, match=match) as caught:
        storage.check_writable(root)
    assert "told to fail" not in str(caught.value) + caplog.text
    storage.check_writable(root)
    assert storage.sizes(root) == {}


@pytest.mark.parametrize(("scheme", "variable"), [("s3", "AWS_ENDPOINT_URL"), ("gs", "STORAGE_EMULATOR_HOST")])
def test_a_store_that_cannot_be_reached_is_the_worlds_fault(scheme: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matryoshka.stores.REQUEST_ATTEMPTS", 1)
    monkeypatch.setenv(variable, "http://name:hidden@127.0.0.1:9")
    with pytest.raises(RuntimeError, match=rf"{scheme}://bucket/x: the object store does not answer.*{variable}") as caught:
        storage.place(f"{scheme}://bucket/x").exists()
    assert "hidden" not in str(caught.value)

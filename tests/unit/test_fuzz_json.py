"""Manifests, journals, leases, states, plans and reports that were damaged: each is read, or refused in a sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutations import bytes_of, json_mutants, obeys, run

from matryoshka import artifacts, corpus, indexing, leases, model, status, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.indexing import IndexStore
from matryoshka.leases import HeldError, Holder, Lease
from matryoshka.status import Status


def refit(data: bytes) -> bytes:
    """Returns a manifest whose fingerprint fits what it says, as far as it says anything: its author means it."""
    try:
        value = json.loads(data)
        own = {name: value[name] for name in ("kind", "identity", "inputs", "facts", "is_complete")}
        receipts = tuple(Receipt.from_json(receipt, "") for receipt in value["receipts"])
        return json.dumps({**value, "fingerprint": Manifest(**own, receipts=receipts).fingerprint}).encode()
    except Exception:
        return data


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    receipts = []
    for key in ("a", "b"):
        storage.publish_bytes(folder / "units" / key, key.encode())
        receipts.append(Receipt(key, 1, (FileRecord.of(folder, folder / "units" / key),), {"slot": f"{key}:0"}))
    Manifest(
        "embeddings", {"model": "m", "dims": [4, 2]}, {"corpus": "c"}, {"width": 4}, tuple(receipts), is_complete=True
    ).write(folder)
    return folder


def test_a_damaged_manifest_is_read_or_refused_and_nothing_else_is_touched(artifact: Path):
    path = artifact / artifacts.MANIFEST
    before = bytes_of(artifact)
    identity = {"model": "m", "dims": [4, 2]}

    def check(data: bytes) -> None:
        path.write_bytes(refit(data))
        there = {**before, artifacts.MANIFEST: path.read_bytes()}
        found = obeys(lambda: artifacts.read(artifact))
        if found:
            obeys(lambda: artifacts.finished_receipts(artifact, found, ["a", "b"], compare_digests=True))
            obeys(lambda: artifacts.find_faults(artifact, found))
        obeys(lambda: artifacts.claim(artifact, "embeddings", identity, replace=False))
        obeys(lambda: artifacts.claim(artifact, "embeddings", identity, replace=True))
        assert bytes_of(artifact) == there

    run(1000, json_mutants(json.loads(path.read_bytes())), check)


def test_a_damaged_journal_is_read_or_refused(artifact: Path):
    found = artifacts.read(artifact)
    path = artifact / "journal" / "00000001.json"
    path.parent.mkdir()
    value = [receipt.as_json() for receipt in found.receipts]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        obeys(lambda: artifacts.read_journal(artifact))
        obeys(lambda: artifacts.finished_receipts(artifact, found, ["a", "b"], compare_digests=True))
        obeys(lambda: artifacts.Journal(artifact))

    run(400, json_mutants(value), check)


def test_a_damaged_lease_keeps_nobody_out_for_ever_and_breaks_nothing(tmp_path: Path):
    holder = dataclasses.replace(Holder.here("theirs", 60.0), host="elsewhere", machine="another")
    path = tmp_path / leases.NAME

    def look(data: bytes) -> None:
        path.write_bytes(data)
        is_held = obeys(lambda: leases.is_held(tmp_path))
        assert is_held is not None
        if is_held:
            with pytest.raises(HeldError, match="another run is writing"):
                Lease.take(tmp_path, "mine")
            assert path.read_bytes() == data

    run(600, json_mutants(json.loads(holder.as_bytes())), look)

    def take(data: bytes) -> None:
        path.write_bytes(data)
        lease = obeys(lambda: Lease.take(tmp_path, "mine"))
        if lease:
            lease.renew()
            lease.release()
            assert not path.exists()

    run(30, json_mutants(json.loads(holder.as_bytes())), take)


def test_a_damaged_status_is_read_or_taken_for_none(tmp_path: Path):
    Status("embed", "key", attempts=2).write(tmp_path)
    path = tmp_path / status.NAME
    value = json.loads(path.read_bytes())

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = obeys(lambda: Status.read(tmp_path))
        obeys(lambda: Status.begin(tmp_path, "embed", "key"))
        if found:
            f"{found.attempts > 1} {found.items:,} {found.rate:,.1f} {found.seen(is_held=False)}"

    run(400, json_mutants(value), check)


@pytest.fixture
def index(make_store, make_index, random_vectors) -> IndexStore:
    store = make_store({"a:0": (["a", "b", "c"], random_vectors(3, 8)), "b:0": (["d", "e"], random_vectors(2, 8, seed=1))})
    made = make_index(store, removed=["b"])
    point = {
        "plan": ["4:5", "8:3"],
        "chosen": 1.0,
        "confirmed": 1.0,
        "low": 0.9,
        "high": 1.0,
        "queries_per_second": 10.0,
        "milliseconds": 1.0,
    }
    tuned = {
        "measure": "recall",
        "embeddings": "e",
        "frontier": [point],
        "exact": point,
        "plans": {name: {"floor": 0.9, **point, "passed_over": []} for name in ("fast", "balanced", "high")},
    }
    corpus_facts = {
        "root": "/data",
        "id_column": "id",
        "text_column": "text",
        "stamps": [["a.parquet", 1, 2]],
        "files": [{"name": "a.parquet", "digest": "0" * 64, "num_rows": 3}],
        "num_empty": 0,
    }
    facts = {
        **made.manifest.facts,
        "tuned": tuned,
        "corpus": corpus_facts,
        "model": "m",
        "precision": "float32",
        "filter_columns": {"year": "integer"},
    }
    dataclasses.replace(made.manifest, facts=facts).write(made.folder)
    return IndexStore.open(made.folder)


def test_an_index_whose_parts_lie_is_searched_or_refused(index: IndexStore):
    path = index.folder / artifacts.MANIFEST
    value = json.loads(path.read_bytes())
    queries = np.eye(8, dtype=np.float32)[:2]
    before = bytes_of(index.folder)

    def use(found: IndexStore) -> None:
        for own in (
            lambda: found.plan,
            lambda: found.dims,
            lambda: found.width,
            lambda: found.layout,
            lambda: found.frontier,
            lambda: found.is_tuning_current,
            lambda: found.coverage,
            lambda: found.shards,
            lambda: found.check_where("year = 2020"),
            lambda: corpus.recall(found.manifest.facts.get("corpus")),
            lambda: indexing.count_missing(found.manifest),
            lambda: found.searcher().search(queries, 2).ids,
            lambda: found.searcher().search(queries, 2, "year = 2020").ids,
        ):
            obeys(own)
        for quality in ("fast", "balanced", "high", "exact"):
            obeys(lambda quality=quality: found.plan_for(quality))

    def check(data: bytes) -> None:
        path.write_bytes(refit(data))
        there = {**before, artifacts.MANIFEST: path.read_bytes()}
        found = obeys(lambda: IndexStore.open(index.folder))
        if found:
            use(found)
        partial = obeys(lambda: IndexStore.open_partial(index.folder))
        if partial and not found:
            use(partial[0])
        assert bytes_of(index.folder) == there

    run(300, json_mutants(value), check)


def test_a_model_whose_parts_lie_is_described_or_refused(tmp_path: Path, tiny: str):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    names = ("modules.json", "config.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer_config.json")
    for name in names:
        path = folder / name
        data = path.read_bytes() if path.is_file() else b'{"max_seq_length": 64}'

        def check(mutant: bytes, path: Path = path) -> None:
            path.write_bytes(mutant)
            obeys(lambda: model.describe(str(folder)))
            obeys(lambda: model.check_layers(folder, 2))
            obeys(lambda: model.describe_architecture(folder))

        run(60, json_mutants(json.loads(data)), check)
        path.write_bytes(data)


JOURNAL = "journal/00000001.json"
FOUND = {
    "a journal that is no list": (JOURNAL, "null", "no list of receipts"),
    "a receipt without files": (JOURNAL, '[{"key": "a", "num_rows": 1, "details": {}}]', "receipt 0: files is missing"),
    "very deep brackets": (JOURNAL, "[" * 100_000, "not JSON"),
    "a kind that cannot be shown": ("manifest.json", r'{"kind": "\ud800", "format": 1, "fingerprint": 1}', "not a manifest"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_is_refused_in_a_sentence(artifact: Path, name: str):
    found = artifacts.read(artifact)
    path, text, message = FOUND[name]
    (artifact / path).parent.mkdir(exist_ok=True)
    (artifact / path).write_text(text)
    with pytest.raises(ValueError, match=message):
        artifacts.finished_receipts(artifact, found, ["a"]) and artifacts.check_owner(artifact, "index")


def test_what_differs_can_be_shown_whatever_it_is(artifact: Path):
    found = artifacts.read(artifact)
    value = json.loads((artifact / artifacts.MANIFEST).read_bytes())
    value |= {"identity": {"model": "\ud800", "dims": [4, 2]}, "is_complete": False}
    (artifact / artifacts.MANIFEST).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"model: \? there, m now"):
        artifacts.claim(artifact, "embeddings", found.identity, replace=False)


@pytest.mark.parametrize("wrong", [{"since": "yesterday"}, {"since": 1e300}, {"renewed": "x"}, {"pid": "../../x"}, {"more": 1}])
def test_a_lease_that_makes_no_sense_keeps_nobody_out(tmp_path: Path, wrong: dict[str, object]):
    value = json.loads(dataclasses.replace(Holder.here("theirs", 60.0), machine="another").as_bytes())
    (tmp_path / leases.NAME).write_text(json.dumps({**value, **wrong}))
    assert not leases.is_held(tmp_path)
    Lease.take(tmp_path, "mine")


def test_a_status_that_makes_no_sense_is_none(tmp_path: Path):
    Status("embed", "key", attempts=2).write(tmp_path)
    value = json.loads((tmp_path / status.NAME).read_bytes())
    (tmp_path / status.NAME).write_text(json.dumps({**value, "attempts": "two"}))
    assert Status.read(tmp_path) is None
    assert Status.begin(tmp_path, "embed", "key").attempts == 1


HALF_TUNED = {"measure": "m", "embeddings": "e", "frontier": [], "plans": {"fast": {"plan": []}, "high": {"plan": []}}}
LIES = {
    "tuned.plans.balanced is missing": ("facts", {"tuned": HALF_TUNED}),
    "plan is not a list": ("facts", {"plan": "4:5"}),
    "funnel: .* is not dim:keep": ("facts", {"plan": ["4"]}),
    "has dims that vectors of 8 dims do not have": ("facts", {"dims": [16]}),
    "width is not a whole number": ("facts", {"width": 8.5}),
    "filter_columns.year is not one of": ("facts", {"filter_columns": {"year": "years"}}),
    "space is not one of": ("identity", {"space": "outer"}),
    "dim is not a whole number": ("identity", {"dim": "4"}),
}


@pytest.mark.parametrize("message", LIES)
def test_an_index_that_lies_is_refused_by_what_it_says(index: IndexStore, message: str):
    part, changed = LIES[message]
    own = {**getattr(index.manifest, part), **changed}
    dataclasses.replace(index.manifest, **{part: own}).write(index.folder)
    with pytest.raises(ValueError, match=message):
        IndexStore.open(index.folder)

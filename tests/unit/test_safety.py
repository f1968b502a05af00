"""Nothing that is read is run or leads out of its folder; what was altered is not parsed; secrets stay secret."""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets_by_hand as datasets
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from matryoshka import artifacts, config, corpus, model, shapes, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import without_secrets
from matryoshka.indexing import IndexStore

Copy = Callable[..., Path]

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "lib").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
RUNS_CODE = ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")
FORBIDDEN = ("eval", "exec", "compile", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_reads_what_could_be_code(path: Path):
    tree = ast.parse(path.read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported}.isdisjoint(RUNS_CODE)
    for name, call in calls(path):
        options = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in (
            "eval",
            "exec",
            "compile",
            "torch.load",
            "torch.save",
            "yaml.load",
            "yaml.unsafe_load",
            "np.fromfile",
        ), name
        if name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle") == "False", f"line {call.lineno}"
        assert options.get("trust_remote_code", "False") == "False", f"line {call.lineno}"
        assert options.get("weights_only", "True") == "True", f"line {call.lineno}"


def test_a_part_of_a_model_whose_weights_are_pickled_is_refused(minilm_copy: Copy):
    folder = minilm_copy()
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 9, "name": "9", "path": "9_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    (folder / "9_Dense").mkdir()
    torch.save({"linear.weight": torch.eye(384)}, folder / "9_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"9_Dense: has pickled weights only, which are not loaded\. Save"):
        model.describe(str(folder))
    save_file({"linear.weight": np.eye(384, dtype=np.float32)}, folder / "9_Dense" / "model.safetensors")
    assert model.describe(str(folder)).width == 384


@pytest.mark.parametrize("kind", ["my_code.Pooling", "subprocess.Popen", "sentence_transformersx.models.Pooling"])
def test_a_model_that_needs_code_of_its_own_is_refused(minilm_copy: Copy, kind: str):
    folder = minilm_copy()
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "my_code.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')")
    with pytest.raises(ValueError, match=rf"needs code of its own \({kind}\), which is never run\. Pass a model without"):
        model.describe(str(folder))
    assert not (folder / "was-run").exists()


def test_an_architecture_that_is_code_in_the_folder_is_refused(minilm_copy: Copy):
    folder = minilm_copy(config={"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}})
    (folder / "mine.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded as a model"):
        model.load(folder, "cpu")
    assert not (folder / "was-run").exists()


def test_modules_do_not_lead_out_of_the_model(minilm_copy: Copy):
    folder = minilm_copy()
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json: '\.\./elsewhere' leads out of the model's folder"):
        model.describe(str(folder))


OUTSIDE = ["../x", "/etc/passwd", "units/../../x", "", ".", "units//x", "units/./x", "units/x\0", "x" * 9_000]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_in_a_manifest_does_not_lead_out_of_the_folder(tmp_path: Path, path: str):
    folder = tmp_path / "artifact"
    storage.publish_bytes(tmp_path / "x", b"x")
    storage.publish_bytes(folder / "units" / "y", b"x")
    receipt = Receipt("a", 1, (FileRecord(path, 1, storage.digest_file(tmp_path / "x")),))
    Manifest("results", {}, receipts=(receipt,), is_complete=True).write(folder)
    with pytest.raises(ValueError, match=r"leads out|is not text|missing"):
        artifacts.read_whole(folder, "results")


def test_a_link_in_a_folder_does_not_lead_out_of_it(tmp_path: Path):
    folder = tmp_path / "artifact"
    storage.publish_bytes(tmp_path / "x", b"x")
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "x")
    receipt = Receipt("a", 1, (FileRecord("link", 1, storage.digest_file(tmp_path / "x")),))
    Manifest("results", {}, receipts=(receipt,), is_complete=True).write(folder)
    with pytest.raises(ValueError, match="link: leads out of the artifact's folder"):
        artifacts.read_whole(folder, "results")


def test_the_key_of_a_shard_does_not_lead_out_of_the_index(make_store, make_index, random_vectors):
    index = make_index(make_store({"a:0": (["a", "b"], random_vectors(2, 8))}), num_shards=1)
    path = index.folder / artifacts.MANIFEST
    (shard,) = index.manifest.receipts
    moved = Receipt("../../elsewhere", shard.num_rows, shard.files, shard.details)
    Manifest("index", index.manifest.identity, index.manifest.inputs, index.manifest.facts, (moved,), is_complete=True).write(
        index.folder
    )
    with pytest.raises(ValueError, match=rf"{path}: the receipt '\.\./\.\./elsewhere' does not name the files of its part"):
        IndexStore.open(index.folder)


def test_the_files_of_a_corpus_do_not_lead_out_of_it():
    known = {"root": "/data", "id_column": "id", "text_column": "text", "stamps": [], "num_empty": 0}
    with pytest.raises(ValueError, match=r"the corpus: '\.\./x' leads out of it"):
        corpus.recall({**known, "files": [{"name": "../x", "digest": "0", "num_rows": 1}]})


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["queries/test", "qrels/test"])
def test_an_altered_file_of_a_dataset_is_refused_before_it_is_parsed(tmp_path: Path, name: str):
    store = datasets.write(tmp_path, {"d": "text"}, {"test": {"q": "which?"}}, {"test": {"q": {"d": 1}}})
    alter(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=rf"{name}\.parquet: its bytes were altered"):
        (store.queries if name.startswith("queries") else store.qrels)("test")


def test_altered_training_pairs_are_refused_before_they_are_parsed(tmp_path: Path):
    with corpus.RowWriter(tmp_path / "pairs" / "train-00000.parquet", {"query": str, "positive": str}) as writer:
        writer.add(("q", "p"))
    record = FileRecord.of(tmp_path, tmp_path / "pairs" / "train-00000.parquet")
    Manifest("dataset", {}, receipts=(Receipt("pairs/train-00000", 1, (record,)),), is_complete=True).write(tmp_path)
    alter(tmp_path / record.path)
    with pytest.raises(ValueError, match=r"train-00000\.parquet: its bytes were altered"):
        datasets.DatasetStore.open(tmp_path).pair_files()


def test_altered_weights_of_a_tuned_model_are_refused_before_they_are_loaded(minilm_copy: Copy):
    folder = minilm_copy()
    records = [FileRecord.of(folder, folder / name) for name in ("config.json", "modules.json")]
    receipts = tuple(Receipt(record.path, 0, (record,)) for record in records)
    Manifest("model", {"dims": [384, 64]}, receipts=receipts, is_complete=True).write(folder)
    assert model.describe(str(folder)).dims == (384, 64)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(f"{text} ")
    with pytest.raises(ValueError, match=r"config\.json: its bytes were altered .*Tune the model again"):
        model.describe(str(folder))


SECRETS = {
    "a password in an address": "https://me:hunter2@host/model",
    "a key as a user": "s3://AKIAABCDEFGHIJKLMNOP:abc@bucket/x",
    "a signed address": "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=hunter2&X-Amz-Date=1",
    "a hub token": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "a hub token in a name": "owner/hf_abcdefghijklmnopqrstuvwxyz0123",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_setting_that_holds_a_secret_is_refused_without_repeating_it(secret: str):
    class Settings(config.JobSettings):
        """Does a job."""

        model: str = config.Field("", description="A model.")
        section: dict[str, object] = config.Field({}, description="More.")

    for values in ({"model": secret}, {"section": {"model": [secret]}}):
        with pytest.raises(ValueError, match="holds a key, a password or a signed address") as refused:
            Settings.from_values(values, "job")
        assert not any(part in str(refused.value) for part in ("hunter2", "AKIA", "hf_"))
    with pytest.raises(ValueError, match="no option '--token=") as refused:
        Settings.from_command_line([f"--token={secret}"], "job")
    assert secret not in str(refused.value)
    assert not any(part in without_secrets(f"GET {secret} failed") for part in ("hunter2", "AKIA", "hf_"))


@pytest.mark.parametrize(
    "text", ["runs/a@b", "me@example.org", "s3://bucket/a=b/part", "what is http://x.org/?", "hf_model", "a?b=c", "file:///x"]
)
def test_what_holds_no_secret_is_left_alone(text: str):
    assert without_secrets(text) == text


def test_shapes_say_where_what_does_not_fit():
    shape = {"a": int, "b?": shapes.MapOf(float), "c?": (str, int | None), "d?": frozenset({"x", "y"})}
    assert shapes.find_fault({"a": 1, "b": {"x": 1}, "c": ["x", None], "d": "x", "e": 0}, shape) == ""
    assert shapes.find_fault({}, shape) == "a is missing"
    assert shapes.find_fault({"a": True}, shape) == "a is not a whole number (found True)"
    assert shapes.find_fault({"a": 2**70}, shape).startswith("a is not a whole number (found 1180")
    assert shapes.find_fault({"a": 1, "b": {"x": float("nan")}}, shape) == "b.x is not a number (found nan)"
    assert shapes.find_fault({"a": 1, "c": ["x"]}, shape) == "c has 1 parts, not 2"
    assert shapes.find_fault({"a": 1, "c": ["\ud800", 1]}, shape) == r"c.0 is not text (found '\ud800')"
    assert shapes.find_fault({"a": 1, "d": "z"}, shape) == "d is not one of x, y (found 'z')"
    assert shapes.find_fault([], shape) == "it is not a mapping (found list)"

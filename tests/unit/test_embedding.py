from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from matryoshka import artifacts, corpus, embedding, vectors
from matryoshka.calibration import Choice
from matryoshka.corpus import Columns, Corpus
from matryoshka.encode import Encoder
from matryoshka.model import ModelInfo
from matryoshka.units import plan_units

TEXTS = ["first text", None, "a violet", "  ", "third text", "fourth, a longer text"]


@pytest.fixture
def source(tmp_path: Path) -> Corpus:
    path = tmp_path / "corpus" / "c.parquet"
    path.parent.mkdir()
    corpus.write_rows(path, {"id": [f"d{number}" for number in range(len(TEXTS))], "text": TEXTS})
    return corpus.inspect(str(path.parent), Columns())


@pytest.fixture
def broken_encoder(minilm_copy: Callable[..., Path]) -> Encoder:
    """A model that gives no finite vector for any text with the word violet."""
    folder = minilm_copy()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    tensors["embeddings.word_embeddings.weight"][8766] = np.nan  # violet, in the vocabulary of BERT
    save_file(tensors, path, metadata={"format": "pt"})
    return Encoder(folder, "cpu", "float32")


def test_a_unit_is_embedded_without_the_rows_that_have_no_text(tmp_path: Path, source: Corpus, encoder: Encoder):
    (unit,) = plan_units(source.files, 10)
    receipt = embedding.embed_unit(encoder, source, unit, tmp_path / "out")
    ids, block = vectors.read_unit(tmp_path / "out" / receipt.files[0].path)
    assert ids.to_pylist() == ["d0", "d2", "d4", "d5"]
    np.testing.assert_array_equal(block, encoder.encode([TEXTS[row] for row in (0, 2, 4, 5)], "document").vectors)
    assert (receipt.key, receipt.num_rows, receipt.details["num_empty"], receipt.details["slot"]) == (
        unit.key,
        4,
        2,
        "c.parquet:0",
    )
    assert 0 < receipt.details["num_tokens"] <= receipt.details["num_padded_tokens"]
    manifest = artifacts.Manifest("embeddings", {}, receipts=(receipt,), is_complete=True)
    assert artifacts.find_faults(tmp_path / "out", manifest) == []


def test_a_unit_done_again_has_the_same_receipt_but_for_its_times(tmp_path: Path, source: Corpus, encoder: Encoder):
    (unit,) = plan_units(source.files, 10)
    first, again = (embedding.embed_unit(encoder, source, unit, tmp_path / name) for name in ("one", "two"))
    assert (first.key, first.num_rows, first.files) == (again.key, again.num_rows, again.files)


def test_a_unit_whose_rows_all_lack_text_is_finished_and_empty(tmp_path: Path, source: Corpus, encoder: Encoder):
    unit = plan_units(source.files, 1)[1]
    receipt = embedding.embed_unit(encoder, source, unit, tmp_path / "out")
    ids, block = vectors.read_unit(tmp_path / "out" / receipt.files[0].path)
    assert (len(ids), block.shape, receipt.num_rows, receipt.details["num_empty"]) == (0, (0, 384), 0, 1)


def test_documents_without_a_finite_vector_are_named_and_nothing_is_written(
    tmp_path: Path, source: Corpus, broken_encoder: Encoder
):
    whole, *_ = plan_units(source.files, 10)
    with pytest.raises(
        ValueError, match=r"^the model gave vectors that are not finite or have no length \(1 documents: 'd2'\)\.$"
    ):
        embedding.embed_unit(broken_encoder, source, whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    harmless = plan_units(source.files, 2)[2]
    assert embedding.embed_unit(broken_encoder, source, harmless, tmp_path / "out").num_rows == 2


def test_a_corpus_that_changed_after_the_plan_is_refused(tmp_path: Path, source: Corpus, encoder: Encoder):
    (unit,) = plan_units(source.files, 10)
    corpus.write_rows(source.path_of("c.parquet"), {"id": ["d0"], "text": ["other"]})
    with pytest.raises(ValueError, match=r"c\.parquet: changed since this run began\. Run the same command again"):
        embedding.embed_unit(encoder, source, unit, tmp_path / "out")


def test_the_manifest_carries_what_later_stages_need(source: Corpus, minilm: ModelInfo):
    identity = embedding.make_identity(minilm, Columns(), Choice("float32", 4096), 10)
    manifest = embedding.make_manifest(source, minilm, identity, {"job": "embed"})
    assert manifest.inputs == {"corpus": source.fingerprint}
    assert (manifest.facts["width"], manifest.facts["dims"]) == (384, [384, 256, 128, 64, 32])
    assert not manifest.facts["is_tuned"]
    assert corpus.recall(manifest.facts["corpus"]) == source
    assert not manifest.is_complete


@pytest.mark.parametrize(
    "other",
    [
        (Columns("other", "text"), Choice("float32", 4096), 10),
        (Columns("id", "other"), Choice("float32", 4096), 10),
        (Columns(), Choice("bf16", 4096), 10),
        (Columns(), Choice("float32", 99), 10),
        (Columns(), Choice("float32", 4096, is_compiled=True), 10),
        (Columns(), Choice("float32", 4096), 11),
        (Columns(), Choice("float32", 4096), 10, "mean"),
    ],
)
def test_whatever_changes_bytes_ids_or_units_is_part_of_the_identity(minilm: ModelInfo, other: tuple[Any, ...]):
    assert embedding.make_identity(minilm, *other) != embedding.make_identity(minilm, Columns(), Choice("float32", 4096), 10)


def test_a_summary_adds_up_what_the_units_cost():
    details = {
        "num_tokens": 90, "num_padded_tokens": 100, "num_truncated": 1, "num_cut_tokens": 7, "num_split": 0, "num_flops": 50.0,
        "tokens_per_step": 64, "compute_seconds": 3.0, "read_seconds": 0.5, "write_seconds": 0.25, "idle_seconds": 0.25,
    }  # fmt: skip
    receipts = [artifacts.Receipt(key, 10, (), details) for key in "ab"]
    summary = embedding.summarise(receipts, num_workers=2, seconds=5.0, flops_per_second=100.0)
    assert (summary["num_documents"], summary["num_tokens"], summary["num_cut_tokens"]) == (20, 180, 14)
    assert (summary["documents_per_second"], summary["tokens_per_second"]) == (4.0, 36.0)
    assert (summary["compute_share"], summary["wait_for_tokens_share"]) == (0.6, 0.1)
    assert (summary["wait_for_writer_share"], summary["wait_for_work_share"]) == (0.05, 0.25)
    assert summary["padding_share"] == 0.1
    assert summary["matrix_rate_share"] == pytest.approx(100 / 6 / 100, abs=1e-4)
    assert embedding.summarise(receipts, 2, 5.0, None)["matrix_rate_share"] is None


def test_the_budget_that_fitted_last_is_where_a_resumed_run_starts():
    receipts = [artifacts.Receipt(str(budget), 1, (), {"tokens_per_step": budget}) for budget in (512, 256, 512)]
    assert embedding.tokens_per_step_that_fit(receipts, 512) == 256
    assert embedding.tokens_per_step_that_fit([], 512) == 512

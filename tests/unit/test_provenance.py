import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.artifacts import Manifest, Receipt
from matryoshka.model import TRAINING_LOG
from matryoshka.provenance import Embedding, Evaluation, Training

ENTRIES = [
    {"step": 0, "dev_nDCG@10_64": 0.5, "dev_nDCG@10_16": 0.3, "dev_nDCG@10": 0.4},
    {"step": 4, "loss": 1.5, "learning_rate": 1e-4, "grad_norm": 2.0},
    {"step": 8, "loss": 1.0, "learning_rate": 0.0, "grad_norm": 1.0},
]


def write_model(folder: Path, stopped_at: int | None) -> Path:
    folder.mkdir()
    summary = {"kept_step": 8, "stopped_at": stopped_at, "num_ranks": 2}
    record: dict[str, Any] = {"summary": summary, "recipe": {"num_steps": 10, "batch_size": 16}, "entries": ENTRIES}
    (folder / TRAINING_LOG).write_text(json.dumps(record))
    Manifest("model", {"dims": [64, 16]}, facts={"train_seconds": 12.5}, is_complete=True).write(folder)
    return folder


@pytest.mark.parametrize(("stopped_at", "num_steps"), [(None, 10), (8, 8)])
def test_the_log_of_a_run_gives_its_curves_and_evaluations(tmp_path: Path, stopped_at: int | None, num_steps: int):
    found = Training.read(write_model(tmp_path / "model", stopped_at))
    assert found.curves == tuple(ENTRIES[1:])
    assert found.evaluations == (
        Evaluation(0, "nDCG@10", 64, 0.5), Evaluation(0, "nDCG@10", 16, 0.3), Evaluation(0, "nDCG@10", None, 0.4),
    )  # fmt: skip
    assert (found.kept_step, found.num_steps, found.num_pairs, found.num_ranks) == (8, num_steps, 16 * num_steps, 2)
    assert found.seconds == 12.5


def test_a_model_that_nobody_tuned_here_has_no_training(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no model here \(no manifest\.json\)"):
        Training.read(tmp_path)


def test_where_the_time_of_embeddings_went_is_the_sum_over_their_units(tmp_path: Path):
    details = {"compute_seconds": 2.0, "read_seconds": 0.5, "write_seconds": 0.25, "idle_seconds": 1.0}
    counts = {"num_tokens": 90, "num_padded_tokens": 100}
    receipts = tuple(Receipt(f"unit {number}", 10, (), {**details, **counts}) for number in range(3))
    Manifest("embeddings", {}, receipts=receipts, is_complete=True).write(tmp_path)
    assert Embedding.read(tmp_path) == Embedding({"compute": 6, "read": 1.5, "write": 0.75, "idle": 3}, 30, 270, 0.1)
    Manifest("embeddings", {}, is_complete=True).write(tmp_path)
    assert Embedding.read(tmp_path).padding == 0

"""The loss, held against its definition in float64: every mask at once, every way to compute it, and the gradients."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from torch import Tensor

from matryoshka import losses, model
from matryoshka.examples import Examples
from matryoshka.forward import TrainingForward, features_of
from matryoshka.losses import MaskedScores
from matryoshka.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

# Pairs 0 and 1 ask the same in other letters, pair 2 has the document of pair 0; negatives are missing, known positives, copies.
PAIRS: dict[str, list[Any]] = {
    "query": ["bada bife", "Bada  bife", "geva noti", "pola", "viro zuna", "ba"],
    "positive": ["kalo", "geva", "kalo", "pola dana", "viro", "noti bada geva kalo pola viro zuna"],
    "negatives": [["viro", "geva"], ["neva"], [], None, ["kalo", "noti"], ["zuna", "Kalo "]],
}
LABELS = ["one", "one", "one", "two", "three", "two"]
DIMS = (64, 16, 5)
RECIPE = dataclasses.replace(small_runs.RECIPE, dims=DIMS, batch_size=6, num_negatives=2)


def open_pairs(folder: Path, tiny: str, columns: dict[str, list[Any]], num_negatives: int = 2) -> Examples:
    _, parts = small_runs.tokenise(folder, Path(tiny), columns, num_negatives=num_negatives)
    return Examples.open(parts, num_negatives)


def loss_of(network: Any, pairs: Examples, recipe: Recipe) -> Tensor:
    """Returns the project's loss of all pairs as one batch."""
    rows = np.arange(len(pairs))
    scores = MaskedScores()
    built = losses.build(network, recipe, scores, 1)
    scores.begin(torch.from_numpy(pairs.mask(rows, rows)))
    loss: Tensor = built([features_of(*column.take(rows)) for column in pairs.columns.values()], torch.empty(0))
    return loss


def documents_of(columns: dict[str, list[Any]], num_negatives: int) -> list[str]:
    lists = [own or [] for own in columns["negatives"]]
    negatives = [own[number] if number < len(own) else "" for number in range(num_negatives) for own in lists]
    return [*columns["positive"], *negatives]


def by_hand(queries: Tensor, documents: Tensor, mask: np.ndarray, dims: Sequence[int]) -> Tensor:
    """Cross-entropy of each query over the documents that count, cosines times 20, summed over dims.

    Source: Henderson et al. 2017, arXiv:1705.00652, equation 6; Kusupati et al. 2022, arXiv:2205.13147, equation 1.
    """
    total = torch.zeros((), dtype=torch.float64)
    for dim in dims:
        q, d = (part[:, :dim] / part[:, :dim].norm(dim=1, keepdim=True) for part in (queries, documents))
        for number in range(len(q)):
            own = 20 * q[number] @ d[number]
            others = [20 * q[number] @ d[place] for place in np.flatnonzero(~mask[number])]
            total = total + (torch.logsumexp(torch.stack(others), 0) - own) / len(q)
    return total


def loss_by_hand(network: Any, columns: dict[str, list[Any]], num_negatives: int = 2) -> Tensor:
    """Returns the loss of all pairs as one batch in float64, by sentence-transformers' own padded forward."""
    double = network.double()
    texts = [columns["query"], documents_of(columns, num_negatives)]
    queries, documents = (double(double.preprocess(list(part)))["sentence_embedding"] for part in texts)
    everything = list(range(len(columns["query"])))
    return by_hand(queries, documents, small_runs.masked_by_hand(columns, everything, everything, num_negatives), DIMS)


def gradient(network: Any, loss: Tensor) -> Tensor:
    """Returns all gradients end to end, in float64."""
    network.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([own.grad.double().ravel() for own in network.parameters() if own.grad is not None])


@pytest.mark.parametrize("mini_batch_tokens", [None, 12, 10_000])
@pytest.mark.parametrize("is_labelled", [False, True])
def test_the_loss_and_its_gradients_are_what_the_definition_gives_with_every_mask_at_once(
    is_labelled: bool, mini_batch_tokens: int | None, tmp_path: Path, tiny: str
):
    columns = {**PAIRS, "label": LABELS} if is_labelled else PAIRS
    reference = model.load(Path(tiny), "cpu", dropout=0.0).train()
    wanted = loss_by_hand(reference, columns)
    exact = gradient(reference, wanted)
    network = model.load(Path(tiny), "cpu", dropout=0.0).train()
    assert TrainingForward(network, "float32").notice == ""
    pairs = open_pairs(tmp_path, tiny, columns)
    loss = loss_of(network, pairs, dataclasses.replace(RECIPE, mini_batch_tokens=mini_batch_tokens))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = gradient(network, loss)
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_the_masks_change_the_loss(tiny: str):
    network = model.load(Path(tiny), "cpu", dropout=0.0).train()
    labelled, plain = (loss_by_hand(network, columns).item() for columns in ({**PAIRS, "label": LABELS}, PAIRS))
    alone = loss_by_hand(network, {**PAIRS, "negatives": [None] * 6}).item()
    assert len({round(value, 3) for value in (labelled, plain, alone)}) == 3


def test_what_is_masked_has_no_influence_on_the_gradient(tmp_path: Path, tiny: str):
    # The known positives among the negatives are other texts here; the loss is the same.
    network = model.load(Path(tiny), "cpu", dropout=0.0).train()
    TrainingForward(network, "float32")
    pairs = open_pairs(tmp_path / "whole", tiny, PAIRS)
    mask = pairs.mask(np.arange(6), np.arange(6))
    (vectors, others) = (torch.randn(18, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    vectors.requires_grad_()
    scores = MaskedScores()
    scores.begin(torch.from_numpy(mask))
    found = scores(others[:6], vectors)
    assert (found.isinf() == torch.from_numpy(mask)).all()
    found[~found.isinf()].sum().backward()
    never = torch.from_numpy(mask.all(axis=0))
    assert never.any()
    assert (vectors.grad[never] == 0).all()


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_caching_may_look_at_some_queries_at_a_time(
    rows_at_once: int, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
):
    pairs = open_pairs(tmp_path, tiny, PAIRS)
    found = []
    for scores_at_once in (losses._SCORES_AT_ONCE, 18 * rows_at_once):
        monkeypatch.setattr(losses, "_SCORES_AT_ONCE", scores_at_once)
        network = model.load(Path(tiny), "cpu", dropout=0.0).train()
        TrainingForward(network, "float32")
        loss = loss_of(network, pairs, dataclasses.replace(RECIPE, mini_batch_tokens=20))
        found.append((loss.item(), gradient(network, loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


def test_gradient_caching_repeats_the_dropout_of_its_first_pass(tmp_path: Path, tiny: str):
    # With the budget of the whole batch, both ways draw the same numbers in the same order, and so must end alike.
    pairs = open_pairs(tmp_path, tiny, PAIRS)
    found = []
    for mini_batch_tokens in (None, 10_000):
        network = model.load(Path(tiny), "cpu", dropout=0.3).train()
        TrainingForward(network, "float32")
        torch.manual_seed(4)
        loss = loss_of(network, pairs, dataclasses.replace(RECIPE, mini_batch_tokens=mini_batch_tokens))
        found.append((loss.item(), gradient(network, loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


def test_scores_are_taken_in_float32_under_autocast():
    scores = MaskedScores()
    scores.begin(torch.zeros((1, 1), dtype=torch.bool))
    vector = torch.full((1, 3), 0.3331)
    with torch.autocast("cpu", torch.bfloat16):
        assert scores(vector, vector).item() == pytest.approx(3 * 0.3331**2, rel=1e-6)


def test_the_first_loss_of_a_run_is_what_its_definition_gives(tmp_path: Path, tiny: str):
    job = small_runs.make_job(tmp_path, tiny, PAIRS, dataclasses.replace(RECIPE, num_steps=1))
    (entry,) = small_runs.train(job).entries
    assert entry["loss"] == pytest.approx(loss_by_hand(model.load(Path(tiny), "cpu"), PAIRS).item(), rel=1e-5)
    assert model.TRAINING_LOG in {path.name for path in job.target.iterdir()}

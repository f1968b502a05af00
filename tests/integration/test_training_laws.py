"""Two ranks do what one process does: the same weights, from the same batches, whatever must not be a negative."""

import dataclasses
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import small_runs
import texts

from matryoshka.training import Job

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = dataclasses.replace(small_runs.RECIPE, dims=(64, 32, 8), num_steps=5, batch_size=16, learning_rate=1e-4)
LONG = dataclasses.replace(
    small_runs.RECIPE, num_steps=9, batch_size=8, dropout=0.1, evaluations=4, patience=4, checkpoint_steps=2, learning_rate=3e-3
)
KILLED_AT = 5  # in the second epoch of three, after the checkpoint of step 4
TOLERANCE = 1e-5


def tangled(num_pairs: int) -> dict[str, list[Any]]:
    """Pairs of very different lengths, with queries and documents that stand more than once, and negatives with gaps."""
    made = texts.pairs(num_pairs)
    queries, positives = made["query"], made["positive"]
    for number in range(0, num_pairs, 4):
        queries[number] = queries[0].upper() if number % 8 else queries[0]  # one query with many answers
    for number in range(1, num_pairs, 6):
        positives[number] = positives[1]  # one document that answers many queries
    for number in range(2, num_pairs, 5):
        positives[number] += " " + " ".join(texts.WORDS[number : number + 40])
    negatives = [None if number % 3 == 0 else [positives[number - 1], positives[0]][: number % 3] for number in range(num_pairs)]
    return {"query": queries, "positive": positives, "negatives": negatives}


def make_jobs(root: Path, base: str) -> dict[str, Job]:
    recipes = {
        "plain": RECIPE,
        "negatives": dataclasses.replace(RECIPE, num_negatives=2),
        "cached": dataclasses.replace(RECIPE, num_negatives=2, mini_batch_tokens=40),
    }
    return {name: small_runs.make_job(root / name, base, tangled(40), recipe) for name, recipe in recipes.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, Job]:
    """What one process trained."""
    jobs = make_jobs(tmp_path_factory.mktemp("alone"), tiny)
    for job in jobs.values():
        small_runs.train(job)
    return jobs


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> tuple[dict[str, Job], ranks.Found]:
    """What two ranks trained, and what each of them said; starting them takes longer than all their steps."""
    root = tmp_path_factory.mktemp("together")
    jobs = make_jobs(root, tiny)
    jobs["labelled"] = small_runs.make_job(root / "labelled", tiny, labelled(), dataclasses.replace(RECIPE, batch_size=4))
    jobs["whole"] = small_runs.make_job(root / "whole", tiny, recipe=LONG, dev=small_runs.dev_set(9, 30))
    jobs["killed"] = jobs["resumed"] = small_runs.again(jobs["whole"], "killed")
    one_query = dataclasses.replace(RECIPE, num_steps=1, evaluations=1)
    jobs["one query"] = small_runs.make_job(
        root / "one", tiny, tangled(16), one_query, dev=small_runs.dev_set(1, 3, is_chunked=True)
    )
    jobs["diverged"] = small_runs.again(jobs["plain"], "diverged", learning_rate=1e30)
    return jobs, ranks.train_two(jobs, {"killed": KILLED_AT})


def labelled() -> dict[str, list[Any]]:
    return {**texts.pairs(24), "label": [f"label {number % 6}" for number in range(24)]}


@pytest.mark.parametrize("name", ["plain", "negatives", "cached"])
def test_two_ranks_end_with_the_weights_of_one_process_on_the_same_batches(name: str, alone: Any, together: Any, tiny: str):
    jobs, _ = together
    before, one, two = (small_runs.weights(Path(folder)) for folder in (tiny, alone[name].target, jobs[name].target))
    # The gradient of a key's bias is zero but for rounding, and Adam makes full steps of it; no vector depends on it.
    keys = [key for key in one if not key.endswith("key.bias")]
    one, two, before = ({key: values[key] for key in keys} for values in (one, two, before))
    assert small_runs.furthest(before, one) > 20 * TOLERANCE, "training moved hardly more than the tolerance allows"
    assert small_runs.furthest(one, two) < TOLERANCE
    losses = [[entry["loss"] for entry in small_runs.log(job)["entries"]] for job in (alone[name], jobs[name])]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "negatives", "cached", "labelled"])
def test_replicas_stay_bit_for_bit_the_same(name: str, together: Any):
    _, found = together
    first, second = found[name]
    assert (first["error"], second["error"]) == (None, None)
    assert first["digest"] == second["digest"]


def test_gradient_caching_changes_nothing_but_memory(alone: Any):
    whole, cached = (small_runs.weights(alone[name].target) for name in ("negatives", "cached"))
    keys = [key for key in whole if not key.endswith("key.bias")]
    assert small_runs.furthest({key: whole[key] for key in keys}, {key: cached[key] for key in keys}) < TOLERANCE


def test_two_ranks_that_were_killed_end_as_the_undisturbed_two_do(together: Any):
    jobs, found = together
    assert small_runs.log(jobs["whole"])["summary"]["steps_per_epoch"] == 3
    assert [rank["error"] for rank in found["killed"]] == ["KilledError: "] * 2
    assert [rank["error"] for rank in found["resumed"]] == [None] * 2
    assert small_runs.are_same(*(small_runs.weights(jobs[name].target) for name in ("whole", "resumed")))
    assert small_runs.log(jobs["whole"]) == small_runs.log(jobs["resumed"])


def test_two_ranks_measure_what_one_process_measures_even_if_one_of_them_has_no_query(together: Any, tiny: str):
    jobs, _ = together
    for name in ("whole", "one query"):
        job = jobs[name]
        assert job.dev is not None
        first = small_runs.log(job)["entries"][0]
        wanted = small_runs.figures_by_hand(tiny, job.dev, job.recipe.dims)
        assert first == {"step": 0, **{key: pytest.approx(value, abs=1e-9) for key, value in wanted.items()}}


def test_a_loss_that_is_not_finite_ends_all_ranks_at_the_same_step_and_writes_no_model(together: Any):
    jobs, found = together
    first, second = (rank["error"] for rank in found["diverged"])
    assert first.startswith("TrainingError: finetune: the loss of step 2 is not finite (nan). Its pairs (query/document): q")
    assert first == second
    assert not [path for path in jobs["diverged"].target.rglob("*") if path.is_file()]


def test_a_process_that_was_really_killed_leaves_what_the_next_one_goes_on_from(tmp_path: Path, tiny: str):
    whole = small_runs.make_job(tmp_path / "whole", tiny, recipe=LONG, dev=small_runs.dev_set(9, 30))
    small_runs.train(whole)
    killed = small_runs.again(whole, "killed")
    process = multiprocessing.get_context("spawn").Process(target=ranks.train_until_killed, args=(killed, KILLED_AT))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not killed.target.exists() or not [path for path in killed.target.rglob("*") if path.is_file()]
    watch = small_runs.train(killed)
    assert watch.entries[0]["step"] == KILLED_AT
    assert small_runs.are_same(*(small_runs.weights(job.target) for job in (whole, killed)))
    assert small_runs.log(whole) == small_runs.log(killed)

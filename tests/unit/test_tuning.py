import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from matryoshka import artifacts, indexing, metrics, tuning
from matryoshka.answers import JUDGED, UNJUDGED, Answers
from matryoshka.artifacts import Journal
from matryoshka.index import CoarseIndex, Dial
from matryoshka.indexing import IndexStore, Layout
from matryoshka.nested import FunnelPlan
from matryoshka.spaces import Kind
from matryoshka.tuning import Trial, Tuner
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]
Build = Callable[..., IndexStore]

WIDTH, NUM_DOCUMENTS, NUM_QUERIES = 16, 240, 70
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def build(make_store: MakeStore, make_index: Build, random_vectors: Make) -> Build:
    """Builds an index of two shards; a third of its documents stand twice, so that there are ties, and two are gone."""

    def made(factory: str, space: Kind = "prefix", dim: int = 4, name: str = "index") -> IndexStore:
        pool = random_vectors(NUM_DOCUMENTS, WIDTH)
        full = np.concatenate([pool[:160], pool[:80]])
        parts = {f"{n}:0": ([f"d{n}-{row}" for row in range(60)], full[60 * n : 60 * n + 60]) for n in range(4)}
        store = make_store(parts, f"{name}-embeddings")
        plan = [f"{dim}:20", f"{WIDTH}:10"] if dim < WIDTH else [f"{WIDTH}:10"]
        layout = Layout(space, dim, factory)
        built = make_index(store, name=name, layout=layout, plan=plan, removed=("d3-7", "d0-30"))
        facts = {**built.manifest.facts, "dims": [WIDTH, 8, 4]}
        dataclasses.replace(built.manifest, facts=facts).write(built.folder)
        return IndexStore.open(built.folder)

    return made


@pytest.fixture
def queries(random_vectors: Make) -> np.ndarray:
    """Each is near a document: [Q, D]."""
    return random_vectors(NUM_DOCUMENTS, WIDTH)[:NUM_QUERIES] + 0.1 * random_vectors(NUM_QUERIES, WIDTH, 1)


NAMES = [f"q{number}" for number in range(NUM_QUERIES)]
IS_CHOOSING = np.arange(NUM_QUERIES) % 2 == 0


def judgements() -> dict[str, dict[str, int]]:
    """The document that a query is near, its twin, another one, one that is not in the index, and one that is wrong."""
    return {
        name: {f"d{n // 60}-{n % 60}": 2, f"d{(n + 160) // 60}-{(n + 160) % 60}": 1, "d1-1": 1, "nowhere": 1, "d0-0": 0}
        for n, name in enumerate(NAMES)
    }


def answers_of(index: IndexStore, queries: np.ndarray, measure: str, num_results: int = 10) -> Answers:
    if measure == JUDGED:
        return Answers.judged(index, queries, NAMES, judgements(), num_results)
    return Answers.unjudged(index.searcher(index.plan_for("exact")), queries, num_results)


def trials_of(index: IndexStore, answers: Answers) -> Iterator[Trial]:
    """Returns all plans, whatever they cost and are worth."""
    tuner = Tuner(index, answers, IS_CHOOSING, tuning.open_shards(index))
    return tuner.trials(least=0.0, enough=math.inf, slack=math.inf)


KINDS: list[tuple[str, Kind]] = [
    ("Flat", "prefix"), ("none", "prefix"), ("dense", "rotation"), ("IVF8,Flat", "prefix"), ("IVF8,PQ4x4fs", "rotation"),
    ("PQ4x4fs", "prefix"),    ("SQ8", "rotation"), ("HNSW8", "prefix"), ("PCA4,IVF4,SQ8", "prefix"),
]  # fmt: skip


@pytest.mark.parametrize("measure", [JUDGED, UNJUDGED])
@pytest.mark.parametrize(("factory", "space"), KINDS)
def test_what_one_wide_shortlist_says_of_a_plan_is_what_searching_with_it_gives(
    build: Build, queries: np.ndarray, factory: str, space: Kind, measure: str
):
    index = build(factory, space)
    answers, chosen = answers_of(index, queries, measure), np.flatnonzero(IS_CHOOSING)
    trials = list(trials_of(index, answers))
    plans = [trial.plan for trial in trials]
    assert len(set(plans)) == len(plans) > 30
    assert any(len(plan.steps) == 3 for plan in plans)
    for trial in trials[:: max(len(trials) // 20, 1)]:
        found = index.searcher(trial.plan).search(answers.queries[chosen], 10).documents
        real = answers.worth(chosen, answers.gains_of(chosen, found))
        np.testing.assert_allclose(trial.worth, real, atol=1e-12, err_msg=trial.plan.describe())


def test_every_setting_of_the_coarse_index_and_every_other_prefix_is_tried(build: Build, queries: np.ndarray):
    def starts(index: IndexStore) -> set[str]:
        found = trials_of(index, answers_of(index, queries, UNJUDGED))
        return {":".join([str(trial.plan.shortlist.dim), *map(str, dict(trial.plan.shortlist.parameters).values())])
                for trial in found}  # fmt: skip

    assert starts(build("IVF8,Flat")) == {*(f"4:{nprobe}" for nprobe in (1, 2, 3, 4, 6, 8)), "8", "16"}
    assert starts(build("Flat", name="flat")) == {"4", "8", "16"}
    assert starts(build("none", name="none")) == {"4", "8", "16"}
    assert starts(build("IVF64,dense", name="lists")) == {"4:1", "4:2", "4:64", "8", "16"}
    assert "4:24" in starts(build("HNSW8", name="graph"))


def test_plans_that_lose_too_much_or_take_too_long_are_left_out(build: Build, queries: np.ndarray):
    index = build("Flat")
    answers = answers_of(index, queries, UNJUDGED)
    tuner = Tuner(index, answers, IS_CHOOSING, tuning.open_shards(index))
    good = list(tuner.trials(least=0.9, enough=math.inf, slack=math.inf))
    assert all(trial.worth.mean() >= 0.9 for trial in good)
    assert 1 < len(good) < len(list(trials_of(index, answers)))
    assert [trial.plan for trial in tuner.trials(least=0.0, enough=0.0, slack=0.0)] == [index.plan_for("exact")]


@pytest.mark.parametrize("measure", [JUDGED, UNJUDGED])
def test_worth_is_what_the_measures_say(build: Build, queries: np.ndarray, measure: str):
    index = build("Flat")
    answers, rows = answers_of(index, queries, measure), np.arange(NUM_QUERIES)
    found = index.searcher(FunnelPlan.parse(["4:20", "16:10"])).search(queries, 10)
    worth = answers.worth(rows, answers.gains_of(rows, found.documents))
    if measure == JUDGED:
        expected = metrics.measure(judgements(), NAMES, [[name for name in own if name] for own in found.ids.tolist()])
        assert worth.mean() == pytest.approx(expected["nDCG@10"], abs=1e-12)
    else:
        exact = index.searcher(index.plan_for("exact")).search(queries, 10).ids.tolist()
        expected_share = [len({*own} & {*best}) / 10 for own, best in zip(found.ids.tolist(), exact, strict=True)]
        np.testing.assert_allclose(worth, expected_share)


def test_exact_search_finds_all_of_its_own_documents(build: Build, queries: np.ndarray):
    index = build("none")
    *_, exact = trials_of(index, answers_of(index, queries, UNJUDGED))
    assert exact.plan == index.plan_for("exact")
    assert (exact.worth == 1).all()


@pytest.mark.parametrize("measure", [JUDGED, UNJUDGED])
def test_tuning_gives_a_frontier_a_plan_for_each_name_and_json(build: Build, queries: np.ndarray, measure: str):
    index, names = build("IVF8,Flat"), [f"q{number}" for number in range(NUM_QUERIES)]
    found = tuning.tune(index, answers_of(index, queries, measure), names, tuning.open_shards(index), floor=0.9, batch=32)
    speeds = [point.queries_per_second for point in found.points]
    assert speeds == sorted(speeds, reverse=True)
    assert set(found.choices) == {"fast", "balanced", "high"}
    for choice in found.choices.values():
        assert choice.point == found.exact or choice.point.chosen >= choice.floor <= choice.point.low
        index.check_plan(choice.point.plan)
    made: dict[str, Any] = found.as_json()
    assert made["num_choosing"] + made["num_confirming"] == NUM_QUERIES
    assert made["plans"]["balanced"]["plan"] == found.choices["balanced"].point.plan.parts


@pytest.mark.parametrize("wrong", [{}, {"d0-0": 0}])
def test_data_of_another_index_is_refused(build: Build, queries: np.ndarray, wrong: dict[str, int]):
    strangers = {name: {"elsewhere": 1, **wrong} for name in NAMES}
    with pytest.raises(ValueError, match=r"none of the 1 judged documents is in it\. Pass the data of this index\."):
        Answers.judged(build("Flat"), queries, NAMES, strangers, 10)


def test_judgements_of_documents_that_exact_search_never_finds_are_refused(build: Build, queries: np.ndarray):
    index = build("Flat")
    opposite = index.searcher(FunnelPlan.parse([f"16:{NUM_DOCUMENTS}"])).search(queries, NUM_DOCUMENTS).ids[:, -1]
    answers = Answers.judged(index, queries, NAMES, {name: {own: 1} for name, own in zip(NAMES, opposite, strict=True)}, 10)
    with pytest.raises(ValueError, match=r"exact search finds no judged document for any query\. Check that"):
        tuning.tune(index, answers, NAMES, tuning.open_shards(index), batch=32)


def test_an_index_that_cannot_be_searched_exactly_cannot_be_tuned(build: Build, queries: np.ndarray):
    index = build("HNSW8", dim=WIDTH)
    with pytest.raises(ValueError, match=r"cannot be searched exactly, every search at 16 dims goes through its HNSW8 index"):
        answers_of(index, queries, UNJUDGED)


def test_a_tuning_survives_being_kept_and_leaves_the_index_as_it_is(build: Build, queries: np.ndarray):
    index = build("IVF8,Flat")
    files = {path: path.read_bytes() for path in index.folder.rglob("*") if path.is_file() and path.name != artifacts.MANIFEST}
    found = tuning.tune(index, answers_of(index, queries, UNJUDGED), NAMES, tuning.open_shards(index), floor=0.9, batch=32)
    index.keep_tuning({"embeddings": "e", **found.as_json()})
    again = IndexStore.open(index.folder)
    assert again.manifest.fingerprint == index.manifest.fingerprint
    assert all(path.read_bytes() == content for path, content in files.items())
    assert again.plan == again.plan_for("balanced") == found.choices["balanced"].point.plan
    assert {again.plan_for(name) for name in ("fast", "high")} == {found.choices[name].point.plan for name in ("fast", "high")}
    assert again.plan_for("exact") == index.plan_for("exact") == FunnelPlan.parse(["16:10"])
    assert again.is_tuning_current
    assert not index.is_tuning_current


def test_a_tuning_is_handed_on_unless_another_plan_is_asked_for(build: Build):
    index = build("Flat")
    plans = {name: {"plan": ["16:10"]} for name in ("fast", "balanced", "high")}
    index.keep_tuning({"measure": "recall", "embeddings": "earlier", "frontier": [], "plans": plans})
    again = IndexStore.open(index.folder)
    assert not again.is_tuning_current
    assert indexing.tuning_of(again.manifest, FunnelPlan.parse(["4:20", "16:10"])) == {"tuned": again.tuned}
    assert indexing.tuning_of(again.manifest, FunnelPlan.parse(["4:21", "16:10"])) == {}
    assert indexing.tuning_of(None, index.plan) == indexing.tuning_of(index.manifest, index.plan) == {}


def test_tuning_leaves_what_an_unfinished_update_has_recorded(build: Build):
    index = build("Flat")
    journal = Journal(index.folder)
    journal.add(indexing.note_update(dataclasses.replace(index.manifest, inputs={"embeddings": "of the next night"})))
    journal.flush()
    index.keep_tuning({"measure": "recall"})
    assert indexing.has_update(index.folder, artifacts.read(index.folder))


def test_a_tuning_of_an_index_that_was_built_anew_meanwhile_is_not_kept(build: Build):
    index = build("Flat")
    dataclasses.replace(index.manifest, inputs={"embeddings": "later"}).write(index.folder)
    with pytest.raises(RuntimeError, match=r"was built anew while it was tuned\. Run python -m jobs\.tune again"):
        index.keep_tuning({})


@pytest.mark.parametrize("quality", ["fast", "balanced", "high"])
def test_an_index_that_was_not_tuned_has_no_plan_by_name(build: Build, quality: Any):
    with pytest.raises(ValueError, match=rf"not tuned, so it has no plan named '{quality}'\. Run python -m jobs\.tune --index"):
        build("Flat").plan_for(quality)


@pytest.mark.parametrize(
    ("factory", "dial"),
    [
        ("Flat", None),
        ("PQ4x4fs", None),
        ("IVF5,SQ8", Dial("nprobe", (1, 2, 3, 4, 5))),
        ("PCA4,IVF2,Flat", Dial("nprobe", (1, 2))),
        ("IVF1,Flat,RFlat", Dial("nprobe", (1,))),
    ],
)
def test_a_coarse_index_says_what_can_be_tuned(random_vectors: Make, factory: str, dial: Dial | None):
    assert CoarseIndex.train(random_vectors(300, 8).astype(np.float32), factory).dial == dial


def test_a_graph_is_tuned_by_how_far_it_is_searched():
    dial = CoarseIndex.train(np.empty((0, 8), np.float32), "HNSW8").dial
    assert dial
    assert (dial.name, dial.is_reach, dial.values[:4], dial.values[-1]) == ("efSearch", True, (16, 24, 32, 48), 2048)

"""The benchmark of searching says what it measured: every point of every system, ratios that follow from them, a picture."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts

from jobs import benchmark, benchmark_search, benchmark_vectors, cluster, measurement
from jobs import index as index_job
from matryoshka import model, storage, synthetic, tradeoffs, vectors
from matryoshka.artifacts import Manifest
from matryoshka.indexing import IndexStore
from matryoshka.synthetic import Spectrum

_WIDTH, _DOCUMENTS, _QUERIES = 16, 300, 40
_PLAN = ("8:50", "16:10")


def _settings(root: Path, **more: Any) -> benchmark.Settings:
    own = {"output": str(root / "out" / "report.json"), "rounds": 1}
    return benchmark.Settings(work="search", **{**own, **more})


@pytest.fixture(scope="module", autouse=True)
def _few_settings() -> Any:
    """Keeps sweeps and queries few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_search, "_DIALS", (("IVF", "nprobe", (4, 64), (10, 200)),))
        patch.setattr(benchmark_search, "_SINGLE_QUERIES", 2)
        patch.setattr(benchmark_vectors, "MADE_QUERIES", _QUERIES)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, local_ray: cluster.Session) -> Path:  # noqa: ARG001 - the session must be there
    """A folder with an index of two shards that must be compared with all, its queries as vectors, and judgements."""
    root = tmp_path_factory.mktemp("benchmark-search")
    store, queries = synthetic.make_store(root / "embeddings", Spectrum(_DOCUMENTS, _WIDTH), _QUERIES)
    folders = {"embeddings": str(store.folder), "output": str(root / "index")}
    index_job.run(index_job.Settings(**folders, shards=2, plan=_PLAN, coarse_index="Flat"))
    (root / "queries").mkdir()
    vectors.write_unit(root / "queries" / "q.parquet", [f"q{number}" for number in range(_QUERIES)], queries.astype(np.float16))
    asked = np.linspace(0, _DOCUMENTS - 1, _QUERIES).astype(int)
    lines = [f"q{number}\t{document:09d}\t1" for number, document in enumerate(asked)]
    (root / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]), "utf-8")
    return root


def _of_index(root: Path, **more: Any) -> benchmark.Settings:
    own = {"index": str(root / "index"), "queries": str(root / "queries")}
    return _settings(root, **{**own, **more})


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    """What one round with all peers that are installed measured, on judged queries; and on the first documents alone."""
    own = {"qrels": str(root / "qrels.tsv"), "scale": (64,), "coarse_index": "none", "plan": _PLAN}
    return benchmark.run(_of_index(root, **own))


@pytest.fixture(scope="module")
def made(root: Path) -> dict[str, Any]:
    """What one round on made-up vectors measured, with some of them in one shard and in two."""
    own = {"synthetic": f"{_DOCUMENTS}:{_WIDTH}", "peers": ("hnsw16",), "scale": (128,), "shards": (1, 2), "plan": _PLAN}
    own |= {"coarse_index": "IVF8,PQ4x4fs", "space": "prefix"}
    return benchmark.run(_settings(root, **own, output=str(root / "made" / "report.json")))


def test_the_report_and_its_pictures_are_on_disk_and_nothing_else(root: Path, report: dict[str, Any]):
    assert json.loads((root / "out" / "report.json").read_text("utf-8")) == json.loads(json.dumps(report))
    assert sorted(path.name for path in (root / "out").iterdir()) == sorted(["report.json", *report["plots"]])
    assert report["plots"] == ["report.svg", "report.png"]


def test_every_point_of_every_system_has_its_figures(report: dict[str, Any]):
    assert list(report["systems"])[:7] == ["ours", "ours_exact", "exact", "hnsw16", "hnsw32", "ivf_flat", "ivf_pq_refine"]
    for system in report["systems"].values():
        assert system["build_seconds"] >= 0
        assert 0 < system["memory_bytes_per_document"] <= system["disk_bytes_per_document"]
        for point in system["points"]:
            assert len(point["seconds"]) == 1
            assert point["queries_per_second"] == pytest.approx(_QUERIES / point["seconds"][0])
            assert point["milliseconds"] > 0
            assert 0 <= point["recall"] <= 1
            assert 0 <= point["ndcg"] <= 1


def test_exact_systems_agree_and_thorough_ones_come_close(report: dict[str, Any]):
    systems = report["systems"]
    (exact,), (scan,) = systems["exact"]["points"], systems["ours_exact"]["points"]
    assert exact["recall"] == scan["recall"] == 1
    assert exact["ndcg"] == pytest.approx(scan["ndcg"])
    assert exact["ndcg"] > 0.9  # a query lies near its document
    for system in systems.values():
        assert max(point["recall"] for point in system["points"]) > 0.99
    assert systems["exact"]["memory_bytes_per_document"] == pytest.approx(4 * _WIDTH, abs=1)


def test_ratios_follow_from_the_points(report: dict[str, Any]):
    points = benchmark_search.points_of({name: system["points"] for name, system in report["systems"].items()})
    seconds = {name: system["build_seconds"] for name, system in report["systems"].items()}
    assert report["ratios"] == tradeoffs.compare(points, seconds)[0]
    wanted = {"exact@0.99", "hnsw@0.985", "hnsw@0.99", "ivf_flat@0.95", "ivf_pq_refine@0.95", "hnsw_build", "exact@ndcg0.995"}
    assert wanted <= report["ratios"].keys()


def test_the_report_says_what_it_rests_on(report: dict[str, Any]):
    own = {"space": "prefix", "dim": 8, "factory": "Flat", "storage": "float16"}
    assert report["index"] == {"num_documents": _DOCUMENTS, "width": _WIDTH, "num_shards": 2, **own}
    assert report["queries"] == {"num_queries": _QUERIES, "num_judged": _QUERIES}
    assert report["synthetic"] is None
    assert "--rounds 1: a median of fewer than 3 says little" in report["notes"]
    assert f"{_QUERIES} queries: fewer than 1024 are a small batch" in report["notes"]
    assert {"faiss-cpu", "torch"} <= report["versions"].keys()
    assert report["hardware"]["device"] == "cpu"


def test_made_up_vectors_state_their_spectrum_and_are_indexed_as_ever(made: dict[str, Any]):
    assert made["synthetic"] == {
        "num_documents": _DOCUMENTS,
        "width": _WIDTH,
        "exponent": 0.7,
        "num_clusters": 1_000,
        "cluster_share": 0.5,
        "noise_share": 0.3,
        "seed": 0,
    }
    assert made["index"]["factory"] == "IVF8,PQ4x4fs"
    assert made["systems"]["ours"]["points"][0]["setting"] == "8d keep 10 (nprobe 4) > 16d keep 10"
    assert list(made["systems"]) == ["ours", "ours_exact", "exact", "hnsw16"]
    assert made["not_run"]["ivf_flat"] == "left out by --peers"
    assert made["ratios"]["ivf_flat@0.95"] is None
    assert "ivf_flat@0.95: none, no ivf_flat was measured" in made["notes"]


def test_the_first_documents_of_an_index_are_indexed_anew(report: dict[str, Any]):
    (row,) = report["scale"]
    assert (row["num_documents"], row["num_shards"], row["coarse_index"]) == (64, 1, "none")
    assert row["recall"] == 1  # at most 800 of 64 are kept


def test_the_plans_that_tuning_found_are_measured_before_the_usual_ones(root: Path, tmp_path: Path):
    shutil.copytree(root / "index", tmp_path / "index")
    figures = {"queries_per_second": 1.0, "confirmed": 1.0, "low": 1.0, "high": 1.0}
    points = [{"plan": ["4:30", "16:10"], **figures}, {"plan": ["16:10"], **figures}]
    plans = dict.fromkeys(("fast", "balanced", "high"), points[0])
    IndexStore.open(tmp_path / "index").keep_tuning({"measure": "recall", "embeddings": "", "frontier": points, "plans": plans})
    found = benchmark.run(_of_index(root, index=str(tmp_path / "index"), peers=("exact",)))
    settings = [point["setting"] for point in found["systems"]["ours"]["points"]]
    assert settings[:2] == ["4d keep 30 > 16d keep 10", "8d keep 10 > 16d keep 10"]
    assert len(settings) == len(set(settings))
    assert [point["setting"] for point in found["systems"]["ours_exact"]["points"]] == ["16d keep 10"]


def test_the_scale_table_has_a_row_for_each_size_and_number_of_shards(made: dict[str, Any]):
    sizes = [(row["num_documents"], row["num_shards"]) for row in made["scale"]]
    assert sizes == [(128, 1), (128, 2)]
    for row in made["scale"]:
        assert 0.5 < row["recall"] <= 1
        assert row["queries_per_second"] > 0
        assert row["build_seconds"] > 0
        assert row["memory_bytes_per_document"] > 2 * _WIDTH


@pytest.fixture(scope="module")
def of_model(root: Path, tiny: str) -> Path:
    """An index that says that the tiny model made its vectors."""
    info = model.describe(tiny)
    store, _ = synthetic.make_store(root / "of-model", Spectrum(100, info.width), 1)
    identity = {**store.manifest.identity, "model": info.fingerprint}
    facts = {**store.manifest.facts, "model": tiny}
    dataclasses.replace(store.manifest, identity=identity, facts=facts).write(store.folder)
    folders = {"embeddings": str(store.folder), "output": str(root / "index-of-model")}
    index_job.run(index_job.Settings(**folders, shards=1, plan=("8:50", f"{info.width}:10"), coarse_index="none"))
    return root / "index-of-model"


def test_queries_of_a_beir_folder_are_encoded_by_the_model_of_the_index(of_model: Path, tmp_path: Path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"_id": "a", "text": "a word"}\n{"_id": "b", "text": "not judged"}\n', "utf-8")
    (tmp_path / "qrels" / "test.tsv").write_text("a\t000000003\t1\n", "utf-8")
    report = benchmark.run(_settings(tmp_path, index=str(of_model), beir=str(tmp_path), peers=("exact",)))
    assert report["queries"] == {"num_queries": 1, "num_judged": 1}
    assert report["systems"]["ours"]["points"][-1]["recall"] == 1


def test_queries_given_as_text_need_the_model_of_the_index(of_model: Path, tmp_path: Path, other: str):
    queries = texts.write_parquet(tmp_path / "queries.parquet", {"id": ["a", "b"], "text": ["a word", "another word"]})
    own = {"index": str(of_model), "queries": str(queries), "peers": ("exact",)}
    with pytest.raises(ValueError, match=r"is not the model that .* was made with\. Pass --model, or index again"):
        benchmark.run(_settings(tmp_path, **own, model=other))
    report = benchmark.run(_settings(tmp_path, **own))
    assert report["queries"] == {"num_queries": 2, "num_judged": 0}
    assert report["systems"]["exact"]["points"][0]["ndcg"] is None
    assert "exact@ndcg0.995" not in report["ratios"]


def test_queries_of_another_width_are_refused(root: Path, tmp_path: Path):
    vectors.write_unit(tmp_path / "q.parquet", ["q"], np.ones((1, 8), np.float16))
    with pytest.raises(ValueError, match=r"q\.parquet: rows of column 'embedding' do not have 16 numbers each"):
        benchmark.run(_of_index(root, queries=str(tmp_path)))


def test_judgements_of_other_queries_are_refused(root: Path, tmp_path: Path):
    (tmp_path / "qrels.tsv").write_text("other\t000000000\t1\n", "utf-8")
    with pytest.raises(ValueError, match=r"qrels\.tsv: judges none of the queries"):
        benchmark.run(_of_index(root, qrels=str(tmp_path / "qrels.tsv")))


def test_judgements_of_documents_that_are_not_there_are_refused(root: Path, tmp_path: Path):
    (tmp_path / "qrels.tsv").write_text("q0\tother\t1\n", "utf-8")
    with pytest.raises(ValueError, match=r"index: has none of the judged documents"):
        benchmark.run(_of_index(root, qrels=str(tmp_path / "qrels.tsv")))


def test_an_index_without_documents_is_refused(root: Path, tmp_path: Path):
    known = IndexStore.open(root / "index").manifest
    Manifest("index", known.identity, known.inputs, known.facts, (), is_complete=True).write(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty: has no documents\. Index some first"):
        benchmark.run(_of_index(root, index=str(tmp_path / "empty")))


def test_an_index_with_removed_documents_is_refused(root: Path, tmp_path: Path):
    shutil.copytree(root / "index", tmp_path / "index")
    removed = texts.write_parquet(tmp_path / "removed.parquet", {"id": ["000000007"]})
    folders = {"embeddings": str(root / "embeddings"), "output": str(tmp_path / "index")}
    index_job.run(index_job.Settings(**folders, shards=2, remove=str(removed)))
    with pytest.raises(ValueError, match=r"index: documents were removed since its shards were built\. Measure one built"):
        benchmark.run(_of_index(root, index=str(tmp_path / "index")))


def test_queries_that_are_none_are_refused(root: Path, tmp_path: Path):
    vectors.write_unit(tmp_path / "q.parquet", [], np.ones((0, _WIDTH), np.float16))
    with pytest.raises(ValueError, match=r": no queries\. Pass a file that has some"):
        benchmark.run(_of_index(root, queries=str(tmp_path)))


def test_an_output_within_the_index_is_refused(root: Path):
    with pytest.raises(ValueError, match="lie in each other"):
        benchmark.run(_of_index(root, output=str(root / "index" / "report.json")))


def test_an_output_that_is_a_folder_is_refused(root: Path):
    with pytest.raises(ValueError, match=r"queries: is a folder\. Pass a file"):
        benchmark.run(_of_index(root, output=str(root / "queries")))


def test_a_peer_that_is_unknown_is_refused(root: Path):
    with pytest.raises(ValueError, match=r"--peers annoy: no such peer\. Choose from exact, hnsw16"):
        benchmark.run(_of_index(root, peers=("annoy",)))


def test_a_larger_scale_than_there_are_documents_is_refused(root: Path):
    with pytest.raises(ValueError, match=r"--scale 301: there are 300 documents\. Pass at most as many"):
        benchmark.run(_of_index(root, scale=(100, 301)))


def test_systems_that_do_not_fit_into_memory_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurement, "free_bytes", lambda: 1_000)
    with pytest.raises(RuntimeError, match=r"the systems take about 0\.0 GB together, and 0\.0 GB are free\. Pass fewer --peers"):
        benchmark.run(_of_index(root))


def test_a_cluster_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match="RAY_ADDRESS is set"):
        benchmark.run(_of_index(root))


def test_nothing_is_left_behind_by_runs_that_were_refused(root: Path, report: dict[str, Any]):  # noqa: ARG001 - made the folder
    assert not list(root.rglob(f"{storage.TEMPORARY}*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --index FOLDER or --synthetic N:D"),
        (["--index", "i", "--synthetic", "9:8"], "give either --index FOLDER or --synthetic N:D"),
        (["--index", "i"], "--index needs its queries as --queries or --beir, one of them"),
        (["--index", "i", "--queries", "q", "--beir", "b"], "--index needs its queries as --queries or --beir, one of them"),
        (["--index", "i", "--beir", "b", "--qrels", "j"], "--qrels judges --queries"),
        (["--synthetic", "9:8", "--queries", "q"], "--queries: with --synthetic, queries are made as well"),
        (["--index", "i", "--queries", "q", "--coarse-index", "Flat"], "--coarse-index: an index that is there is measured"),
        (["--synthetic", "9:8", "--shards", "1,2"], "--shards: several numbers go with --scale"),
        (["--synthetic", "9:8", "--scale", "0"], "--shards, --scale: a number below 1"),
        (["--synthetic", "9:8", "--pairs", "p"], "--pairs: says nothing to benchmark search"),
        (["--synthetic", "9:8", "--device", "tpu"], "'device': input should be 'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        benchmark.Settings.from_command_line(["search", *arguments, "--output", "report.json"], "python -m jobs.benchmark")


def test_made_up_vectors_of_no_size_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="--synthetic many: is not documents:dims"):
        benchmark.run(_settings(tmp_path, synthetic="many"))

"""Every stage on a cluster of nodes that are killed, added and cut off: what comes out is what comes out undisturbed.

One cluster and one driver serve all of these tests. The last one takes the head away.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_runs
import texts
import yaml
from driver import Driver
from nodes import ROOT, Node, Nodes, wait_until

from matryoshka import artifacts, corpus, embedding
from matryoshka.corpus import Columns
from matryoshka.encode import Encoder
from matryoshka.indexing import IndexStore
from matryoshka.units import plan_units

_FILES, _ROWS, _UNIT_ROWS, _TOKENS = 6, 60, 6, 512
_NUM_NODES, _NUM_SHARDS, _NUM_QUERIES = 3, 18, 12
_RECIPE = {
    "batch_size": 16, "max_steps": 90, "epochs": 20, "learning_rate": 3e-3, "precision": "float32", "dims": "64,16",
    "evaluations": 0, "checkpoint_steps": 3, "attempts": 10, "workers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with Nodes() as nodes:
        nodes.add(*[1] * (_NUM_NODES - 1))
        yield nodes


@pytest.fixture
def three(cluster: Nodes) -> Nodes:
    """The cluster with three nodes, the head among them, whatever was done to it before."""
    cluster.add(*[1] * (_NUM_NODES - len(cluster.alive)))
    return cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk that all nodes mount."""
    root = tmp_path_factory.mktemp("shared")
    texts.write_corpus(root / "corpus", num_files=_FILES, rows_per_file=_ROWS)
    texts.write_parquet(root / "pairs.parquet", texts.pairs(240))
    return root


@pytest.fixture(scope="module")
def driver(cluster: Nodes, root: Path) -> Iterator[Driver]:
    driver = Driver(cluster, root / "driver.txt")
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def undisturbed(root: Path, tiny: str) -> Path:
    """What a single process without Ray makes of the corpus, unit by unit."""
    folder = root / "undisturbed"
    encoder = Encoder(Path(tiny), "cpu", "float32", _TOKENS)
    source = corpus.inspect(str(root / "corpus"), Columns("id", "text"))
    for unit in plan_units(source.files, _UNIT_ROWS):
        embedding.embed_unit(encoder, source, unit, folder)
    return folder


def _cut_off(cluster: Nodes, node: Node) -> None:
    """Cuts a node off, or kills it where that cannot be done."""
    if cluster.why_no_cuts:
        node.kill()
    else:
        cluster.cut_off(node)


def _reconnect(cluster: Nodes, driver: Driver, node: Node) -> None:
    """Brings back a node that was cut off, once it is given up for lost: it learns that, and ends."""
    if not cluster.why_no_cuts:
        wait_until(lambda: node.name not in driver.names())
        cluster.reconnect(node)
        node.wait_for_end()


def test_nodes_can_be_cut_off_here(cluster: Nodes) -> None:
    if cluster.why_no_cuts:
        pytest.skip(f"the tests kill nodes instead of cutting them off: {cluster.why_no_cuts}")


def test_nodes_have_the_dependencies_but_not_this_repository(cluster: Nodes) -> None:
    command = (
        "import importlib.util as own; print([bool(own.find_spec(name)) for name in ('torch', 'ray', 'matryoshka', 'jobs')])"
    )
    with cluster.run([cluster.python, "-c", command], stdout=subprocess.PIPE) as process:
        assert process.communicate()[0] == "[True, True, False, False]\n"


@pytest.fixture(scope="module")
def embedded(cluster: Nodes, driver: Driver, root: Path, tiny: str) -> Path:
    """Vectors of a run in whose middle one node was killed, one added, and one cut off."""
    _, first, second = cluster.alive
    fixed = {"unit_rows": _UNIT_ROWS, "precision": "float32", "tokens_per_step": _TOKENS}
    driver.start("embed", 6, 24, output=root / "embeddings", corpus=root / "corpus", model=tiny, **fixed)
    driver.wait_for(6)
    assert all(node.find("_EncoderActor") for node in cluster.alive), "encoders are not spread"
    first.freeze("_EncoderActor")  # so that it has units in hand when it is killed
    driver.go_on()
    driver.wait_for(24)
    first.kill()
    (third,) = cluster.add(1)
    wait_until(lambda: bool(third.find("_EncoderActor")))
    _cut_off(cluster, second)
    driver.go_on()
    driver.finish()
    _reconnect(cluster, driver, second)
    return root / "embeddings"


@pytest.mark.usefixtures("one_thread")
def test_vectors_are_the_same_whatever_becomes_of_the_nodes(undisturbed: Path, embedded: Path) -> None:
    assert folders.vectors(embedded) == folders.vectors(undisturbed)


def _ranks(cluster: Nodes) -> list[Node]:
    """Returns the node of each rank."""
    return [node for node in cluster.alive for _ in node.find("ray::RayTrainWorker")]


def _last_step(output: Path) -> int:
    return max((int(path.name[5:]) for path in (output / "checkpoints").glob("step-*")), default=0)


def test_weights_are_the_same_whatever_becomes_of_the_ranks_nodes(three: Nodes, driver: Driver, root: Path, tiny: str) -> None:
    driver.run("prepare", output=root / "data", pairs=root / "pairs.parquet")
    paths = {"data": root / "data", "model": tiny}
    driver.start("finetune", output=root / "at once", **paths, **_RECIPE)
    wait_until(lambda: _last_step(root / "at once") > 0)
    assert len({node.name for node in _ranks(three)}) == 2
    driver.finish()

    output = root / "disturbed"
    driver.start("finetune", output=output, **paths, **_RECIPE)
    wait_until(lambda: _last_step(output) > 0)
    first = next(node for node in _ranks(three) if node is not three.head)
    first.freeze("ray::RayTrainWorker")  # the other rank waits for it, while a node comes that can take its place
    three.add(1)
    step = _last_step(output)
    first.kill()
    wait_until(lambda: _last_step(output) > step)
    second = next(node for node in _ranks(three) if node is not three.head)
    _cut_off(three, second)
    driver.finish()
    _reconnect(three, driver, second)
    assert small_runs.are_same(small_runs.weights(output), small_runs.weights(root / "at once"))
    logs = [artifacts.storage.read_json(folder / "training_log.json")["entries"] for folder in (output, root / "at once")]
    assert logs[0] == logs[1]


def _indexing(root: Path, name: str) -> dict[str, Any]:
    fixed = {"shards": _NUM_SHARDS, "plan": "16:100,64:20", "coarse_index": "Flat", "space": "rotation"}
    return {"output": root / name, "embeddings": root / "embeddings", **fixed}


@pytest.fixture(scope="module")
def indexed(cluster: Nodes, driver: Driver, root: Path, embedded: Path) -> Path:  # noqa: ARG001 - it is made of these
    """An index that was built in one go."""
    cluster.add(*[1] * (_NUM_NODES - len(cluster.alive)))
    driver.run("index", **_indexing(root, "index"))
    names = {node.name for node in cluster.alive}
    wait_until(lambda: driver.names("build_shard") >= names)
    return root / "index"


def test_an_index_is_the_same_whatever_becomes_of_the_nodes(three: Nodes, driver: Driver, root: Path, indexed: Path) -> None:
    _, first, second = three.alive
    driver.start("index", 2, 8, **_indexing(root, "disturbed index"))
    driver.wait_for(2)
    first.kill()
    three.add(1)
    driver.go_on()
    driver.wait_for(8)
    _cut_off(three, second)
    driver.go_on()
    driver.finish()
    _reconnect(three, driver, second)
    assert artifacts.read(root / "disturbed index").fingerprint == artifacts.read(indexed).fingerprint
    assert folders.contents(root / "disturbed index" / "shards") == folders.contents(indexed / "shards")


def test_a_search_asks_shards_on_every_node(three: Nodes, driver: Driver, root: Path, embedded: Path, indexed: Path) -> None:
    table = pq.read_table(next((embedded / "units").glob("*.parquet")))
    block = np.asarray(table["embedding"].to_pylist(), dtype=np.float16)
    queries = texts.write_parquet(root / "queries.parquet", table.to_pydict())
    driver.start(
        "search", len(block), index=indexed, queries=queries, vector_column="embedding", output=root / "results", results=5
    )
    driver.wait_for(len(block))
    assert all(node.find("_ShardActor") for node in three.alive)
    driver.go_on()
    driver.finish()
    found = pq.read_table(root / "results" / "results.parquet")["document_id"].to_pylist()
    assert found == IndexStore.open(indexed).searcher().search(block, 5).ids.ravel().tolist()


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["none", "another"])
def test_a_driver_without_the_cluster_s_token_is_refused(cluster: Nodes, root: Path, tmp_path: Path, token: str) -> None:
    environment = {**cluster.environment, "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path)}
    command = [cluster.python, "-m", "jobs.prepare", f"--pairs={root / 'pairs.parquet'}", f"--output={tmp_path / 'data'}"]
    with cluster.run(command, ROOT, env=environment, stderr=subprocess.PIPE) as process:
        message = process.communicate()[1]
    assert process.returncode == 1
    assert "no connection" in message
    assert "RAY_AUTH_TOKEN" in message


def _submit(cluster: Nodes, config: Path) -> subprocess.Popen[str]:
    ray = [cluster.python, "-m", "ray.scripts.scripts", "job", "submit", f"--address={cluster.dashboard}", "--working-dir=."]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return cluster.run([*ray, "--", "python", "-m", "jobs.embed", f"--config={config}"], ROOT, **pipes)


def _completes(cluster: Nodes, config: Path) -> bool:
    """Submits a job, and returns whether it ran; until the lease of a driver that was lost with its head expires, it does not."""
    with _submit(cluster, config) as job:
        said = job.communicate()[0]
    assert job.returncode == 0 or "another run is writing to it" in said, said
    return job.returncode == 0


def test_a_submitted_job_ends_with_its_head_and_completes_on_another(
    three: Nodes, driver: Driver, root: Path, undisturbed: Path, tiny: str
) -> None:
    output, config = root / "submitted", root / "embed.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "output": str(output), "corpus": str(root / "corpus"), "model": tiny,
                "unit_rows": _UNIT_ROWS, "precision": "float32", "tokens_per_step": _TOKENS,
            }
        )
    )  # fmt: skip
    with _submit(three, config) as job:
        wait_until(lambda: folders.count_units(output) > 0 or job.poll() is not None)
        is_running = job.poll() is None
        three.head.kill()
        said = job.communicate()[0]
    assert is_running, said
    assert job.returncode > 0, said
    assert driver.process.wait() != 0, "a driver outlived its head"
    assert not folders.manifest(output)["is_complete"]

    with Nodes() as another:
        another.add(1)
        wait_until(lambda: _completes(another, config))
    assert folders.vectors(output) == folders.vectors(undisturbed)

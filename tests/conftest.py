"""Fixtures of all tests: a tiny model, one local Ray for the whole session, one finished pipeline."""

import functools
import logging
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import texts
import yaml

if TYPE_CHECKING:
    from faulty_proxy import Proxy

    from jobs.cluster import Session

PIPELINE_PAIRS = 240


_LISTENING = pytest.StashKey[dict[str, socket.socket]]()


def pytest_configure(config: pytest.Config) -> None:
    """Keeps every process of the session off the network, on a Ray of its own, and with bucket stores of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    listening = config.stash[_LISTENING] = {scheme: socket.socket() for scheme in ("s3", "gs")}
    for own in listening.values():
        own.bind(("127.0.0.1", 0))  # now, so that Ray's workers have the address, whenever the server starts
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        del os.environ[name]
    os.environ |= {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{listening['gs'].getsockname()[1]}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listening['s3'].getsockname()[1]}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "MATRYOSHKA_CACHE": tempfile.mkdtemp(prefix="matryoshka-test-cache-"),
    }
    os.environ.pop("RAY_ADDRESS", None)
    # Workers are what this process waits for: other tests must not starve them.
    os.environ |= {"RAY_worker_niceness": "0"}
    hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("untimed")


def pytest_unconfigure() -> None:
    """Leaves nothing behind."""
    shutil.rmtree(os.environ["MATRYOSHKA_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def s3(pytestconfig: pytest.Config) -> "Iterator[Proxy]":
    """A real S3 server; what comes is the proxy before it, which can be told to fail."""
    import s3_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server.serve(pytestconfig.stash[_LISTENING]["s3"]) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def gs(pytestconfig: pytest.Config) -> "Iterator[Proxy]":
    """A server of Google's protocol; what comes is the proxy before it, which can be told to fail."""
    import gs_server

    with gs_server.serve(pytestconfig.stash[_LISTENING]["gs"]) as proxy:
        yield proxy


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> "Proxy":
    """The proxy before each store: what holds of one must hold of the other."""
    proxy: Proxy = request.getfixturevalue(request.param)
    return proxy


@pytest.fixture
def any_bucket(store: "Proxy") -> str:
    """The address of an empty bucket in each store."""
    return store.make_bucket()


@pytest.fixture
def bucket(s3: "Proxy") -> str:
    """The address of an empty bucket of S3."""
    return s3.make_bucket()


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups down
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file in one process, and all that look at the finished pipeline; skips what needs a GPU."""
    looking = {item.path for item in items if "finished_pipeline" in getattr(item, "fixturenames", ())}
    for item in items:
        if item.path.parent.name == "gpu" and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
        item.add_marker(pytest.mark.xdist_group("finished_pipeline" if item.path in looking else item.path.name))


@pytest.fixture(scope="session")
def local_ray() -> "Iterator[Session]":
    """A Ray on this machine that all jobs of the test session share: starting one takes longer than most tests."""
    from jobs import cluster

    with cluster.connected() as session:
        yield session


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("this machine has no mount command")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keeps tiny models on one thread: on a busy machine, threads wait for each other longer than they work."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models of one architecture and different weights."""
    import tiny_model

    root = tmp_path_factory.mktemp("models")
    tiny_model.save(root / "tiny", seed=1)
    tiny_model.save(root / "other", seed=2)
    return root


@pytest.fixture(scope="session")
def tiny(models: Path) -> str:
    """The tiny model that most tests use."""
    return str(models / "tiny")


@pytest.fixture(scope="session")
def other(models: Path) -> str:
    """Another tiny model."""
    return str(models / "other")


@pytest.fixture(scope="session")
def pipeline_config(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A YAML file for the whole pipeline, small enough for a minute."""
    root = tmp_path_factory.mktemp("pipeline")
    texts.write_parquet(root / "pairs.parquet", texts.pairs(PIPELINE_PAIRS))
    config = {
        "output": str(root / "run"),
        "candidates": [tiny],
        "also": {"alike": {"sts": str(texts.write_sts(root / "alike.csv"))}},
        "prepare": {"pairs": str(root / "pairs.parquet")},
        "finetune": {
            "dims": [64, 32, 16],
            "batch_size": 16,
            "epochs": 18,
            "learning_rate": 3e-3,
            "dropout": 0.0,
            "precision": "float32",
            "workers": 1,
        },
        "embed": {"unit_rows": 40, "precision": "float32", "workers": 1},
        "index": {"shards": 2, "plan": ["16:100", "64:20"], "coarse_index": "Flat"},
    }
    path = root / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


@pytest.fixture(scope="session")
def finished_pipeline(pipeline_config: Path, local_ray: "Session") -> Path:  # noqa: ARG001 - the session must be there
    """The output of the whole pipeline; tests read it, and copy it before they change anything."""
    from jobs import pipeline

    settings = pipeline.Settings.from_command_line(["--config", str(pipeline_config)], "pipeline")
    pipeline.run(settings)
    return Path(settings.output)

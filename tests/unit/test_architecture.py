"""The direction of imports, and the one door of each dependency, as the sources have them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIB, JOBS = ROOT / "lib" / "matryoshka", ROOT / "jobs"
SOURCES = sorted([*LIB.rglob("*.py"), *JOBS.rglob("*.py")])
DOORS = {
    "ray": ("jobs/",),
    "faiss": ("lib/matryoshka/index.py", "lib/matryoshka/search_peers.py"),
    **dict.fromkeys(("hnswlib", "usearch"), ("lib/matryoshka/search_peers.py",)),
    **dict.fromkeys(("numba", "llvmlite"), ("lib/matryoshka/kernels.py",)),
    "scipy": ("lib/matryoshka/metrics.py",),
    **dict.fromkeys(("bm25s", "Stemmer"), ("lib/matryoshka/lexical.py",)),
    "altair": tuple(f"lib/matryoshka/{room}.py" for room in ("charts", "figures", "findings", "portraits")),
    "vl_convert": ("lib/matryoshka/charts.py",),
    "jinja2": ("lib/matryoshka/page.py",),
    "upath": ("lib/matryoshka/buckets.py",),
    **dict.fromkeys(("s3fs", "botocore"), ("lib/matryoshka/s3.py",)),
    **dict.fromkeys(("gcsfs", "google"), ("lib/matryoshka/gs.py",)),
    **dict.fromkeys(("fsspec", "aiohttp"), ("lib/matryoshka/s3.py", "lib/matryoshka/gs.py")),
    "pydantic": ("lib/matryoshka/config.py",),
    "yaml": ("lib/matryoshka/config.py",),
    "huggingface_hub": ("lib/matryoshka/model.py",),
    "sentence_transformers": tuple(f"lib/matryoshka/{room}.py" for room in ("model", "losses", "training", "plain_trainer")),
    "transformers": tuple(f"lib/matryoshka/{room}.py" for room in ("model", "packed", "training", "peers", "plain_trainer")),
    "datasets": ("lib/matryoshka/plain_trainer.py",),
    "peft": ("lib/matryoshka/layers.py",),
    **dict.fromkeys(("sklearn", "threadpoolctl"), ("lib/matryoshka/maps.py",)),
    "safetensors": tuple(f"lib/matryoshka/{room}.py" for room in ("model", "checkpoints", "weights")),
    "tokenizers": tuple(f"lib/matryoshka/{room}.py" for room in ("tokens", "chunks")),
    "semantic_text_splitter": ("lib/matryoshka/chunks.py",),
    "datasketch": ("lib/matryoshka/leaks.py",),
    "pyarrow": tuple(
        f"lib/matryoshka/{room}.py"
        for room in {"corpus", "sources", "partitions", "vectors", "filters", "funnel", "indexing", "verification"}
        | {"removals", "queries", "results", "runs"}
    ),
    **dict.fromkeys(("nncf", "onnxruntime", "openvino"), ("lib/matryoshka/peers.py",)),
    "rich": ("jobs/terminal.py",),
    "psutil": ("jobs/training_group.py",),
    "jobs": ("jobs/",),
}
HEAVY = {"torch", "transformers", "sentence_transformers", "accelerate", "datasets", "numba", "scipy", "sklearn", "pandas"}
HEAVY_FOR = {
    **dict.fromkeys(("embed", "export", "finetune", "index", "pipeline", "plan", "prepare"), HEAVY),  # pipeline brings the others
    **dict.fromkeys(("report", "verify"), HEAVY | {"ray"}),
    "status": HEAVY | {"ray", "faiss", "pyarrow", "altair"},
}
PURE = (
    *("units", "nested", "topk", "conditions", "clock", "batches", "tradeoffs", "significance"),
    *("geometry", "estimates", "shapes"),
)
LAYERS = [
    {"config", "units", "nested", "topk", "conditions", "clock", "batches", "frontier", "tradeoffs", "significance"}
    | {"geometry", "reading", "estimates", "shapes"},
    {"storage", "corpus", "index", "metrics", "docstrings", "recipe", "stream", "curves", "charts", "figures"}
    | {"splits", "sources", "partitions", "leaks", "chunks", "rates", "kernels", "lexical", "maps", "weights"}
    | {"buckets", "s3", "gs", "stores", "cache"},
    {"artifacts", "model", "pairs", "positives", "sts", "encode", "tokens", "packed", "vectors", "scans", "products", "spaces"}
    | {"funnel", "lists"}
    | {"examples", "losses", "layers", "forward", "checkpoints", "dev", "assembly", "cleaning", "labelled", "beir"}
    | {"removals", "filters", "queries", "leases", "status"},
    {"preparation", "mining", "training", "card", "embedding", "indexing", "layouts", "evaluation", "report", "verification"}
    | {"calibration", "peers", "plain_trainer", "answers", "tuning", "results", "search_peers", "synthetic"}
    | {"rankings", "runs", "comparison", "showcase", "verdict", "retrieval", "anatomy", "hidden", "provenance"}
    | {"findings", "portraits", "page"},
]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Yields every imported module of a file in full, those inside functions and type-checking blocks included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_all_sources_are_looked_at():
    assert {path.stem for path in LIB.glob("*.py")} - {"__init__"} == set().union(*LAYERS)
    assert (JOBS / "cluster.py") in SOURCES


@pytest.mark.parametrize("package", DOORS)
def test_each_dependency_is_imported_only_where_its_door_is(package: str):
    users = [name_of(path) for path in SOURCES if package in packages(path)]
    assert users
    assert [user for user in users if not user.startswith(DOORS[package])] == []


@pytest.mark.parametrize("job", HEAVY_FOR)
def test_a_driver_starts_without_the_libraries_that_compute(job: str):
    """They take seconds, and belong to those that compute: workers, or the driver itself once there is something to do."""
    code = f"import sys, jobs.{job}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"jobs.{job}" in ran.stdout.split()
    assert HEAVY_FOR[job] & set(ran.stdout.split()) == set()


@pytest.mark.parametrize("room", PURE)
def test_the_pure_rooms_import_only_the_standard_library_and_numpy(room: str):
    assert packages(LIB / f"{room}.py") <= {*sys.stdlib_module_names, "numpy"}


@pytest.mark.parametrize("depth", range(len(LAYERS)))
def test_rooms_import_only_rooms_of_their_own_layer_or_below(depth: int):
    reachable = set().union(*LAYERS[: depth + 1])
    for room in LAYERS[depth]:
        inner = {name.split(".")[1] for name in imports(LIB / f"{room}.py") if name.startswith("matryoshka.")}
        assert inner <= reachable, room


def test_rooms_do_not_import_each_other_in_a_circle():
    below = {
        path.stem: {name.split(".")[1] for name in imports(path) if name.startswith("matryoshka.")} for path in LIB.glob("*.py")
    }
    while below:
        leaves = {room for room, needed in below.items() if not needed & below.keys()}
        assert leaves, f"a circle among {sorted(below)}"
        below = {room: needed for room, needed in below.items() if room not in leaves}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_prints(path: Path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [f"{name_of(path)}:{call.lineno}" for call in calls if call.func.id == "print"] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_runs_at_import(path: Path):
    """A module defines things; the only bare statement is the call of a job under its own name."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree_of(path).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        is_way = name_of(path) == "jobs/__init__.py" and ast.unparse(node).startswith("sys.path.insert(")  # to the library
        assert is_text or is_guarded or is_way or isinstance(node, allowed), f"{name_of(path)}:{node.lineno}"

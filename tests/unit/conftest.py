"""What several unit tests build on: the real small model, and small real stores and indexes."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from matryoshka import indexing, model, removals, vectors
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.encode import Encoder
from matryoshka.indexing import IndexStore, Layout
from matryoshka.model import ModelInfo
from matryoshka.nested import shrink
from matryoshka.vectors import EmbeddingStore

_LAYOUT = Layout("prefix", 4, "Flat")

Parts = Mapping[str, tuple[list[str], np.ndarray]]


@pytest.fixture(scope="session")
def minilm() -> ModelInfo:
    return model.describe("minilm")


@pytest.fixture(scope="session")
def encoder(minilm: ModelInfo) -> Encoder:
    return Encoder(minilm.folder, "cpu", "float32")


@pytest.fixture
def minilm_copy(minilm: ModelInfo, tmp_path: Path) -> Callable[..., Path]:
    """Copies the model with changed keys in its JSON files; the weights are a link."""

    def copy(**changes: Mapping[str, object]) -> Path:
        folder = tmp_path / "minilm-copy"
        shutil.copytree(minilm.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "model.safetensors").symlink_to(minilm.folder / "model.safetensors")
        for stem, values in changes.items():
            path = folder / f"{stem}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return copy


@pytest.fixture(scope="session")
def random_vectors() -> Callable[..., np.ndarray]:
    def make(count: int, width: int, seed: int = 0) -> np.ndarray:
        return shrink(np.random.default_rng(seed).standard_normal((count, width)), width).astype(np.float16)

    return make


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """Writes a finished embedding store: (ids, vectors) for each slot."""

    def make(parts: Parts, name: str = "embeddings") -> EmbeddingStore:
        folder = tmp_path / name
        (folder / "units").mkdir(parents=True, exist_ok=True)
        receipts = []
        for number, (slot, (ids, block)) in enumerate(parts.items()):
            path = folder / "units" / f"unit-{number}.parquet"
            vectors.write_unit(path, ids, block)
            receipts.append(Receipt(f"unit-{number}", len(ids), (FileRecord.of(folder, path),), {"slot": slot}))
        width = next(iter(parts.values()))[1].shape[1]
        facts = {"width": width, "dims": [width, 4], "is_tuned": False}
        Manifest("embeddings", {"model": "m"}, {"corpus": "c"}, facts, tuple(receipts), is_complete=True).write(folder)
        return EmbeddingStore.open(folder)

    return make


@pytest.fixture
def make_index(tmp_path: Path) -> Callable[..., IndexStore]:
    """Builds a finished index of a store: shortlist of 4 dims, full width after it; some documents removed after the build."""

    def make(
        store: EmbeddingStore,
        num_shards: int = 2,
        name: str = "index",
        layout: Layout = _LAYOUT,
        plan: Sequence[str] = (),
        queries: np.ndarray | None = None,
        removed: Sequence[str] = (),
    ) -> IndexStore:
        folder = tmp_path / name
        slots, plans = indexing.plan_shards(store, num_shards, {})
        shared = [indexing.train(store, layout, queries, 10_000, folder)] if indexing.needs_training(layout) else []
        shards = [indexing.build_shard(own, layout, folder, *shared) for own in plans]
        listed = [removals.remember(folder, pa.array(sorted(removed), pa.large_string()))] if removed else []
        buried = [removals.bury(folder, shard, *listed) for shard in shards if removed]
        identity = {
            "model": "m", "space": layout.space, "dim": layout.dim, "coarse_index": layout.factory, "storage": layout.storage,
        }  # fmt: skip
        facts = {
            "slots": slots,
            "width": store.width,
            "dims": list(store.dims),
            "plan": list(plan or ["4:5", f"{store.width}:3"]),
        }
        receipts = (*shared, *shards, *listed, *buried)
        Manifest("index", identity, {"embeddings": "e"}, facts, receipts, is_complete=True).write(folder)
        return IndexStore.open(folder)

    return make

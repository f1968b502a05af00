"""What passes through Ray's object store is seen, and it is neither the corpus nor its vectors."""

from pathlib import Path

import folders
import numpy as np
import pytest
import ray
import texts

from jobs import embed, index, object_store

pytestmark = pytest.mark.usefixtures("local_ray")

_LOOK_SECONDS = 0.05
_MIB = 1 << 20


def test_what_lies_in_the_store_is_seen_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="jobs"), object_store.measured(_LOOK_SECONDS) as use:
        reference = ray.put(np.zeros(32 * _MIB, np.uint8))
        folders.wait_until(lambda: use.peak_bytes >= 32 * _MIB)
        del reference
    assert use.limit_bytes > use.peak_bytes
    assert f"event=object-store peak_bytes={use.peak_bytes} limit_bytes={use.limit_bytes}" in caplog.text


def test_neither_texts_nor_vectors_pass_through_it(tmp_path: Path, tiny: str) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus", num_files=4, rows_per_file=2_000, num_words=100)
    before = object_store.Use()
    before.sample()
    with object_store.measured(_LOOK_SECONDS) as use:
        embed.run(embed.Settings(output=str(tmp_path / "vectors"), corpus=str(corpus), model=tiny, unit_rows=2_000))
        index.run(index.Settings(output=str(tmp_path / "index"), embeddings=str(tmp_path / "vectors"), shards=2))
    num_text_bytes = sum(len(text) for text in texts.documents(0, 8_000, num_words=100)["text"])
    num_vector_bytes = sum(path.stat().st_size for path in (tmp_path / "vectors" / "units").iterdir())
    assert min(num_text_bytes, num_vector_bytes) > _MIB, "each unit's are more than Ray sends along with a call"
    assert use.peak_bytes - before.peak_bytes < _MIB // 4

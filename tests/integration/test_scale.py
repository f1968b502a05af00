"""Planning, resuming and committing stay cheap for a corpus that nobody can hold: 20,000 units are a billion documents."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_UNITS, _UNITS_PER_FILE = 20_000, 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ``tests/scale.py`` found, by the name of the run."""
    script, folder = Path(__file__).parents[1] / "scale.py", tmp_path_factory.mktemp("scale") / "embeddings"
    done = subprocess.run([sys.executable, script, folder, "--units", str(_UNITS)], stdout=subprocess.PIPE, check=True)
    return {found["run"]: found for found in map(json.loads, done.stdout.splitlines())}


def test_a_resumed_run_plans_only_what_has_no_receipt(runs: dict[str, dict[str, Any]]) -> None:
    assert {run["num_units"] for run in runs.values()} == {_UNITS}
    todo = {name: run["num_todo"] for name, run in runs.items()}
    assert todo == {
        "killed half-way": _UNITS,
        "resumed": _UNITS // 2,
        "a file changed": _UNITS_PER_FILE,
        "nothing to do": 0,
    }


def test_the_units_of_a_changed_file_take_the_place_of_its_old_ones(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["resumed"]["num_files"] == runs["a file changed"]["num_files"] == _UNITS


def test_recording_a_unit_writes_nothing_that_grows_with_the_run(runs: dict[str, dict[str, Any]]) -> None:
    for run in (runs["killed half-way"], runs["resumed"]):
        assert run["num_segments"] > 100
        assert run["largest_segment_bytes"] < 100_000
        assert not run["is_manifest_rewritten"]


def test_the_driver_stays_far_below_its_limits_of_20_seconds_and_1_gib(runs: dict[str, dict[str, Any]]) -> None:
    assert max(run["total_seconds"] for run in runs.values()) < 20
    assert max(run["peak_mib"] for run in runs.values()) < 1_024

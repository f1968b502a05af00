from pathlib import Path

from jobs import measurement
from matryoshka import storage


def test_what_is_free_is_some_of_what_there_is():
    total = int(Path("/proc/meminfo").read_text("utf-8").split()[1]) * 1024
    assert 0 < measurement.free_bytes() <= total


def test_what_is_measured_lies_beside_the_report_while_it_is_measured_and_not_in_a_bucket(tmp_path: Path):
    with measurement.scratch(tmp_path / "reports" / "benchmark.json") as folder:
        assert folder.parent == tmp_path / "reports"
    with measurement.scratch(storage.place("s3://bucket/benchmark.json")) as elsewhere:
        assert elsewhere.is_dir()
    assert not folder.exists()
    assert not elsewhere.exists()
    assert list((tmp_path / "reports").iterdir()) == []

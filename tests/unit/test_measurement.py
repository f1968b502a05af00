from pathlib import Path

from jobs import measurement


def test_what_is_free_is_some_of_what_there_is():
    total = int(Path("/proc/meminfo").read_text("utf-8").split()[1]) * 1024
    assert 0 < measurement.free_bytes() <= total

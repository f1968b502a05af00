import os

import pytest

from jobs.processes import Process


def test_a_process_that_fails_or_is_lost_is_named():
    with Process("onnx_int8", int, "no number") as failing, pytest.raises(RuntimeError, match="onnx_int8: ValueError"):
        failing.answer()
    with Process("tuned", os._exit, 9) as lost, pytest.raises(RuntimeError, match="the process of tuned was lost"):
        lost.answer()


def test_thread_settings_do_not_reach_the_peers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Process("tuned", os.getenv, "OMP_NUM_THREADS") as process:
        assert process.answer() is None
    assert os.environ["OMP_NUM_THREADS"] == "1"

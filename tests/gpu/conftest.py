"""Tests that need a GPU; elsewhere they are skipped and say so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")

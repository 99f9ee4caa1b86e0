"""These tests need torch: without it the whole folder is skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_pycollect_makemodule(module_path: Path) -> None:
    if not HAS_TORCH:
        pytest.skip("torch is not installed: pip install 'onnxopt[train]'", allow_module_level=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)

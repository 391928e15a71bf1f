"""GPU tests run where CUDA devices are, and are skipped, with a reason, where they are not."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        needed = next((mark.args[0] for mark in item.iter_markers("gpu")), 1)
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))

"""GPU tests run where CUDA devices are, and are skipped, with a reason, where they are not.

`gpu(number of devices, capability=(major, minor))`: the latter for what is made for devices of one kind.
"""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        mark = next(item.iter_markers("gpu"), pytest.mark.gpu(1).mark)
        (needed,), capability = mark.args, mark.kwargs.get("capability")
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))
        elif capability is not None and torch.cuda.get_device_capability() != capability:
            item.add_marker(pytest.mark.skip(reason=f"needs a device of compute capability {capability}"))

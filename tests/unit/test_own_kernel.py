"""Kernels of our own: where they are not to be had, something else is used, and the log says what and why."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from seesaw_ds.model.ops import row_kernels
from seesaw_ds.parallel.own_kernel import OwnKernel


class BrokenSpec:
    def build_and_load(self) -> None:
        raise RuntimeError("ninja: build stopped")


def test_a_kernel_that_does_not_compile_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    kernel = OwnKernel(Path("model/rows.cu"), "rows are torch's")
    kernel.__dict__["spec"] = BrokenSpec()
    with caplog.at_level(logging.WARNING):
        assert not kernel.loads
        assert not kernel.loads
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == ["rows are torch's, since rows.cu does not compile: ninja: build stopped"]


def test_there_are_none_for_float32() -> None:
    assert row_kernels.make_row_kernels(torch.float32, torch.device("cuda")) is None

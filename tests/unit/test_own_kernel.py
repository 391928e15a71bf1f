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


@pytest.mark.parametrize(
    ("num_tiles", "num_rows", "size", "expected"),
    [
        (64, 36, 4096, 32),
        (64, 36, 14336, 16),
        (64, 20, 14336, 10),
        (64, 1, 14336, 2),  # of 112 blocks each
        (64, 1, 1024, 17),
        (2, 8, 128, 1),
    ],
)
def test_the_last_band_takes_as_long_as_the_sum_of_the_first_travels(num_tiles, num_rows, size, expected) -> None:
    assert row_kernels.tiles_of_last_band(num_tiles, num_rows, size, 132) == expected

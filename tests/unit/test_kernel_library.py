"""Compiling FlashInfer's kernels: only what is missing, side by side, and a failure of one is not the others'."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

import pytest

from seesaw_ds.model.kernel_library import compile_kernels


@dataclass
class FakeSpec:
    """A kernel whose build waits until as many builds as `barrier` has parties have begun."""

    name: str
    barrier: threading.Barrier
    is_compiled: bool = False
    fails: bool = False
    builds: list[bool] = field(default_factory=list)

    def build(self, verbose: bool) -> None:
        self.barrier.wait(timeout=20)
        self.builds.append(verbose)
        if self.fails:
            raise RuntimeError("no compiler")
        self.is_compiled = True


def test_missing_kernels_are_built_side_by_side(caplog: pytest.LogCaptureFixture) -> None:
    barrier = threading.Barrier(2)
    specs = [FakeSpec("norm", barrier), FakeSpec("page", barrier, is_compiled=True), FakeSpec("prefill", barrier)]
    with caplog.at_level(logging.INFO):
        compile_kernels(specs)
        compile_kernels(specs)
    assert [spec.builds for spec in specs] == [[False], [], [False]]
    assert [record.getMessage() for record in caplog.records] == [
        "FlashInfer compiles 2 kernels for this device, once a machine: that takes minutes"
    ]


def test_a_kernel_that_does_not_compile_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    barrier = threading.Barrier(2)
    specs = [FakeSpec("norm", barrier, fails=True), FakeSpec("prefill", barrier)]
    with caplog.at_level(logging.WARNING):
        compile_kernels(specs)
    assert specs[1].is_compiled
    assert [record.getMessage() for record in caplog.records] == [
        "FlashInfer compiles norm at its first use instead, since this failed: no compiler"
    ]

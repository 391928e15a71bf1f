"""The kernel for decode rows: where it is not to be had, FlashInfer's is used, and the log says why."""

from __future__ import annotations

import logging

import pytest

from seesaw_ds.model.attention import row_attention


class BrokenKernel:
    def build_and_load(self) -> None:
        raise RuntimeError("ninja: build stopped")


def test_a_kernel_that_does_not_compile_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_attention, "row_kernel", BrokenKernel)
    row_attention.loads_row_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not row_attention.loads_row_kernel()
        assert not row_attention.loads_row_kernel()
    row_attention.loads_row_kernel.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "row_attention.cu does not compile: ninja: build stopped" in caplog.text

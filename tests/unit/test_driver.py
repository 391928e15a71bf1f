"""Calls of the CUDA driver: found by name, with their types, and refusals that say what was refused."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from seesaw_ds.parallel import driver


def test_a_call_has_its_types_and_one_that_is_missing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(cuMemcpyAsync=SimpleNamespace())
    monkeypatch.setattr(driver, "_library", lambda: library)
    assert driver.find_call("cuMemcpyAsync", ctypes.c_uint64, ctypes.c_size_t) is library.cuMemcpyAsync
    assert library.cuMemcpyAsync.argtypes == [ctypes.c_uint64, ctypes.c_size_t]
    assert library.cuMemcpyAsync.restype is ctypes.c_int
    assert driver.find_call("cuMemcpyBatchAsync_v2", ctypes.c_void_p) is None


def test_a_refusal_names_the_number_and_what_was_refused() -> None:
    driver.check(0, "a copy")
    with pytest.raises(RuntimeError, match="CUresult=801: CUDA refused a copy"):
        driver.check(801, "a copy")

"""Calls of the CUDA driver that torch does not offer, or takes the host's time around."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def find_call(name: str, *argument_types: type) -> Callable[..., int] | None:
    """A function of the driver that returns a CUresult; None where this driver has not got it."""
    function = getattr(_library(), name, None)
    if function is not None:
        function.argtypes = list(argument_types)
        function.restype = ctypes.c_int
    return function


@functools.cache
def copy_call() -> Callable[..., int]:
    """(target, source, bytes, stream) -> CUresult."""
    copy = find_call("cuMemcpyAsync", ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    assert copy is not None
    return copy


def check(result: int, what: str) -> None:
    """Raises RuntimeError with CUDA's number when it refused `what`."""
    if result != 0:
        raise RuntimeError(f"CUresult={result}: CUDA refused {what}")


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

"""Linear products by each of the algorithms that cuBLASLt proposes; torch only takes the first.

Weights are (out, in), contiguous or the transpose of a contiguous tensor, in bfloat16 or float16, of rows and columns
that are multiples of 16 bytes.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import torch

WORKSPACE_BYTES = 16 << 20  # of partial sums: 256 rows of 8,192 outputs in two parts
_MOST_ALGORITHMS = 16

# cublasLt.h and library_types.h
DTYPES = {torch.bfloat16: 14, torch.float16: 2}
_COMPUTE_32F = 68
_R_32F = 0
_DESC_TRANSA = 3
_PREFERENCE_MAX_WORKSPACE_BYTES = 1
_PREFERENCE_MIN_ALIGNMENTS = (5, 6, 7, 8)  # of the four matrices; else weights are taken to lie at multiples of 256
_OP_T = 1

_ALIGNMENT = 16  # bytes, of a row and so of whatever a tensor of whole rows starts with

_ONE, _ZERO = c_float(1.0), c_float(0.0)


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Proposal(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Product:
    """One algorithm for one size. cuBLAS has matrices by columns: (out, N) is the weight times (in, N)."""

    def __init__(self, descriptors: _Descriptors, algorithm: _Algorithm) -> None:
        self._descriptors = descriptors
        self._algorithm = algorithm

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(N, in) times (out, in) transposed, (N, out)."""
        out = x.new_empty((x.shape[0], weight.shape[0]))
        if (status := self._run(x, weight, out)) != 0:
            raise RuntimeError(f"cublasLtMatmul: status {status} for {tuple(x.shape)} by {tuple(weight.shape)}")
        return out

    def runs(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether cuBLASLt takes it after all."""
        return self._run(x, weight, x.new_empty((x.shape[0], weight.shape[0]))) == 0

    def _run(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
        its = self._descriptors
        workspace = _workspace(x.device)
        status: int = _library().cublasLtMatmul(
            _handle(),
            its.operation,
            byref(_ONE),
            c_void_p(weight.data_ptr()),
            its.weight,
            c_void_p(x.data_ptr()),
            its.x,
            byref(_ZERO),
            c_void_p(out.data_ptr()),
            its.out,
            c_void_p(out.data_ptr()),
            its.out,
            byref(self._algorithm),
            c_void_p(workspace.data_ptr()),
            c_size_t(workspace.nbytes),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        return status


class _Descriptors:
    """cuBLASLt's names for a product and its matrices. They live as long as the process: there are a few hundred."""

    def __init__(self, num_rows: int, weight: torch.Tensor) -> None:
        num_out, num_in = weight.shape
        dtype = DTYPES[weight.dtype]
        self.operation = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self.operation), _COMPUTE_32F, _R_32F)
        if weight.is_contiguous():
            transposed = c_int(_OP_T)
            size = c_size_t(ctypes.sizeof(transposed))
            _call("cublasLtMatmulDescSetAttribute", self.operation, _DESC_TRANSA, byref(transposed), size)
            self.weight = _matrix(dtype, num_in, num_out)
        else:
            self.weight = _matrix(dtype, num_out, num_in)
        self.x = _matrix(dtype, num_in, num_rows)
        self.out = _matrix(dtype, num_out, num_rows)


def _matrix(dtype: int, num_rows: int, num_columns: int) -> c_void_p:
    """The columns follow each other."""
    layout = c_void_p()
    rows, columns, column_stride = c_uint64(num_rows), c_uint64(num_columns), c_int64(num_rows)
    _call("cublasLtMatrixLayoutCreate", byref(layout), dtype, rows, columns, column_stride)
    return layout


def proposed_products(num_rows: int, weight: torch.Tensor) -> list[Product]:
    """What cuBLASLt holds fit for a size, the one it likes best first; nothing for weights that lie otherwise."""
    is_aligned = all(size * weight.itemsize % _ALIGNMENT == 0 for size in weight.shape)
    if not is_aligned or not (weight.is_contiguous() or weight.t().is_contiguous()):
        return []
    its = _Descriptors(num_rows, weight)
    preference = c_void_p()
    _call("cublasLtMatmulPreferenceCreate", byref(preference))
    _prefer(preference, _PREFERENCE_MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE_BYTES))
    for attribute in _PREFERENCE_MIN_ALIGNMENTS:
        _prefer(preference, attribute, c_uint32(_ALIGNMENT))
    proposals = (_Proposal * _MOST_ALGORITHMS)()
    count = c_int()
    matrices = (its.operation, its.weight, its.x, its.out, its.out)
    query = (_handle(), *matrices, preference, _MOST_ALGORITHMS, proposals, byref(count))
    status = _library().cublasLtMatmulAlgoGetHeuristic(*query)
    _call("cublasLtMatmulPreferenceDestroy", preference)
    if status != 0:  # none that fits
        return []
    return [Product(its, proposal.algorithm) for proposal in proposals[: count.value] if proposal.status == 0]


def _prefer(preference: c_void_p, attribute: int, value: c_uint32 | c_uint64) -> None:
    size = c_size_t(ctypes.sizeof(value))
    _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, byref(value), size)


def _call(name: str, *arguments: object) -> None:
    if (status := getattr(_library(), name)(*arguments)) != 0:
        raise RuntimeError(f"{name}: status {status}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that torch has loaded."""
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Products of one stream follow each other, and steps of a device have one stream."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

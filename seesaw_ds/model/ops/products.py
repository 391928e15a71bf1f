"""Linear products of few rows by the fastest algorithm that cuBLASLt has for them, as timed on this device.

torch takes the first that cuBLAS proposes. For the few rows of a decode step another one is often faster, up to a fifth
(`docs/performance.md`): cuBLAS likes to split the inner dimension there, and adds the parts up in a second kernel.
With more rows, as in prefill, its first choice is the best.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

MOST_ROWS = 256
WORKSPACE_BYTES = 16 << 20  # of partial sums: 256 rows of 8,192 outputs in two parts
_MOST_ALGORITHMS = 16
_LEAST_GAIN = 0.02  # what timings differ by; and where nothing is to be gained, results stay torch's
_WORTH_A_LOOK = 1.15  # times the fastest at first sight
_NUM_TIMINGS = 5

# cublasLt.h and library_types.h
_COMPUTE_32F = 68
_R_32F = 0
_TYPES = {torch.bfloat16: 14, torch.float16: 2}
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


class TuningTimes(NamedTuple):
    """Milliseconds of one product of each size that was tuned: torch's, and the chosen one."""

    usual: float
    tuned: float


class TunedProducts:
    """``x @ weight.T`` for the sizes that `tune` has seen; other sizes, and those with a bias, are torch's.

    Weights are (out, in), contiguous or the transpose of a contiguous tensor, in bfloat16 or float16.
    """

    def __init__(self) -> None:
        self._products: dict[Hashable, _Product] = {}
        self._row_counts: set[int] = set()  # that any of these has: prefill, which is not tuned, asks no further

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(N, in) times (out, in) transposed, (N, out)."""
        num_rows = x.shape[0]
        if num_rows in self._row_counts and bias is None and x.is_contiguous():
            fastest = self._products.get(_key(num_rows, weight))
            if fastest is not None:
                return fastest(x, weight)
        return F.linear(x, weight, bias)

    def tune(self, num_rows: Iterable[int], weights: Iterable[torch.Tensor]) -> TuningTimes:
        """Time what cuBLASLt proposes for each number of rows up to `MOST_ROWS`, and each weight.

        Takes some 5 ms each. The weights' values do not matter, and of weights alike only the first is timed.
        """
        usual = tuned = 0.0
        alike = {_key(0, weight): weight for weight in reversed(list(weights)) if weight.dtype in _TYPES}
        if alike:
            flush = _Flush(next(iter(alike.values())).device)
            for rows, weight in product((rows for rows in num_rows if rows <= MOST_ROWS), alike.values()):
                choice = _choose(rows, weight, flush)
                if choice.fastest is not None:
                    self._products[_key(rows, weight)] = choice.fastest
                    self._row_counts.add(rows)
                usual += choice.usual
                tuned += choice.tuned
        return TuningTimes(usual, tuned)


def _key(num_rows: int, weight: torch.Tensor) -> Hashable:
    return num_rows, weight.shape, weight.stride(), weight.dtype


def faster(times: Mapping[int, float], usual: float) -> int | None:
    """Which of `times` is the least, if it is enough less than the `usual` one; else None."""
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] < (1 - _LEAST_GAIN) * usual else None


class _Choice(NamedTuple):
    """`fastest` is None where torch's is; milliseconds of torch's product and of the chosen one."""

    fastest: _Product | None
    usual: float
    tuned: float


def _choose(num_rows: int, weight: torch.Tensor, flush: _Flush) -> _Choice:
    x = torch.randn(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    products = [proposed for proposed in _proposed(num_rows, weight) if proposed.runs(x, weight)]
    at_first = [flush.time(partial(proposed, x, weight), 1) for proposed in products]
    tried = [i for i, time in enumerate(at_first) if time <= _WORTH_A_LOOK * min(at_first)]
    times = {i: flush.time(partial(products[i], x, weight), _NUM_TIMINGS) for i in tried}
    usual = flush.time(partial(F.linear, x, weight), _NUM_TIMINGS)
    best = faster(times, usual)
    return _Choice(None, usual, usual) if best is None else _Choice(products[best], usual, times[best])


class _Flush:
    """Times work whose weights are not in the L2 cache, as in a step, where other layers come between."""

    def __init__(self, device: torch.device) -> None:
        num_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def time(self, work: Callable[[], object], count: int) -> float:
        """The least of `count` times, in milliseconds: a host that is disturbed adds to some. A first call, which may
        load kernels, is not counted.
        """
        work()
        timings = []
        for _ in range(count):
            self._memory.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            timings.append((start, end))
        torch.cuda.synchronize()
        return min(start.elapsed_time(end) for start, end in timings)


class _Product:
    """One algorithm for one size. cuBLAS has matrices by columns: (out, N) is the weight times (in, N)."""

    def __init__(self, descriptors: _Descriptors, algorithm: _Algorithm) -> None:
        self._descriptors = descriptors
        self._algorithm = algorithm

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0], weight.shape[0]))
        if (status := self._run(x, weight, out)) != 0:
            raise RuntimeError(f"cublasLtMatmul: status {status} for {tuple(x.shape)} by {tuple(weight.shape)}")
        return out

    def runs(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
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
        dtype = _TYPES[weight.dtype]
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


def _proposed(num_rows: int, weight: torch.Tensor) -> list[_Product]:
    """What cuBLASLt holds fit for a size, the one it likes best first."""
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
    return [_Product(its, proposal.algorithm) for proposal in proposals[: count.value] if proposal.status == 0]


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

"""A decode step's linear products and norms by kernels of our own, row_kernels.cu, which says how they work.

They begin while the kernels before them still run, and read weights meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import torch

from seesaw_ds.parallel.host_slots import HostSlots
from seesaw_ds.parallel.own_kernel import OwnKernel

# As in the source. With more rows cuBLASLt's products are faster in a step: what CTAs leave to each other grows with
# the rows.
MOST_ROWS = 96
_BLOCK = 128  # elements of a row that are multiplied at once; with more than 64 rows half as many
_TILE = 128  # features, of which a product with a gate has half as many gates
_FLOATS_OF_CTA = _TILE * MOST_ROWS
# Counters are for 64 features of half the rows.
_FEATURES_OF_COUNTER = 32
_MOST_FEATURES = 1 << 19
# For a sum over ranks through host memory, bytes of weights that are read while one byte travels: 4.3 TB/s, 34 GB/s.
_BYTES_PER_BYTE = 128
_MOST_NORM_SIZE = 4 * 512 * 8

_SOURCE = Path(__file__).with_suffix(".cu")
_INSTEAD = "decode steps have cuBLASLt's products and FlashInfer's norms"
_KERNELS = {
    torch.bfloat16: OwnKernel(_SOURCE, _INSTEAD),
    torch.float16: OwnKernel(_SOURCE, _INSTEAD, ["-DFLOAT16"]),
}


def row_kernels(dtype: torch.dtype, device: torch.device) -> OwnKernel | None:
    """Those of a model in `dtype`, where the device can have them."""
    kernel = _KERNELS.get(dtype)
    return kernel if kernel is not None and kernel.can_run(device) else None


def make_row_kernels(dtype: torch.dtype, device: torch.device) -> RowKernels | None:
    """For a model in `dtype`; None where the device cannot have them."""
    kernel = row_kernels(dtype, device)
    return None if kernel is None else RowKernels(kernel, dtype, device)


def tiles_of_last_band(num_tiles: int, num_rows: int, size: int, num_ctas: int) -> int:
    """How many tiles of a product of (rows, size) are computed while the sum of the others travels.

    As many as take as long, and give every CTA (thread block) some work; but no more than half of the tiles, which are
    an even number: the sum of the last band travels when the product has ended.
    """
    share = 1 / (1 + size / (_BYTES_PER_BYTE * num_rows))
    least = -(-num_ctas * _BLOCK // size)
    return min(max(round(share * num_tiles), least), num_tiles // 2)


class RowKernels:
    """For up to `MOST_ROWS` rows, one stream at a time. Nothing is loaded before `prepare`."""

    def __init__(self, kernel: OwnKernel, dtype: torch.dtype, device: torch.device) -> None:
        self._kernel = kernel
        self._dtype = dtype
        self._num_ctas = num_ctas = torch.cuda.get_device_properties(device).multi_processor_count
        # Of a sum over ranks a CTA has parts of two tiles of both bands.
        self._partials = torch.empty(4 * num_ctas * _FLOATS_OF_CTA, dtype=torch.float32, device=device)
        self._counters = torch.zeros(_MOST_FEATURES // _FEATURES_OF_COUNTER, dtype=torch.int32, device=device)

    def prepare(self) -> bool:
        """Load the kernels; False if they cannot be had."""
        return self._kernel.loads

    def multiplies(self, num_rows: int, weight: torch.Tensor) -> bool:
        """Whether `multiply` takes so many rows, and an (out, in) weight."""
        num_out, num_in = weight.shape
        return (
            0 < num_rows <= MOST_ROWS
            and num_out <= _MOST_FEATURES
            and weight.dtype == self._dtype
            and num_out % _TILE == num_in % _BLOCK == 0
            and weight.stride() in ((num_in, 1), (1, num_out))
            and weight.data_ptr() % 16 == 0
        )

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``: (N, in) and (out, in), contiguous or the transpose of a contiguous tensor, to (N, out)."""
        return self._multiply(x, weight, weight.shape[0], 0)

    def reduces(self, num_rows: int, weight: torch.Tensor, slots: HostSlots) -> bool:
        """Whether `multiply_and_reduce` takes so many rows, and an (out, in) weight."""
        num_out = weight.shape[0]
        # Bands can be alike, and a CTA has parts of two tiles of each at most.
        has_bands = num_out % (2 * _TILE) == 0 and num_out // _TILE <= self._num_ctas
        return has_bands and self.multiplies(num_rows, weight) and slots.holds(num_rows, num_out)

    def multiply_and_reduce(self, x: torch.Tensor, weight: torch.Tensor, slots: HostSlots) -> torch.Tensor:
        """The sum of `multiply` over the ranks of `slots`, in float32 in the order of the ranks."""
        out = x.new_empty((x.shape[0], weight.shape[0]))
        self._kernel.module.multiply_and_reduce_rows(
            x,
            weight,
            out,
            self._partials,
            self._counters,
            tiles_of_last_band(weight.shape[0] // _TILE, x.shape[0], x.shape[1], self._num_ctas),
            slots.rank,
            slots.slots(x.dtype),
            slots.flags,
            slots.calls,
        )
        return out

    def gates(self, weight: torch.Tensor, num_cells: int) -> bool:
        """Whether `multiply_gated` takes a weight that `multiply` takes."""
        return weight.is_contiguous() and weight.shape[0] % (_TILE * num_cells) == 0

    def multiply_gated(self, x: torch.Tensor, weight: torch.Tensor, num_cells: int) -> torch.Tensor:
        """``silu(x @ gate.T) * (x @ up.T)``, (N, F), of a contiguous (2 F, in) weight that has gates and ups in turn,
        F / `num_cells` of each.
        """
        num_features = weight.shape[0] // 2
        return self._multiply(x, weight, num_features, num_features // num_cells)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, num_out: int, cell_features: int) -> torch.Tensor:
        out = x.new_empty((x.shape[0], num_out))
        self._kernel.module.multiply_rows(x, weight, out, self._partials, self._counters, cell_features)
        return out

    def norms(self, x_NM: torch.Tensor) -> bool:
        """Whether `add_rms_norm` takes it."""
        num_rows, size = x_NM.shape
        return 0 < num_rows <= MOST_ROWS and size % 8 == 0 and size <= _MOST_NORM_SIZE and x_NM.is_contiguous()

    def add_rms_norm(
        self, x_NM: torch.Tensor, residual_NM: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> None:
        """In place: `residual_NM` += `x_NM`, which becomes its norm times (weight + weight_offset)."""
        self._kernel.module.add_rms_norm_rows(x_NM, residual_NM, weight, eps, weight_offset)

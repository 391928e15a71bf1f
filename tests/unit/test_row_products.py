"""Which products and norms our own kernels for few rows take; the kernels themselves need a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seesaw_ds.model.ops.row_kernels import MOST_ROWS, RowKernels
from seesaw_ds.parallel.host_slots import HostSlots
from seesaw_ds.parallel.own_kernel import OwnKernel

CPU = torch.device("cpu")


class Alone:
    """A group of one rank, and memory that it shares with itself."""

    def rank(self):
        return 0

    def size(self):
        return 1

    def tensor(self, offset, shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def make_kernels(monkeypatch):
    def make(num_multiprocessors=132):
        properties = SimpleNamespace(multi_processor_count=num_multiprocessors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return RowKernels(OwnKernel(Path("rows.cu"), "nothing"), torch.bfloat16, CPU)

    return make


def weight(num_out: int, num_in: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty((num_out, num_in), dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("num_rows", "matrix", "expected"),
    [
        (1, weight(256, 256), True),
        (MOST_ROWS, weight(256, 256), True),
        (MOST_ROWS, weight(256, 256).t(), True),
        (0, weight(256, 256), False),
        (MOST_ROWS + 1, weight(256, 256), False),
        (8, weight(192, 256), False),
        (8, weight(256, 192), False),
        (8, weight(256, 512)[:, :256], False),
        (8, weight(256, 256, torch.float16), False),
        (8, weight(256, 256, torch.float32), False),
        (8, weight(1 << 19, 128), True),
        (8, weight((1 << 19) + 128, 128), False),
    ],
)
def test_products(make_kernels, num_rows, matrix, expected):
    assert make_kernels().multiplies(num_rows, matrix) is expected


@pytest.mark.parametrize(
    ("num_rows", "num_out", "num_multiprocessors", "expected"),
    [
        (64, 8192, 132, True),
        (65, 8192, 132, True),
        (64, 16384, 132, True),
        (65, 16384, 132, False),  # pieces of 64 rows: twice as many as there is memory for
        (64, 8192 + 128, 132, False),  # an odd number of tiles
        (64, 16384, 114, False),  # a CTA would have parts of three tiles of a band
        (0, 8192, 132, False),
    ],
)
def test_sums_over_ranks(make_kernels, num_rows, num_out, num_multiprocessors, expected):
    slots = HostSlots(Alone(), CPU, Alone(), 0)
    assert make_kernels(num_multiprocessors).reduces(num_rows, weight(num_out, 4096), slots) is expected


def test_gates_and_ups_of_a_cell_fill_tiles(make_kernels):
    kernels = make_kernels()
    assert kernels.gates(weight(512, 256), 4)
    assert not kernels.gates(weight(512, 256), 8)
    assert not kernels.gates(weight(512, 512).t(), 4)


@pytest.mark.parametrize(
    ("num_rows", "size", "expected"),
    [(1, 16384, True), (96, 4096, True), (0, 4096, False), (97, 4096, False), (8, 4100, False), (8, 16392, False)],
)
def test_norms(make_kernels, num_rows, size, expected):
    x = torch.empty((num_rows, size), dtype=torch.bfloat16, device="meta")
    assert make_kernels().norms(x) is expected

"""Addresses of rows; the copies themselves need a device (tests/gpu)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from seesaw_ds.parallel.row_copies import row_addresses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_addresses_of_strided_rows(dtype: torch.dtype) -> None:
    tensor = torch.arange(120).to(dtype).view(5, 24)[:, 8:16].unflatten(1, (2, 4))
    rows = np.array([3, 0, 4])
    num_bytes = tensor[0].numel() * tensor.element_size()
    for address, row in zip(row_addresses(tensor, rows), rows, strict=True):
        assert ctypes.string_at(int(address), num_bytes) == tensor[row].contiguous().view(torch.uint8).numpy().tobytes()


def test_rows_must_be_contiguous() -> None:
    with pytest.raises(AssertionError):
        row_addresses(torch.zeros(5, 4, 6)[:, :, 1:4], np.array([0]))

"""Copies of KV blocks between the device and registered host memory, bit for bit, by both calls of the driver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seesaw_ds.parallel import row_copies

NUM_ROWS = 300


@pytest.mark.gpu(1)
@pytest.mark.parametrize("has_batches", [True, False], ids=["in one call", "one by one"])
@pytest.mark.parametrize("row_shape", [(3, 2, 4, 16, 128), (1, 2, 1, 16, 64)])
def test_rows_go_out_and_come_back(
    monkeypatch: pytest.MonkeyPatch, has_batches: bool, row_shape: tuple[int, ...]
) -> None:
    if not has_batches:
        monkeypatch.setattr(row_copies, "_batch_call", lambda: None)
    elif row_copies._batch_call() is None:
        pytest.skip("the driver is older than CUDA 13")
    rng = np.random.default_rng(0)
    on_device = torch.randn((NUM_ROWS, *row_shape), device="cuda", dtype=torch.bfloat16)
    original = on_device.clone()
    numel = on_device[0].numel()
    on_host = torch.zeros((NUM_ROWS, numel + 64), dtype=torch.bfloat16, pin_memory=True)[:, 64:]
    device_rows, host_rows = rng.permutation(NUM_ROWS)[:200], rng.permutation(NUM_ROWS)[:200]
    device_side = row_copies.row_addresses(on_device, device_rows)
    host_side = row_copies.row_addresses(on_host, host_rows)

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        row_copies.copy_runs(host_side, device_side, 2 * numel)
    torch.cuda.synchronize()
    assert torch.equal(on_host[host_rows], original[device_rows].flatten(1).cpu())
    others = np.setdiff1d(np.arange(NUM_ROWS), host_rows)
    assert not on_host[others].any()

    on_device[device_rows] = 0
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        row_copies.copy_runs(device_side, host_side, 2 * numel)
    torch.cuda.synchronize()
    assert torch.equal(on_device, original)

"""Copies of whole blocks between a device pool, of either phase, and the host pool. This is the KV re-shard.

Prefill ranks write their rectangles of a block's row and decode ranks read theirs; swap-in and eviction are the same
copies with a decode shard. On CUDA they are queued on the current stream: a rectangle that is not contiguous in the
device pool goes through a staging buffer on the device, so that only contiguous runs cross the bus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.parallel.device import is_cuda, record_event
from seesaw_ds.parallel.row_copies import copy_runs, row_addresses

if TYPE_CHECKING:
    from seesaw_ds.parallel.device import Event

STAGING_BYTES = 64 << 20
_PACE_BYTES = 16 << 20


def copy_to_host(
    device_pool: DeviceKVPool, device_blocks: Sequence[int], host_pool: HostKVPool, host_blocks: Sequence[int]
) -> int:
    """Copy block ``device_blocks[i]``, this rank's part of it, to ``host_blocks[i]``; returns the bytes copied.

    On CUDA the host blocks are complete when the current stream has come this far.
    """
    return _copy(device_pool, device_blocks, host_pool, host_blocks, to_host=True)


def copy_to_device(
    host_pool: HostKVPool, host_blocks: Sequence[int], device_pool: DeviceKVPool, device_blocks: Sequence[int]
) -> int:
    """Copy this rank's part of block ``host_blocks[i]`` to ``device_blocks[i]``; returns the bytes copied.

    On CUDA the host blocks must stay as they are until the current stream has come this far.
    """
    return _copy(device_pool, device_blocks, host_pool, host_blocks, to_host=False)


def _copy(
    device_pool: DeviceKVPool,
    device_blocks: Sequence[int],
    host_pool: HostKVPool,
    host_blocks: Sequence[int],
    to_host: bool,
) -> int:
    assert len(device_blocks) == len(host_blocks), (len(device_blocks), len(host_blocks))
    copied_bytes = 0
    bus = _Bus(device_pool.tensor.device, to_host)
    for on_device, on_host in _rectangles(device_pool, host_pool):
        if not is_cuda(on_device.device):
            pair = ((on_device, _index(device_blocks)), (on_host, _index(host_blocks)))
            (source, source_index), (target, target_index) = pair if to_host else pair[::-1]
            target.index_copy_(0, target_index, source.index_select(0, source_index))
        elif on_device[:1].is_contiguous():
            bus.move(on_device, np.asarray(device_blocks), on_host, np.asarray(host_blocks))
        else:
            for start, staging in _staged(on_device, len(device_blocks)):
                batch = slice(start, start + len(staging))
                index = _index(device_blocks[batch], on_device.device)
                if to_host:
                    torch.index_select(on_device, 0, index, out=staging)
                bus.move(staging, np.arange(len(staging)), on_host, np.asarray(host_blocks[batch]))
                if not to_host:
                    on_device.index_copy_(0, index, staging)
        copied_bytes += len(host_blocks) * on_host[:1].numel() * on_host.element_size()
    return copied_bytes


class _Bus:
    """Queues copies between device and host, about twice `_PACE_BYTES` ahead at most: whoever queues more waits here.

    A direction of the bus has one copy engine, which takes the copies of all streams in the order in which they were
    queued. So a decode step's indices, a few KB, had to wait for a whole sequence's KV that was queued before: on two
    H200 steps of 38 ms took 60 to 118 ms beside swaps.
    """

    def __init__(self, device: torch.device, to_host: bool) -> None:
        self._device = device
        self._to_host = to_host
        self._events: deque[Event] = deque()

    def move(
        self, on_device: torch.Tensor, device_blocks: np.ndarray, on_host: torch.Tensor, host_blocks: np.ndarray
    ) -> None:
        """Queue the copies of blocks' parts, each of which is contiguous on both sides."""
        block_bytes = on_host[0].numel() * on_host.element_size()
        device_side, host_side = row_addresses(on_device, device_blocks), row_addresses(on_host, host_blocks)
        targets, sources = (host_side, device_side) if self._to_host else (device_side, host_side)
        batch_size = max(1, _PACE_BYTES // block_bytes)
        for start in range(0, len(targets), batch_size):
            copy_runs(targets[start : start + batch_size], sources[start : start + batch_size], block_bytes)
            event = record_event(self._device)
            assert event is not None
            self._events.append(event)
            if len(self._events) > 1:
                self._events.popleft().synchronize()


def _rectangles(device_pool: DeviceKVPool, host_pool: HostKVPool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views (num_blocks, layers, 2, heads, block_size, head_dim) of what the shard shares with each host piece.

    A block of the host view is contiguous; a block of the device view is where its heads are all of the shard's.
    """
    for piece, (layers, heads), piece_layers in host_pool.layout.overlaps(device_pool.shard):
        yield (
            device_pool.tensor[:, layers.start : layers.stop, :, heads.start : heads.stop],
            host_pool.piece(piece)[:, piece_layers.start : piece_layers.stop],
        )


def _staged(rectangle: torch.Tensor, num_blocks: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Cover `num_blocks` blocks in batches: (index of the first block, contiguous buffer for the batch).

    Batches share one buffer, and the allocator hands it on within the current stream only: copies queued on that
    stream are done with it before the next ones begin.
    """
    block_bytes = rectangle[0].numel() * rectangle.element_size()
    batch_size = max(1, min(num_blocks, STAGING_BYTES // block_bytes))
    buffer = rectangle.new_empty((batch_size, *rectangle.shape[1:]))
    for start in range(0, num_blocks, batch_size):
        yield start, buffer[: num_blocks - start]


def _index(blocks: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    if device is None:
        return torch.tensor(blocks, dtype=torch.int64)
    return torch.tensor(blocks, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)

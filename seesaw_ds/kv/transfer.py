"""Copies of whole blocks between a device pool, of either phase, and the host pool. This is the KV re-shard.

Prefill ranks write their rectangles of a block's row and decode ranks read theirs; swap-in and eviction are the same
copies with a decode shard. On CUDA they are queued on the current stream: a rectangle that is not contiguous in the
device pool goes through a staging buffer on the device, so that only contiguous runs cross the bus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.parallel.device import is_cuda, record_event

if TYPE_CHECKING:
    from seesaw_ds.parallel.device import Event

_STAGING_BYTES = 64 << 20
_PACE_BYTES = 16 << 20


def copy_to_host(
    device_pool: DeviceKVPool, device_blocks: Sequence[int], host_pool: HostKVPool, host_blocks: Sequence[int]
) -> int:
    """Copy block ``device_blocks[i]``, this rank's part of it, to ``host_blocks[i]``; returns the bytes copied.

    On CUDA the host blocks are complete when the current stream has come this far.
    """
    assert len(device_blocks) == len(host_blocks), (len(device_blocks), len(host_blocks))
    copied_bytes = 0
    pace = _Pace(device_pool.tensor.device)
    for on_device, on_host in _rectangles(device_pool, host_pool):
        block_bytes = on_host[:1].numel() * on_host.element_size()
        if not is_cuda(on_device.device):
            source = on_device.index_select(0, _index(device_blocks))
            on_host.index_copy_(0, _index(host_blocks), source)
        elif on_device[:1].is_contiguous():
            for device_block, host_block in zip(device_blocks, host_blocks, strict=True):
                on_host[host_block].copy_(on_device[device_block], non_blocking=True)
                pace.count(block_bytes)
        else:
            for start, staging in _staged(on_device, len(device_blocks)):
                batch = slice(start, start + len(staging))
                torch.index_select(on_device, 0, _index(device_blocks[batch], on_device.device), out=staging)
                for host_block, staged in zip(host_blocks[batch], staging, strict=True):
                    on_host[host_block].copy_(staged, non_blocking=True)
                    pace.count(block_bytes)
        copied_bytes += len(host_blocks) * block_bytes
    return copied_bytes


def copy_to_device(
    host_pool: HostKVPool, host_blocks: Sequence[int], device_pool: DeviceKVPool, device_blocks: Sequence[int]
) -> int:
    """Copy this rank's part of block ``host_blocks[i]`` to ``device_blocks[i]``; returns the bytes copied.

    On CUDA the host blocks must stay as they are until the current stream has come this far.
    """
    assert len(device_blocks) == len(host_blocks), (len(device_blocks), len(host_blocks))
    copied_bytes = 0
    pace = _Pace(device_pool.tensor.device)
    for on_device, on_host in _rectangles(device_pool, host_pool):
        block_bytes = on_host[:1].numel() * on_host.element_size()
        if not is_cuda(on_device.device):
            source = on_host.index_select(0, _index(host_blocks))
            on_device.index_copy_(0, _index(device_blocks), source)
        elif on_device[:1].is_contiguous():
            for host_block, device_block in zip(host_blocks, device_blocks, strict=True):
                on_device[device_block].copy_(on_host[host_block], non_blocking=True)
                pace.count(block_bytes)
        else:
            for start, staging in _staged(on_device, len(device_blocks)):
                batch = slice(start, start + len(staging))
                for host_block, staged in zip(host_blocks[batch], staging, strict=True):
                    staged.copy_(on_host[host_block], non_blocking=True)
                    pace.count(block_bytes)
                on_device.index_copy_(0, _index(device_blocks[batch], on_device.device), staging)
        copied_bytes += len(host_blocks) * block_bytes
    return copied_bytes


class _Pace:
    """Keeps at most twice `_PACE_BYTES` of copies queued on the device: whoever queues more waits here.

    A direction of the bus has one copy engine, which takes the copies of all streams in the order in which they were
    queued. So a decode step's indices, a few KB, had to wait for a whole sequence's KV that was queued before: on two
    H200 steps of 38 ms took 60 to 118 ms beside swaps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_bytes = 0
        self._events: deque[Event] = deque()

    def count(self, num_bytes: int) -> None:
        """Count bytes that were queued just now."""
        self._num_bytes += num_bytes
        if self._num_bytes < _PACE_BYTES:
            return
        self._num_bytes = 0
        event = record_event(self._device)
        if event is not None:
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
    batch_size = max(1, min(num_blocks, _STAGING_BYTES // block_bytes))
    buffer = rectangle.new_empty((batch_size, *rectangle.shape[1:]))
    for start in range(0, num_blocks, batch_size):
        yield start, buffer[: num_blocks - start]


def _index(blocks: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    if device is None:
        return torch.tensor(blocks, dtype=torch.int64)
    return torch.tensor(blocks, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)

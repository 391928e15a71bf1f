"""Copies of whole blocks between a device pool, of either phase, and the host pool. This is the KV re-shard.

Prefill ranks write their rectangles of a block's row and decode ranks read theirs; swap-in and eviction are the same
copies with a decode shard. A rectangle is one run on both sides where it has all of both sides' layers, else one run a
head. On CUDA the runs are queued on the current stream, for the copy engine: no kernel takes part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from seesaw_ds.kv.device_pool import DeviceKVPool, part_of
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.parallel.device import is_cuda, record_event
from seesaw_ds.parallel.row_copies import copy_runs, row_addresses

if TYPE_CHECKING:
    from seesaw_ds.parallel.device import Event

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
    for piece, in_shard, in_piece in host_pool.layout.overlaps(device_pool.shard):
        on_device, on_host = device_pool.part(in_shard), part_of(host_pool.piece(piece), in_piece)
        if is_cuda(on_device.device):
            sides = zip(*runs_of(on_device, on_host), strict=True)
            bus.move(*map(RunList, sides, (device_blocks, host_blocks)))
        else:
            pair = ((on_device, torch.tensor(device_blocks)), (on_host, torch.tensor(host_blocks)))
            (source, source_index), (target, target_index) = pair if to_host else pair[::-1]
            target.index_copy_(0, target_index, source.index_select(0, source_index))
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

    def move(self, on_device: RunList, on_host: RunList) -> None:
        """Queue the copies of the runs on one side to those on the other."""
        target, source = (on_host, on_device) if self._to_host else (on_device, on_host)
        targets, sources = target.addresses(), source.addresses()
        batch_size = max(1, _PACE_BYTES // source.num_bytes)
        for start in range(0, len(targets), batch_size):
            copy_runs(targets[start : start + batch_size], sources[start : start + batch_size], source.num_bytes)
            event = record_event(self._device)
            assert event is not None
            self._events.append(event)
            if len(self._events) > 1:
                self._events.popleft().synchronize()


@dataclass(frozen=True)
class RunList:
    """Runs of equal size of some `blocks`: `views` are (num_blocks, ...) each, contiguous in a block."""

    views: tuple[torch.Tensor, ...]
    blocks: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Of one run."""
        return int(self.views[0][0].numel() * self.views[0].element_size())

    def addresses(self) -> np.ndarray:
        """Where the runs begin, block after block."""
        return np.stack([row_addresses(view, np.asarray(self.blocks)) for view in self.views], axis=1).ravel()


def runs_of(on_device: torch.Tensor, on_host: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of a rectangle on both sides that are contiguous in a block: all of it, or each of its heads."""
    if on_device[0].is_contiguous() and on_host[0].is_contiguous():
        return [(on_device, on_host)]
    return list(zip(on_device.unbind(1), on_host.unbind(1), strict=True))

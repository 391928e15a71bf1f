"""KV re-sharding from device to device: blocks that stay on the GPU take the other phase's layout, in place.

A rank owns a rectangle of (layers x heads) of every block in each phase. What two ranks exchange is where one's old
rectangle meets the other's new one::

    P2->T2, 4 layers, 2 heads      rank 0 (layers 0 1)         rank 1 (layers 2 3)
                                   head 0: keeps               head 0: sends to rank 0
                                   head 1: sends to rank 1     head 1: keeps

Blocks go in batches. A batch is read whole into buffers, its own part too, before any of it is written, because the new
form of a block overwrites the old one. Two batches are under way: one travels while the other is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from seesaw_ds.kv.device_pool import DeviceKVPool, part_of
from seesaw_ds.layout import LayoutPair, Phase, Shard
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.scratch import Cutter, padded
from seesaw_ds.parallel.transport import Handle, Transport

# Of one batch, what goes out and what comes in: large enough for the full rate of a link, small beside the pools.
_BATCH_BYTES = 128 << 20
_NUM_UNDER_WAY = 2
KV_SCRATCH_BYTES = _NUM_UNDER_WAY * _BATCH_BYTES


class _Parcel(NamedTuple):
    """What goes to or comes from `rank`: a rectangle, counted within this rank's shard."""

    rank: int
    part: Shard


class _Batch(NamedTuple):
    """A batch under way, and where it belongs."""

    handle: Handle
    block_index: torch.Tensor
    arrived: list[tuple[_Parcel, torch.Tensor]]


class KVExchange:
    """Moves the blocks of one replica between its phases' layouts. All its ranks call `run` together.

    `pools` are this rank's views of one memory. `transport` connects (at least) the replica's ranks, and `ranks` are
    their global numbers in replica order. `scratch`, of KV_SCRATCH_BYTES at least, is used while `run`'s work goes on;
    without one the exchange has memory of its own.
    """

    def __init__(
        self,
        layouts: LayoutPair,
        pools: dict[Phase, DeviceKVPool],
        num_layers: int,
        num_kv_heads: int,
        transport: Transport,
        ranks: Sequence[int],
        scratch: torch.Tensor | None = None,
    ) -> None:
        self._blocks = {phase: _widened(pool.tensor) for phase, pool in pools.items()}
        self._transport = transport
        self._ranks = tuple(ranks)
        self._rank = self._ranks.index(dist.get_rank())
        self._is_static = layouts.is_static
        shards = {
            phase: [layouts[phase].shard(rank, num_layers, num_kv_heads) for rank in range(layouts.replica_size)]
            for phase in Phase
        }
        self._outgoing = {to: self._parcels(shards[to.other][self._rank], shards[to]) for to in Phase}
        self._incoming = {to: self._parcels(shards[to][self._rank], shards[to.other]) for to in Phase}
        self._block_bytes = max(self._bytes_under_way(to) for to in Phase)
        if not self._is_static and scratch is None:
            num_bytes = _NUM_UNDER_WAY * max(_BATCH_BYTES, self._block_bytes)
            scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._blocks[Phase.PREFILL].device)
        self._buffers = () if scratch is None else scratch.chunk(_NUM_UNDER_WAY)

    def run(self, to: Phase, blocks: Sequence[int]) -> int:
        """Give `blocks` the layout of `to`; returns the bytes received from other ranks.

        On CUDA the work is queued: it waits for the current stream, and the current stream waits for it.
        """
        if self._is_static or not blocks:
            return 0
        old, new = self._blocks[to.other], self._blocks[to]
        batch_size = len(self._buffers[0]) // self._block_bytes
        received_bytes = 0
        previous: _Batch | None = None
        for number, index in enumerate(to_device(blocks, old.device).split(batch_size)):
            batch = self._start(old, to, index, Cutter(self._buffers[number % _NUM_UNDER_WAY]))
            if previous is not None:
                _finish(previous, new)
            previous = batch
            received_bytes += sum(
                data.numel() * data.element_size() for parcel, data in batch.arrived if parcel.rank != self._rank
            )
        assert previous is not None
        _finish(previous, new)
        return received_bytes

    def _parcels(self, shard: Shard, others: list[Shard]) -> list[_Parcel]:
        """What of `shard`, one of this rank, each rank has in `others`."""
        parcels = []
        for rank, other in enumerate(others):
            common = shard.intersect(other)
            if not common.is_empty:
                parcels.append(_Parcel(rank, common.within(shard)))
        return parcels

    def _bytes_under_way(self, to: Phase) -> int:
        """What a block takes of a buffer on its way, at most."""
        old, new = self._blocks[to.other], self._blocks[to]
        sizes = [part_of(old, parcel.part)[0].numel() for parcel in self._outgoing[to]]
        sizes += [part_of(new, parcel.part)[0].numel() for parcel in self._incoming[to] if parcel.rank != self._rank]
        return sum(padded(numel * old.element_size()) for numel in sizes)

    def _start(self, old: torch.Tensor, to: Phase, index: torch.Tensor, buffer: Cutter) -> _Batch:
        parts = {}
        for parcel in self._outgoing[to]:
            source = part_of(old, parcel.part)
            part = buffer.take((len(index), *source.shape[1:]), old.dtype)
            parts[parcel.rank] = torch.index_select(source, 0, index, out=part)
        new = self._blocks[to]
        receives = []
        arrived = []
        for parcel in self._incoming[to]:
            if parcel.rank == self._rank:
                arrived.append((parcel, parts.pop(self._rank)))
                continue
            landing = buffer.take((len(index), *part_of(new, parcel.part).shape[1:]), new.dtype)
            arrived.append((parcel, landing))
            receives.append((landing, self._ranks[parcel.rank]))
        sends = [(data, self._ranks[rank]) for rank, data in parts.items()]
        return _Batch(self._transport.exchange(sends, receives), index, arrived)


def _widened(blocks: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes where head_dim allows: selecting costs by the element, not by the byte."""
    ratio = torch.int64.itemsize // blocks.element_size()
    return blocks if blocks.shape[-1] % ratio else blocks.view(torch.int64)


def _finish(batch: _Batch, new: torch.Tensor) -> None:
    batch.handle.wait()
    for parcel, data in batch.arrived:
        part_of(new, parcel.part).index_copy_(0, batch.block_index, data)

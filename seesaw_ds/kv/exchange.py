"""KV re-sharding from device to device: blocks that stay on the GPU take the other phase's layout, in place.

A rank owns a rectangle of (layers x heads) of every block in each phase. What two ranks exchange is where one's old
rectangle meets the other's new one::

    P2->T2, 4 layers, 2 heads      rank 0 (layers 0 1)         rank 1 (layers 2 3)
                                   head 0: keeps               head 0: sends to rank 0
                                   head 1: sends to rank 1     head 1: keeps

Blocks go in batches. A batch is read whole into buffers, its own part too, before any of it is written, because the new
form of a block overwrites the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.layout import LayoutPair, Phase, Shard
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.transport import Handle, Transport

# Of one batch, over all ranks that it goes to: large enough for the full rate of a link, small beside the pools.
_BATCH_BYTES = 128 << 20


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
    their global numbers in replica order.
    """

    def __init__(
        self,
        layouts: LayoutPair,
        pools: dict[Phase, DeviceKVPool],
        num_layers: int,
        num_kv_heads: int,
        transport: Transport,
        ranks: Sequence[int],
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

    def run(self, to: Phase, blocks: Sequence[int]) -> int:
        """Give `blocks` the layout of `to`; returns the bytes received from other ranks.

        On CUDA the work is queued: it waits for the current stream, and the current stream waits for it.
        """
        if self._is_static or not blocks:
            return 0
        old, new = self._blocks[to.other], self._blocks[to]
        batch_size = max(1, _BATCH_BYTES // (max(old[0].numel(), new[0].numel()) * old.element_size()))
        received_bytes = 0
        previous: _Batch | None = None
        for index in to_device(blocks, old.device).split(batch_size):
            batch = self._start(old, to, index)
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
                part = Shard(common.layers.within(shard.layers), common.kv_heads.within(shard.kv_heads))
                parcels.append(_Parcel(rank, part))
        return parcels

    def _start(self, old: torch.Tensor, to: Phase, index: torch.Tensor) -> _Batch:
        parts = {parcel.rank: _part(old, parcel.part).index_select(0, index) for parcel in self._outgoing[to]}
        new = self._blocks[to]
        receives = []
        arrived = []
        for parcel in self._incoming[to]:
            if parcel.rank == self._rank:
                arrived.append((parcel, parts.pop(self._rank)))
                continue
            shape = (len(index), *_part(new, parcel.part).shape[1:])
            landing = torch.empty(shape, dtype=new.dtype, device=new.device)
            arrived.append((parcel, landing))
            receives.append((landing, self._ranks[parcel.rank]))
        sends = [(data, self._ranks[rank]) for rank, data in parts.items()]
        return _Batch(self._transport.exchange(sends, receives), index, arrived)


def _widened(blocks: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes where head_dim allows: selecting costs by the element, not by the byte."""
    ratio = torch.int64.itemsize // blocks.element_size()
    return blocks if blocks.shape[-1] % ratio else blocks.view(torch.int64)


def _part(tensor: torch.Tensor, part: Shard) -> torch.Tensor:
    return tensor[:, part.layers.start : part.layers.stop, :, part.kv_heads.start : part.kv_heads.stop]


def _finish(batch: _Batch, new: torch.Tensor) -> None:
    batch.handle.wait()
    for parcel, data in batch.arrived:
        _part(new, parcel.part).index_copy_(0, batch.block_index, data)

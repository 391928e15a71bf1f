"""What a change of layout and the host KV pool cost on the links, from the bytes that have to move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase, Shard
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.sched.output import PreloadSize
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape


class TransitionSeconds(NamedTuple):
    """Seconds of a transition one way: the weights', and each KV block's that stays on the devices.

    For weights that have all come early, `early` is how long they were on their way, beside steps, and `landing` takes
    them from KV blocks to their slots.
    """

    weights: float
    kv_block: float
    landing: float
    early: float


@dataclass(frozen=True, slots=True)
class ReshardSeconds:
    """Seconds to take the other phase's layout, by the phase that is entered."""

    to_prefill: TransitionSeconds
    to_decode: TransitionSeconds

    def to(self, phase: Phase, num_kv_blocks: int = 0, preloaded: float = 0.0) -> float:
        """Seconds of the transition into `phase` with `num_kv_blocks` blocks on the devices, and a share `preloaded` of
        the weights too.
        """
        way = self.to_prefill if phase is Phase.PREFILL else self.to_decode
        return (1 - preloaded) * way.weights + preloaded * way.landing + num_kv_blocks * way.kv_block


def reshard_seconds(
    shape: ModelShape, pair: LayoutPair, hardware: HardwareProfile, dtype: str, weight_reshard: str, block_size: int
) -> ReshardSeconds:
    """Seconds of a transition, for the rank that waits longest; a static pair moves nothing.

    Weights: "exchange" receives what the rank does not hold yet, layer by layer, from other devices; "host" copies it
    from host memory, all devices at once. A KV block of `block_size` tokens is read and written in device
    memory once, and what the rank does not hold yet of it comes from other devices.
    """
    ways = {}
    for to in Phase:
        way = TransitionSeconds(0.0, 0.0, 0.0, 0.0)
        if not pair.is_static:
            source, target = pair[to.other], pair[to]
            num_bytes = _received_bytes(shape, pair.cells_per_layer, source, target, dtype)
            way = TransitionSeconds(
                weights=_weights_seconds(num_bytes, shape, hardware, weight_reshard),
                kv_block=_kv_block_seconds(shape, source, target, hardware, dtype, block_size),
                landing=2 * num_bytes / (hardware.memory_bandwidth * hardware.memory_efficiency),
                early=_early_seconds(num_bytes, shape, hardware),
            )
        ways[to] = way
    return ReshardSeconds(ways[Phase.PREFILL], ways[Phase.DECODE])


def preload_size(
    shape: ModelShape, pair: LayoutPair, dtype: str, weight_reshard: str, block_size: int
) -> PreloadSize | None:
    """What of the exchange into the decode layout can come early, if there is one; a round for each cell."""
    if pair.is_static or weight_reshard != "exchange":
        return None
    cells = pair.cells_per_layer
    num_rounds = max(received for _, received in _parts(pair.prefill, pair.decode, shape.num_layers, cells))
    if num_rounds == 0:
        return None
    shards = [
        max((pair[phase].shard(rank, shape.num_layers, shape.num_kv_heads) for phase in Phase), key=_size)
        for rank in range(pair.replica_size)
    ]
    smallest = min(shards, key=_size)
    block_bytes = shape.kv_block_bytes(smallest.layers.size, smallest.kv_heads.size, block_size, dtype)
    return PreloadSize(num_rounds, math.ceil(_cell_bytes(shape, cells, dtype) / block_bytes))


def _size(shard: Shard) -> int:
    return shard.layers.size * shard.kv_heads.size


def _cell_bytes(shape: ModelShape, cells: int, dtype: str) -> float:
    return shape.layer_parameters * DTYPE_BYTES[dtype] / cells


@cache
def _parts(source: ParallelLayout, target: ParallelLayout, num_layers: int, width: int) -> tuple[tuple[int, int], ...]:
    """Of each rank's new shard of `num_layers` x `width` parts: how many there are, how many it does not hold yet.

    Kept, because a plan asks for it again with each micro-batch size.
    """
    parts = []
    for rank in range(target.replica_size):
        new = target.shard(rank, num_layers, width)
        kept = new.intersect(source.shard(rank, num_layers, width))
        num_new = new.layers.size * new.kv_heads.size
        parts.append((num_new, num_new - kept.layers.size * kept.kv_heads.size))
    return tuple(parts)


def _received_bytes(shape: ModelShape, cells: int, source: ParallelLayout, target: ParallelLayout, dtype: str) -> float:
    """Weights that the rank which lacks most does not hold yet."""
    num_received = max(received for _, received in _parts(source, target, shape.num_layers, cells))
    return num_received * _cell_bytes(shape, cells, dtype)


def _weights_seconds(num_bytes: float, shape: ModelShape, hardware: HardwareProfile, weight_reshard: str) -> float:
    if weight_reshard == "host":
        return num_bytes / hardware.host_to_device
    return num_bytes / _exchange_bandwidth(hardware) + hardware.send_seconds * shape.num_layers


def _early_seconds(num_bytes: float, shape: ModelShape, hardware: HardwareProfile) -> float:
    # Beside steps weights go through host memory, where a faster exchange between the devices is of no use. A slower
    # one is of no other way: it goes through host memory too, or is gloo's.
    bandwidth = min(_exchange_bandwidth(hardware), hardware.duplex)
    return num_bytes / bandwidth + hardware.send_seconds * shape.num_layers


def _kv_block_seconds(
    shape: ModelShape,
    source: ParallelLayout,
    target: ParallelLayout,
    hardware: HardwareProfile,
    dtype: str,
    block_size: int,
) -> float:
    part_bytes = shape.kv_block_bytes(1, 1, block_size, dtype)
    bandwidth = hardware.memory_bandwidth * hardware.memory_efficiency
    return max(
        part_bytes * (2 * num_new / bandwidth + num_received / _exchange_bandwidth(hardware))
        for num_new, num_received in _parts(source, target, shape.num_layers, shape.num_kv_heads)
    )


def _exchange_bandwidth(hardware: HardwareProfile) -> float:
    return hardware.exchange_bandwidth or hardware.send_bandwidth


@dataclass(slots=True)
class CopyLanes:
    """One device's two copy engines: each copies in order, and both are slower while the other is busy."""

    hardware: HardwareProfile
    in_free: float = 0.0
    out_free: float = 0.0

    def copy_in(self, now: float, num_bytes: float) -> float:
        """Start a copy to the device when the lane is free; returns when it ends."""
        start = max(now, self.in_free)
        is_duplex = start < self.out_free
        self.in_free = start + num_bytes / (self.hardware.duplex if is_duplex else self.hardware.host_to_device)
        return self.in_free

    def copy_out(self, now: float, num_bytes: float) -> float:
        """Start a copy to the host when the lane is free; returns when it ends."""
        start = max(now, self.out_free)
        is_duplex = start < self.in_free
        self.out_free = start + num_bytes / (self.hardware.duplex if is_duplex else self.hardware.device_to_host)
        return self.out_free

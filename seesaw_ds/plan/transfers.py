"""What a change of layout and the host KV pool cost on the links, from the bytes that have to move."""

from __future__ import annotations

from dataclasses import dataclass

from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape


@dataclass(frozen=True, slots=True)
class ReshardSeconds:
    """Seconds to take the other phase's weights, by the phase that is entered."""

    to_prefill: float
    to_decode: float

    def to(self, phase: Phase) -> float:
        """Seconds of the transition into `phase`."""
        return self.to_prefill if phase is Phase.PREFILL else self.to_decode


def reshard_seconds(
    shape: ModelShape, pair: LayoutPair, hardware: HardwareProfile, dtype: str, weight_reshard: str
) -> ReshardSeconds:
    """Seconds of a transition's weights, for the rank that waits longest.

    "exchange" receives what the rank does not hold yet, layer by layer, from other devices; "host" copies the whole
    shard from host memory, all devices at once. A static pair moves nothing.
    """
    return ReshardSeconds(
        _one_way(shape, pair, pair.decode, pair.prefill, hardware, dtype, weight_reshard),
        _one_way(shape, pair, pair.prefill, pair.decode, hardware, dtype, weight_reshard),
    )


def _one_way(
    shape: ModelShape,
    pair: LayoutPair,
    source: ParallelLayout,
    target: ParallelLayout,
    hardware: HardwareProfile,
    dtype: str,
    weight_reshard: str,
) -> float:
    if pair.is_static:
        return 0.0
    cells = pair.cells_per_layer
    cell_bytes = shape.layer_parameters * DTYPE_BYTES[dtype] / cells
    longest = 0.0
    for rank in range(pair.replica_size):
        old = source.shard(rank, shape.num_layers, cells)
        new = target.shard(rank, shape.num_layers, cells)
        new_cells = new.layers.size * new.kv_heads.size
        if weight_reshard == "host":
            seconds = new_cells * cell_bytes / hardware.host_to_device
        else:
            kept = old.intersect(new)
            num_received = new_cells - kept.layers.size * kept.kv_heads.size
            seconds = num_received * cell_bytes / hardware.send_bandwidth
            seconds += hardware.send_seconds * shape.num_layers
        longest = max(longest, seconds)
    return longest


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

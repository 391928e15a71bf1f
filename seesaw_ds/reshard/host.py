"""Weight re-sharding from a node-shared copy of all cells in host memory; works for any pair of layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seesaw_ds.layout import Phase
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.plan import CellTensor, ReshardPlan


class HostWeights:
    """Every cell of every layer, once per node: [layer][cell][cell tensor], each tensor contiguous (rows, cols).

    Takes over `mapping`, which holds at least `required_bytes`. Each rank stores the cells that it loads; readers
    need a barrier after the last store.
    """

    def __init__(
        self,
        mapping: NodeSharedMapping,
        cell_tensors: Sequence[CellTensor],
        num_layers: int,
        cells_per_layer: int,
        dtype: torch.dtype,
    ) -> None:
        self._mapping = mapping
        cell_numel = sum(spec.numel for spec in cell_tensors)
        cells = mapping.tensor(0, (num_layers, cells_per_layer, cell_numel), dtype)
        self._tensors = {}
        offset = 0
        for spec in cell_tensors:
            part = cells[:, :, offset : offset + spec.numel]
            self._tensors[spec.name] = part.unflatten(2, (spec.rows, spec.cols))
            offset += spec.numel

    @staticmethod
    def required_bytes(
        cell_tensors: Sequence[CellTensor], num_layers: int, cells_per_layer: int, dtype: torch.dtype
    ) -> int:
        """Bytes of the mapping."""
        return num_layers * cells_per_layer * sum(spec.numel for spec in cell_tensors) * dtype.itemsize

    def cell(self, layer: int, cell: int, name: str) -> torch.Tensor:
        """The view (rows, cols) of one cell tensor, contiguous."""
        return self._tensors[name][layer, cell]

    def store(self, layer: int, cell: int, name: str, tensor: torch.Tensor) -> None:
        """Copy `tensor` (rows, cols), from any device, into its place."""
        self.cell(layer, cell, name).copy_(tensor)

    def close(self) -> None:
        """Let go of the mapping."""
        self._tensors.clear()
        self._mapping.close()


class HostReshard:
    """Reads the cells that a rank lacks from `host`, which it takes over; `phase` is the arena's at the start."""

    def __init__(
        self,
        plan: ReshardPlan,
        arena: WeightArena,
        host: HostWeights,
        replica_rank: int,
        phase: Phase = Phase.PREFILL,
    ) -> None:
        self._incoming = {to_phase: plan.incoming(to_phase, replica_rank) for to_phase in Phase}
        self._arena = arena
        self._host = host
        self._phase = phase

    def run(self, to_phase: Phase) -> int:
        """Copy the cells that are not in their slot already; returns the bytes copied.

        On CUDA the copies are queued on the current stream.
        """
        assert to_phase is not self._phase, f"the weights are in phase {to_phase.value} already"
        copied_bytes = 0
        for (layer, cell), slot in self._incoming[to_phase].items():
            for spec in self._arena.cell_tensors:
                target = self._arena.cell(spec.name, slot)
                target.copy_(self._host.cell(layer, cell, spec.name), non_blocking=True)
                copied_bytes += target.nbytes
        self._phase = to_phase
        return copied_bytes

    def close(self) -> None:
        """Let go of the host copy."""
        self._host.close()

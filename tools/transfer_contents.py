"""Weights and KV with known contents, for tools/bench_transfers.py: every element depends on what it is and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from seesaw_ds.kv.device_pool import DeviceKVPool, allocate_kv, block_numel
from seesaw_ds.layout import LayoutPair, Phase, Shard
from seesaw_ds.model.weights import cell_tensors
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.host import HostWeights
from seesaw_ds.reshard.plan import plan_reshard
from seesaw_ds.shapes import ModelShape

BLOCK_SIZE = 16
BLOCKS_AT_ONCE = 128  # filled, checked or copied together: about what one sequence has
_MULTIPLIER = -7046029254386353131  # odd, so no two numbers have the same product
_MATRIX_BITS = 40  # more places than any matrix has
_SALT_BITS = 30  # more blocks than any pool has


def words(ids: torch.Tensor) -> torch.Tensor:
    """A different random-looking int64 for each id."""
    product = ids * _MULTIPLIER
    return product ^ (product >> 29)


class KnownWeights:
    """The arena of replica rank `rank`, at first in prefill layout."""

    def __init__(
        self, shape: ModelShape, layouts: LayoutPair, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = plan_reshard(layouts, shape.num_layers)
        self.arena = WeightArena(cell_tensors(shape, layouts.cells_per_layer), self.plan.num_slots[rank], dtype, device)
        self._rank = rank
        for layer, cell, index, matrix in self._owned(Phase.PREFILL):
            matrix.view(torch.int64).copy_(self._expected(layer, cell, index))

    def is_exact(self, phase: Phase) -> bool:
        """Whether all that this rank owns in `phase` is in its place."""
        return all(
            torch.equal(matrix.view(torch.int64), self._expected(layer, cell, index))
            for layer, cell, index, matrix in self._owned(phase)
        )

    def store(self, host: HostWeights) -> None:
        """Copy this rank's cells of prefill to the node's copy."""
        for layer, cell, index, matrix in self._owned(Phase.PREFILL):
            host.store(layer, cell, self.arena.cell_tensors[index].name, matrix)

    def _owned(self, phase: Phase) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """(layer, cell, index of the matrix, matrix) of all that is here in `phase`."""
        for (layer, cell), slot in self.plan.placement[phase][self._rank].items():
            for index, spec in enumerate(self.arena.cell_tensors):
                yield layer, cell, index, self.arena.cell(spec.name, slot)

    def _expected(self, layer: int, cell: int, index: int) -> torch.Tensor:
        specs = self.arena.cell_tensors
        num_words = specs[index].numel * self.arena.dtype.itemsize // 8
        ids = torch.arange(num_words, device=self.arena.device).view(specs[index].rows, -1)
        matrix = (layer * self.plan.layouts.cells_per_layer + cell) * len(specs) + index
        return words(ids + (matrix << _MATRIX_BITS))


class KnownKV:
    """One KV memory of this rank, seen in both layouts."""

    def __init__(
        self,
        shape: ModelShape,
        shards: Mapping[Phase, Shard],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        numel = max(block_numel(shard, BLOCK_SIZE, shape.head_dim) for shard in shards.values())
        self.memory = allocate_kv(num_blocks, numel, dtype, device)
        self.pools = {
            phase: DeviceKVPool(self.memory, shard, BLOCK_SIZE, shape.head_dim) for phase, shard in shards.items()
        }
        self._salt = 0
        words_per_head = shape.head_dim * dtype.itemsize // 8
        self._sizes = (shape.num_kv_heads, shape.num_layers, 2, BLOCK_SIZE, words_per_head)
        self._device = device

    def fill(self, phase: Phase) -> None:
        """Give every block new contents, in the layout of `phase`."""
        self._salt += 1
        for blocks, view in self._batches(phase):
            view.copy_(self.expected(blocks, self.pools[phase].shard))

    def is_exact(self, phase: Phase) -> bool:
        """Whether every block has its contents in the layout of `phase`."""
        shard = self.pools[phase].shard
        return all(torch.equal(view, self.expected(blocks, shard)) for blocks, view in self._batches(phase))

    def expected(self, blocks: torch.Tensor, shard: Shard) -> torch.Tensor:
        """What `shard` has of `blocks` (int64, on the device), as words: (blocks, heads, layers, 2, tokens, words)."""
        axes = [torch.arange(size, device=self._device) for size in self._sizes]
        axes[0] = axes[0][shard.kv_heads.start : shard.kv_heads.stop]
        axes[1] = axes[1][shard.layers.start : shard.layers.stop]
        ids = blocks + (self._salt << _SALT_BITS)
        for size, axis in zip(self._sizes, axes, strict=True):
            ids = ids.unsqueeze(-1) * size + axis
        return words(ids)

    def _batches(self, phase: Phase) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(block numbers, their words) of some blocks at a time."""
        tensor = self.pools[phase].tensor.view(torch.int64)
        numbers = torch.arange(len(tensor), device=self._device)
        for start in range(0, len(tensor), BLOCKS_AT_ONCE):
            part = slice(start, start + BLOCKS_AT_ONCE)
            yield numbers[part], tensor[part]

"""The KV pool in host memory: one node-shared mapping that all ranks of a replica write and read."""

from __future__ import annotations

import torch

from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.parallel.shared_memory import NodeSharedMapping


class HostKVPool:
    """`num_blocks` rows of `layout`, as tensors over `mapping`, which the pool takes over.

    The pool does not know which blocks are in use: block ids come from the scheduler.
    """

    def __init__(
        self, mapping: NodeSharedMapping, layout: HostBlockLayout, num_blocks: int, dtype: torch.dtype
    ) -> None:
        assert dtype.itemsize == layout.itemsize, (dtype, layout.itemsize)
        self.layout = layout
        self.num_blocks = num_blocks
        self.dtype = dtype
        self._mapping = mapping
        rows = mapping.tensor(0, (num_blocks, layout.row_numel), dtype)
        self._pieces = []
        for offset, shard in zip(layout.piece_offsets, layout.pieces, strict=True):
            shape = (shard.kv_heads.size, shard.layers.size, 2, layout.block_size, layout.head_dim)
            self._pieces.append(rows[:, offset : offset + layout.shard_numel(shard)].unflatten(1, shape))

    def piece(self, index: int) -> torch.Tensor:
        """All blocks of one of the layout's pieces: (num_blocks, kv_heads, layers, 2, block_size, head_dim).

        Strided over the rows; any layers of one head of a block are contiguous.
        """
        return self._pieces[index]

    def close(self) -> None:
        """Let go of the mapping."""
        self._pieces.clear()
        self._mapping.close()

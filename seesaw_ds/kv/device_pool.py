"""The paged KV pool of one rank on its device: one memory, seen in either phase's layout."""

from __future__ import annotations

import torch

from seesaw_ds.layout import Shard


class DeviceKVPool:
    """`num_blocks` blocks of the layers and heads in `shard`, over `memory` of `allocate_kv`.

    `tensor` is (num_blocks, num_local_kv_heads, num_local_layers, 2, block_size, head_dim), a block in the order of the
    host pool. All of a block's KV is one run, so that it can be swapped in one copy; where the other phase's shard is
    larger, the run has a rest that this one does not use.
    """

    def __init__(self, memory: torch.Tensor, shard: Shard, block_size: int, head_dim: int) -> None:
        self.shard = shard
        self.num_blocks = memory.shape[0]
        self.block_size = block_size
        shape = (shard.kv_heads.size, shard.layers.size, 2, block_size, head_dim)
        self.tensor = memory[:, : block_numel(shard, block_size, head_dim)].unflatten(1, shape)

    def layer(self, local_layer: int) -> torch.Tensor:
        """The view (num_blocks, 2, num_local_kv_heads, block_size, head_dim) of one of this rank's layers."""
        return self.tensor[:, :, local_layer].transpose(1, 2)

    def part(self, part: Shard) -> torch.Tensor:
        """The view of some heads and layers of all blocks, counted within the pool's shard."""
        return part_of(self.tensor, part)


def part_of(blocks: torch.Tensor, part: Shard) -> torch.Tensor:
    """Some heads and layers of `blocks` (num_blocks, kv_heads, layers, ...), as a view."""
    return blocks[:, part.kv_heads.start : part.kv_heads.stop, part.layers.start : part.layers.stop]


def block_numel(shard: Shard, block_size: int, head_dim: int) -> int:
    """Elements of one block in `shard`."""
    return shard.layers.size * 2 * shard.kv_heads.size * block_size * head_dim


def allocate_kv(num_blocks: int, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of `num_blocks` blocks of `numel` elements.

    It starts as zeros, since attention may read (and mask) slots of a block that no token was written to.
    """
    return torch.zeros((num_blocks, numel), dtype=dtype, device=device)

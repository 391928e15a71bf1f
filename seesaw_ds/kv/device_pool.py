"""The paged KV pool of one rank on its device, for one phase's shard."""

from __future__ import annotations

import torch

from seesaw_ds.layout import Shard


class DeviceKVPool:
    """`num_blocks` blocks of the layers and heads in `shard`.

    `tensor` is (num_blocks, num_local_layers, 2, num_local_kv_heads, block_size, head_dim), contiguous: all of a
    block's KV is one run, so that it can be swapped in one copy. It starts as zeros, since attention may read (and
    mask) slots of a block that no token was written to.
    """

    def __init__(
        self,
        shard: Shard,
        num_blocks: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shard = shard
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, shard.layers.size, 2, shard.kv_heads.size, block_size, head_dim)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, local_layer: int) -> torch.Tensor:
        """The view (num_blocks, 2, num_local_kv_heads, block_size, head_dim) of one of this rank's layers."""
        return self.tensor[:, local_layer]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.tensor.nbytes

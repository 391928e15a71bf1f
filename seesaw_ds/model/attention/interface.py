"""The attention backend interface: paged KV, HND blocks.

Shape letters: N tokens of the batch, B sequences, H local query heads, K local KV heads, D head dim, S block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of which sequences a step computes, and where their KV is.

    query_lens     tokens of each sequence in the batch, in batch order; their sum is N
    kv_lens        tokens of each sequence up to and with this step's
    block_tables   (B, max blocks) int64 on the device: each sequence's KV blocks; entries past its end are any valid id
    write_blocks   (N,) int64 on the device: the block each new token's KV goes to
    write_offsets  (N,) int64 on the device: its place in that block
    """

    query_lens: list[int]
    kv_lens: list[int]
    block_tables: torch.Tensor
    write_blocks: torch.Tensor
    write_offsets: torch.Tensor

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has exactly one token in the batch."""
        return len(self.query_lens) == self.write_blocks.shape[0]


class AttentionBackend(Protocol):
    """Writes a step's keys and values into the paged cache and attends over it."""

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for a step; called once before the layers of that step run."""

    def forward(
        self, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of one layer, for the planned step.

        `kv_cache` is the layer's (blocks, 2, K, S, D) view, K and V in the second dim; it is written. Returns (N, H, D).
        """

"""The attention backend interface: paged KV, HND blocks.

Shape letters: N tokens of the batch, B sequences, W blocks of the longest, H local query heads, K local KV heads,
D head dim, S block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How scores are made: ``scale * q @ k``, capped to ``soft_cap * tanh(score / soft_cap)`` when that is given.

    `window`: a token sees that many tokens, itself included; None is all before it.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of which sequences a step computes, and where their KV is; int32 arrays on the host.

    query_lens    (B,) tokens of each sequence in the batch, in batch order; their sum is N
    kv_lens       (B,) tokens of each sequence up to and with this step's
    block_tables  (B, W) each sequence's KV blocks, in order; what is past its end is any valid block

    The first `num_decode_rows` sequences have one token each, at its end.
    """

    query_lens: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    num_decode_rows: int = 0


class AttentionBackend(Protocol):
    """Attends over the paged cache, into which the step's own keys and values are already written."""

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for a step; called once before the layers of that step run."""

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        """Causal attention of one layer, for the planned step: (N, H, D) to `out_NHD`, both contiguous.

        `kv_cache` is the layer's (blocks, 2, K, S, D) view, K and V in the second dim.
        """


class FixedAttention(AttentionBackend, Protocol):
    """For batches of one size. Its plan stays in place: a CUDA graph captured after one is replayed after another."""

    def fits(self, batch: AttentionBatch) -> bool:
        """Whether this can be planned."""

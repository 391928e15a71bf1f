"""Paged attention in plain torch: runs anywhere, and is what other backends are compared with."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from seesaw_ds.model.attention.interface import AttentionBatch


class TorchAttention:
    """Gathers each sequence's blocks and calls scaled_dot_product_attention."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._query_lens: list[int] = []
        self._kv_lens: list[int] = []
        self._tables = torch.empty(0)
        self._mask = torch.empty(0)

    def plan(self, batch: AttentionBatch) -> None:
        self._query_lens = batch.query_lens.tolist()
        self._kv_lens = batch.kv_lens.tolist()
        width = -(-max(self._kv_lens) // self._block_size)
        self._tables = torch.from_numpy(batch.block_tables[:, :width].astype(np.int64)).to(self._device)
        kv_lens = torch.from_numpy(batch.kv_lens).to(self._device)
        self._mask = torch.arange(width * self._block_size, device=self._device) < kv_lens[:, None, None, None]

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        is_decode = len(self._query_lens) == q_NHD.shape[0]
        return self._decode(q_NHD, kv_cache) if is_decode else self._prefill(q_NHD, kv_cache)

    def _decode(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """All sequences at once."""
        blocks = kv_cache[self._tables]  # (B, blocks, 2, K, S, D)
        kv = blocks.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # (2, B, K, tokens, D)
        out = F.scaled_dot_product_attention(q_NHD[:, :, None], kv[0], kv[1], attn_mask=self._mask, enable_gqa=True)
        return out[:, :, 0]

    def _prefill(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """One sequence at a time; a chunk that is not a prompt's first attends to the chunks before it."""
        out = torch.empty_like(q_NHD)
        first = 0
        for row, (query_len, kv_len) in enumerate(zip(self._query_lens, self._kv_lens, strict=True)):
            num_blocks = -(-kv_len // self._block_size)
            blocks = kv_cache[self._tables[row, :num_blocks]]  # (blocks, 2, K, S, D)
            kv = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[None, :, :, :kv_len]  # (1, 2, K, tokens, D)
            q = q_NHD[first : first + query_len].transpose(0, 1)[None]
            mask = None
            if query_len != kv_len:
                last_visible = torch.arange(kv_len - query_len, kv_len, device=q.device)[:, None]
                mask = torch.arange(kv_len, device=q.device) <= last_visible
            attended = F.scaled_dot_product_attention(
                q, kv[:, 0], kv[:, 1], attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            out[first : first + query_len] = attended[0].transpose(0, 1)
            first += query_len
        return out

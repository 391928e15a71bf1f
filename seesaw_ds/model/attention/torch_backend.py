"""Paged attention in plain torch: runs anywhere, and is what other backends are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from seesaw_ds.model.attention.interface import AttentionBatch


class TorchAttention:
    """Gathers each sequence's blocks and calls scaled_dot_product_attention."""

    def __init__(self) -> None:
        self._batch: AttentionBatch | None = None
        self._mask: torch.Tensor | None = None

    def plan(self, batch: AttentionBatch) -> None:
        self._batch = batch
        self._mask = None

    def forward(
        self, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "plan() comes before forward()"
        kv_cache[batch.write_blocks, 0, :, batch.write_offsets] = k_NKD
        kv_cache[batch.write_blocks, 1, :, batch.write_offsets] = v_NKD
        return self._decode(batch, q_NHD, kv_cache) if batch.is_decode else self._prefill(batch, q_NHD, kv_cache)

    def _decode(self, batch: AttentionBatch, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """All sequences at once, padded to the longest."""
        num_blocks = -(-max(batch.kv_lens) // kv_cache.shape[3])
        blocks = kv_cache[batch.block_tables[:, :num_blocks]]  # (B, blocks, 2, K, S, D)
        kv = blocks.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # (2, B, K, tokens, D)
        if self._mask is None:
            kv_lens = torch.tensor(batch.kv_lens, device=q_NHD.device)
            self._mask = torch.arange(kv.shape[3], device=q_NHD.device) < kv_lens[:, None, None, None]
        out = F.scaled_dot_product_attention(q_NHD[:, :, None], kv[0], kv[1], attn_mask=self._mask, enable_gqa=True)
        return out[:, :, 0]

    def _prefill(self, batch: AttentionBatch, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """One sequence at a time; a chunk that is not a prompt's first attends to the chunks before it."""
        out = torch.empty_like(q_NHD)
        first = 0
        for row, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
            num_blocks = -(-kv_len // kv_cache.shape[3])
            blocks = kv_cache[batch.block_tables[row, :num_blocks]]  # (blocks, 2, K, S, D)
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

"""Paged attention in plain torch: runs anywhere, and is what other backends are compared with."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from seesaw_ds.model.attention.interface import AttentionBatch, AttentionRule


class TorchAttention:
    """Gathers each sequence's blocks; scaled_dot_product_attention, or its steps one by one where scores are capped."""

    def __init__(self, rule: AttentionRule, block_size: int, device: torch.device) -> None:
        self._rule = rule
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
        last_visible = torch.from_numpy(batch.kv_lens).to(self._device)[:, None, None, None] - 1
        self._mask = self._visible(width * self._block_size, last_visible)

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        if len(self._query_lens) == q_NHD.shape[0]:
            out_NHD.copy_(self._decode(q_NHD, kv_cache))
        else:
            self._prefill(q_NHD, kv_cache, out_NHD)

    def _decode(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """All sequences at once."""
        blocks = kv_cache[self._tables]  # (B, blocks, 2, K, S, D)
        kv = blocks.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # (2, B, K, tokens, D)
        return self._attend(q_NHD[:, :, None], kv[0], kv[1], self._mask)[:, :, 0]

    def _prefill(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        """One sequence at a time; a chunk that is not a prompt's first attends to the chunks before it."""
        first = 0
        for row, (query_len, kv_len) in enumerate(zip(self._query_lens, self._kv_lens, strict=True)):
            num_blocks = -(-kv_len // self._block_size)
            blocks = kv_cache[self._tables[row, :num_blocks]]  # (blocks, 2, K, S, D)
            kv = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[None, :, :, :kv_len]  # (1, 2, K, tokens, D)
            q = q_NHD[first : first + query_len].transpose(0, 1)[None]
            mask = None
            if query_len != kv_len or self._rule.window is not None or self._rule.soft_cap is not None:
                last_visible = torch.arange(kv_len - query_len, kv_len, device=q.device)[:, None]
                mask = self._visible(kv_len, last_visible)
            attended = self._attend(q, kv[:, 0], kv[:, 1], mask)
            out_NHD[first : first + query_len] = attended[0].transpose(0, 1)
            first += query_len

    def _visible(self, num_tokens: int, last_visible: torch.Tensor) -> torch.Tensor:
        """Which of a sequence's tokens each query sees: (..., num_tokens) of `last_visible` (..., 1)."""
        tokens = torch.arange(num_tokens, device=self._device)
        mask = tokens <= last_visible
        return mask if self._rule.window is None else mask & (tokens > last_visible - self._rule.window)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Of (B, H, queries, D) to (B, K, tokens, D); no mask is a causal one."""
        scale, soft_cap = self._rule.scale, self._rule.soft_cap
        if soft_cap is None:
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        assert mask is not None
        group_size = q.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(group_size, dim=1) for part in (keys, values))
        scores = soft_cap * torch.tanh(q @ keys.transpose(2, 3) * scale / soft_cap)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype) @ values

"""q, k and v in one tensor and apart again: matrices (rows, in) or biases (rows,)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def fuse_qkv(parts: Sequence[torch.Tensor], num_kv_heads: int) -> torch.Tensor:
    """q, k and v put in the order of the fused form, KV head by KV head: a new tensor."""
    by_head = [part.view(num_kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_head, dim=1).flatten(0, 1)


def split_qkv(qkv: torch.Tensor, rows: Sequence[int], num_kv_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v of that many `rows` each, contiguous; the inverse of `fuse_qkv`."""
    rows_per_head = [count // num_kv_heads for count in rows]
    by_head = qkv.view(num_kv_heads, sum(rows_per_head), *qkv.shape[1:])
    return tuple(part.flatten(0, 1).contiguous() for part in torch.split(by_head, rows_per_head, dim=1))

"""The layer operations in plain torch: run anywhere, and are what the fused kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.rope import RotaryTables


class TorchOps:
    """Rounds where transformers' Llama rounds, so that float32 runs match it token for token."""

    def rms_norm(self, x_NM: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x_NM.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x_NM.dtype)

    def add_rms_norm(
        self, x_NM: torch.Tensor, residual_NM: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual_NM = residual_NM + x_NM
        return self.rms_norm(residual_NM, weight, eps), residual_NM

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return (F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]).flatten(1)

    def rotate_and_store(self, qkv: torch.Tensor, places: TokenPlaces, kv_cache: torch.Tensor) -> torch.Tensor:
        queries_per_kv_head = qkv.shape[2] - 2
        q_NHD = qkv[:, :, :queries_per_kv_head].flatten(1, 2)
        kv_cache[places.write_blocks, 0, :, places.write_offsets] = RotaryTables.apply(
            qkv[:, :, -2], places.cos, places.sin
        )
        kv_cache[places.write_blocks, 1, :, places.write_offsets] = qkv[:, :, -1]
        return RotaryTables.apply(q_NHD, places.cos, places.sin)

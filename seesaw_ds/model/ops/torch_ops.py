"""The layer operations in plain torch: run anywhere, and are what the fused kernels are compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from seesaw_ds.model.families.family import Activation
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.ops.products import TuningTimes
from seesaw_ds.model.rope import RotaryTables
from seesaw_ds.parallel.all_reduce import AllReduce


class TorchOps:
    """Rounds where transformers' Llama rounds, so that float32 runs match it token for token."""

    def __init__(self, activation: Activation = "silu", norm_adds_one: bool = False) -> None:
        self._activation = activation
        self._norm_adds_one = norm_adds_one

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def linear_all_reduce(self, x: torch.Tensor, weight: torch.Tensor, all_reduce: AllReduce) -> torch.Tensor:
        return all_reduce(self.linear(x, weight))

    def tune_linear(self, num_rows: Iterable[int], weights: Iterable[torch.Tensor]) -> TuningTimes:
        return TuningTimes(0.0, 0.0)

    def rms_norm(self, x_NM: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x_NM.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if self._norm_adds_one:
            return (wide * (1.0 + weight.float())).to(x_NM.dtype)
        return weight * wide.to(x_NM.dtype)

    def add_rms_norm(
        self, x_NM: torch.Tensor, residual_NM: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual_NM = residual_NM + x_NM
        return self.rms_norm(residual_NM, weight, eps), residual_NM

    def act_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.unbind(2)
        gate = F.silu(gate) if self._activation == "silu" else F.gelu(gate, approximate="tanh")
        return (gate * up).flatten(1)

    def linear_act_and_mul(self, x_NM: torch.Tensor, weight: torch.Tensor, num_cells: int) -> torch.Tensor:
        return self.act_and_mul(self.linear(x_NM, weight).view(x_NM.shape[0], num_cells, 2, -1))

    def norm_heads(
        self, qkv: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        queries, keys, values = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
        return torch.cat((self.rms_norm(queries, query_weight, eps), self.rms_norm(keys, key_weight, eps), values), 2)

    def rotate_and_store(
        self, qkv: torch.Tensor, places: TokenPlaces, kv_cache: torch.Tensor, q_NHD: torch.Tensor
    ) -> None:
        queries = qkv[:, :, :-2].flatten(1, 2)
        kv_cache[places.write_blocks, 0, :, places.write_offsets] = RotaryTables.apply(
            qkv[:, :, -2], places.cos, places.sin
        )
        kv_cache[places.write_blocks, 1, :, places.write_offsets] = qkv[:, :, -1]
        q_NHD.copy_(RotaryTables.apply(queries, places.cos, places.sin))

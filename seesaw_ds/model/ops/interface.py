"""The operations of a decoder layer but attention, behind one interface: plain torch, or CUDA kernels.

Shape letters: N tokens, M hidden size, K local KV heads, G query heads per KV head, D head dim, S block size,
C cells that this rank owns of a layer, F local FFN size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from seesaw_ds.model.ops.products import TuningTimes
from seesaw_ds.parallel.all_reduce import AllReduce


@dataclass(frozen=True)
class TokenPlaces:
    """Where a step's tokens stand: their rotary angles, and the KV slots their keys and values go to.

    cos, sin       (N, D) float32
    write_blocks   (N,) int64: the KV block of each token
    write_offsets  (N,) int64: its place in that block
    """

    cos: torch.Tensor
    sin: torch.Tensor
    write_blocks: torch.Tensor
    write_offsets: torch.Tensor


class LayerOps(Protocol):
    """Operations of a layer, made for one model's norms and activation."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``, if any: (N, in) and (out, in) to (N, out)."""

    def linear_all_reduce(self, x: torch.Tensor, weight: torch.Tensor, all_reduce: AllReduce) -> torch.Tensor:
        """The sum of ``x @ weight.T`` over the ranks of `all_reduce`."""

    def tune_linear(self, num_rows: Iterable[int], weights: Iterable[torch.Tensor]) -> TuningTimes:
        """Find the fastest way for each of these numbers of rows and weights, all (out, in)."""

    def rms_norm(self, x_NM: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x / rms(x) * weight``; in families whose norms add one, ``* (1 + weight)``, here and below."""

    def add_rms_norm(
        self, x_NM: torch.Tensor, residual_NM: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new residual ``r = x + residual``, and its norm: (norm, r). Both arguments may be overwritten."""

    def act_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``activation(gate) * up`` of (N, C, 2, F / C): (N, F)."""

    def linear_act_and_mul(self, x_NM: torch.Tensor, weight: torch.Tensor, num_cells: int) -> torch.Tensor:
        """`act_and_mul` of the product with a weight (C * 2 * F / C, M) that has `num_cells` C: (N, F)."""

    def norm_heads(
        self, qkv: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """RMS norm of each query and each key of (N, K, G + 2, D), which may be overwritten; weights are (D,)."""

    def rotate_and_store(
        self, qkv: torch.Tensor, places: TokenPlaces, kv_cache: torch.Tensor, q_NHD: torch.Tensor
    ) -> None:
        """Rotate queries and keys of (N, K, G + 2, D); write keys and values to the cache, the queries to `q_NHD`.

        `kv_cache` is one layer's (blocks, 2, K, S, D) view, `q_NHD` contiguous (N, K * G, D).
        """

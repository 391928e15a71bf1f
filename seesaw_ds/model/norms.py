"""RMS norms and what families have in their places: of the hidden states, of a layer's output, of queries and keys.

Shape letters: N tokens, M hidden size, K local KV heads, G query heads per KV head, D head dim.
"""

from __future__ import annotations

import torch
from torch import nn

from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.parallel.all_reduce import AllReduce


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, of x alone or of x with the residual stream added."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: LayerOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._eps = eps
        self._ops = ops

    def forward(self, x_NM: torch.Tensor, residual_NM: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, residual): with no residual yet, x itself becomes it."""
        if residual_NM is None:
            return self._ops.rms_norm(x_NM, self.weight, self._eps), x_NM
        return self._ops.add_rms_norm(x_NM, residual_NM, self.weight, self._eps)


class AddResidual(nn.Module):
    """In the place of a norm before attention or FFN, where there is none."""

    def forward(self, x_NM: torch.Tensor, residual_NM: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden state, residual), which are the same."""
        hidden_NM = x_NM if residual_NM is None else x_NM + residual_NM
        return hidden_NM, hidden_NM


class OutputNorm(nn.Module):
    """RMS norm of what attention or FFN adds to the residual stream."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: LayerOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._eps = eps
        self._ops = ops

    def forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x_NM, self.weight, self._eps)


class OutputScale(nn.Module):
    """A factor on what attention or FFN adds to the residual stream."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        return x_NM * self._scale


class HeadNorm(nn.Module):
    """RMS norm of every query head and every key head, with one (D,) weight for queries and one for keys."""

    def __init__(self, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float, ops: LayerOps) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(query_weight, requires_grad=False)
        self.key_weight = nn.Parameter(key_weight, requires_grad=False)
        self._eps = eps
        self._ops = ops

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """Of (N, K, G + 2, D), which may be overwritten."""
        return self._ops.norm_heads(qkv, self.query_weight, self.key_weight, self._eps)


class ProjectionNorm(nn.Module):
    """RMS norm of a token's queries over all heads of all ranks, and of its keys; the ranks add up their squares.

    `query_weight` (K, G, D) and `key_weight` (K, 1, D) are this rank's; `num_queries` and `num_keys` count the
    elements of all ranks.
    """

    def __init__(
        self,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        num_queries: int,
        num_keys: int,
        eps: float,
        all_reduce: AllReduce,
    ) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(query_weight, requires_grad=False)
        self.key_weight = nn.Parameter(key_weight, requires_grad=False)
        self._counts = (num_queries, num_keys)
        self._eps = eps
        self._all_reduce = all_reduce

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """Of (N, K, G + 2, D)."""
        queries, keys, values = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
        squares = [part.float().square().sum((1, 2, 3)) for part in (queries, keys)]
        sums = self._all_reduce(torch.stack(squares, dim=1))
        normed = [
            (weight * (part.float() * torch.rsqrt(sums[:, i, None, None, None] / count + self._eps))).to(qkv.dtype)
            for i, (part, weight, count) in enumerate(
                zip((queries, keys), (self.query_weight, self.key_weight), self._counts, strict=True)
            )
        ]
        return torch.cat((*normed, values), dim=2)

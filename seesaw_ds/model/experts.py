"""A mixture of experts: every rank computes its slice of all experts, each for the tokens that the router sends it.

Shape letters: N tokens, M hidden size, E experts, T experts per token, C cells that this rank owns of a layer, F FFN
size of a cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.parallel.all_reduce import AllReduce
from seesaw_ds.shapes import ModelShape


class Experts(nn.Module):
    """Tokens are sorted by expert, so that one grouped product serves all; no shape depends on the routing.

    `router` (E, M) is whole on every rank. Matrices are bound after construction.
    """

    def __init__(
        self, shape: ModelShape, router: torch.Tensor, num_cells: int, ops: LayerOps, all_reduce: AllReduce
    ) -> None:
        super().__init__()
        self.router = nn.Parameter(router, requires_grad=False)
        self._num_cells = num_cells
        self._experts_per_token = shape.experts_per_token
        self._is_normalized = shape.has_normalized_experts
        self._ops = ops
        self._all_reduce = all_reduce

    def bind(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Take arena views (C * E * 2 * F, M) and (C * E * F, M)."""
        cells_and_experts = (self._num_cells, self.router.shape[0])
        self.gate_up = nn.Parameter(gate_up.unflatten(0, (*cells_and_experts, -1)), requires_grad=False)
        self.down = nn.Parameter(down.unflatten(0, (*cells_and_experts, -1)), requires_grad=False)

    def forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        weights_NT, experts_NT = self._route(x_NM)
        experts, order = experts_NT.flatten().sort(stable=True)
        ends_E = torch.searchsorted(
            experts, torch.arange(self.router.shape[0], device=experts.device), right=True, out_int32=True
        )
        sorted_x = x_NM[order // self._experts_per_token]
        sorted_out = torch.zeros_like(sorted_x)
        for gate_up, down in zip(self.gate_up, self.down, strict=True):  # a cell's (E, 2 * F, M) and (E, F, M)
            hidden = F.grouped_mm(sorted_x, gate_up.transpose(1, 2), offs=ends_E)
            hidden = self._ops.act_and_mul(hidden.view(hidden.shape[0], 1, 2, -1))
            sorted_out += F.grouped_mm(hidden, down, offs=ends_E)
        out = torch.empty_like(sorted_out)
        out[order] = sorted_out
        out_NTM = out.unflatten(0, experts_NT.shape) * weights_NT[:, :, None]
        return self._all_reduce(out_NTM.sum(1).to(x_NM.dtype))

    def _route(self, x_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token's chosen experts: their weights, in the dtype of x, and their numbers."""
        scores_NE = F.linear(x_NM, self.router).float().softmax(dim=-1)
        weights_NT, experts_NT = scores_NE.topk(self._experts_per_token, dim=-1)
        if self._is_normalized:
            weights_NT = weights_NT / weights_NT.sum(dim=-1, keepdim=True)
        return weights_NT.to(x_NM.dtype), experts_NT

"""From logits and a batch's parameters to tokens: temperature, min_p, top_k, top_p, and the draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from seesaw_ds.model.sampling_filters import mask_min_p, mask_top_k, mask_top_k_top_p
from seesaw_ds.model.sampling_rng import gumbel_noise, stream_states
from seesaw_ds.model.sampling_state import BatchPlan, RowParams, Rows


class Draw(Protocol):
    """Chooses a token of each row; every implementation chooses the same ones, up to the rounding of logarithms."""

    def __call__(self, logits: Tensor, params: RowParams, positions: Tensor, plan: BatchPlan) -> Tensor:
        """Token ids [rows] int64 by `params`: the most likely one, or a draw from those that the filters leave.

        Args:
            logits: [rows, V] of any float dtype, after edits and penalties; not changed.
            params, plan: of the same rows, `plan` with at least one that is random.
            positions: [rows] int64, which output token is being sampled, from 0.
        """


class TorchDraw:
    """Plain torch, on any device: works for the rows that need it and no others. All arithmetic is float32."""

    def __call__(self, logits: Tensor, params: RowParams, positions: Tensor, plan: BatchPlan) -> Tensor:
        assert plan.random is not None
        random_params = RowParams(*(column[plan.random] for column in params))
        drawn = _draw(logits[plan.random].float(), random_params, positions[plan.random], plan)
        if isinstance(plan.random, slice):
            return drawn
        return logits.argmax(dim=-1).index_copy_(0, plan.random, drawn)


def _draw(logits: Tensor, params: RowParams, positions: Tensor, plan: BatchPlan) -> Tensor:
    logits = logits / params.temperature.float()
    if plan.min_p is not None:
        min_p = params.min_p[plan.min_p].float()
        logits = change_rows(logits, plan.min_p, lambda part: mask_min_p(part, min_p))
    if plan.truncated is not None:
        top_k, top_p = params.top_k[plan.truncated], params.top_p[plan.truncated]
        logits = change_rows(logits, plan.truncated, lambda part: _truncate(part, top_k, top_p, plan))
    noise = gumbel_noise(stream_states(params.seed[:, 0], positions), logits.shape[1])
    return noise.add_(logits).argmax(dim=-1)


def _truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, plan: BatchPlan) -> Tensor:
    if plan.any_top_p:
        return mask_top_k_top_p(logits, top_k, top_p, plan.max_top_k)
    assert plan.max_top_k is not None, "a truncated row has top_k, top_p or both"
    return mask_top_k(logits, top_k, plan.max_top_k)


def change_rows(logits: Tensor, rows: Rows, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to some rows of a tensor that the caller owns."""
    if not isinstance(rows, Tensor):
        return change(logits)
    return logits.index_copy_(0, rows, change(logits[rows]))

"""What sampling parameters do to logits, row by row. B = rows, V = vocabulary, E = edits per row.

Every rule here compares values with a threshold, so tokens with equal logits are kept or dropped together, and no
result depends on the order of a sort, of a sum, or on the other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Probabilities as integers, relative to the most likely token's: an integer sum is the same in any order. Even 2**18
# tokens of the greatest weight sum to 2**50, which float64 holds exactly.
_WEIGHT_ONE = 2.0**32


def add_edits(logits: Tensor, edits: Tensor, positions: Tensor) -> Tensor:
    """Add logit_bias, and forbid stop tokens until min_tokens are out.

    Args:
        logits: [B, V] float32, changed in place.
        edits: [B, E, 3] float64: token id, what to add (-inf forbids), and the output position where it ends.
            Padding adds 0 to token 0.
        positions: [B] int64, the output position being sampled.
    """
    token_ids, values, ends = edits.unbind(-1)
    active = positions[:, None] < ends
    values = torch.where(active, values, 0.0).to(torch.float32)
    return logits.scatter_add_(1, token_ids.to(torch.int64), values)


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output.

    Args:
        logits: [B, V] float32.
        output_counts: [B, V] int32, how often each token stands in the output.
        in_prompt: [B, V] bool.
        repetition, frequency, presence: [B, 1] float32.
    """
    in_output = output_counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_output | in_prompt, repeated, logits)
    return logits - frequency * output_counts - presence * in_output


def mask_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than `min_p` ([B, 1] float32, above 0) times the most likely token."""
    threshold = logits.amax(dim=-1, keepdim=True) + min_p.log()
    return logits.masked_fill(logits < threshold, -torch.inf)


def mask_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int | None) -> Tensor:
    """Keep the `top_k` largest logits, then of those the fewest whose probability, renormalized, reaches `top_p`.

    The most likely token always stays. Tokens tied with the last one kept stay too.

    Args:
        logits: [B, V] float32.
        top_k: [B, 1] int64 in 1..V.
        top_p: [B, 1] float64; 1 or more keeps every token.
        max_top_k: the largest of `top_k`, when that is small enough to be worth not sorting everything.
    """
    if max_top_k is None:
        best_first = logits.sort(dim=-1, descending=True).values
    else:
        best_first = logits.topk(max_top_k, dim=-1).values
    kth_best = best_first.gather(1, top_k - 1)
    best = best_first[:, :1]

    # With ties at the k-th place more than k tokens remain, and all of them count in the total.
    total = torch.where(logits >= kth_best, _weights(logits, best), 0).sum(dim=-1, keepdim=True)
    reached = _weights(best_first, best).cumsum(dim=-1)
    last_kept = (reached < total * top_p).sum(dim=-1, keepdim=True).clamp_(max=best_first.shape[1] - 1)
    nucleus = torch.where(top_p < 1.0, best_first.gather(1, last_kept), -torch.inf)
    return logits.masked_fill(logits < torch.maximum(kth_best, nucleus), -torch.inf)


def mask_top_k(logits: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """`mask_top_k_top_p` for rows that all have top_p 1."""
    kth_best = logits.topk(max_top_k, dim=-1).values.gather(1, top_k - 1)
    return logits.masked_fill(logits < kth_best, -torch.inf)


def _weights(logits: Tensor, best: Tensor) -> Tensor:
    return ((logits - best).exp_() * _WEIGHT_ONE).to(torch.int64)

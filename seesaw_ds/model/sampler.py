"""From logits to tokens: the same request and seed give the same tokens, whatever the layout, batch or eviction.

A row's token is a function of its own logits, its parameters and its output position. Work is done for the rows that
need it and no others (an all-greedy batch is one argmax), nothing waits for the device, and the numbers behind a random
choice depend on the seed, the position and the token id alone (`sampling_rng`).

The order of the steps, and their meaning, is vLLM's: logit_bias and min_tokens, penalties, temperature, min_p, top_k,
top_p. Log-probabilities are those of the raw logits. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seesaw_ds.model.sampling_draw import Draw, change_rows
from seesaw_ds.model.sampling_filters import add_edits, apply_penalties
from seesaw_ds.model.sampling_output import SampledTokens, row_logprobs
from seesaw_ds.model.sampling_state import BatchPlan, SamplingState

# Rows are sampled in parts of at most this many logits, which bounds temporary memory: 20 bytes per logit in a
# plain random batch, up to 50 with top_p.
_MAX_LOGITS_AT_ONCE = 1 << 24
_MOST_BYTES_PER_LOGIT = 50


def sampling_bytes(num_rows: int, vocab_size: int) -> int:
    """The most memory that sampling `num_rows` rows takes beside the logits, in bytes."""
    part = min(num_rows, max(1, _MAX_LOGITS_AT_ONCE // vocab_size))
    return part * vocab_size * _MOST_BYTES_PER_LOGIT


def sample(
    logits: Tensor,
    slots: Tensor,
    output_positions: Tensor,
    state: SamplingState,
    host_slots: Sequence[int],
    draw: Draw,
) -> SampledTokens:
    """Choose the next token of each row, and count it where penalties need it.

    Args:
        logits: [rows, V] of any float dtype, on `state.device`; not changed.
        slots: [rows] int64 on the same device: each row's slot in `state`, all different.
        output_positions: [rows] int64 on the same device: which output token is being sampled, from 0.
        host_slots: the same as `slots`, for the host.
        draw: what chooses where a row is random.

    Raises:
        RuntimeError: a slot has no sequence.
    """
    num_rows = len(host_slots)
    assert logits.shape == (num_rows, state.vocab_size), (logits.shape, num_rows, state.vocab_size)
    assert slots.shape == output_positions.shape == (num_rows,), (slots.shape, output_positions.shape, num_rows)
    part = max(1, _MAX_LOGITS_AT_ONCE // state.vocab_size)
    chosen = [
        _choose(
            logits[start : start + part],
            slots[start : start + part],
            output_positions[start : start + part],
            state,
            state.plan(host_slots[start : start + part]),
            draw,
        )
        for start in range(0, max(num_rows, 1), part)
    ]
    token_ids = torch.cat(chosen) if len(chosen) > 1 else chosen[0]

    plan = state.plan(host_slots)
    if plan.penalized is not None:
        state.count_tokens(slots[plan.penalized], token_ids[plan.penalized])
    if plan.logprob_index is None:
        return SampledTokens(token_ids)
    return SampledTokens(
        token_ids,
        row_logprobs(logits, token_ids, plan.logprob_rows, plan.num_top_logprobs, plan.logprob_index, part),
    )


def _choose(
    logits: Tensor, slots: Tensor, positions: Tensor, state: SamplingState, plan: BatchPlan, draw: Draw
) -> Tensor:
    if plan.random is None and plan.edited is None and plan.penalized is None:
        return logits.argmax(dim=-1)
    params = state.row_params(slots)
    if plan.edited is not None or plan.penalized is not None:
        logits = logits.to(torch.float32, copy=True)
    if plan.edited is not None:
        edits, edited_positions = state.edits(slots[plan.edited]), positions[plan.edited]
        logits = change_rows(logits, plan.edited, lambda part: add_edits(part, edits, edited_positions))
    if plan.penalized is not None:
        penalties = (params.repetition, params.frequency, params.presence)
        arguments = (*state.token_history(slots[plan.penalized]), *(p[plan.penalized].float() for p in penalties))
        logits = change_rows(logits, plan.penalized, lambda part: apply_penalties(part, *arguments))
    return logits.argmax(dim=-1) if plan.random is None else draw(logits, params, positions, plan)

"""How large prefill micro-batches are, and which part of a prompt goes into one.

Cost is counted in attention pairs, as integers: a token at prompt index i costs ``pairs_per_token`` (its share
of the linear layers) plus ``i + 1`` (the keys it attends to). Costs of consecutive chunks add up to the cost of
the whole.

The same micro-batches pass every stage of a pipeline in the same order, so ``n`` of them with costs ``a_i`` take

    sum(a_i) + (num_stages - 1) * max(a_i)

whatever their order: filling and draining cost the largest micro-batch, and making only the first and the last
ones small gains nothing. What helps is one limit for all of a phase, small when the phase has little work.
"""

from __future__ import annotations

import math

MICRO_BATCH_OVERHEAD_TOKENS = 256
"""Reading the weights and launching a micro-batch takes about as long as computing this many tokens."""
LEAST_PROMPT_SHARE = 8
"""However many decode rows ride in a micro-batch, its prompts have this part of its tokens and cost: one in so many.

A small one, for with more than seven rows to a prompt token a micro-batch has more tokens than it should, and matrix
products take a step up there: 264 tokens take three tiles of 128 where 256 take two.
"""


def chunk_cost(start: int, num_tokens: int, pairs_per_token: int) -> int:
    """The cost of prompt tokens ``start .. start + num_tokens``, in attention pairs."""
    return num_tokens * (pairs_per_token + start) + num_tokens * (num_tokens + 1) // 2


def tokens_within_cost(start: int, cost: int, pairs_per_token: int) -> int:
    """The most tokens from `start` on whose `chunk_cost` is at most `cost`."""
    # chunk_cost(n) <= cost  <=>  n^2 + b n - 2 cost <= 0  with b = 2 (pairs_per_token + start) + 1
    b = 2 * (pairs_per_token + start) + 1
    return (math.isqrt(b * b + 8 * max(cost, 0)) - b) // 2


def micro_batch_cost(work: int, num_stages: int, overhead: int, full_cost: int) -> int:
    """The cost that each micro-batch of a prefill phase should have.

    With `work` cut into micro-batches of cost a, each costing `overhead` more, the pipeline takes
    ``(work / a + num_stages - 1) * (a + overhead)``, which is least at ``a^2 = work * overhead / (num_stages - 1)``.
    The answer is that, but not under `overhead` and not over `full_cost`, which a single stage always gets.
    """
    if num_stages == 1:
        return full_cost
    return min(full_cost, max(overhead, math.isqrt(work * overhead // (num_stages - 1))))


class MicroBatchRoom:
    """What is left of one micro-batch's token and cost budgets while it is being filled."""

    def __init__(self, num_tokens: int, cost: int, pairs_per_token: int) -> None:
        self._num_tokens = num_tokens
        self._cost = cost
        self._pairs_per_token = pairs_per_token
        self._is_empty = True

    @property
    def is_full(self) -> bool:
        """Whether no token more fits."""
        return self._num_tokens == 0 or self._cost <= 0

    def fit(self, start: int, num_remaining: int) -> int:
        """How many of a prompt's `num_remaining` tokens from `start` on go into this micro-batch; 0 when it is full.

        An empty micro-batch takes at least one token.
        """
        by_cost = tokens_within_cost(start, self._cost, self._pairs_per_token)
        return min(num_remaining, self._num_tokens, max(by_cost, int(self._is_empty)))

    def take(self, start: int, num_tokens: int) -> None:
        """Spend the budgets on a chunk."""
        self._num_tokens -= num_tokens
        self._cost -= chunk_cost(start, num_tokens, self._pairs_per_token)
        self._is_empty = False

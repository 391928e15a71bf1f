"""How long sequences go on, and how much of the GPU pool they will fill together."""

from __future__ import annotations

import math

Resident = tuple[int, int, int]
"""A sequence on the GPU: the tokens it may still produce, the blocks it holds, and those it may add."""


class LengthForecast:
    """How long sequences go on, learned from those that stopped before their `max_tokens`.

    Stopping is taken to be equally likely at each token, so the mean is all tokens produced, by whomever, over the
    number of sequences that stopped. Until one has stopped every sequence is expected to use its `max_tokens`,
    unless `expected_output_tokens` says how long outputs are: it weighs as much as one stopped sequence.
    """

    def __init__(self, expected_output_tokens: int | None) -> None:
        if expected_output_tokens is not None and expected_output_tokens < 1:
            raise ValueError(f"expected_output_tokens={expected_output_tokens}: must be at least 1, or None if unknown")
        self._num_tokens = expected_output_tokens or 0
        self._num_stopped = 0 if expected_output_tokens is None else 1

    @property
    def mean_tokens(self) -> float:
        """The mean number of tokens until a sequence stops, infinite if none is known to stop."""
        return self._num_tokens / self._num_stopped if self._num_stopped else math.inf

    def add_tokens(self, num_tokens: int) -> None:
        """Count tokens that were produced."""
        self._num_tokens += num_tokens

    def add_stopped(self) -> None:
        """Count a sequence that ended before its `max_tokens`."""
        self._num_stopped += 1


def stay_within(num_blocks: int, residents: list[Resident], block_size: int, mean_tokens: float) -> bool:
    """Whether `residents` are expected to hold no more than `num_blocks` GPU blocks at any time until all have ended.

    They are sorted, so that the shortest-lived come first. After t more steps a share
    ``exp(-t / mean_tokens)`` of those with t tokens left has not stopped, and each has grown by t / block_size
    blocks. So with the last k left, which hold H blocks now, they hold
    ``exp(-t / mean_tokens) * (H + k * t / block_size)``, which is largest at
    ``t = mean_tokens - H * block_size / k``, or at the end nearest to it of the time in which those k are left.
    Rounding to whole blocks is left out, but together they add no more blocks than each may.
    """
    num_held = 0
    num_growth = 0
    num_residents = len(residents)
    for k, (remaining, held, growth) in enumerate(reversed(residents), start=1):
        num_held += held
        num_growth += growth
        if num_held + num_growth <= num_blocks:
            continue
        t = mean_tokens - num_held * block_size / k
        next_end = residents[-k - 1][0] if k < num_residents else 0
        if t < next_end:
            t = next_end
        if t > remaining:
            t = remaining
        grown = k * t / block_size
        expected = num_held + (grown if grown < num_growth else num_growth)
        if expected > num_blocks and math.exp(-t / mean_tokens) * expected > num_blocks:
            return False
    return True

"""Which sequences move from the host to the GPU, and when: as many as are expected to finish there.

Filling the GPU to the last block with young sequences would have most of them evicted again as they grow, or
stalled when the host is full too. So a sequence is copied in only if the residents' expected peak stays within the
GPU pool, and one free block is left for each that may still grow.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple

from seesaw_ds.sched.output import SwapIn
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.sequence import Sequence, SequenceState

_RESIDENT = (SequenceState.SWAPPING_IN, SequenceState.RUNNING)
_BEFORE_SWAP_IN = (SequenceState.PREFILLING, SequenceState.SWAPPING_OUT, SequenceState.HOST)


class Resident(NamedTuple):
    """A sequence on the GPU: the blocks it holds, those it may add, and the tokens it may still produce."""

    num_held_blocks: int
    num_growth_blocks: int
    num_remaining_tokens: int


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

    def add_token(self) -> None:
        """Count a token that was produced."""
        self._num_tokens += 1

    def add_stopped(self) -> None:
        """Count a sequence that ended before its `max_tokens`."""
        self._num_stopped += 1


def expected_peak(residents: Iterable[Resident], block_size: int, mean_tokens: float) -> float:
    """The most GPU blocks that `residents` are expected to hold together while they run to their ends.

    After t more steps a share ``exp(-t / mean_tokens)`` of those with t tokens left to produce has not stopped,
    and each has grown by t / block_size blocks. So with the k longest-lived left, which hold H blocks now, they
    hold ``exp(-t / mean_tokens) * (H + k * t / block_size)``, which is largest at
    ``t = mean_tokens - H * block_size / k``, or at the end nearest to it of the time in which those k are left.
    Rounding to whole blocks is left out, but together they add no more blocks than each may.
    """
    longest_first = sorted(residents, key=lambda resident: resident.num_remaining_tokens, reverse=True)
    next_ends = [*(resident.num_remaining_tokens for resident in longest_first[1:]), 0]
    peak = 0.0
    num_held = 0
    num_growth = 0
    for k, (resident, next_end) in enumerate(zip(longest_first, next_ends, strict=False), start=1):
        num_held += resident.num_held_blocks
        num_growth += resident.num_growth_blocks
        best = mean_tokens - num_held * block_size / k
        t = min(max(best, next_end), resident.num_remaining_tokens)
        peak = max(peak, math.exp(-t / mean_tokens) * (num_held + min(k * t / block_size, num_growth)))
    return peak


class Prefetcher:
    """The sequences on the host, oldest first, on their way to the GPU."""

    def __init__(self, pools: KvPools, block_size: int, forecast: LengthForecast) -> None:
        self._pools = pools
        self._block_size = block_size
        self._forecast = forecast
        self._queue: list[tuple[int, Sequence]] = []  # a heap; sequences that ended are skipped
        self._is_blocked = False

    def push(self, seq: Sequence) -> None:
        """Queue a sequence whose KV is on the host."""
        seq.state = SequenceState.HOST
        heapq.heappush(self._queue, (seq.order, seq))
        self._is_blocked = False

    def notice_room(self) -> None:
        """Look again after a refusal: a sequence ended or gave its blocks back."""
        self._is_blocked = False

    def next_swap_in(self) -> SwapIn | None:
        """Start the oldest sequence's way to the GPU, if there is room for it."""
        while self._queue and self._queue[0][1].state is not SequenceState.HOST:
            heapq.heappop(self._queue)
        if self._is_blocked or not self._queue:
            return None
        _, seq = self._queue[0]
        pools = self._pools
        self._is_blocked = (
            pools.slots.num_free == 0
            or pools.gpu.num_free < len(seq.host_blocks)
            or not self._fits([*self._residents(), _resident(seq)])
        )
        if self._is_blocked:
            return None
        heapq.heappop(self._queue)
        seq.state = SequenceState.SWAPPING_IN
        seq.in_flight += 1
        return pools.start_swap_in(seq)

    def will_have_host_room(self, prompt: Sequence) -> bool:
        """Whether a waiting prompt can have its host blocks once transfers in flight and prefill have settled.

        Counts on the swap-ins that then become possible, and on nobody ending who need not.
        """
        pools = self._pools
        owners = pools.owners.values()
        ended = [seq for seq in owners if seq.state is SequenceState.ENDED]
        ending = [seq for seq in owners if seq.state is not SequenceState.ENDED and seq.spec.max_tokens == 1]
        soon_free = sum(len(seq.host_blocks) for seq in ending)
        if not pools.reserve.admits(prompt.prompt_blocks, prompt.peak_blocks, soon_free):
            return False

        swapping_in = [seq for seq in owners if seq.state is SequenceState.SWAPPING_IN]
        num_host_free = pools.host.num_free + sum(len(seq.host_blocks) for seq in (*ended, *ending, *swapping_in))
        num_gpu_free = pools.gpu.num_free + sum(len(seq.gpu_blocks) for seq in ended)
        num_slots_free = pools.slots.num_free + sum(seq.slot is not None for seq in ended)
        residents = self._residents()
        candidates = (seq for seq in owners if seq.state in _BEFORE_SWAP_IN and seq.spec.max_tokens > 1)
        for seq in sorted(candidates, key=lambda candidate: candidate.order):
            if prompt.prompt_blocks <= num_host_free:
                break
            residents.append(_resident(seq))
            num_gpu_free -= len(seq.host_blocks)
            num_slots_free -= 1
            if num_slots_free < 0 or num_gpu_free < 0 or not self._fits(residents):
                break
            num_host_free += len(seq.host_blocks)
        return prompt.prompt_blocks <= num_host_free

    def _residents(self) -> list[Resident]:
        return [_resident(seq) for seq in self._pools.owners.values() if seq.state in _RESIDENT]

    def _fits(self, residents: list[Resident]) -> bool:
        """Whether these may be on the GPU together; a lone one always may, for the pool holds its largest size."""
        num_blocks = self._pools.gpu.num_blocks
        margin = sum(resident.num_growth_blocks > 0 for resident in residents)
        return (
            sum(resident.num_held_blocks for resident in residents) + margin <= num_blocks
            and expected_peak(residents, self._block_size, self._forecast.mean_tokens) <= num_blocks
        )


def _resident(seq: Sequence) -> Resident:
    """What `seq` is on the GPU, or would be after its swap-in."""
    num_held = len(seq.gpu_blocks) or len(seq.host_blocks)
    return Resident(num_held, seq.peak_blocks - num_held, seq.spec.max_tokens - seq.num_output_tokens)

"""Which sequences move from the host to the GPU, and when: as many as are expected to finish there.

Filling the GPU to the last block with young sequences would have most of them evicted again as they grow, or
stalled when the host is full too. So a sequence is copied in only if the residents' expected peak stays within the
GPU pool. Were each resident to produce one token per step and end after its expected number of tokens, then with
the residents sorted by how many blocks they still grow, longest first, the pool is fullest just before some
resident k ends, when those up to k hold what they hold now plus k's growth::

    peak = max over k of (held_1 + ... + held_k) + k * growth_k
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import accumulate

from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.output import SwapIn
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.sequence import Sequence, SequenceState

_RESIDENT = (SequenceState.SWAPPING_IN, SequenceState.RUNNING)
_BEFORE_SWAP_IN = (SequenceState.PREFILLING, SequenceState.SWAPPING_OUT, SequenceState.HOST)


def expected_peak(sizes: Iterable[tuple[int, int]]) -> int:
    """The most blocks held at once by sequences of (blocks held, blocks to grow) that grow in step and then end."""
    by_growth = sorted(sizes, key=lambda size: size[1], reverse=True)
    held = accumulate(blocks for blocks, _ in by_growth)
    return max((total + k * growth for k, (total, (_, growth)) in enumerate(zip(held, by_growth), start=1)), default=0)


class LengthForecast:
    """How many more tokens a sequence is expected to produce, learned from those that stopped.

    Stopping is taken to be equally likely at each token, so the mean is all tokens produced, by whomever, over the
    number of sequences that stopped; one that reached its `max_tokens` counts as not having stopped. Until a
    sequence has stopped every one is expected to use its `max_tokens`, unless `expected_output_tokens` says how
    long outputs are: it weighs as much as one stopped sequence of that length.
    """

    def __init__(self, expected_output_tokens: int | None) -> None:
        self._num_tokens = expected_output_tokens or 0
        self._num_stopped = 0 if expected_output_tokens is None else 1

    def add_tokens(self, num_tokens: int) -> None:
        """Count tokens that were produced."""
        self._num_tokens += num_tokens

    def add_stopped(self) -> None:
        """Count a sequence that ended before its `max_tokens`."""
        self._num_stopped += 1

    def num_remaining_tokens(self, seq: Sequence) -> int:
        """Expected tokens of `seq` from now on, at least 1 and at most its limit."""
        limit = seq.spec.max_tokens - seq.num_output_tokens
        return min(limit, max(1, self._num_tokens // self._num_stopped)) if self._num_stopped else limit


class Prefetcher:
    """The sequences on the host, oldest first, on their way to the GPU."""

    def __init__(self, pools: KvPools, forecast: LengthForecast) -> None:
        self._pools = pools
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
            or not self._fits([*self._resident_sizes(), self._size(seq)])
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
        sizes = list(self._resident_sizes())
        candidates = (seq for seq in owners if seq.state in _BEFORE_SWAP_IN and seq.spec.max_tokens > 1)
        for seq in sorted(candidates, key=lambda candidate: candidate.order):
            if prompt.prompt_blocks <= num_host_free:
                break
            sizes.append(self._size(seq))
            num_gpu_free -= len(seq.host_blocks)
            num_slots_free -= 1
            if num_slots_free < 0 or num_gpu_free < 0 or not self._fits(sizes):
                break
            num_host_free += len(seq.host_blocks)
        return prompt.prompt_blocks <= num_host_free

    def _resident_sizes(self) -> Iterable[tuple[int, int]]:
        return (self._size(seq) for seq in self._pools.owners.values() if seq.state in _RESIDENT)

    def _size(self, seq: Sequence) -> tuple[int, int]:
        """Blocks that `seq` holds on the GPU, or would after its swap-in, and the blocks it is expected to add."""
        num_held = len(seq.gpu_blocks) or len(seq.host_blocks)
        growth = blocks_for(self._forecast.num_remaining_tokens(seq), seq.block_size)
        return num_held, min(growth, seq.peak_blocks - num_held)

    def _fits(self, sizes: list[tuple[int, int]]) -> bool:
        """Whether the GPU pool holds the residents' expected peak; a lone one fits, for somebody must run."""
        return len(sizes) == 1 or expected_peak(sizes) <= self._pools.gpu.num_blocks

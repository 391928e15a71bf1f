"""Which sequences move from the host to the GPU, and when: as many as are expected to finish there.

Filling the GPU to the last block with young sequences would have most of them evicted again as they grow, or
stalled when the host is full too. So a sequence is copied in only if the residents' expected peak stays within the
GPU pool, and one free block is left for each that may still grow.
"""

from __future__ import annotations

import heapq
from bisect import insort

from seesaw_ds.sched.forecast import LengthForecast, Resident, expected_peak
from seesaw_ds.sched.output import SwapIn
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.sequence import Sequence, SequenceState

_RESIDENT = (SequenceState.SWAPPING_IN, SequenceState.RUNNING)
_BEFORE_SWAP_IN = (SequenceState.PREFILLING, SequenceState.SWAPPING_OUT, SequenceState.HOST)


class Prefetcher:
    """The sequences on the host, oldest first, on their way to the GPU."""

    def __init__(self, pools: KvPools, block_size: int, forecast: LengthForecast) -> None:
        self._pools = pools
        self._block_size = block_size
        self._forecast = forecast
        self._queue: list[tuple[int, Sequence]] = []  # a heap; sequences that ended are skipped
        self._is_blocked = False
        self._residents: list[Resident] | None = None  # sorted; built anew after each event

    def push(self, seq: Sequence) -> None:
        """Queue a sequence whose KV is on the host."""
        seq.state = SequenceState.HOST
        heapq.heappush(self._queue, (seq.order, seq))
        self._is_blocked = False

    def notice_event(self) -> None:
        """Note that sequences have moved or grown."""
        self._residents = None

    def notice_room(self) -> None:
        """Look again after a refusal: a sequence ended or gave its blocks back."""
        self._is_blocked = False
        self._residents = None

    def next_swap_in(self) -> SwapIn | None:
        """Start the oldest sequence's way to the GPU, if there is room for it."""
        while self._queue and self._queue[0][1].state is not SequenceState.HOST:
            heapq.heappop(self._queue)
        if self._is_blocked or not self._queue:
            return None
        _, seq = self._queue[0]
        pools = self._pools
        if pools.slots.num_free == 0 or pools.gpu.num_free < len(seq.host_blocks):
            self._is_blocked = True
            return None
        if self._residents is None:
            self._residents = self._sorted_residents()
        insort(self._residents, _resident(seq))
        if not self._fits(self._residents):
            self._is_blocked = True
            self._residents = None
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
        residents = self._sorted_residents()
        candidates = (seq for seq in owners if seq.state in _BEFORE_SWAP_IN and seq.spec.max_tokens > 1)
        for seq in sorted(candidates, key=lambda candidate: candidate.order):
            if prompt.prompt_blocks <= num_host_free:
                break
            insort(residents, _resident(seq))
            num_gpu_free -= len(seq.host_blocks)
            num_slots_free -= 1
            if num_slots_free < 0 or num_gpu_free < 0 or not self._fits(residents):
                break
            num_host_free += len(seq.host_blocks)
        return prompt.prompt_blocks <= num_host_free

    def _sorted_residents(self) -> list[Resident]:
        return sorted(_resident(seq) for seq in self._pools.owners.values() if seq.state in _RESIDENT)

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
    return Resident(seq.spec.max_tokens - seq.num_output_tokens, num_held, seq.peak_blocks - num_held)

"""Which sequences are on the GPU: prompts that stay there, and those that come back from the host.

Filling the GPU to the last block with young sequences would have most of them evicted again as they grow, or
stalled when the host is full too. So a sequence becomes a resident only if the residents' expected peak stays within
the GPU pool, and one free block is left for each that may still grow.

That leaves blocks unused while the residents are young. In a decode phase, and when no prompt is left, the GPU may
be filled nearly to the last block instead, if those who find no room to grow can go to the host for a while: larger
batches are worth more than such copies, which run beside the compute, cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from operator import attrgetter, lt, sub

from seesaw_ds.layout import Phase
from seesaw_ds.sched.forecast import LengthForecast, Resident, stay_within
from seesaw_ds.sched.output import SwapIn
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.sequence import Sequence, SequenceState

# Moving a sequence out and another in takes less than a decode step or two, so that this is seldom enough.
_YIELD_TOKENS = 128
# How much room to grow each resident is sure of where the GPU is filled.
_FILL_TOKENS = 128


class Residency:
    """Decides who may be on the GPU, and brings in the sequences on the host. `unit`: as for `Scheduler`."""

    def __init__(self, pools: KvPools, block_size: int, forecast: LengthForecast, unit: int = 1) -> None:
        self._pools = pools
        self._block_size = block_size
        self._forecast = forecast
        self._yield_tokens = _YIELD_TOKENS // unit
        self._fill_blocks = _FILL_TOKENS // unit // block_size + 1
        self._queue: list[tuple[tuple[int, int], int]] = []  # a heap of (rank, seq_id); ids not on the host are skipped
        self._on_host: dict[int, Sequence] = {}
        self._is_end_game = False
        self._is_decoding = False
        self._is_blocked = False
        # As first asked for since an event, and the sequence and margin refused last since then.
        self._residents: _Residents | None = None
        self._refusal: tuple[int, int] | None = None

    def push(self, seq: Sequence) -> None:
        """Queue a sequence whose KV is on the host."""
        seq.state = SequenceState.HOST
        self._on_host[seq.seq_id] = seq
        heapq.heappush(self._queue, (self._rank(seq), seq.seq_id))
        self._is_blocked = False

    def start_phase(self, phase: Phase) -> None:
        """Look again after a change of phase."""
        self._is_decoding = phase is Phase.DECODE
        self.notice_room()

    def start_end_game(self) -> None:
        """From now on those with most to go come to the GPU first: no prompt is left, so none has to wait its turn."""
        if not self._is_end_game:
            self._is_end_game = True
            self._queue = [(self._rank(seq), seq_id) for seq_id, seq in self._on_host.items()]
            heapq.heapify(self._queue)

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence that ended, if its KV is on the host."""
        self._on_host.pop(seq.seq_id, None)

    def notice_event(self) -> None:
        """Note that sequences have moved or grown."""
        self._residents = self._refusal = None

    def notice_room(self) -> None:
        """Look again after a refusal: a sequence ended or gave its blocks back, or there is one prompt less."""
        self._is_blocked = False
        self._residents = self._refusal = None

    def accepts(self, seq: Sequence, transit_blocks: int) -> bool:
        """Whether `seq`, a prompt or on the host, may have a slot and GPU blocks now.

        `transit_blocks` are kept free for prompts on their way to the host.
        """
        if self._refusal == (seq.seq_id, transit_blocks):
            return False
        pools = self._pools
        num_blocks = len(seq.host_blocks) or seq.prompt_blocks
        if pools.slots.num_free > 0 and pools.gpu.num_free >= num_blocks:
            if self._residents is None:
                self._residents = _Residents(pools.residents.values())
            if self._fits(seq, num_blocks, self._residents, pools.gpu.num_blocks - transit_blocks):
                return True
        self._refusal = (seq.seq_id, transit_blocks)
        return False

    def next_swap_in(self, transit_blocks: int) -> SwapIn | None:
        """Start the way to the GPU of the first in the queue, if there is room."""
        if self._is_blocked or not self._on_host:
            return None
        seq = self._first()
        if not self.accepts(seq, transit_blocks):
            self._is_blocked = True
            return None
        del self._on_host[seq.seq_id]
        self._residents = None
        seq.state = SequenceState.SWAPPING_IN
        seq.in_flight += 1
        return self._pools.start_swap_in(seq)

    def find_yielder(self, running: Iterable[Sequence]) -> Sequence | None:
        """In the end game, whom of the `running` to evict for the sake of a sequence on the host with more to go.

        The run ends with the sequence that ends last. One that waits on the host while others finish would run on by
        itself, at the cost of a whole batch's steps. So whoever is ahead by `_YIELD_TOKENS` makes room, but not the
        designated sequence: nobody may grow before it ends.
        """
        if not self._on_host or not self._is_blocked:
            return None
        longest = self._tokens_to_go(self._first())
        if longest <= 2 * self._yield_tokens:
            return None
        ahead = [
            seq
            for seq in running
            if not seq.is_fully_issued
            and seq.seq_id != self._pools.reserve.designated
            and self._yield_tokens < self._tokens_to_go(seq) <= longest - self._yield_tokens
        ]
        return min(ahead, key=lambda seq: (self._tokens_to_go(seq), seq.order), default=None)

    def _rank(self, seq: Sequence) -> tuple[int, int]:
        num_tokens = seq.spec.max_tokens - seq.num_output_tokens
        return (-num_tokens if self._is_end_game else 0, seq.order)

    def _first(self) -> Sequence:
        while (seq := self._on_host.get(self._queue[0][1])) is None or self._queue[0][0] != self._rank(seq):
            heapq.heappop(self._queue)
        return seq

    def _tokens_to_go(self, seq: Sequence) -> float:
        return min(seq.spec.max_tokens - seq.num_output_tokens, self._forecast.mean_tokens)

    def _fits(self, seq: Sequence, num_held: int, others: _Residents, num_blocks: int) -> bool:
        """Whether `seq`, with `num_held` blocks, and the `others` are expected to fit into `num_blocks` together."""
        if not others.sequences:
            return True
        num_growing = others.num_growing + (seq.peak_blocks > num_held)
        if others.num_held_blocks + num_held + num_growing > num_blocks:
            return False
        if others.num_peak_blocks + seq.peak_blocks <= num_blocks:
            return True
        together = others.by_sequence()
        together.append((seq.spec.max_tokens - seq.num_output_tokens, num_held, seq.peak_blocks - num_held))
        together.sort()
        if stay_within(num_blocks, together, self._block_size, self._forecast.mean_tokens):
            return True
        if not (self._is_decoding or self._is_end_game):
            return False
        if sum(held + min(growth, self._fill_blocks) for _, held, growth in together) > num_blocks:
            return False
        # Whoever is evicted needs host room, beside what the reserve rule keeps free: else residents stall.
        pools = self._pools
        host_room = pools.host.num_free + len(seq.host_blocks) - pools.reserve.num_kept_free
        return stay_within(num_blocks + host_room, together, self._block_size, self._forecast.mean_tokens)


class _Residents:
    """The sequences on the GPU with the blocks that they hold at this time, and totals over them."""

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = list(sequences)
        self._held = list(map(len, map(attrgetter("gpu_blocks"), self.sequences)))
        self._peaks = list(map(attrgetter("peak_blocks"), self.sequences))
        self.num_held_blocks = sum(self._held)
        self.num_peak_blocks = sum(self._peaks)
        self.num_growing = sum(map(lt, self._held, self._peaks))

    def by_sequence(self) -> list[Resident]:
        """What the forecast needs of each."""
        remaining = [seq.spec.max_tokens - seq.num_output_tokens for seq in self.sequences]
        return list(zip(remaining, self._held, map(sub, self._peaks, self._held), strict=True))

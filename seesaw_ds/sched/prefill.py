"""The waiting queue and the micro-batches made from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.decode import DecodeGroups
from seesaw_ds.sched.output import PrefillBatch, PrefillChunk, SchedulerLimits
from seesaw_ds.sched.packing import (
    LEAST_PROMPT_SHARE,
    MICRO_BATCH_OVERHEAD_TOKENS,
    MicroBatchRoom,
    chunk_cost,
    micro_batch_cost,
)
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.residency import Residency
from seesaw_ds.sched.sequence import Sequence, SequenceState


class PrefillQueue:
    """Waiting sequences, first in, first out, cut into micro-batches of about equal cost.

    A prompt is admitted when its first chunk is issued; at most one admitted prompt has chunks left to issue.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        pools: KvPools,
        residency: Residency,
        groups: DecodeGroups,
        pairs_per_token: int,
    ) -> None:
        self._limits = limits
        self._pools = pools
        self._residency = residency
        self._groups = groups
        self._pairs_per_token = pairs_per_token
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._waiting_blocks = 0
        self._waiting_cost = 0
        self._unfinished: Sequence | None = None
        self._in_flight: dict[int, list[tuple[Sequence, bool]]] = {}
        self._phase_cost = 0
        self.is_input_closed = False

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet."""
        return len(self._waiting)

    @property
    def waiting_blocks(self) -> int:
        """Blocks of all waiting prompts."""
        return self._waiting_blocks

    @property
    def head(self) -> Sequence | None:
        """The next prompt to admit."""
        return next(iter(self._waiting.values()), None)

    @property
    def has_chunks_left(self) -> bool:
        """Whether part of an admitted prompt is not issued yet."""
        return self._unfinished is not None

    @property
    def has_batches_in_flight(self) -> bool:
        """Whether a micro-batch is unanswered."""
        return bool(self._in_flight)

    @property
    def is_pipeline_full(self) -> bool:
        """Whether enough micro-batches are in flight: one for each stage, and the next."""
        return len(self._in_flight) > self._limits.prefill_stages

    @property
    def transit_margin(self) -> int:
        """GPU blocks that residents leave to prompts in transit: none when only prompts of one token pass through."""
        return self._transit_blocks() if self._spills else 0

    def waiting(self) -> Collection[Sequence]:
        """The sequences not admitted yet, the next one first."""
        return self._waiting.values()

    def __contains__(self, seq_id: int) -> bool:
        """Whether `seq_id` is waiting."""
        return seq_id in self._waiting

    def add(self, seq: Sequence) -> None:
        """Append to the queue."""
        self._waiting[seq.seq_id] = seq
        self._waiting_blocks += seq.prompt_blocks
        self._waiting_cost += self._prompt_cost(seq)

    def remove_waiting(self, seq_id: int) -> Sequence:
        """Take a sequence out of the queue, from anywhere in it."""
        seq = self._waiting.pop(seq_id)
        self._waiting_blocks -= seq.prompt_blocks
        self._waiting_cost -= self._prompt_cost(seq)
        self._residency.notice_room()
        return seq

    def drop_chunks(self, seq: Sequence) -> None:
        """Issue no more chunks of `seq`, if any are left."""
        if self._unfinished is seq:
            self._unfinished = None

    def start_phase(self) -> None:
        """Forget the work of the last prefill phase."""
        self._phase_cost = 0

    def can_admit(self) -> bool:
        """Whether the head, if there is one, could be admitted now."""
        head = self.head
        return head is not None and self._destination(head) is not None

    def next_batch(self, step_id: int) -> PrefillBatch | None:
        """Fill and issue a micro-batch, admitting prompts as they start; None when none can be issued now."""
        if self.is_pipeline_full or not (self._unfinished or self._admit_head()):
            return None
        group, rows = self._groups.rows_to_ride(step_id) if self._limits.mixes_steps else (0, ())
        room = self._room_beside(len(rows))
        chunks: list[PrefillChunk] = []
        issued: list[tuple[Sequence, bool]] = []
        while (seq := self._unfinished) is not None:
            start = seq.num_prefilled_tokens
            num_tokens = room.fit(start, seq.spec.num_prompt_tokens - start)
            if num_tokens == 0:
                break
            room.take(start, num_tokens)
            chunk = self._issue_chunk(seq, num_tokens)
            chunks.append(chunk)
            issued.append((seq, chunk.is_last))
            if chunk.is_last and not (room.is_full or self._admit_head()):
                break
        self._in_flight[step_id] = issued
        return PrefillBatch(step_id, tuple(chunks), group, rows)

    def finish_batch(self, step_id: int) -> list[tuple[Sequence, bool]]:
        """The sequences of an answered micro-batch's chunks, each with whether its prompt ended there."""
        return self._in_flight.pop(step_id)

    def _admit_head(self) -> bool:
        """Admit the next prompt, if there is one and room for it."""
        head = self.head
        if head is None or (stays := self._destination(head)) is None:
            return False
        self.remove_waiting(head.seq_id)
        self._pools.admit(head, stays)
        head.state = SequenceState.PREFILLING
        self._unfinished = head
        return True

    def _destination(self, seq: Sequence) -> bool | None:
        """Where a prompt's KV will go: True, it stays on the GPU; False, to the host or nowhere; None, no room now."""
        pools = self._pools
        num_blocks = seq.prompt_blocks
        if not self._spills and pools.host.num_used:
            return None  # those evicted come first
        if num_blocks > pools.gpu.num_free or not pools.reserve.admits(num_blocks, seq.peak_blocks):
            return None
        if seq.spec.max_tokens > 1:
            if self._residency.accepts(seq, self.transit_margin if self.num_waiting > 1 else 0):
                return True
            if not self._spills or num_blocks > pools.host.num_free - self._groups.num_victim_blocks:
                return None
        # Residents need what is free beyond that to grow.
        is_room = pools.num_transit_blocks == 0 or pools.num_transit_blocks + num_blocks <= self._transit_blocks()
        return False if is_room else None

    @property
    def _spills(self) -> bool:
        """Whether prompts go to the host when they cannot stay.

        With one phase they wait instead, until the host has room for all that are left: then the end game can begin.
        """
        if not self._limits.has_one_phase:
            return True
        return self.is_input_closed and self._waiting_blocks <= self._pools.host.num_free

    def _transit_blocks(self) -> int:
        """GPU blocks that prompts in transit may hold together: what fills the pipeline, and two prompts."""
        head = self.head
        if head is None:
            return 0
        in_flight = (self._limits.prefill_stages + 3) * self._limits.max_num_batched_tokens
        wanted = blocks_for(in_flight, self._limits.block_size) + 2 * head.prompt_blocks
        return min(wanted, self._limits.num_gpu_blocks // 2)

    def _issue_chunk(self, seq: Sequence, num_tokens: int) -> PrefillChunk:
        start = seq.num_prefilled_tokens
        seq.num_prefilled_tokens += num_tokens
        is_last = seq.num_prefilled_tokens == seq.spec.num_prompt_tokens
        seq.in_flight += 1
        if is_last:
            seq.in_flight += seq.goes_to_host  # the swap-out
            seq.num_issued_tokens = 1
        self._unfinished = None if is_last else seq
        self._phase_cost += chunk_cost(start, num_tokens, self._pairs_per_token)
        host_blocks = seq.host_blocks if is_last else ()
        return PrefillChunk(seq.seq_id, start, num_tokens, tuple(seq.gpu_blocks), is_last, host_blocks)

    def _room_beside(self, num_rows: int) -> MicroBatchRoom:
        """The budgets of a micro-batch's prompts when `num_rows` decode rows ride in it."""
        most_tokens, most_cost = self._limits.max_num_batched_tokens, self._cost_limit()
        return MicroBatchRoom(
            max(most_tokens - num_rows, most_tokens // LEAST_PROMPT_SHARE, 1),
            max(most_cost - num_rows * self._pairs_per_token, most_cost // LEAST_PROMPT_SHARE),
            self._pairs_per_token,
        )

    def _cost_limit(self) -> int:
        """The cost limit of a micro-batch, from all the work that this phase is known to have."""
        work = self._phase_cost + self._waiting_cost
        num_free = self._pools.host.num_free + self._pools.gpu.num_free
        if self._waiting_blocks > num_free:
            work -= self._waiting_cost * (self._waiting_blocks - num_free) // self._waiting_blocks
        if (seq := self._unfinished) is not None:
            start = seq.num_prefilled_tokens
            work += chunk_cost(start, seq.spec.num_prompt_tokens - start, self._pairs_per_token)
        # At most twice the cost of its tokens' linear layers: tokens fill a micro-batch before attention does.
        full_cost = chunk_cost(self._pairs_per_token, self._limits.max_num_batched_tokens, self._pairs_per_token)
        return micro_batch_cost(
            work,
            self._limits.prefill_stages,
            overhead=MICRO_BATCH_OVERHEAD_TOKENS * self._pairs_per_token,
            full_cost=full_cost,
        )

    def _prompt_cost(self, seq: Sequence) -> int:
        return chunk_cost(0, seq.spec.num_prompt_tokens, self._pairs_per_token)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the waiting queue's totals are the sums over it."""
        num_blocks = sum(seq.prompt_blocks for seq in self._waiting.values())
        cost = sum(self._prompt_cost(seq) for seq in self._waiting.values())
        if (num_blocks, cost) != (self._waiting_blocks, self._waiting_cost):
            raise RuntimeError(
                f"waiting queue: {num_blocks} blocks of cost {cost} != counted {self._waiting_blocks} "
                f"of cost {self._waiting_cost}"
            )

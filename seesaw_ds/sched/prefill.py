"""The waiting queue and the micro-batches made from it."""

from __future__ import annotations

from collections import OrderedDict

from seesaw_ds.sched.output import PrefillBatch, PrefillChunk, SchedulerLimits
from seesaw_ds.sched.packing import MicroBatchRoom, chunk_cost, micro_batch_cost
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.sequence import Sequence, SequenceState

# Reading the weights and launching a micro-batch takes about as long as computing this many tokens.
_MICRO_BATCH_OVERHEAD_TOKENS = 256


class PrefillQueue:
    """Waiting sequences, first in, first out, cut into micro-batches of about equal cost.

    A prompt is admitted when its first chunk is issued; at most one admitted prompt has chunks left to issue.
    """

    def __init__(self, limits: SchedulerLimits, pools: KvPools, pairs_per_token: int) -> None:
        self._limits = limits
        self._pools = pools
        self._pairs_per_token = pairs_per_token
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._waiting_blocks = 0
        self._waiting_cost = 0
        self._unfinished: Sequence | None = None
        self._in_flight: dict[int, list[tuple[Sequence, bool]]] = {}
        self._phase_cost = 0

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
    def is_pipeline_full(self) -> bool:
        """Whether enough micro-batches are in flight: one for each stage, and the next."""
        return len(self._in_flight) > self._limits.prefill_stages

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
        return seq

    def drop_chunks(self, seq: Sequence) -> None:
        """Issue no more chunks of `seq`, if any are left."""
        if self._unfinished is seq:
            self._unfinished = None

    def start_phase(self) -> None:
        """Forget the work of the last prefill phase."""
        self._phase_cost = 0

    def next_batch(self, step_id: int) -> PrefillBatch | None:
        """Fill and issue a micro-batch, admitting prompts as they start; None when none can be issued now."""
        if self.is_pipeline_full:
            return None
        limits = self._limits
        room = MicroBatchRoom(
            limits.max_num_batched_tokens, self._cost_limit(), limits.block_size, self._pairs_per_token
        )
        chunks: list[PrefillChunk] = []
        issued: list[tuple[Sequence, bool]] = []
        while (seq := self._unfinished or self.head) is not None:
            start = seq.num_prefilled_tokens
            num_tokens = room.fit(start, seq.spec.num_prompt_tokens - start)
            if num_tokens == 0 or not (seq is self._unfinished or self._admit(seq)):
                break
            room.take(start, num_tokens)
            chunk = self._issue_chunk(seq, num_tokens)
            chunks.append(chunk)
            issued.append((seq, chunk.is_last))
        if not chunks:
            return None
        self._in_flight[step_id] = issued
        return PrefillBatch(step_id, tuple(chunks))

    def finish_batch(self, step_id: int) -> list[tuple[Sequence, bool]]:
        """The sequences of an answered micro-batch, each with whether its prompt ended there."""
        return self._in_flight.pop(step_id)

    def _admit(self, seq: Sequence) -> bool:
        if not self._pools.can_admit(seq):
            return False
        self.remove_waiting(seq.seq_id)
        self._pools.admit(seq)
        seq.state = SequenceState.PREFILLING
        return True

    def _issue_chunk(self, seq: Sequence, num_tokens: int) -> PrefillChunk:
        start = seq.num_prefilled_tokens
        seq.num_prefilled_tokens += num_tokens
        is_last = seq.num_prefilled_tokens == seq.spec.num_prompt_tokens
        seq.in_flight += 1
        if is_last:
            seq.in_flight += 1  # the swap-out
            seq.num_issued_tokens = 1
        self._unfinished = None if is_last else seq
        self._phase_cost += chunk_cost(start, num_tokens, self._pairs_per_token)
        host_blocks = seq.host_blocks if is_last else ()
        return PrefillChunk(seq.seq_id, start, num_tokens, seq.prefill_blocks, is_last, host_blocks)

    def _cost_limit(self) -> int:
        """The cost limit of a micro-batch, from all the work that this phase is known to have."""
        work = self._phase_cost + self._waiting_cost
        num_host_free = self._pools.host.num_free
        if self._waiting_blocks > num_host_free:
            work -= self._waiting_cost * (self._waiting_blocks - num_host_free) // self._waiting_blocks
        if (seq := self._unfinished) is not None:
            start = seq.num_prefilled_tokens
            work += chunk_cost(start, seq.spec.num_prompt_tokens - start, self._pairs_per_token)
        return micro_batch_cost(
            work,
            self._limits.prefill_stages,
            overhead=_MICRO_BATCH_OVERHEAD_TOKENS * self._pairs_per_token,
            full_cost=chunk_cost(0, self._limits.max_num_batched_tokens, self._pairs_per_token),
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

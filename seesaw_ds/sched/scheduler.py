"""The transition-minimizing scheduler: prefill until the host pool is full, decode until it is empty.

It follows the paper's section on transition-minimizing scheduling: prompts are prefilled in one layout and their
KV goes to the host pool; the phase turns to decode when the next prompt finds no room there (or none is left), and
back when every sequence has moved to the GPU. Running sequences keep their GPU KV during a prefill phase, and
sequences are copied from the host to the GPU in both phases, whenever there is room.
"""

from __future__ import annotations

from collections import Counter

from seesaw_ds.layout import Phase
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.decode import DecodeGroups
from seesaw_ds.sched.forecast import LengthForecast
from seesaw_ds.sched.output import (
    Action,
    DecodeBatch,
    DecodeDone,
    Event,
    Evict,
    EvictDone,
    Finished,
    PhaseSwitched,
    PrefillBatch,
    PrefillDone,
    SchedulerLimits,
    SequenceSpec,
    SwapInDone,
    SwapOutDone,
    SwitchPhase,
)
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.prefetch import Prefetcher
from seesaw_ds.sched.prefill import PrefillQueue
from seesaw_ds.sched.sequence import Sequence, SequenceState
from seesaw_ds.sched.stats import SchedulerStats, TransitionReason


class Scheduler:
    """Decides what one replica does next. Call `schedule` until it returns None, then `update` with each event.

    Pure: equal calls give equal actions. `pairs_per_token` weighs attention against the rest in prefill: the
    context length at which a token's attention costs as much as its linear layers, about (parameters of a
    layer) / (2 x heads x head_dim). `expected_output_tokens` is a first guess of the outputs' lengths, for inputs
    whose `max_tokens` say little about them. `phase` is the phase entered last, `transitions` why each change
    happened.
    """

    def __init__(
        self, limits: SchedulerLimits, pairs_per_token: int = 8192, expected_output_tokens: int | None = None
    ) -> None:
        self.limits = limits
        self.phase = Phase.PREFILL
        self.transitions: list[TransitionReason] = []
        self._pools = KvPools(limits)
        self._prefill = PrefillQueue(limits, self._pools, pairs_per_token)
        self._decode = DecodeGroups(limits, self._pools)
        self._forecast = LengthForecast(expected_output_tokens)
        self._prefetcher = Prefetcher(self._pools, limits.block_size, self._forecast)
        self._input_closed = False
        self._is_switching = False
        self._num_added = 0
        self._num_steps = 0
        self._num_finished = 0
        self._num_evictions = 0

    # Input

    def add(self, spec: SequenceSpec) -> None:
        """Queue a sequence.

        Raises ValueError when it could never run with these pools, RuntimeError after `close_input`.
        """
        if self._input_closed:
            raise RuntimeError(f"seq_id={spec.seq_id}: the input is closed")
        if spec.seq_id in self._prefill or spec.seq_id in self._pools.owners:
            raise ValueError(f"seq_id={spec.seq_id}: already scheduled; give each sequence an id of its own")
        self._check_size(spec)
        self._prefill.add(Sequence(spec, order=self._num_added, block_size=self.limits.block_size))
        self._num_added += 1

    def close_input(self) -> None:
        """No sequence will be added any more."""
        self._input_closed = True

    def abort(self, seq_id: int) -> None:
        """Drop a sequence wherever it is, without a `Finished`; an id that is not live is ignored.

        Its blocks are free as soon as nothing in flight uses them.
        """
        if seq_id in self._prefill:
            self._prefill.remove_waiting(seq_id)
        elif (seq := self._pools.owners.get(seq_id)) is not None and seq.state is not SequenceState.ENDED:
            self._end(seq)

    @property
    def wants_input(self) -> bool:
        """Whether the waiting prompts could leave the host pool unfilled, one micro-batch counted on top."""
        look_ahead = blocks_for(self.limits.max_num_batched_tokens, self.limits.block_size)
        return not self._input_closed and self._prefill.waiting_blocks < self.limits.num_host_blocks + look_ahead

    @property
    def is_done(self) -> bool:
        """Whether the input is closed, every sequence has ended and nothing is in flight."""
        idle = not self._is_switching and not self._pools.owners
        return self._input_closed and idle and self._prefill.num_waiting == 0

    def _check_size(self, spec: SequenceSpec) -> None:
        if spec.num_prompt_tokens < 1 or spec.max_tokens < 1:
            raise ValueError(
                f"seq_id={spec.seq_id}: num_prompt_tokens={spec.num_prompt_tokens} and "
                f"max_tokens={spec.max_tokens} must both be at least 1"
            )
        limits = self.limits
        prompt = blocks_for(spec.num_prompt_tokens, limits.block_size)
        peak = blocks_for(spec.num_prompt_tokens + spec.max_tokens - 1, limits.block_size)
        for name, needed, available in (
            ("num_prefill_blocks", prompt, limits.num_prefill_blocks),
            ("num_gpu_blocks", peak, limits.num_gpu_blocks),
            ("num_host_blocks", peak, limits.num_host_blocks),
        ):
            if needed > available:
                raise ValueError(
                    f"seq_id={spec.seq_id}: {spec.num_prompt_tokens} prompt tokens and max_tokens={spec.max_tokens} "
                    f"need {needed} blocks of {limits.block_size}, but {name}={available}; "
                    "give the pool more memory, or shorten the request"
                )

    # Actions

    def schedule(self) -> Action | None:
        """The next action, or None when nothing can start before an event or more input."""
        if (swap_in := self._prefetcher.next_swap_in()) is not None:
            return swap_in
        if self._is_switching:
            return None
        if self.phase is Phase.PREFILL:
            return self._next_prefill()
        return self._next_decode() or self._next_evict()

    def _next_evict(self) -> Evict | None:
        seq = self._decode.pop_victim()
        if seq is None:
            return None
        self._num_evictions += 1
        seq.state = SequenceState.EVICTING
        seq.in_flight += 1
        return self._pools.start_evict(seq)

    def _next_prefill(self) -> PrefillBatch | SwitchPhase | None:
        if (batch := self._prefill.next_batch(self._num_steps)) is not None:
            self._num_steps += 1
            return batch
        if self._prefill.has_chunks_left or not self._has_sequence_to_decode():
            return None
        head = self._prefill.head
        if head is not None:
            return None if self._will_admit(head) else self._switch(Phase.DECODE, TransitionReason.HOST_FULL)
        return self._switch(Phase.DECODE, TransitionReason.NO_PROMPT_LEFT) if self._input_closed else None

    def _next_decode(self) -> DecodeBatch | SwitchPhase | None:
        head = self._prefill.head
        if head is not None and self._pools.host.num_used == 0 and self._pools.can_admit(head):
            return self._switch(Phase.PREFILL, TransitionReason.HOST_EMPTY)
        if (batch := self._decode.next_batch(self._num_steps)) is not None:
            self._num_steps += 1
        return batch

    def _switch(self, to: Phase, reason: TransitionReason) -> SwitchPhase:
        self.phase = to
        self._is_switching = True
        self.transitions.append(reason)
        self._prefill.start_phase()
        self._decode.spare_victims()
        return SwitchPhase(to)

    def _has_sequence_to_decode(self) -> bool:
        """Whether some sequence has its first token and needs more."""
        return any(
            seq.state not in (SequenceState.PREFILLING, SequenceState.ENDED) for seq in self._pools.owners.values()
        )

    def _will_admit(self, prompt: Sequence) -> bool:
        """Whether `prompt` has room on the host now, or will have it without a change of phase."""
        pools = self._pools
        return (
            self._decode.has_steps_in_flight
            or (
                prompt.prompt_blocks <= pools.host.num_free
                and pools.reserve.admits(prompt.prompt_blocks, prompt.peak_blocks)
            )
            or self._prefetcher.will_have_host_room(prompt)
        )

    # Events

    def update(self, event: Event) -> list[Finished]:
        """Take the answer to an action; returns the sequences that ended with it."""
        self._prefetcher.notice_event()
        if isinstance(event, DecodeDone):
            return self._on_decode_done(event)
        if isinstance(event, PrefillDone):
            return self._on_prefill_done(event)
        if isinstance(event, PhaseSwitched):
            assert self._is_switching
            assert event.phase is self.phase
            self._is_switching = False
            return []
        seq = self._pools.owners[event.seq_id]
        seq.in_flight -= 1
        if seq.state is SequenceState.ENDED:
            self._release_if_idle(seq)
        elif isinstance(event, SwapOutDone):
            self._on_swap_out_done(seq)
        elif isinstance(event, SwapInDone):
            assert seq.state is SequenceState.SWAPPING_IN
            self._pools.finish_swap_in(seq)
            self._decode.join(seq)
        else:
            assert isinstance(event, EvictDone)
            assert seq.state is SequenceState.EVICTING
            self._pools.finish_evict(seq)
            self._prefetcher.push(seq)
        return []

    def _on_prefill_done(self, event: PrefillDone) -> list[Finished]:
        first_tokens = dict(event.tokens)
        finished: list[Finished] = []
        for seq, is_last in self._prefill.finish_batch(event.step_id):
            seq.in_flight -= 1
            if seq.state is SequenceState.ENDED:
                self._release_if_idle(seq)
            elif is_last:
                finished += self._append(seq, first_tokens[seq.seq_id])
                if seq.state is SequenceState.PREFILLING:
                    seq.state = SequenceState.SWAPPING_OUT
                    if seq.is_swapped_out:
                        self._prefetcher.push(seq)
        return finished

    def _on_swap_out_done(self, seq: Sequence) -> None:
        self._pools.free_prefill(seq)
        seq.is_swapped_out = True
        if seq.state is SequenceState.SWAPPING_OUT:
            self._prefetcher.push(seq)

    def _on_decode_done(self, event: DecodeDone) -> list[Finished]:
        tokens = dict(event.tokens)
        finished: list[Finished] = []
        for seq in self._decode.finish_batch(event.step_id):
            seq.in_flight -= 1
            if seq.state is SequenceState.ENDED:
                self._release_if_idle(seq)
            else:
                finished += self._append(seq, tokens[seq.seq_id])
        return finished

    def _append(self, seq: Sequence, token: int) -> list[Finished]:
        self._forecast.add_token()
        reason = seq.append(token)
        if reason is None:
            return []
        self._num_finished += 1
        self._end(seq)
        return [Finished(seq.seq_id, reason, seq.num_output_tokens)]

    def _end(self, seq: Sequence) -> None:
        if seq.state is SequenceState.RUNNING:
            self._decode.leave(seq)
        self._prefill.drop_chunks(seq)
        seq.state = SequenceState.ENDED
        if 0 < seq.num_output_tokens < seq.spec.max_tokens:
            self._forecast.add_stopped()
        self._prefetcher.notice_room()
        self._pools.retire(seq)
        self._release_if_idle(seq)

    def _release_if_idle(self, seq: Sequence) -> None:
        if seq.in_flight == 0:
            self._pools.release(seq)
            self._prefetcher.notice_room()

    # Reports

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all counts agree, each used block has one owner, and the reserve rule is kept."""
        self._pools.check_integrity()
        self._prefill.check_integrity()

    def stats(self) -> SchedulerStats:
        """Counts of sequences and blocks as they stand now."""
        states = Counter(seq.state for seq in self._pools.owners.values())
        pools = self._pools
        return SchedulerStats(
            phase=self.phase,
            num_waiting=self._prefill.num_waiting,
            num_prefilling=states[SequenceState.PREFILLING] + states[SequenceState.SWAPPING_OUT],
            num_host=states[SequenceState.HOST] + states[SequenceState.SWAPPING_IN] + states[SequenceState.EVICTING],
            num_running=states[SequenceState.RUNNING],
            num_finished=self._num_finished,
            num_prefill_blocks_used=pools.prefill.num_used,
            num_prefill_blocks=pools.prefill.num_blocks,
            num_gpu_blocks_used=pools.gpu.num_used,
            num_gpu_blocks=pools.gpu.num_blocks,
            num_host_blocks_used=pools.host.num_used,
            num_host_blocks=pools.host.num_blocks,
            num_transitions=len(self.transitions),
            num_evictions=self._num_evictions,
        )

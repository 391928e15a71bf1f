"""The transition-minimizing scheduler: prefill until the GPU and the host are full, decode until the host is empty.

It follows the paper's section on transition-minimizing scheduling, and goes beyond it in two things. Prompts are
prefilled in one layout; their KV stays on the GPU where it is expected to have room to grow, else it goes to the host
pool. The phase turns to decode when the next prompt finds no room in either (or none is left), and back when every
sequence has moved to the GPU. What is beyond the paper: sequences on the GPU go on decoding during a prefill phase, as
rows of its micro-batches (`SchedulerLimits.mixes_steps`), which are compute-bound and read the weights anyway. And
where the phase would turn to decode, a `LayoutChooser` may have them decode on in the prefill layout
(`seesaw_ds.sched.staying`).
"""

from __future__ import annotations

from collections import Counter, deque

from seesaw_ds.layout import Phase
from seesaw_ds.requests import FinishReason
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.decode import DecodeGroups
from seesaw_ds.sched.forecast import LengthForecast
from seesaw_ds.sched.output import (
    Action,
    Activate,
    DecodeBatch,
    DecodeDone,
    Event,
    Evict,
    EvictDone,
    Finished,
    PhaseSwitched,
    PrefillDone,
    SchedulerLimits,
    SequenceSpec,
    SwapInDone,
    SwapOutDone,
    SwitchPhase,
)
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.prefill import PrefillQueue
from seesaw_ds.sched.preload import Preloading
from seesaw_ds.sched.residency import Residency
from seesaw_ds.sched.sequence import Sequence, SequenceState
from seesaw_ds.sched.stats import SchedulerStats, TransitionReason
from seesaw_ds.sched.staying import LayoutChooser, Staying, live_batch

_ON_GPU = (SequenceState.PREFILLING, SequenceState.SWAPPING_IN, SequenceState.RUNNING)
# Sequences that make room for others at once.
_MOST_YIELDING = 4
_IN_TRANSIT = (SequenceState.SWAPPING_OUT, SequenceState.SWAPPING_IN, SequenceState.EVICTING, SequenceState.ENDED)


class Scheduler:
    """Decides what one replica does next. Call `schedule` until it returns None, then `update` with each event.

    Pure: equal calls give equal actions. `pairs_per_token` weighs attention against the rest in prefill: the
    context length at which a token's attention costs as much as its linear layers, about (parameters of a
    layer) / (2 x heads x head_dim). `expected_output_tokens` is a first guess of the outputs' lengths, for inputs
    whose `max_tokens` say little about them. `layout_chooser` is asked before each change to decode, where steps are
    mixed and there are two layouts; without one the change is made at once. `unit` is how many tokens the limits and
    lengths count as one: several in a simulation. `phase` is the phase entered last, `transitions` why each change
    happened.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        pairs_per_token: int = 8192,
        expected_output_tokens: int | None = None,
        layout_chooser: LayoutChooser | None = None,
        unit: int = 1,
    ) -> None:
        assert layout_chooser is None or limits.may_stay
        self.limits = limits
        self.phase = Phase.PREFILL
        self.transitions: list[TransitionReason] = []
        self._pools = KvPools(limits)
        self._forecast = LengthForecast(expected_output_tokens)
        self._residency = Residency(self._pools, limits.block_size, self._forecast, unit)
        self._decode = DecodeGroups(limits, self._pools)
        self._prefill = PrefillQueue(limits, self._pools, self._residency, self._decode, pairs_per_token)
        self._preloading = Preloading(limits, self._pools, self._prefill)
        self._staying = Staying(layout_chooser)
        self._to_activate: deque[Sequence] = deque()
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
        if self._prefill.is_input_closed:
            raise RuntimeError(f"seq_id={spec.seq_id}: the input is closed")
        if spec.seq_id in self._prefill or spec.seq_id in self._pools.owners:
            raise ValueError(f"seq_id={spec.seq_id}: already scheduled; give each sequence an id of its own")
        self.limits.check_fits(spec)
        self._prefill.add(Sequence(spec, order=self._num_added, block_size=self.limits.block_size))
        self._num_added += 1

    def close_input(self) -> None:
        """No sequence will be added any more."""
        self._prefill.is_input_closed = True

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
        """Whether the waiting prompts could leave the pools unfilled, one micro-batch counted on top."""
        limits = self.limits
        look_ahead = blocks_for(limits.max_num_batched_tokens, limits.block_size)
        room = limits.num_gpu_blocks + limits.num_host_blocks + look_ahead
        return not self._prefill.is_input_closed and self._prefill.waiting_blocks < room

    @property
    def is_done(self) -> bool:
        """Whether the input is closed, every sequence has ended and nothing is in flight."""
        idle = not self._is_switching and not self._pools.owners
        return self._prefill.is_input_closed and idle and self._prefill.num_waiting == 0

    # Actions

    def schedule(self) -> Action | None:
        """The next action, or None when nothing can start before an event or more input."""
        if (activate := self._next_activate()) is not None:
            return activate
        if self._is_switching:
            return None
        if self.phase is Phase.PREFILL and (preload := self._preloading.next()) is not None:
            return preload
        # Nothing is in transit while the phase is decode.
        margin = self._prefill.transit_margin if self.phase is Phase.PREFILL else 0
        if self._prefill.is_input_closed and self._prefill.num_waiting == 0:
            self._residency.start_end_game()
            self._mark_yielder()
        if (swap_in := self._residency.next_swap_in(margin)) is not None:
            return swap_in
        if self.phase is Phase.PREFILL:
            return self._next_prefill()
        return self._next_decode() or self._next_evict()

    def _mark_yielder(self) -> None:
        """Have a running sequence make room for one on the host that has more to go, if that helps.

        Not while the host has enough to fill the GPU again: then nobody's end is near the end of the run.
        """
        pools = self._pools
        if pools.host.num_used < pools.gpu.num_used and self._decode.num_victims < _MOST_YIELDING:
            seq = self._residency.find_yielder(self._decode.candidates())
            if seq is not None and len(seq.gpu_blocks) <= pools.host.num_free - self._decode.num_victim_blocks:
                self._decode.mark_victim(seq)

    def _next_activate(self) -> Activate | None:
        while self._to_activate:
            seq = self._to_activate.popleft()
            if seq.state is SequenceState.RUNNING:
                return self._pools.activate(seq)
        return None

    def _next_evict(self) -> Evict | None:
        seq = self._decode.pop_victim()
        if seq is None:
            return None
        self._num_evictions += 1
        seq.state = SequenceState.EVICTING
        seq.in_flight += 1
        return self._pools.start_evict(seq)

    def _next_prefill(self) -> Action | None:
        is_staying = self._staying.is_on(self._has_prompts_left())
        # In a stay a micro-batch waits for the rows that are to ride in it: else it would delay them, and save nothing.
        waits = is_staying and self._decode.is_next_group_busy
        if not waits and (batch := self._prefill.next_batch(self._num_steps)) is not None:
            self._num_steps += 1
            return batch
        decodes = self.limits.has_one_phase or is_staying  # decode steps go between the micro-batches
        if decodes and not self._prefill.is_pipeline_full and (step := self._next_step()) is not None:
            return step
        if (evict := self._next_evict()) is not None:
            return evict
        if decodes or (reason := self._reason_to_decode()) is None:
            return None
        return self._stay_or_switch(reason) if self._staying.is_possible else self._switch(Phase.DECODE, reason)

    def _has_prompts_left(self) -> bool:
        return self._prefill.head is not None or not self._prefill.is_input_closed

    def _reason_to_decode(self) -> TransitionReason | None:
        """Why the phase is to change now, if it is."""
        if self._prefill.has_chunks_left or not self._has_sequence_to_decode():
            return None
        if self._prefill.head is not None:
            return None if self._is_in_flux() else TransitionReason.HOST_FULL
        return TransitionReason.NO_PROMPT_LEFT if self._prefill.is_input_closed else None

    def _stay_or_switch(self, reason: TransitionReason) -> Action | None:
        mean_tokens, preloaded = self._forecast.mean_tokens, self._preloading.share
        batch = live_batch(self._pools.owners.values(), mean_tokens, self._prefill.num_waiting, preloaded)
        if batch.num_sequences == 0:
            return None  # the last tokens are under way
        if self._staying.begins(batch):
            self._residency.notice_room()
            return self.schedule()
        if self._staying.has_stayed and reason is TransitionReason.NO_PROMPT_LEFT:
            reason = TransitionReason.FEW_LEFT
        return self._switch(Phase.DECODE, reason)

    def _next_decode(self) -> DecodeBatch | SwitchPhase | None:
        if self._pools.host.num_used == 0 and self._can_prefill():
            return self._switch(Phase.PREFILL, TransitionReason.HOST_EMPTY)
        return self._next_step()

    def _can_prefill(self) -> bool:
        """Whether the GPU has room for the next prompt, and for those that will pass through to the host."""
        pools = self._pools
        is_room = pools.gpu.num_free >= self._prefill.transit_margin or not pools.slot_holders
        return is_room and self._prefill.can_admit()

    def _next_step(self) -> DecodeBatch | None:
        if (batch := self._decode.next_batch(self._num_steps)) is not None:
            self._num_steps += 1
        return batch

    def _switch(self, to: Phase, reason: TransitionReason) -> SwitchPhase:
        self.phase = to
        self._is_switching = True
        self.transitions.append(reason)
        self._prefill.start_phase()
        self._staying.start_phase()
        self._residency.start_phase(to)
        self._decode.start_phase(self.limits.prefill_stages if to is Phase.PREFILL else self.limits.decode_stages)
        blocks: list[int] = []
        if not self.limits.is_static:
            for seq in self._pools.slot_holders.values():
                if seq.state in _ON_GPU and not seq.is_fully_issued:
                    blocks += seq.gpu_blocks
        return SwitchPhase(to, tuple(blocks))

    def _has_sequence_to_decode(self) -> bool:
        """Whether some sequence has its first token and needs more."""
        return any(
            seq.state not in (SequenceState.PREFILLING, SequenceState.ENDED) for seq in self._pools.owners.values()
        )

    def _is_in_flux(self) -> bool:
        """Whether something is under way whose end may make room for a prompt."""
        return (
            self._prefill.has_batches_in_flight
            or self._decode.has_steps_in_flight
            or any(seq.state in _IN_TRANSIT for seq in self._pools.owners.values())
        )

    # Events

    def update(self, event: Event) -> list[Finished]:
        """Take the answer to an action; returns the sequences that ended with it."""
        self._residency.notice_event()
        if isinstance(event, DecodeDone):
            return self._on_rows(event.step_id, dict(event.tokens))
        if isinstance(event, PrefillDone):
            return self._on_prefill_done(event)
        if isinstance(event, PhaseSwitched):
            assert self._is_switching
            assert event.phase is self.phase
            self._is_switching = False
            self._preloading.end_phase()
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
            self._residency.push(seq)
        return []

    def _on_prefill_done(self, event: PrefillDone) -> list[Finished]:
        tokens = dict(event.tokens)
        finished = self._on_rows(event.step_id, tokens)
        for seq, is_last in self._prefill.finish_batch(event.step_id):
            seq.in_flight -= 1
            if seq.state is SequenceState.ENDED:
                self._release_if_idle(seq)
            elif is_last:
                self._forecast.add_tokens(1)
                if (reason := seq.append(tokens[seq.seq_id])) is not None:
                    finished.append(self._finish(seq, reason))
                if seq.state is SequenceState.PREFILLING:
                    self._leave_prefill(seq)
        return finished

    def _leave_prefill(self, seq: Sequence) -> None:
        if seq.stays:
            self._decode.join(seq)
            self._to_activate.append(seq)
            return
        seq.state = SequenceState.SWAPPING_OUT
        if seq.is_swapped_out:
            self._residency.push(seq)

    def _on_swap_out_done(self, seq: Sequence) -> None:
        self._pools.finish_swap_out(seq)
        self._residency.notice_room()
        if seq.state is SequenceState.SWAPPING_OUT:
            self._residency.push(seq)

    def _on_rows(self, step_id: int, tokens: dict[int, int]) -> list[Finished]:
        finished: list[Finished] = []
        num_tokens = 0
        for seq in self._decode.finish_batch(step_id):
            seq.in_flight -= 1
            if seq.state is SequenceState.ENDED:
                self._release_if_idle(seq)
                continue
            num_tokens += 1
            if (reason := seq.append(tokens[seq.seq_id])) is not None:
                finished.append(self._finish(seq, reason))
        self._forecast.add_tokens(num_tokens)
        return finished

    def _finish(self, seq: Sequence, reason: FinishReason) -> Finished:
        self._num_finished += 1
        self._end(seq)
        return Finished(seq.seq_id, reason, seq.num_output_tokens)

    def _end(self, seq: Sequence) -> None:
        if seq.state is SequenceState.RUNNING:
            self._decode.leave(seq)
        self._prefill.drop_chunks(seq)
        self._residency.drop(seq)
        self._staying.count_end()
        seq.state = SequenceState.ENDED
        if 0 < seq.num_output_tokens < seq.spec.max_tokens:
            self._forecast.add_stopped()
        self._residency.notice_room()
        self._pools.retire(seq)
        self._release_if_idle(seq)

    def _release_if_idle(self, seq: Sequence) -> None:
        if seq.in_flight == 0:
            self._pools.release(seq)
            self._residency.notice_room()

    # Reports

    @property
    def num_left_after_stay(self) -> int | None:
        """How many sequences were left when the last stay in the prefill layout ended; 0: to the end; None: no stay."""
        return self._staying.num_left

    @property
    def most_host_blocks_used(self) -> int:
        """The most blocks of the host pool that were used at once so far."""
        return self._pools.host.most_used

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
            num_gpu_blocks_used=pools.gpu.num_used - len(pools.lent_blocks),
            num_gpu_blocks=pools.gpu.num_blocks,
            num_host_blocks_used=pools.host.num_used,
            num_host_blocks=pools.host.num_blocks,
            num_transitions=len(self.transitions),
            num_evictions=self._num_evictions,
        )

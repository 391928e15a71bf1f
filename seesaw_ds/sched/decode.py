"""Running sequences, the pipeline groups they step in, and who gives way when GPU blocks run out."""

from __future__ import annotations

from collections.abc import Iterator

from seesaw_ds.sched.output import DecodeBatch, DecodeRow, SchedulerLimits
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.sequence import Sequence, SequenceState

# One step runs and the next is queued behind it, so that workers never wait for the scheduler.
_MAX_STEPS_IN_FLIGHT = 2


class DecodeGroups:
    """The running sequences, in as many groups as the phase has stages; the groups step in turn::

        2 stages   stage 0   g0 g1 g0 g1 ...
                   stage 1      g0 g1 g0 ...

    A sequence's steps in flight are always of one group, since the token of one step is fed to the next when the
    group comes round: a sequence that changes groups is left out until its steps are answered.
    """

    def __init__(self, limits: SchedulerLimits, pools: KvPools) -> None:
        self._block_size = limits.block_size
        self._pools = pools
        self._groups: list[dict[int, Sequence]] = [{} for _ in range(limits.prefill_stages)]
        self._num_in_flight = [0] * limits.prefill_stages
        self._batches: dict[int, tuple[int | None, list[Sequence]]] = {}
        self._next_group = 0
        self._victims: dict[int, Sequence] = {}

    @property
    def has_steps_in_flight(self) -> bool:
        """Whether a step with decode rows is unanswered."""
        return bool(self._batches)

    @property
    def is_next_group_busy(self) -> bool:
        """Whether the group whose turn it is has as many steps in flight as it may."""
        return self._num_in_flight[self._next_group] == _MAX_STEPS_IN_FLIGHT

    def members(self) -> Iterator[Sequence]:
        """The running sequences."""
        return (seq for group in self._groups for seq in group.values())

    def join(self, seq: Sequence) -> None:
        """Make `seq` run, in the smallest group."""
        seq.state = SequenceState.RUNNING
        self._put(seq, min(range(len(self._groups)), key=lambda group: len(self._groups[group])))

    def leave(self, seq: Sequence) -> None:
        """Take out a sequence that ended or is evicted; its steps in flight stay counted."""
        del self._groups[seq.group][seq.seq_id]
        self._victims.pop(seq.seq_id, None)

    def next_batch(self, step_id: int) -> DecodeBatch | None:
        """Issue a step of the next group that has one to make; None when there is none.

        Takes the blocks that the rows need, and marks victims when there are too few. A group with as many steps in
        flight as it may have keeps its turn. Were others let past it, two steps of one group would follow each other,
        the second would hold up the pipeline until the first one's tokens are back, and the order would stay so::

            in turn     g0 g1 g0 g1 g0 g1        out of turn    g0 g0 .. g1 g1 .. g0 g0 ..
        """
        self._rebalance()
        num_groups = len(self._groups)
        for group in ((self._next_group + i) % num_groups for i in range(num_groups)):
            if self._num_in_flight[group] == _MAX_STEPS_IN_FLIGHT:
                return None
            if rows := self._step(step_id, group):
                return DecodeBatch(step_id, group, rows)
        return None

    def rows_to_ride(self, step_id: int) -> tuple[int, tuple[DecodeRow, ...]]:
        """The next group and its rows, which may be none, for a prefill micro-batch to take along.

        Groups ride in turn, so that a row's token is known in the first stage when its group comes round.
        """
        self._rebalance()
        group = self._next_group
        self._next_group = (group + 1) % len(self._groups)
        return group, self._step(step_id, group)

    def finish_batch(self, step_id: int) -> list[Sequence]:
        """The sequences of an answered step, in the order of its rows; none when it had no rows."""
        if step_id not in self._batches:
            return []
        group, sequences = self._batches.pop(step_id)
        if group is not None:
            self._num_in_flight[group] -= 1
        return sequences

    @property
    def num_victims(self) -> int:
        """Sequences marked to be evicted and not yet taken out."""
        return len(self._victims)

    @property
    def num_victim_blocks(self) -> int:
        """Host blocks that those marked will take."""
        return sum(len(seq.gpu_blocks) for seq in self._victims.values())

    def mark_victim(self, seq: Sequence) -> None:
        """Have `seq` evicted as soon as it has no step in flight."""
        self._victims[seq.seq_id] = seq

    def start_phase(self, num_stages: int) -> None:
        """Regroup for a pipeline of `num_stages`.

        Whoever has steps in flight may step again at once: workers share their tokens when they change phase.
        """
        members = list(self.members())
        self._groups = [{} for _ in range(num_stages)]
        self._num_in_flight = [0] * num_stages
        self._batches = {step_id: (None, sequences) for step_id, (_, sequences) in self._batches.items()}
        self._next_group = 0
        self._victims.clear()
        for i, seq in enumerate(members):
            self._put(seq, i % num_stages)
            seq.step_group = seq.group

    def pop_victim(self) -> Sequence | None:
        """A sequence to evict now, taken out of its group: marked, and with no step in flight."""
        for seq in self._victims.values():
            if seq.in_flight == 0:
                self.leave(seq)
                return seq
        return None

    def _step(self, step_id: int, group: int) -> tuple[DecodeRow, ...]:
        """Issue a step of `group`; its rows, none when it has none to make now."""
        if self._num_in_flight[group] == _MAX_STEPS_IN_FLIGHT:
            return ()
        rows, sequences = self._issue_rows(group)
        if rows:
            self._next_group = (group + 1) % len(self._groups)
            self._num_in_flight[group] += 1
            self._batches[step_id] = (group, sequences)
        return tuple(rows)

    def _put(self, seq: Sequence, group: int) -> None:
        seq.group = group
        self._groups[group][seq.seq_id] = seq

    def _rebalance(self) -> None:
        while True:
            sizes = list(map(len, self._groups))
            most, least = max(sizes), min(sizes)
            if most - least <= 1:
                return
            largest, smallest = sizes.index(most), sizes.index(least)
            _, seq = self._groups[largest].popitem()
            self._put(seq, smallest)

    def _issue_rows(self, group: int) -> tuple[list[DecodeRow], list[Sequence]]:
        """The rows of a step of `group`, and the sequence of each."""
        rows: list[DecodeRow] = []
        sequences: list[Sequence] = []
        lacking: list[Sequence] = []
        block_size, victims = self._block_size, self._victims
        for seq in self._groups[group].values():
            # `is_fully_issued` and `next_position` written out, as this runs for every token.
            spec, num_issued = seq.spec, seq.num_issued_tokens
            if num_issued >= spec.max_tokens or seq.seq_id in victims or (seq.in_flight and seq.step_group != group):
                continue
            position = spec.num_prompt_tokens + num_issued - 1
            new_blocks: tuple[int, ...] = ()
            if position // block_size >= len(seq.gpu_blocks):
                if not self._may_grow(seq):
                    continue
                if self._pools.gpu.num_free == 0:
                    lacking.append(seq)
                    continue
                new_blocks = self._pools.grow(seq)
            seq.num_issued_tokens = num_issued + 1
            seq.in_flight += 1
            seq.step_group = group
            assert seq.slot is not None
            rows.append(DecodeRow(seq.seq_id, seq.slot, position, new_blocks))
            sequences.append(seq)
        if lacking:
            self._mark_victims(lacking)
        return rows, sequences

    def _may_grow(self, seq: Sequence) -> bool:
        reserve = self._pools.reserve
        if reserve.allows_growth(seq.seq_id):
            return True
        if reserve.designated is None:
            oldest = min(self.candidates(), key=lambda candidate: candidate.order)
            reserve.designate(oldest.seq_id)
        return seq.seq_id == reserve.designated

    def candidates(self) -> Iterator[Sequence]:
        """Running sequences that are not to be evicted."""
        return (seq for seq in self.members() if seq.seq_id not in self._victims)

    def _mark_victims(self, lacking: list[Sequence]) -> None:
        """Choose sequences to evict, newest first, until the blocks to come are enough for the `lacking` rows.

        A victim may be one of the lacking itself, but the designated sequence, or else the oldest, is left to run.
        Only as many are chosen as the host has room for; by the reserve rule that is at least one once all
        transfers have settled.
        """
        leaving = [seq for seq in self._pools.owners.values() if self._is_leaving(seq)]
        num_coming = sum(len(seq.gpu_blocks) for seq in leaving)
        num_host_free = self._pools.host.num_free - self.num_victim_blocks
        num_lacking = len(lacking)
        designated = self._pools.reserve.designated
        by_age = sorted(self.candidates(), key=lambda seq: (seq.seq_id != designated, seq.order))
        for victim in reversed(by_age[1:]):
            if num_coming >= num_lacking:
                return
            if victim.is_fully_issued:
                continue
            num_host_free -= len(victim.gpu_blocks)
            if num_host_free < 0:
                return
            self._victims[victim.seq_id] = victim
            num_coming += len(victim.gpu_blocks)
            num_lacking -= victim in lacking

    def _is_leaving(self, seq: Sequence) -> bool:
        """Whether the sequence's GPU blocks, if any, come free without a further decision."""
        return (
            seq.seq_id in self._victims
            or seq.state in (SequenceState.EVICTING, SequenceState.ENDED)
            or (seq.state is SequenceState.RUNNING and seq.is_fully_issued)
        )

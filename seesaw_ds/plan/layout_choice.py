"""Which layout to decode in when prefill stops: the decode layout at once, or the prefill layout until few are left.

Two predictions are compared. That of the plan has the cost model as it is and the lengths that were expected; the
other has the run's own factors (`seesaw_ds.plan.corrections`) and lengths. The plan's choice is left only where the
other gains more than 5% of the seconds that are left.

With no prompt left the choice is when to change: now, at any number of sequences left, or never. With prompts left the
batch stays as full as it is whatever is chosen, for the host or the queue fills it up; what is compared is decoding all
that the host holds, in the decode layout and with the transitions there and back, or in the prefill layout with none.
There the plan itself stays only for a gain over 5%: prompts that are let in one by one make smaller micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from seesaw_ds.layout import Phase
from seesaw_ds.plan.corrections import Corrections, WorkKind
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.rundown import Room, Span, run_down
from seesaw_ds.plan.transfers import ReshardSeconds
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.sched.staying import LiveBatch, LiveSequence

LEAST_GAIN = 0.05
"""The share of the remaining seconds that leaving the plan's choice must gain."""


@dataclass(frozen=True, slots=True)
class ChangedChoice:
    """A choice that differs from the plan's: both as `LayoutChooser` answers, with their seconds as corrected."""

    num_sequences: int
    planned_num_left: int | None
    taken_num_left: int | None
    planned_seconds: float
    taken_seconds: float


class LayoutChoice:
    """Answers a scheduler's question by the cost model of both layouts, corrected by what the run has taken.

    `limits` are the real ones of one replica; `unit` is how many tokens the scheduler counts as one.
    `planned_mean_tokens` is the mean output that the plan expected, infinite where outputs run to their most.
    """

    def __init__(
        self,
        costs: Mapping[Phase, CostModel],
        reshard: ReshardSeconds,
        limits: SchedulerLimits,
        planned_mean_tokens: float = math.inf,
        unit: int = 1,
    ) -> None:
        self.corrections = Corrections()
        self._costs = costs
        self._reshard = reshard
        self._block_size = limits.block_size
        self._room = Room(limits.num_gpu_blocks * limits.block_size, limits.max_num_seqs)
        self._planned_mean_tokens = planned_mean_tokens
        self._unit = unit
        self._was_changed = False
        self._changes: list[ChangedChoice] = []

    def take_changes(self) -> list[ChangedChoice]:
        """Choices since the last call that differ from the plan's; the first of those that follow on each other."""
        changes, self._changes = self._changes, []
        return changes

    def num_left_to_switch(self, batch: LiveBatch) -> int | None:
        """As `LayoutChooser` says."""
        if self._unit > 1:
            batch = self._in_tokens(batch)
        planned = self._options(batch, self._planned_mean_tokens, Corrections()).best()
        now = self._options(batch, batch.mean_tokens, self.corrections)
        best = now.best()
        planned_seconds, best_seconds = now.seconds(planned), now.seconds(best)
        is_changed = planned_seconds - best_seconds > LEAST_GAIN * planned_seconds
        if is_changed and not self._was_changed:
            change = ChangedChoice(batch.num_sequences, planned, best, planned_seconds, best_seconds)
            self._changes.append(change)
        self._was_changed = is_changed
        return best if is_changed else planned

    def _options(self, batch: LiveBatch, mean_tokens: float, corrections: Corrections) -> _Options:
        spans = run_down(batch, mean_tokens, self._room)
        return _Options(_Model(self._costs, self._reshard, self._block_size, corrections), spans, batch)

    def _in_tokens(self, batch: LiveBatch) -> LiveBatch:
        """The batch with all lengths in tokens, not units."""

        def scaled(sequences: Iterable[LiveSequence]) -> tuple[LiveSequence, ...]:
            return tuple(LiveSequence(self._unit * stored, self._unit * most) for stored, most in sequences)

        mean_tokens = self._unit * batch.mean_tokens
        return LiveBatch(scaled(batch.on_gpu), scaled(batch.on_host), mean_tokens, batch.has_prompts_left)


@dataclass(frozen=True, slots=True)
class _Model:
    """Corrected seconds of spans and transitions."""

    costs: Mapping[Phase, CostModel]
    reshard: ReshardSeconds
    block_size: int
    corrections: Corrections

    def span_seconds(self, phase: Phase, span: Span) -> float:
        """All of a span's steps in the layout of `phase`."""
        cost = self.costs[phase]
        context = span.most_context if cost.hardware.pads_decode else span.mean_context
        once = cost.round_seconds(span.num_rows, span.num_rows * context)
        return span.num_steps * once * self.corrections.factor(WorkKind.step(phase))

    def transition_seconds(self, to: Phase, num_gpu_tokens: int) -> float:
        """A transition with so many tokens of KV on the devices."""
        seconds = self.reshard.to(to, num_gpu_tokens // self.block_size)
        return seconds * self.corrections.factor(WorkKind.transition(to))


class _Options:
    """Seconds of each choice for one batch. A choice is a number of sequences left by then, or None for now."""

    def __init__(self, model: _Model, spans: list[Span], batch: LiveBatch) -> None:
        stays = [model.span_seconds(Phase.PREFILL, span) for span in spans]
        switched = [model.span_seconds(Phase.DECODE, span) for span in spans]
        num_gpu_tokens = sum(seq.num_stored_tokens for seq in batch.on_gpu)
        self._seconds: dict[int | None, float] = {None: sum(switched)}
        self._seconds[None] += model.transition_seconds(Phase.DECODE, num_gpu_tokens)
        if batch.has_prompts_left:
            self._seconds[None] += model.transition_seconds(Phase.PREFILL, num_gpu_tokens)
        else:
            before, after = stays[0], sum(switched[1:])
            for i, span in enumerate(spans[1:], start=1):
                transition = model.transition_seconds(Phase.DECODE, span.num_gpu_tokens)
                self._seconds[span.num_left] = before + transition + after
                before, after = before + stays[i], after - switched[i]
        self._seconds[0] = sum(stays)
        self._least_gain = LEAST_GAIN if batch.has_prompts_left else 0.0

    def best(self) -> int | None:
        """The choice with the fewest seconds; of equal ones the one that changes first."""
        best = min(self._seconds, key=lambda choice: self._seconds[choice])
        return best if self._seconds[best] < (1 - self._least_gain) * self._seconds[None] else None

    def seconds(self, choice: int | None) -> float:
        """Seconds of a choice, which may come from other options of the batch: the nearest here that changes later."""
        if choice is None:
            return self._seconds[None]
        return self._seconds[max(each for each in self._seconds if each is not None and each <= choice)]

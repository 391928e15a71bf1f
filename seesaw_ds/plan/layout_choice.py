"""Which layout to decode in when prefill stops: the decode layout at once, or the prefill layout until few are left.

Two predictions are compared. That of the plan has the cost model as it is and the lengths that were expected; the
other has the run's own factors (`seesaw_ds.plan.corrections`) and lengths. The plan's choice is left only where the
other gains more than 5% of the seconds that are left.

With no prompt left the choice is when to change: now, at any number of sequences left, or never.

With prompts left the batch stays as full as it is whatever is chosen, for the host or the queue fills it up. As many
sequences have to be decoded as prompts are let in: in the decode layout for as many as the host holds at once, with the
transitions there and back, or in the prefill layout with none, where prompts that are let in one by one leave bubbles.
There the plan itself stays only for a gain over 5%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.plan.corrections import Corrections, WorkKind
from seesaw_ds.plan.cost import CostModel, add_work, chunk_work
from seesaw_ds.plan.rundown import Refill, Room, Span, refill, run_down
from seesaw_ds.plan.transfers import ReshardSeconds
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.sched.staying import LiveBatch, LiveSequence

LEAST_GAIN = 0.05
"""The share of the remaining seconds that leaving the plan's choice must gain."""
# With no prompt left, what a stay must gain over changing at once: less is noise, and not worth a line of the log.
_LEAST_LAST_GAIN = 0.005
# To change at once, as planned.
_AS_ALWAYS = (True, False)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a batch, and what else could have been; both as `LayoutChooser` answers.

    `is_changed`: what was taken is not the plan's choice, which is the `other`; else that is to change at once. The
    seconds until all are decoded, or with prompts left until as many have found room, are by the corrected model.
    """

    num_sequences: int
    num_prompts_left: int
    is_changed: bool
    taken: int | None
    taken_seconds: float
    other: int | None
    other_seconds: float


def choice_text(pair: LayoutPair, choice: int | None) -> str:
    """A choice in words."""
    if choice is None:
        return f"decode in {pair.decode}"
    return f"decode in {pair.prefill} until {choice} sequences are left" if choice else f"decode on in {pair.prefill}"


class LayoutChoice:
    """Answers a scheduler's question by the cost model of both layouts, corrected by what the run has taken.

    `limits` are the real ones of one replica; `unit` and `bundle` are how many tokens and how many sequences the
    scheduler counts as one.
    `planned_mean_tokens` is the mean output that the plan expected, infinite where outputs run to their most.
    """

    def __init__(
        self,
        costs: Mapping[Phase, CostModel],
        reshard: ReshardSeconds,
        limits: SchedulerLimits,
        planned_mean_tokens: float = math.inf,
        unit: int = 1,
        bundle: int = 1,
    ) -> None:
        self.corrections = Corrections()
        self._costs = costs
        self._reshard = reshard
        self._limits = limits
        self._room = Room(limits.num_gpu_blocks * limits.block_size, limits.max_num_seqs)
        self._planned_mean_tokens = planned_mean_tokens
        self._unit = unit
        self._bundle = bundle
        self._last_sort = _AS_ALWAYS
        self._choices: list[Choice] = []

    def take_choices(self) -> list[Choice]:
        """What was chosen since the last call, but for changes of layout as planned.

        Of choices of one sort that follow on each other it is the first: stays as planned, or what is not as planned.
        """
        choices, self._choices = self._choices, []
        return choices

    def num_left_to_switch(self, batch: LiveBatch) -> int | None:
        """As `LayoutChooser` says."""
        num_left = self._choose(self._as_is(batch) if self._unit * self._bundle > 1 else batch)
        return None if num_left is None else num_left // self._bundle

    def _choose(self, batch: LiveBatch) -> int | None:
        planned = self._options(batch, self._planned_mean_tokens, Corrections()).best()
        now = self._options(batch, batch.mean_tokens, self.corrections)
        best = now.best()
        is_changed = now.seconds(planned) - now.seconds(best) > LEAST_GAIN * now.seconds(planned)
        taken = best if is_changed else planned
        other = planned if is_changed else None
        sort = (taken is None, is_changed)
        if sort != self._last_sort and sort != _AS_ALWAYS:
            seconds = now.seconds(taken), now.seconds(other)
            sizes = batch.num_sequences, batch.num_prompts_left
            self._choices.append(Choice(*sizes, is_changed, taken, seconds[0], other, seconds[1]))
        self._last_sort = sort
        return taken

    def _options(self, batch: LiveBatch, mean_tokens: float, corrections: Corrections) -> _Options:
        model = _Model(self._costs, self._reshard, self._limits, corrections, batch.preloaded)
        if batch.num_prompts_left:
            return _refill_options(model, refill(batch, mean_tokens, self._room))
        return _rundown_options(model, run_down(batch, mean_tokens, self._room))

    def _as_is(self, batch: LiveBatch) -> LiveBatch:
        """The batch with its lengths in tokens, not units, and with each sequence of its bundles."""
        unit, bundle = self._unit, self._bundle

        def expanded(sequences: Iterable[LiveSequence]) -> tuple[LiveSequence, ...]:
            return tuple(LiveSequence(unit * stored, unit * most) for stored, most in sequences for _ in range(bundle))

        on_gpu, on_host = expanded(batch.on_gpu), expanded(batch.on_host)
        num_prompts_left = bundle * batch.num_prompts_left
        return LiveBatch(on_gpu, on_host, unit * batch.mean_tokens, num_prompts_left, batch.preloaded)


@dataclass(frozen=True, slots=True)
class _Model:
    """Corrected seconds of spans and transitions. `preloaded`: see `LiveBatch`."""

    costs: Mapping[Phase, CostModel]
    reshard: ReshardSeconds
    limits: SchedulerLimits
    corrections: Corrections
    preloaded: float

    def span_seconds(self, phase: Phase, span: Span) -> float:
        """All of a span's steps in the layout of `phase`."""
        cost = self.costs[phase]
        once = cost.round_seconds(span.num_rows, span.num_rows * _context(cost, span))
        return span.num_steps * once * self.corrections.factor(WorkKind.step(phase))

    def bubble_seconds(self, work: Refill) -> float:
        """What its prompts cost more in a stay than in a prefill phase.

        A group's next step waits until its last one is through all stages. So one long micro-batch in a round of short
        steps makes the round as long as if all were long::

            stage 0   g0g0g0 g1 g2          g0        the prompt rides with g0
            stage 1          g0g0g0 g1 g2
        """
        cost, span = self.costs[Phase.PREFILL], work.span
        num_groups = cost.layout.pp
        num_chunks = -(-work.prompt_tokens // self.limits.max_num_batched_tokens)
        rows = cost.group_work(-(-span.num_rows // num_groups), span.num_rows * _context(cost, span) / num_groups)
        chunk = chunk_work(0, -(-work.prompt_tokens // num_chunks), True)
        longer = max(cost.stage_seconds(add_work(chunk, rows))) - max(cost.stage_seconds(rows))
        return work.num_prompts * (-num_chunks % num_groups) * longer * self.corrections.factor(WorkKind.MICRO_BATCH)

    def transition_seconds(self, to: Phase, num_gpu_tokens: int) -> float:
        """A transition with so many tokens of KV on the devices."""
        preloaded = self.preloaded if to is Phase.DECODE else 0.0
        seconds = self.reshard.to(to, num_gpu_tokens // self.limits.block_size, preloaded)
        return seconds * self.corrections.factor(WorkKind.transition(to))


def _context(cost: CostModel, span: Span) -> float:
    """The KV tokens that a row of the span's steps reads."""
    return span.most_context if cost.hardware.pads_decode else span.mean_context


@dataclass(frozen=True, slots=True)
class _Options:
    """Seconds by choice for one batch. A choice is a number of sequences left by then, or None for now.

    Another choice than now must gain `least_gain` of the seconds.
    """

    by_choice: Mapping[int | None, float]
    least_gain: float

    def best(self) -> int | None:
        """The choice with the fewest seconds; of equal ones the one that changes first."""
        best = min(self.by_choice, key=lambda choice: self.by_choice[choice])
        return best if self.by_choice[best] < (1 - self.least_gain) * self.by_choice[None] else None

    def seconds(self, choice: int | None) -> float:
        """Seconds of a choice, which may come from other options of the batch: the nearest here that changes later."""
        if choice is None:
            return self.by_choice[None]
        return self.by_choice[max(each for each in self.by_choice if each is not None and each <= choice)]


def _refill_options(model: _Model, work: Refill) -> _Options:
    """To the decode layout and back, or to stay."""
    transitions = sum(model.transition_seconds(to, work.span.num_gpu_tokens) for to in Phase)
    now = model.span_seconds(Phase.DECODE, work.span) + transitions
    stay = model.span_seconds(Phase.PREFILL, work.span) + model.bubble_seconds(work)
    return _Options({None: now, 0: stay}, LEAST_GAIN)


def _rundown_options(model: _Model, spans: list[Span]) -> _Options:
    """To change at the start of any span, or never."""
    stays = [model.span_seconds(Phase.PREFILL, span) for span in spans]
    switched = [model.span_seconds(Phase.DECODE, span) for span in spans]
    before, after = 0.0, sum(switched)
    by_choice: dict[int | None, float] = {}
    for i, span in enumerate(spans):
        transition = model.transition_seconds(Phase.DECODE, span.num_gpu_tokens)
        by_choice[span.num_left if i else None] = before + transition + after
        before, after = before + stays[i], after - switched[i]
    by_choice[0] = before
    return _Options(by_choice, _LEAST_LAST_GAIN)

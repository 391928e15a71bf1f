"""What steps and transitions of a run take against the cost model; whoever runs them tells when they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from seesaw_ds.layout import Phase
from seesaw_ds.plan.corrections import Corrections, WorkKind
from seesaw_ds.plan.cost import CostModel, add_work, chunk_work
from seesaw_ds.plan.transfers import ReshardSeconds
from seesaw_ds.sched.output import Action, DecodeBatch, PrefillBatch, PrefillChunk, Preload, SwitchPhase

# Steps of one kind, one after the other, that make a sample: their ends are told apart by more than the clock's noise.
_STEPS_IN_SAMPLE = 8


class _Step(NamedTuple):
    """A step under way. `group` is that of its rows, None without any."""

    kind: WorkKind
    group: int | None
    predicted_seconds: float


class StepTimes:
    """Compares when steps end with what the cost model says lies between two ends.

    In a stretch of steps of one kind that follow on each other, with always one under way, the time from the first end
    to the last is that of all but the first. The first step of a stretch is so left out, and with it whatever came
    before it: a transition, a wait for input, another kind of step.
    """

    def __init__(self, costs: Mapping[Phase, CostModel], reshard: ReshardSeconds, corrections: Corrections) -> None:
        self._costs = costs
        self._reshard = reshard
        self._corrections = corrections
        self._phase = Phase.PREFILL
        self._under_way: dict[int, _Step] = {}
        self._switch_seconds = 0.0
        self._is_preloaded = False
        self._kind: WorkKind | None = None
        self._last_end = 0.0
        self._num_steps = 0
        self._observed = 0.0
        self._predicted = 0.0

    def issued(self, action: Action) -> None:
        """An action is given to the workers."""
        if isinstance(action, DecodeBatch):
            seconds = self._seconds(self._phase, action)
            self._under_way[action.step_id] = _Step(WorkKind.step(self._phase), action.group, seconds)
        elif isinstance(action, PrefillBatch):
            group = action.group if action.rows else None
            seconds = self._seconds(Phase.PREFILL, action, action.chunks)
            self._under_way[action.step_id] = _Step(WorkKind.MICRO_BATCH, group, seconds)
        elif isinstance(action, Preload):
            self._is_preloaded = True
        elif isinstance(action, SwitchPhase):
            self._phase = action.to
            # Where weights have come early, what is left says little of other transitions.
            seconds = self._reshard.to(action.to, len(action.gpu_block_ids))
            self._switch_seconds = 0.0 if self._is_preloaded else seconds
            self._is_preloaded = False

    def step_ended(self, step_id: int, now: float) -> None:
        """A step's tokens have come, at `now` seconds."""
        step = self._under_way.pop(step_id)
        if step.kind is self._kind:
            self._num_steps += 1
            self._observed += now - self._last_end
            self._predicted += step.predicted_seconds
        if step.kind is not self._kind or self._num_steps == _STEPS_IN_SAMPLE or not self._under_way:
            self._end_stretch()
            self._kind = step.kind if self._under_way else None
        self._last_end = now

    def switched(self, to: Phase, seconds: float) -> None:
        """A transition took so long, from the end of the last step."""
        if self._switch_seconds > 0:
            self._corrections.add(WorkKind.transition(to), seconds, self._switch_seconds)

    def _end_stretch(self) -> None:
        if self._num_steps == _STEPS_IN_SAMPLE and self._kind is not None:
            self._corrections.add(self._kind, self._observed, self._predicted)
        self._num_steps = 0
        self._observed = self._predicted = 0.0

    def _seconds(self, phase: Phase, batch: DecodeBatch | PrefillBatch, chunks: tuple[PrefillChunk, ...] = ()) -> float:
        """Between the end of the step before and that of `batch`, in a pipeline that has enough of such steps."""
        cost = self._costs[phase]
        work = add_work(
            cost.decode_work([row.position + 1 for row in batch.rows]),
            *(chunk_work(chunk.start, chunk.num_tokens, chunk.is_last) for chunk in chunks),
        )
        if not batch.rows:
            return max(cost.stage_seconds(work))
        groups = {step.group for step in self._under_way.values() if step.group is not None}
        return cost.step_interval(work, len(groups | {batch.group}))

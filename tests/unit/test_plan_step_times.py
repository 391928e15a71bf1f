"""Timing a run against the cost model: what a simulated run takes is what is predicted, and outliers are left out."""

from __future__ import annotations

import math

import pytest

from plan_cases import hardware, limits_of, pair, run_config, shape
from seesaw_ds.layout import Phase
from seesaw_ds.plan import simulator
from seesaw_ds.plan.corrections import Corrections, WorkKind
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.step_times import StepTimes
from seesaw_ds.plan.transfers import reshard_seconds
from seesaw_ds.plan.workloads import RequestLength, workload_lengths
from seesaw_ds.sched.output import (
    DecodeBatch,
    DecodeDone,
    DecodeRow,
    PhaseSwitched,
    PrefillDone,
    Preload,
    SwitchPhase,
)

MODEL = shape("llama2-70b")
A10 = hardware("a10")


def times(layouts: str) -> tuple[StepTimes, Corrections]:
    costs = {phase: CostModel(MODEL, A10, pair(layouts)[phase], "bfloat16") for phase in Phase}
    corrections = Corrections()
    reshard = reshard_seconds(MODEL, pair(layouts), A10, "bfloat16", "exchange", 16)
    return StepTimes(costs, reshard, corrections), corrections


class TimedReplica(simulator._Replica):
    """A simulated replica that takes `slowness` times as long as the cost model says."""

    slowness = 1.0
    step_times: StepTimes

    def _execute(self, action, now):
        super()._execute(action, now)
        self.step_times.issued(action)
        if isinstance(action, SwitchPhase):
            self.switch_start = self.last_step

    def take_event(self):
        event = self.events[0][2]
        now = super().take_event()
        if isinstance(event, (DecodeDone, PrefillDone)):
            self.last_step = now
            self.step_times.step_ended(event.step_id, self.slowness * now)
        elif isinstance(event, PhaseSwitched):
            self.step_times.switched(event.phase, self.slowness * (now - self.switch_start))
        return now


@pytest.mark.parametrize("slowness", [1.0, 1.7])
@pytest.mark.parametrize("layouts", ["P8->T8", "T2P4->T4P2"])
def test_a_run_that_takes_what_the_model_says_needs_no_correction(monkeypatch, layouts, slowness):
    step_times, corrections = times(layouts)
    monkeypatch.setattr(TimedReplica, "slowness", slowness)
    monkeypatch.setattr(TimedReplica, "step_times", step_times, raising=False)
    monkeypatch.setattr(simulator, "_Replica", TimedReplica)
    lengths = workload_lengths("arxiv", 150)
    run = run_config(layouts, lengths, 640.0, max_num_batched_tokens=512, num_host_kv_blocks=6000)
    Simulator(MODEL, A10, pair(layouts), limits_of(run, MODEL, A10)).run(lengths)
    known = corrections.known()
    assert {WorkKind.MICRO_BATCH, WorkKind.DECODE_LAYOUT_STEP, WorkKind.TO_DECODE, WorkKind.TO_PREFILL} <= known.keys()
    for factor in known.values():
        assert factor == pytest.approx(slowness, rel=0.1)


def test_steps_of_a_stay_are_told_from_those_of_the_decode_layout(monkeypatch):
    step_times, corrections = times("P8->T8")
    monkeypatch.setattr(TimedReplica, "step_times", step_times, raising=False)
    monkeypatch.setattr(simulator, "_Replica", TimedReplica)
    lengths = [RequestLength(500, 20 + i % 40) for i in range(100)]
    run = run_config("P8->T8", lengths, 640.0)
    slow = A10.with_all_reduce_scaled(0.05)
    simulated = Simulator(MODEL, slow, pair("P8->T8"), limits_of(run, MODEL, A10)).run(lengths)
    assert simulated.num_left_after_stay is not None
    # The times go by the profile with fast links: only the layout without all-reduces takes what it says.
    assert corrections.factor(WorkKind.PREFILL_LAYOUT_STEP) == pytest.approx(1.0, rel=0.1)
    assert WorkKind.PREFILL_LAYOUT_STEP in corrections.known()


def step(step_id: int) -> DecodeBatch:
    return DecodeBatch(step_id, 0, (DecodeRow(0, 0, position=1000),))


def test_waits_between_stretches_are_left_out():
    step_times, corrections = times("P8->T8")
    step_times.issued(SwitchPhase(Phase.DECODE))
    cost = CostModel(MODEL, A10, pair("P8->T8").decode, "bfloat16")
    predicted = cost.step_interval(cost.decode_work([1001]), 1)
    now = 0.0
    step_id = 0
    for _ in range(6):
        now += 1000.0  # nothing was under way
        step_times.issued(step(step_id))
        for _ in range(9):
            step_times.issued(step(step_id + 1))
            step_times.step_ended(step_id, now)
            now += 3 * predicted
            step_id += 1
        step_times.step_ended(step_id, now)
        step_id += 1
    assert corrections.factor(WorkKind.DECODE_LAYOUT_STEP) == pytest.approx(3.0)
    assert not math.isclose(corrections.factor(WorkKind.TO_DECODE), 3.0)


def test_a_transition_whose_weights_came_early_is_no_sample():
    step_times, corrections = times("P8->T4P2")
    for is_preloaded in (True, False):
        if is_preloaded:
            step_times.issued(Preload(3, (1, 2, 3)))
        for to in (Phase.DECODE, Phase.PREFILL):
            step_times.issued(SwitchPhase(to))
            step_times.switched(to, 1000.0)
    # Two samples make a factor: there are two of the way back.
    assert WorkKind.TO_PREFILL in corrections.known()
    assert WorkKind.TO_DECODE not in corrections.known()
    step_times.issued(SwitchPhase(Phase.DECODE))
    step_times.switched(Phase.DECODE, 1000.0)
    assert WorkKind.TO_DECODE in corrections.known()

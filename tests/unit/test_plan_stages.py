"""Stages of unequal depth: the split balances a step, is taken where it pays, and does not break the closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest

from plan_cases import hardware, pair, run_config, shape
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.plan.bounds import InputTotals, typical_steps
from seesaw_ds.plan.candidates import Candidate, find_candidates, make_candidate
from seesaw_ds.plan.cost import CostModel, StepWork
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import TookTooLong
from seesaw_ds.plan.planner import _best_split, make_plan
from seesaw_ds.plan.report import plan_json, plan_table
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.stages import balanced_last, unequal_splits, with_last_stage
from seesaw_ds.plan.trials import RANKING, Simulated, simulate
from seesaw_ds.plan.workloads import RequestLength, workload_lengths
from seesaw_ds.shapes import ModelShape

MODEL = shape("llama3-8b")
A10, L4 = hardware("a10"), hardware("l4")
SHAREGPT = workload_lengths("sharegpt", 200)
DECODE = StepWork(num_tokens=64, decode_context=64 * 400, num_rows=64)


def cost(text: str, machine: HardwareProfile = A10, model: ModelShape = MODEL) -> CostModel:
    return CostModel(model, machine, ParallelLayout.parse(text), "bfloat16")


def candidate(layouts: str, lengths: list[RequestLength], machine: HardwareProfile, **changes) -> Candidate:
    run = run_config(layouts, lengths, 320.0, **{"max_num_batched_tokens": 512, **changes})
    return make_candidate(run, MODEL, machine, InputTotals.of(lengths))


def found(lengths: list[RequestLength], machine: HardwareProfile, num_devices: int) -> dict[str, Candidate]:
    """The planner's candidates with 512 tokens a micro-batch, by their layouts without numbers of layers."""
    run = run_config("auto", lengths, 320.0)
    candidates, _ = find_candidates(run, MODEL, machine, num_devices, 8, InputTotals.of(lengths))
    return {str(each.pair.with_equal_stages): each for each in candidates if each.run.max_num_batched_tokens == 512}


@pytest.mark.parametrize("num_layers", [3, 8, 13])
@pytest.mark.parametrize("text", ["P2", "P3", "T2P3"])
@pytest.mark.parametrize("step", [DECODE, DECODE._replace(num_rows=1), StepWork(512, 100_000, 512, 0, 3)])
def test_no_other_split_has_a_faster_slowest_stage(num_layers, text, step):
    model = replace(MODEL, num_layers=num_layers)
    equal = cost(text, model=model)
    last = balanced_last(equal, step)
    layout = with_last_stage(equal.layout, num_layers, last)
    slowest = max(CostModel(model, A10, layout, "bfloat16").stage_seconds(step))
    for cuts in combinations(range(1, num_layers), layout.pp - 1):
        counts = tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, num_layers)))
        other = replace(layout, layer_counts=counts)
        assert slowest <= max(CostModel(model, A10, other, "bfloat16").stage_seconds(step)) * (1 + 1e-9)


def test_a_heavy_head_takes_layers_from_the_last_stage_and_a_light_one_none():
    assert 1.5 < cost("P4").head_seconds(64) / cost("P4").layer_seconds(DECODE) < 2.5
    assert balanced_last(cost("P4"), DECODE) == 7
    assert balanced_last(cost("P8"), DECODE) == 3
    assert str(with_last_stage(ParallelLayout.parse("T2P4"), 32, 7)) == "T2P4[8,9,8,7]"
    assert balanced_last(cost("P2", model=shape("llama2-70b")), DECODE) == 40
    assert balanced_last(cost("T4"), DECODE) == 32


def test_a_pair_is_split_by_phase_and_one_layout_by_steps():
    splits = {}
    for text in ("P4->T2P2", "P4", "P8", "P4->T4"):
        costs = {phase: CostModel(MODEL, L4, pair(text)[phase], "bfloat16") for phase in Phase}
        # So few tokens that the LM head takes longer than what the last layer is spared, and one layer more.
        steps = {Phase.PREFILL: StepWork(256, 100_000, 512, 0, 30), Phase.DECODE: StepWork(16, 0, 0, 16 * 400, 16)}
        splits[text] = list(map(str, unequal_splits(costs, steps)))
    assert splits["P4->T2P2"] == ["P4->T2P2[17,15]", "P4[8,9,8,7]->T2P2", "P4[8,9,8,7]->T2P2[17,15]"]
    assert splits["P4"] == ["P4[8,9,8,7]", "P4[8,9,9,6]"]
    assert splits["P8"] == ["P8[4,5,4,4,4,4,4,3]", "P8[4,5,5,4,4,4,4,2]"]
    assert splits["P4->T4"] == ["P4[8,9,8,7]->T4"]


def test_the_last_stage_takes_the_remainder_in_prefill():
    prefill = StepWork(2048, 1_000_000, 2048, 0, 3)
    splits = {}
    for num_layers, text in ((13, "P2"), (13, "P3"), (12, "P2"), (14, "P4")):
        costs = {phase: cost(text, model=replace(MODEL, num_layers=num_layers)) for phase in Phase}
        for decode in (prefill, DECODE):
            steps = {Phase.PREFILL: prefill, Phase.DECODE: decode}
            splits[num_layers, text, decode] = list(map(str, unequal_splits(costs, steps)))
    assert splits[13, "P2", prefill] == ["P2[6,7]"]
    assert splits[13, "P3", prefill] == ["P3[4,4,5]"]
    assert splits[13, "P3", DECODE] == ["P3[4,4,5]", "P3[5,5,3]"]
    assert splits[12, "P2", prefill] == splits[14, "P4", prefill] == []


def test_70b_in_two_stages_keeps_them_equal():
    model, lengths = shape("llama2-70b"), workload_lengths("arxiv", 160)
    run = run_config("auto", lengths, 64.0)
    candidates, _ = find_candidates(run, model, hardware("h200-nvlink"), 2, 8, InputTotals.of(lengths))
    assert {each.run.layouts for each in candidates} == {"T2", "P2", "T2->P2", "P2->T2"}
    assert all(each.alternative is None for each in candidates)


@pytest.mark.parametrize("num_stages", [4, 8])
def test_the_balanced_split_of_a_heavy_head_is_simulated_faster(num_stages):
    chosen = found(SHAREGPT, A10, num_stages)[f"P{num_stages}"]
    counts = chosen.pair.decode.layer_counts
    assert counts[-1] < 32 // num_stages < max(counts)
    seconds = {
        each.run.layouts: simulate(each, MODEL, A10, InputTotals.of(SHAREGPT), SHAREGPT, RANKING).seconds
        for each in (chosen, chosen.alternative)
    }
    assert seconds[chosen.run.layouts] < 0.95 * seconds[f"P{num_stages}"]


def test_equal_stages_stay_where_the_closed_form_gains_nothing():
    lengths = workload_lengths("3000x1", 50)  # one row a prompt: no head to speak of
    for each in found(lengths, A10, 4).values():
        assert each.pair.has_equal_stages
        assert each.alternative is None


def test_a_split_whose_fullest_stage_has_no_room_is_not_tried():
    lengths = [RequestLength(6000, 1000)] * 20
    equal = candidate("P2", lengths, A10)
    steps = typical_steps(equal.pair, equal.limits, InputTotals.of(lengths))
    assert balanced_last(cost("P2"), steps[Phase.DECODE]) == 15
    device, longest = equal.pools.device, -(-7000 // 16)
    kv_of_one = device.kv * longest // equal.pools.num_gpu_blocks
    needed = (device.weights + device.embeddings + device.activations + kv_of_one) / 0.9  # gpu_memory_utilization
    for memory_bytes, is_tried in ((1.01 * needed, False), (1.5 * needed, True)):
        each = found(lengths, replace(A10, memory_bytes=int(memory_bytes)), 2)["P2"]
        assert (each.alternative is not None) == is_tried
        assert is_tried or each.pair.has_equal_stages


@pytest.mark.parametrize("layouts", ["P4[8,9,8,7]", "P4[9,9,9,5]->T2P2[17,15]", "T2P2[20,12]->P4[1,10,10,11]"])
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt", "3000x1"])
@pytest.mark.parametrize("changes", [{}, {"mixed_steps": False}], ids=str)
def test_no_run_with_unequal_stages_beats_the_closed_form(layouts, workload, changes):
    lengths = workload_lengths(workload, 60)
    each = candidate(layouts, lengths, A10, **changes)
    simulated = Simulator(MODEL, A10, pair(layouts), each.limits).run(lengths)
    assert each.least_seconds == each.bound.total <= simulated.seconds


def test_the_plan_tells_the_split_and_its_seconds():
    lengths = workload_lengths("sharegpt", 100)
    plan = make_plan(run_config("auto", lengths, 320.0), MODEL, L4, 4, lengths, with_static=False)
    best = plan.best.candidate
    values = plan_json(plan)["best"]
    for phase in Phase:
        stages = values["stages"][phase.value]
        assert stages["layers"] == [layers.size for layers in best.pair[phase].stage_layers(32)]
        assert len(stages["seconds"]) == best.pair[phase].pp
        assert min(stages["seconds"]) > 0
    table = plan_table(plan)
    shown = [line for line in table.splitlines() if line.startswith("stages of")]
    assert len(shown) == sum(best.pair[phase].pp > 1 for phase in Phase) > 0
    assert f"stages of {best.pair.prefill} in prefill, layers and ms of a typical step: " in table


@pytest.mark.parametrize(("seconds", "taken"), [((100, 90), True), ((100, 99.8), False), ((90, 100), False)])
def test_a_split_that_saves_little_in_the_simulation_is_not_taken(seconds, taken):
    equal, unequal = (candidate(layouts, SHAREGPT, A10) for layouts in ("P4", "P4[8,9,8,7]"))
    by_layouts = dict(zip(("P4", "P4[8,9,8,7]"), seconds))

    def rank(each: Candidate, stop_after: float = math.inf) -> Simulated:
        seconds = by_layouts[each.run.layouts]
        if seconds >= stop_after:
            raise TookTooLong
        return Simulated(each, simulated=None, seconds=seconds, num_requests=200)

    for first in (replace(equal, alternative=unequal), replace(unequal, alternative=equal)):
        assert _best_split(rank(first), rank).candidate.pair.has_equal_stages != taken
    assert _best_split(rank(unequal), rank).candidate is unequal

"""The simulator around the real scheduler: what it must add up to, how fast it is, and that it repeats itself."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from plan_cases import hardware, limits_of, pair, run_config, shape
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.plan.bounds import InputTotals, bound_seconds
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun, TookTooLong
from seesaw_ds.plan.simulator import Simulator, _bundled, _Replica
from seesaw_ds.plan.static_engine import BatchPolicy, StaticEngineLimits, run_static_engine
from seesaw_ds.plan.transfers import reshard_seconds
from seesaw_ds.plan.workloads import RequestLength, workload_lengths
from seesaw_ds.sched.output import (
    DecodeBatch,
    DecodeRow,
    PrefillBatch,
    PrefillChunk,
    Preload,
    PreloadSize,
    SwitchPhase,
)

MODEL = shape("llama2-70b")
A10 = hardware("a10")


def simulate(
    layouts: str,
    lengths: list[RequestLength],
    host_gib: float = 640.0,
    unit: int = 1,
    bundle: int = 1,
    machine: HardwareProfile = A10,
    stays: bool = True,
    **changes,
):
    run = run_config(layouts, lengths, host_gib, **changes)
    limits = limits_of(run, MODEL, machine)
    return Simulator(MODEL, machine, pair(layouts), limits, unit=unit, bundle=bundle, stays=stays).run(lengths)


def replica(layouts: str) -> _Replica:
    run = run_config(layouts, [RequestLength(1000, 100)], 640.0)
    costs = {phase: CostModel(MODEL, A10, pair(layouts)[phase], "bfloat16") for phase in Phase}
    reshard = reshard_seconds(MODEL, pair(layouts), A10, "bfloat16", "exchange", 16)
    return _Replica(limits_of(run, MODEL, A10), costs, reshard, A10, unit=1)


def mixed_batch(step_id: int, group: int) -> PrefillBatch:
    chunk = PrefillChunk(100, 0, 256, tuple(range(100)), is_last=False)
    return PrefillBatch(step_id, (chunk,), group, (DecodeRow(group, group, position=1000),))


@pytest.mark.parametrize(("unit", "bundle"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize(
    ("name", "late_seconds", "early_seconds"), [("h200-p2p-off", 1.0, 0.4), ("h200-nvlink", 0.16, 0.1)]
)
def test_weights_come_while_the_last_prompts_run(
    monkeypatch: pytest.MonkeyPatch, name: str, late_seconds: float, early_seconds: float, unit: int, bundle: int
):
    lengths = workload_lengths("sharegpt", 400)
    changes = {"host_gib": 24.0, "machine": hardware(name), "unit": unit, "bundle": bundle, "stays": False}
    early = simulate("P2->T2", lengths, **changes)
    monkeypatch.setattr("seesaw_ds.plan.simulator.preload_size", lambda *_: None)
    late = simulate("P2->T2", lengths, **changes)
    assert late.transition_seconds > late_seconds
    assert early.transition_seconds < early_seconds
    assert early.prefill_seconds == pytest.approx(late.prefill_seconds, rel=0.01)
    assert early.decode_seconds == pytest.approx(late.decode_seconds, rel=0.05)


def test_what_has_not_come_by_the_change_is_left_to_the_exchange():
    simulated = replica("P8->T8")
    simulated.scheduler.limits = replace(simulated.scheduler.limits, preload=PreloadSize(num_rounds=4, round_blocks=1))
    way = simulated._reshard.to_decode
    simulated._execute(Preload(2, (0, 1)), 0.0)
    simulated._execute(Preload(2, (2, 3)), 0.0)
    simulated._execute(SwitchPhase(Phase.DECODE, ()), 0.75 * way.early)
    assert simulated.transition_seconds == pytest.approx(0.25 * way.weights + 0.75 * way.landing)


@pytest.mark.parametrize("mixed_steps", [True, False])
@pytest.mark.parametrize("layouts", ["P8->T4P2", "T4P2"])
def test_parts_add_up_to_the_whole(layouts, mixed_steps):
    run = simulate(layouts, workload_lengths("arxiv", 60), mixed_steps=mixed_steps)
    assert run.num_transitions == (0 if layouts == "T4P2" and mixed_steps else 1)
    assert run.prefill_seconds + run.decode_seconds + run.transition_seconds == pytest.approx(run.seconds)
    assert min(run.prefill_seconds, run.decode_seconds) > 0
    assert 0.4 < run.busy_share <= 1
    assert run.requests_per_second == pytest.approx(60 / run.seconds)


def test_rows_wait_for_their_last_token_and_other_groups_do_not():
    same, others = replica("P8->T4P2"), replica("P8->T4P2")
    for step in range(2):
        same._execute(mixed_batch(step, group=0), 0.0)
        others._execute(mixed_batch(step, group=step), 0.0)
    gap, other_gap = (ends[1][0] - ends[0][0] for ends in (sorted(same.events), sorted(others.events)))
    first = min(same.events)[0]
    assert gap == pytest.approx(first)  # through all eight stages again
    assert other_gap == pytest.approx(first / 8, rel=0.1)  # through the slowest one
    assert sorted(same.events)[0][2].tokens == ((0, 0),)


def test_a_step_in_the_prefill_phase_has_the_prefill_layout():
    batch = DecodeBatch(0, 0, (DecodeRow(0, 0, position=1000),))
    before, after = replica("P8->T4P2"), replica("P8->T4P2")
    after._execute(SwitchPhase(Phase.DECODE), 0.0)
    switched = after.events.pop()[0]
    before._execute(batch, 0.0)
    after._execute(batch, switched)
    assert before.events[0][0] > 3 * (after.events[0][0] - switched)  # eight stages of one device against two of four


def test_a_switch_moves_the_kv_that_stays_on_the_devices():
    empty, full = replica("P8->T4P2"), replica("P8->T4P2")
    empty._execute(SwitchPhase(Phase.DECODE), 0.0)
    full._execute(SwitchPhase(Phase.DECODE, tuple(range(5000))), 0.0)
    received = 5000 * 2 * 80 * 8 * 16 * 128 * 2 * 3 / 32 / A10.send_bandwidth  # a rank had a quarter of its new eighth
    assert full.events[0][0] - empty.events[0][0] == pytest.approx(received, rel=0.1)


def test_riding_rows_shorten_the_run():
    lengths = workload_lengths("arxiv", 150)
    for layouts in ("P8->T4P2", "P8->T8"):
        mixed = simulate(layouts, lengths, max_num_batched_tokens=256)
        apart = simulate(layouts, lengths, mixed_steps=False)
        assert mixed.seconds < 0.95 * apart.seconds
        assert mixed.riding_share > 0.1
        assert apart.riding_share == 0.0


def test_one_request_takes_its_prefill_and_its_steps_one_after_the_other():
    run = simulate("T8", [RequestLength(1000, 101)])
    shorter = simulate("T8", [RequestLength(1000, 51)])
    step = (run.decode_seconds - shorter.decode_seconds) / 50
    weights = 80 * MODEL.layer_parameters * 2 / 8 / (600 * 2**30 * 0.9)
    assert weights < step < 2 * weights
    assert run.mean_decode_batch == 1.0


def test_a_small_host_pool_makes_transitions_that_cost_time():
    lengths = workload_lengths("arxiv", 60)
    many = simulate("P8->T4P2", lengths, num_host_kv_blocks=2000, stays=False)
    assert many.num_transitions > 3
    assert many.seconds > simulate("P8->T4P2", lengths).seconds


@pytest.mark.parametrize("changes", [{}, {"num_host_kv_blocks": 3000}], ids=["one filling", "many fillings"])
def test_on_slow_links_a_large_batch_decodes_in_the_prefill_layout(changes):
    lengths = workload_lengths("sharegpt", 300)
    slow = A10.with_all_reduce_scaled(0.1)
    at_once, choosing = (
        simulate("P8->T8", lengths, machine=slow, max_num_batched_tokens=512, stays=stays, **changes)
        for stays in (False, True)
    )
    assert choosing.seconds < 0.6 * at_once.seconds
    assert 0 < choosing.num_left_after_stay < 100  # the last ones are still faster in the decode layout
    assert choosing.num_transitions == 1
    bundled = simulate("P8->T8", lengths, machine=slow, max_num_batched_tokens=512, unit=4, bundle=2, **changes)
    assert bundled.seconds == pytest.approx(choosing.seconds, rel=0.06)
    assert bundled.num_left_after_stay == pytest.approx(choosing.num_left_after_stay, abs=16)
    assert at_once.num_left_after_stay is None


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("layouts", ["P8->T8", "P8->T4P2", "T2P4->T8"])
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt"])
def test_the_choice_costs_nothing_where_it_gains_little(scale, layouts, workload):
    lengths = workload_lengths(workload, 150)
    machine = A10.with_all_reduce_scaled(scale)
    sizes = {"max_num_batched_tokens": 512, "num_host_kv_blocks": 3000}
    at_once, choosing = (simulate(layouts, lengths, machine=machine, stays=stays, **sizes) for stays in (False, True))
    assert choosing.seconds <= 1.02 * at_once.seconds


def test_equal_inputs_give_equal_runs():
    lengths = workload_lengths("sharegpt", 100)
    assert simulate("P8->T4P2", lengths) == simulate("P8->T4P2", lengths)


@pytest.mark.parametrize(
    ("layouts", "changes"),
    [
        ("P8->T4P2", {"max_num_batched_tokens": 256}),
        ("P8->T8", {"max_num_batched_tokens": 512}),
        ("P8->T4P2", {"mixed_steps": False}),
        ("T8", {"mixed_steps": False}),
        ("T4P2", {"max_num_batched_tokens": 512}),
    ],
)
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt"])
def test_units_change_the_seconds_by_little_and_the_transitions_not_at_all(layouts, changes, workload):
    lengths = workload_lengths(workload, 150)
    fine, coarse = (simulate(layouts, lengths, unit=unit, **changes) for unit in (1, 8))
    assert coarse.seconds == pytest.approx(fine.seconds, rel=0.06)
    assert coarse.riding_share == pytest.approx(fine.riding_share, abs=0.1)
    assert coarse.num_transitions == fine.num_transitions
    assert coarse.mean_decode_batch == pytest.approx(fine.mean_decode_batch, rel=0.15)


def test_a_full_gpu_is_filled_alike_in_any_unit():
    lengths = [RequestLength(1000, 500)] * 300
    model, machine = shape("llama3-8b"), hardware("l4")
    run = run_config("D2P2->D2T2", lengths, 320.0, max_num_batched_tokens=512)
    limits = limits_of(run, model, machine)
    fine, coarse = (Simulator(model, machine, pair(run.layouts), limits, unit=unit).run(lengths) for unit in (1, 4))
    assert coarse.seconds == pytest.approx(fine.seconds, rel=0.02)
    assert coarse.mean_decode_batch == pytest.approx(fine.mean_decode_batch, rel=0.05)


@pytest.mark.parametrize(
    ("layouts", "changes"),
    [
        ("P8->T4P2", {"max_num_batched_tokens": 256}),
        ("P8->T8", {"max_num_batched_tokens": 512}),
        ("P8->T4P2", {"mixed_steps": False}),
        ("P8", {"max_num_batched_tokens": 512}),
        ("T8", {"mixed_steps": False}),
    ],
)
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt"])
@pytest.mark.parametrize("unit", [1, 4])
def test_bundles_change_the_seconds_by_little_and_the_transitions_not_at_all(layouts, changes, workload, unit):
    lengths = workload_lengths(workload, 300)
    fine, coarse = (simulate(layouts, lengths, **size, **changes) for size in ({}, {"unit": unit, "bundle": 4}))
    assert coarse.seconds == pytest.approx(fine.seconds, rel=0.07)
    assert coarse.riding_share == pytest.approx(fine.riding_share, abs=0.1)
    assert coarse.num_transitions == fine.num_transitions
    # The last few sequences are in one pipeline group, as a bundle, and not in a group each.
    assert coarse.mean_decode_batch == pytest.approx(fine.mean_decode_batch, rel=0.35)
    assert coarse.num_requests == 300


@pytest.mark.parametrize("num_requests", [8, 100, 125, 256])
def test_bundles_have_all_tokens_of_a_batch_and_its_order(num_requests):
    batch = sorted(workload_lengths("sharegpt", num_requests), key=lambda length: -length.output_tokens)
    bundles = _bundled(batch, 4)
    assert len(bundles) == round(num_requests / 4)
    for values, bundled in zip(zip(*batch), zip(*bundles)):
        assert 4 * sum(bundled) == pytest.approx(sum(values), rel=0.02)
    outputs = [length.output_tokens for length in bundles]
    assert outputs == sorted(outputs, reverse=True)
    assert _bundled(batch, 1) == batch


def test_a_bundle_asks_for_as_much_as_its_sequences_together():
    one, four = (simulate("P8->T4P2", [RequestLength(1000, 200)] * 64, bundle=bundle) for bundle in (1, 4))
    assert four.seconds == pytest.approx(one.seconds, rel=0.03)
    assert four.mean_decode_batch == pytest.approx(one.mean_decode_batch, rel=0.1)


@pytest.mark.parametrize("layouts", ["P8->T4P2", "P8->T8", "T8", "P8", "T4P2->T8", "T2P4->T4P2"])
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt", "3000x1", "100x300"])
@pytest.mark.parametrize("changes", [{"max_num_batched_tokens": 256}, {}, {"mixed_steps": False}], ids=str)
def test_no_run_beats_the_closed_form(layouts, workload, changes):
    lengths = workload_lengths(workload, 80)
    run = run_config(layouts, lengths, 640.0, **changes)
    limits = limits_of(run, MODEL, A10)
    bound = bound_seconds(MODEL, A10, pair(layouts), limits, InputTotals.of(lengths), "bfloat16", "exchange")
    simulated = Simulator(MODEL, A10, pair(layouts), limits).run(lengths)
    assert bound.total <= simulated.seconds
    assert bound.total > 0.3 * simulated.seconds


def test_replicas_share_the_work():
    lengths = workload_lengths("arxiv", 64)
    model, machine = shape("llama3-15b"), hardware("a100-40-nvlink")
    seconds = {}
    for layouts, num_devices in (("P4->T4", 4), ("D2P4->D2T4", 8)):
        run = run_config(layouts, lengths, 40.0 * num_devices)
        simulator = Simulator(model, machine, pair(layouts), limits_of(run, model, machine))
        seconds[layouts] = simulator.run(lengths).seconds
    assert 0.5 < seconds["D2P4->D2T4"] / seconds["P4->T4"] < 0.75


def test_512_devices_run_in_domains():
    lengths = workload_lengths("sharegpt", 2000)
    run = run_config("D64P8->D64T4P2", lengths, 80.0 * 512)
    simulator = Simulator(MODEL, A10, pair(run.layouts), limits_of(run, MODEL, A10), unit=8)
    simulated = simulator.run(lengths)
    one = simulate("P8->T4P2", lengths[::64], unit=8)
    assert simulated.num_requests == 2000
    assert one.seconds * 0.7 < simulated.seconds < one.seconds * 1.8


def test_2000_requests_on_8_devices_are_50_times_faster_than_they_run():
    lengths = workload_lengths("sharegpt", 2000)
    start = time.process_time()
    run = simulate("P8->T4P2", lengths)
    assert run.seconds > 50 * (time.process_time() - start)


def test_a_request_that_can_never_fit_is_refused():
    lengths = [RequestLength(3000, 500)]
    run = run_config("P8->T4P2", lengths, 640.0)
    limits = replace(limits_of(run, MODEL, A10), num_gpu_blocks=100)
    with pytest.raises(ValueError, match="num_gpu_blocks=100"):
        Simulator(MODEL, A10, pair("P8->T4P2"), limits).run(lengths)


def test_a_run_that_takes_too_long_is_cut_short() -> None:
    model, machine, lengths = shape("llama2-70b"), hardware("h200-nvlink"), workload_lengths("arxiv", 20)
    run = run_config("P2->T2", lengths, 20.0)
    simulator = Simulator(model, machine, pair("P2->T2"), limits_of(run, model, machine))
    whole = simulator.run(lengths)
    assert simulator.run(lengths, stop_after=1.001 * whole.seconds) == whole
    with pytest.raises(TookTooLong):
        simulator.run(lengths, stop_after=0.999 * whole.seconds)


def test_a_static_run_that_takes_too_long_is_cut_short() -> None:
    model, machine, lengths = shape("llama3-15b"), hardware("a10"), workload_lengths("sharegpt", 30)
    limits = StaticEngineLimits(num_kv_tokens=50_000, max_num_seqs=32, max_num_batched_tokens=512, block_size=16)

    def run(stop_after: float) -> SimulatedRun:
        layout = ParallelLayout.parse("T4")
        return run_static_engine(model, machine, layout, limits, BatchPolicy.CHUNKED, lengths, stop_after=stop_after)

    whole = run(math.inf)
    assert run(1.001 * whole.seconds) == whole
    with pytest.raises(TookTooLong):
        run(0.999 * whole.seconds)

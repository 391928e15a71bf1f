"""The simulator around the real scheduler: what it must add up to, how fast it is, and that it repeats itself."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from plan_cases import hardware, limits_of, pair, run_config, shape
from seesaw_ds.plan.bounds import InputTotals, bound_seconds
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.workloads import RequestLength, workload_lengths

MODEL = shape("llama2-70b")
A10 = hardware("a10")


def simulate(layouts: str, lengths: list[RequestLength], host_gib: float = 640.0, unit: int = 1, **changes):
    run = run_config(layouts, lengths, host_gib, **changes)
    limits = limits_of(run, MODEL, A10)
    return Simulator(MODEL, A10, pair(layouts), limits, unit=unit).run(lengths)


def test_parts_add_up_to_the_whole():
    run = simulate("P8->T4P2", workload_lengths("arxiv", 60))
    assert run.num_transitions == 1
    assert run.prefill_seconds + run.decode_seconds + run.transition_seconds == pytest.approx(run.seconds)
    assert 0.8 < run.busy_share <= 1
    assert run.requests_per_second == pytest.approx(60 / run.seconds)


def test_one_request_takes_its_prefill_and_its_steps_one_after_the_other():
    run = simulate("T8", [RequestLength(1000, 101)])
    shorter = simulate("T8", [RequestLength(1000, 51)])
    step = (run.decode_seconds - shorter.decode_seconds) / 50
    weights = 80 * MODEL.layer_parameters * 2 / 8 / (600 * 2**30 * 0.9)
    assert weights < step < 2 * weights
    assert run.mean_decode_batch == 1.0


def test_a_small_host_pool_makes_transitions_that_cost_time():
    lengths = workload_lengths("arxiv", 60)
    many = simulate("P8->T4P2", lengths, num_host_kv_blocks=2000)
    assert many.num_transitions > 3
    assert many.seconds > simulate("P8->T4P2", lengths).seconds


def test_equal_inputs_give_equal_runs():
    lengths = workload_lengths("sharegpt", 100)
    assert simulate("P8->T4P2", lengths) == simulate("P8->T4P2", lengths)


@pytest.mark.parametrize("layouts", ["P8->T4P2", "T8", "P8"])
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt"])
def test_units_change_the_seconds_by_little_and_the_transitions_not_at_all(layouts, workload):
    lengths = workload_lengths(workload, 150)
    fine, coarse = (simulate(layouts, lengths, unit=unit) for unit in (1, 8))
    assert coarse.seconds == pytest.approx(fine.seconds, rel=0.06)
    assert coarse.num_transitions == fine.num_transitions
    assert coarse.mean_decode_batch == pytest.approx(fine.mean_decode_batch, rel=0.15)


@pytest.mark.parametrize("layouts", ["P8->T4P2", "P8->T8", "T8", "P8", "T4P2->T8", "T2P4->T4P2"])
@pytest.mark.parametrize("workload", ["arxiv", "sharegpt", "3000x1", "100x300"])
def test_no_run_beats_the_closed_form(layouts, workload):
    lengths = workload_lengths(workload, 80)
    run = run_config(layouts, lengths, 640.0)
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

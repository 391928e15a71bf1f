"""The planner: it finds what exhaustive simulation finds, explains losers, and answers the impossible."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from plan_cases import ROOT, hardware, pair, run_config, shape
from seesaw_ds.errors import UserError
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.bounds import InputTotals
from seesaw_ds.plan.candidates import (
    Candidate,
    Constraints,
    broken_rule,
    find_candidates,
    layout_pairs,
    make_candidate,
    num_seqs_to_try,
    with_fewer_seqs,
    with_host_pool,
)
from seesaw_ds.plan.outcome import TookTooLong
from seesaw_ds.plan.planner import (
    _best_in_detail,
    _search,
    _with_fewer_seqs,
    _with_smaller_pool,
    make_plan,
)
from seesaw_ds.plan.report import plan_json, plan_table
from seesaw_ds.plan.sensitivity import bandwidth_curves, output_ratio_curves
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.static_engine import HostWork
from seesaw_ds.plan.static_search import StaticEngineKind
from seesaw_ds.plan.trials import FINAL, RANKING, Simulated, _most_bundled, simulate, thinned
from seesaw_ds.plan.workloads import RequestLength, parse_workload, workload_lengths

MODEL = shape("llama2-70b")
A10 = hardware("a10")
ARXIV = workload_lengths("arxiv", 500)
RUN = run_config("auto", ARXIV, 640.0)


@pytest.fixture(scope="module")
def plan_70b_a10():
    return make_plan(RUN, MODEL, A10, 8, ARXIV)


def test_every_layout_pair_is_tried_once():
    pairs = [str(each) for each in layout_pairs(8, 8)]
    assert len(pairs) == len(set(pairs)) == 16 + 9 + 4 + 1
    assert {"P8->T4P2", "D2P4->D2T4", "D4T2->D4P2", "D8"} <= set(pairs)
    assert all(each.replica_size <= 8 and each.world_size == 512 for each in layout_pairs(512, 8))
    assert {each.replica_size for each in layout_pairs(6, 8)} == {1, 2}  # 3 and 6 would straddle the nodes of 8
    assert [str(each) for each in layout_pairs(1, 8)] == ["T1"]


def test_heads_and_layers_rule_out_layouts():
    model = replace(MODEL, num_kv_heads=4, num_layers=6)
    rules = {str(each): broken_rule(model, each) for each in layout_pairs(8, 8)}
    assert rules["T8"] == "num_key_value_heads=4 is not a multiple of 8"
    assert rules["P8"] == "8 stages for num_hidden_layers=6"
    assert rules["T4P2"] is None


def test_resharding_wins_on_eight_a10_and_the_parts_add_up(plan_70b_a10):
    best = plan_70b_a10.best
    assert best.candidate.pair.prefill.pp == 8
    assert best.candidate.pair.decode.tp >= 4
    assert best.prefill_seconds + best.decode_seconds + best.transition_seconds == pytest.approx(best.seconds)
    assert best.requests_per_second == pytest.approx(500 / best.seconds)
    assert plan_70b_a10.speedup > 1.2


def test_each_layout_is_ranked_pruned_or_rejected_with_a_reason(plan_70b_a10):
    plan = plan_70b_a10
    names = [simulated.candidate.run.layouts for simulated in plan.ranking]
    names += [candidate.run.layouts for candidate in plan.pruned]
    names += [rejected.layouts for rejected in plan.rejected]
    assert sorted(names) == sorted(str(each) for each in layout_pairs(8, 8))
    assert all("GiB" in rejected.reason for rejected in plan.rejected)
    assert all(rejected.layouts.startswith("D") for rejected in plan.rejected)  # no copy of the weights fits half


def test_what_was_pruned_could_not_have_won(plan_70b_a10):
    totals = InputTotals.of(ARXIV)
    best = plan_70b_a10.ranking[0].seconds
    assert plan_70b_a10.pruned
    for candidate in plan_70b_a10.pruned[:4]:
        assert simulate(candidate, MODEL, A10, totals, ARXIV, RANKING).seconds > best


def in_seconds(seconds: dict[tuple[str, int], float], calls: list[tuple[str, int]]):
    """A stand-in for a simulation that looks up what it is to answer, and writes down what it was asked."""

    def rank(each: Candidate, stop_after: float = math.inf) -> Simulated:
        calls.append((each.run.layouts, each.run.max_num_batched_tokens))
        taken = seconds.get(calls[-1], 1e6)
        if taken >= stop_after:
            raise TookTooLong
        return Simulated(each, simulated=None, seconds=taken, num_requests=500)

    return rank


def test_pairs_not_far_behind_try_other_micro_batch_sizes():
    candidates, _ = find_candidates(RUN, MODEL, A10, 8, 8, InputTotals.of(ARXIV))
    seconds = {("P8->T8", 512): 900.0, ("P8->T4P2", 512): 940.0, ("T2P4->T8", 512): 950.0}
    seconds |= {("P8->T8", 256): 920.0, ("P8->T8", 1024): 890.0, ("P8->T8", 2048): 890.0, ("P8->T4P2", 256): 880.0}
    calls: list[tuple[str, int]] = []
    ranked, pruned = _search(candidates, in_seconds(seconds, calls))
    assert (ranked[0].candidate.run.layouts, ranked[0].candidate.run.max_num_batched_tokens) == ("P8->T4P2", 256)
    assert {tokens for layouts, tokens in calls if layouts == "P8->T8"} == {256, 512, 1024, 2048}
    assert {tokens for layouts, tokens in calls if layouts == "P8->T4P2"} == {256, 512}
    assert {tokens for layouts, tokens in calls if layouts == "T2P4->T8"} == {512}
    names = {done.candidate.run.layouts for done in ranked} | {candidate.run.layouts for candidate in pruned}
    assert names == {candidate.run.layouts for candidate in candidates}


def test_the_fastest_in_detail_wins_and_equal_runs_are_examined_once():
    candidates, _ = find_candidates(RUN, MODEL, A10, 8, 8, InputTotals.of(ARXIV))
    by_layouts = {each.run.layouts: each for each in candidates if each.run.max_num_batched_tokens == 512}
    coarse = {"P8": 100.0, "P8->T8": 100.0, "P8->T4P2": 101.0, "T2P4->T8": 101.2, "T4P2->T8": 101.4, "T8": 110.0}
    ranked = [Simulated(by_layouts[layouts], None, seconds, 500) for layouts, seconds in coarse.items()]
    fine = {("P8", 512): 100.5, ("P8->T4P2", 512): 99.0, ("T2P4->T8", 512): 100.0, ("T4P2->T8", 512): 1.0}
    calls: list[tuple[str, int]] = []
    run = Simulator(MODEL, A10, pair("P8->T8"), ranked[1].candidate.limits).run(ARXIV[:2])
    shares = {"P8": 0.4, "P8->T8": 0.4, "P8->T4P2": 0.4, "T2P4->T8": 0.3, "T4P2->T8": 0.2, "T8": 0.0}

    def with_share(done: Simulated) -> Simulated:
        return replace(done, simulated=replace(run, host_pool_share=shares[done.candidate.run.layouts]))

    def best_in_detail(pool_seconds: float) -> Simulated:
        calls.clear()
        judge = in_seconds(fine, calls)
        return _best_in_detail(
            list(map(with_share, ranked)), lambda *arguments: with_share(judge(*arguments)), pool_seconds
        )

    assert best_in_detail(0.0).candidate.run.layouts == "P8->T4P2"
    assert [layouts for layouts, _ in calls] == ["P8", "P8->T4P2"]
    # Of those that are about as fast the one that needs less of a dear host pool wins.
    assert best_in_detail(0.1).candidate.run.layouts == "T4P2->T8"
    assert [layouts for layouts, _ in calls] == ["P8", "T4P2->T8"]


@pytest.mark.parametrize(
    ("most", "num_requests", "dp", "numbers"),
    [
        (1024, 5000, 1, [1024, 512, 256]),
        (1024, 801, 2, [401, 256]),
        (800, 5000, 1, [800, 512, 256]),
        (256, 5000, 1, [256]),
        (100, 5000, 4, [100]),
        (1024, 3, 2, [2]),
    ],
)
def test_numbers_of_sequences_are_those_allowed_and_there(most, num_requests, dp, numbers):
    assert num_seqs_to_try(replace(RUN, max_num_seqs=most), num_requests, dp) == numbers


SHAREGPT = workload_lengths("sharegpt", 2000)
MANY_SEQS = run_config("auto", SHAREGPT, 640.0, max_num_seqs=1024)


@pytest.mark.parametrize(("vocab_size", "numbers"), [(32_000, {1024}), (128_000, {1024, 512}), (512_000, {256})])
def test_candidates_have_as_many_sequences_as_fit(vocab_size, numbers):
    """An A10 has no room for the logits of many sequences with a large vocabulary beside an eighth of the model."""
    model = replace(MODEL, vocab_size=vocab_size)
    candidates, _ = find_candidates(MANY_SEQS, model, A10, 8, 8, InputTotals.of(SHAREGPT))
    assert {each.run.max_num_seqs for each in candidates} == numbers


@pytest.mark.parametrize(
    ("seconds_of", "best", "tried"),
    [
        (
            {(1024, 512): 1000.0, (512, 512): 990.0, (512, 256): 980.0, (512, 1024): 970.0, (256, 256): 990.0},
            (512, 256),
            256,
        ),
        ({(1024, 512): 1000.0, (512, 512): 1040.0, (512, 256): 1030.0}, (1024, 512), 512),
        ({(1024, 512): 1000.0, (512, 512): 950.0, (256, 512): 900.0}, (256, 512), 256),
        ({(1024, 512): 1000.0, (512, 512): 1200.0, (256, 512): 500.0}, (1024, 512), 512),
    ],
    ids=["another size", "no better", "ever fewer", "far behind"],
)
def test_fewer_sequences_at_once_are_tried_while_that_helps(seconds_of, best, tried):
    totals = InputTotals.of(SHAREGPT)
    candidates, _ = find_candidates(MANY_SEQS, MODEL, A10, 8, 8, totals)
    first = next(each for each in candidates if str(each.pair) == "P8->T4P2" and each.run.max_num_batched_tokens == 512)
    asked: list[int] = []

    def rank(each: Candidate, stop_after: float = math.inf) -> Simulated:
        run = each.run
        assert str(each.pair.with_equal_stages) == "P8->T4P2"
        asked.append(run.max_num_seqs)
        seconds = seconds_of.get((run.max_num_seqs, run.max_num_batched_tokens), 1100.0)
        if seconds >= stop_after:
            raise TookTooLong
        return Simulated(each, simulated=None, seconds=seconds, num_requests=2000)

    def fewer(each: Candidate) -> list[Candidate]:
        return with_fewer_seqs(each, MODEL, A10, totals)

    # Every closed form is below these seconds, so all sizes may be tried.
    ranked = _with_fewer_seqs([Simulated(first, None, 1000.0, 2000)], fewer, rank)
    run = ranked[0].candidate.run
    assert (run.max_num_seqs, run.max_num_batched_tokens) == best
    assert min(asked) == tried
    assert [done.seconds for done in ranked] == sorted(done.seconds for done in ranked)


def run_with_pool(gib: float, share: float, seconds_at: dict[float, float]) -> tuple[float, list[float]]:
    """The size of the pool that is chosen from `gib` on, of which a share is used, and the sizes that were simulated.

    `seconds_at` are those of pools of about that size; a GiB takes half a second to provide.
    """
    totals = InputTotals.of(ARXIV)
    asked: list[float] = []

    def simulated(each: Candidate, stop_after: float = math.inf) -> Simulated:
        size = each.run.kv_offloading_size
        asked.append(round(size, 1))
        seconds = seconds_at[min(seconds_at, key=lambda known: abs(known - size))]
        if seconds >= stop_after:
            raise TookTooLong
        return replace(first, candidate=each, seconds=seconds)

    candidate = make_candidate(replace(RUN, layouts="P8->T8", kv_offloading_size=gib), MODEL, A10, totals)
    outcome = Simulator(MODEL, A10, pair("P8->T8"), candidate.limits).run(ARXIV[:2])
    first = Simulated(candidate, replace(outcome, host_pool_share=share), seconds_at[gib], 500)

    def resized(each: Candidate, size: float) -> Candidate:
        return with_host_pool(each, size, MODEL, A10, totals)

    trials = SimpleNamespace(rank=simulated, judge=simulated)
    best = _with_smaller_pool(first, resized, trials, pool_seconds=0.5)
    return round(best.candidate.run.kv_offloading_size, 1), asked


def test_a_host_pool_is_as_large_as_is_used_or_pays():
    assert run_with_pool(640.0, 0.5, {640.0: 540.0}) == (400.0, [])  # with a quarter of room
    assert run_with_pool(640.0, 0.0, {640.0: 540.0}) == (4.0, [])
    assert run_with_pool(3.0, 0.1, {3.0: 540.0}) == (3.0, [])
    # All of it is used. A quarter saves 240 s of providing it, a sixteenth 60 s more, a 64th 15 s more.
    assert run_with_pool(640.0, 1.0, {640.0: 540.0, 160.0: 700.0, 40.0: 740.0, 10.0: 760.0}) == (
        40.0,
        [640.0, 160.0, 40.0, 10.0, 40.0],
    )
    assert run_with_pool(640.0, 0.9, {640.0: 540.0, 160.0: 900.0}) == (640.0, [640.0, 160.0])


def test_the_host_pools_size_is_chosen_where_it_costs_and_is_not_given():
    lengths = workload_lengths("sharegpt", 300)
    run = run_config("auto", lengths, 100.0)
    given, chosen, fixed = (
        make_plan(run, MODEL, hardware("h200-nvlink"), 2, lengths, with_static=False, constraints=constraints).best
        for run, constraints in (
            (run, Constraints()),
            (run, Constraints(host_pool_seconds=0.65)),
            (replace(run, num_host_kv_blocks=5000), Constraints(host_pool_seconds=0.65)),
        )
    )
    assert given.candidate.run.kv_offloading_size == fixed.candidate.run.kv_offloading_size == 100.0
    assert 0.01 < given.simulated.host_pool_share < 0.1
    share = chosen.simulated.host_pool_share
    assert chosen.candidate.run.kv_offloading_size == pytest.approx(max(4.0, 125 * share))
    assert chosen.seconds < 1.02 * given.seconds


def test_more_sequences_at_once_are_taken_where_that_is_faster():
    lengths = workload_lengths("sharegpt", 800)
    few, many = (
        make_plan(run_config("auto", lengths, 24.0, max_num_seqs=most), MODEL, hardware("h200-nvlink"), 2, lengths)
        for most in (256, 1024)
    )
    assert few.best.candidate.run.max_num_seqs == few.best_static.max_num_seqs == 256
    assert many.best.candidate.run.max_num_seqs == 800
    assert many.best.requests_per_second > 1.05 * few.best.requests_per_second
    assert many.best_static.max_num_seqs > 256
    assert many.best_static.simulated.seconds <= few.best_static.simulated.seconds
    assert "max_num_seqs=800" in plan_table(many)
    assert plan_json(many)["best_static"]["max_num_seqs"] == many.best_static.max_num_seqs


@pytest.mark.parametrize("workload", ["arxiv:500", "sharegpt:600"])
@pytest.mark.parametrize("layouts", ["P8->T4P2", "T2P4"])
def test_a_coarse_simulation_is_near_the_exact_one(workload, layouts):
    lengths = workload_lengths(*parse_workload(workload))
    totals = InputTotals.of(lengths)
    run = run_config(layouts, lengths, 640.0, max_num_batched_tokens=512)
    candidate = make_candidate(run, MODEL, A10, totals)
    exact, coarse = (simulate(candidate, MODEL, A10, totals, lengths, effort) for effort in (FINAL, RANKING))
    whole = Simulator(MODEL, A10, pair(layouts), candidate.limits).run(lengths)
    assert exact.simulated == whole
    assert coarse.simulated != whole
    assert coarse.seconds == pytest.approx(whole.seconds, rel=0.06)


def test_few_requests_and_small_pools_are_not_bundled():
    candidate = make_candidate(replace(RUN, layouts="P8->T8"), MODEL, A10, InputTotals.of(ARXIV))
    limits = candidate.limits
    for changes, most in (
        ({}, 4),
        ({"num_gpu_blocks": 4000}, 3),
        ({"num_gpu_blocks": 1000}, 0),
        ({"max_num_seqs": 64}, 2),
    ):
        assert _most_bundled(replace(candidate, limits=replace(limits, **changes)), ARXIV) == most
    assert _most_bundled(candidate, ARXIV[:100]) == 3
    assert _most_bundled(candidate, ARXIV[:30]) == 0


def test_a_plan_says_how_long_it_decodes_in_the_prefill_layout(plan_70b_a10):
    assert plan_json(plan_70b_a10)["best"]["num_left_after_stay"] is None
    stay = replace(plan_70b_a10.best.simulated, num_left_after_stay=24)
    plan = replace(plan_70b_a10, best=replace(plan_70b_a10.best, simulated=stay))
    prefill = plan.best.candidate.pair.prefill
    assert f"decode in {prefill} until 24 sequences are left" in plan_table(plan)
    assert "sequences are left" not in plan_table(plan_70b_a10)
    assert plan_json(plan)["best"]["num_left_after_stay"] == 24


def test_a_device_that_holds_the_model_needs_no_resharding():
    lengths = workload_lengths("arxiv", 200)
    plan = make_plan(run_config("auto", lengths, 100.0), shape("llama3-8b"), hardware("h200-p2p-off"), 2, lengths)
    assert str(plan.best.candidate.pair) == "D2"


def test_plans_repeat_themselves_and_take_seconds():
    lengths = workload_lengths("sharegpt", 2000)
    run = run_config("auto", lengths, 640.0)
    start = time.process_time()
    plan = make_plan(run, MODEL, A10, 8, lengths)
    # Under 5 s on an idle core; the bound leaves room for a busy machine.
    assert time.process_time() - start < 15
    again = make_plan(run, MODEL, A10, 8, lengths, with_static=False)
    assert again.best == plan.best
    assert again.best_static is None
    assert again.speedup is None


def test_a_million_requests_are_thinned():
    lengths = thinned([RequestLength(100, 100)] * 1_000_000, 50_000)
    assert len(lengths) == 500
    assert thinned([RequestLength(10, 1000)], 10) == [RequestLength(10, 1000)]
    many = workload_lengths("arxiv", 500) * 40
    small = make_plan(RUN, MODEL, A10, 8, ARXIV, with_static=False)
    large = make_plan(RUN, MODEL, A10, 8, many, with_static=False)
    assert large.best.candidate.run.layouts == small.best.candidate.run.layouts
    assert large.best.requests_per_second == pytest.approx(small.best.requests_per_second, rel=0.1)


@pytest.mark.parametrize(
    ("num_devices", "host_gib", "message"),
    [
        (4, 640.0, r"no layout of 4 x a10 fits: the weights take 128\.\d GiB.*at least 7 devices"),
        (8, 1.0, r"kv_offloading_size=1: one request of max_model_len=\d+ needs 1\.\d+ GiB"),
    ],
)
def test_impossible_demands_say_what_is_needed(num_devices, host_gib, message):
    run = replace(RUN, kv_offloading_size=host_gib)
    with pytest.raises(UserError, match=message):
        make_plan(run, MODEL, A10, num_devices, ARXIV)


def test_heads_that_no_tensor_parallel_size_divides_name_a_number_of_devices_that_would_do():
    model = replace(shape("llama3-8b"), num_heads=10, num_kv_heads=5, intermediate_size=14335, num_layers=2)
    lengths = [RequestLength(500, 100)] * 20
    machine = replace(hardware("l4"), memory_bytes=7 << 28)
    run = run_config("auto", lengths, 10.0)
    with pytest.raises(UserError) as caught:
        make_plan(run, model, machine, 3, lengths, devices_per_node=3)
    message = str(caught.value)
    assert "T3: num_attention_heads=10 is not a multiple of 3" in message
    assert "P3: 3 stages for num_hidden_layers=2" in message
    assert "; 5 devices of one node would do, as T5" in message


def test_host_memory_bounds_the_pools():
    with pytest.raises(UserError, match=r"1 x 640.0 GiB of KV are asked for, 100.0 GiB are free; lower kv_offloading"):
        make_plan(RUN, MODEL, A10, 8, ARXIV, constraints=Constraints(host_bytes=100 << 30))


def test_cells_of_the_checkpoint_and_micro_batch_sizes_bound_the_candidates():
    limits = Constraints(micro_batch_tokens=(64, 96), folder_cells=4)
    candidates, rejected = find_candidates(RUN, MODEL, A10, 8, 8, InputTotals.of(ARXIV), limits)
    assert {candidate.run.max_num_batched_tokens for candidate in candidates} == {64, 96}
    assert all(4 % candidate.pair.cells_per_layer == 0 for candidate in candidates)
    reasons = {item.layouts: item.reason for item in rejected}
    assert reasons["P8->T8"] == "the checkpoint's 4 cells a layer cannot make 8; convert it with --max-tp 8"


def test_an_empty_input_is_refused():
    with pytest.raises(UserError, match="no requests"):
        make_plan(RUN, MODEL, A10, 8, [])


def test_candidates_take_host_reload_where_cells_cannot_be_exchanged():
    lengths = [RequestLength(500, 100)] * 20
    model = replace(shape("llama3-8b"), num_heads=48, num_kv_heads=12, intermediate_size=14400)
    run = run_config("auto", lengths, 60.0)
    candidates, _ = find_candidates(run, model, hardware("h100"), 6, 6, InputTotals.of(lengths))
    reshards = {candidate.run.layouts: candidate.run.weight_reshard for candidate in candidates}
    assert reshards["T2P3->T3P2"] == "host"
    assert reshards["P6->T6"] == "exchange"


def test_json_and_table_tell_the_plan(plan_70b_a10):
    values = json.loads(json.dumps(plan_json(plan_70b_a10)))
    assert values["best"]["layouts"] == plan_70b_a10.best.candidate.run.layouts
    assert values["best_static"]["requests_per_second"] > 0
    assert values["speedup"] == pytest.approx(
        values["best"]["requests_per_second"] / values["best_static"]["requests_per_second"]
    )
    memory = values["best"]["memory_gib"]
    assert sum(memory.values()) - memory["host_kv"] <= 24 * 0.9 + 0.01
    table = plan_table(plan_70b_a10)
    assert "best; max_num_batched_tokens" in table
    assert "by the closed form" in table
    assert "cannot run" in table
    assert "speed-up over it" in table


def test_json_and_table_name_the_static_engine(plan_70b_a10):
    static = plan_json(plan_70b_a10)["best_static"]
    assert (static["virtual_engines"], static["host"]) == (False, None)
    assert "virtual engines" not in plan_table(plan_70b_a10)
    kind = StaticEngineKind(HostWork(0.0073, 0.0), has_virtual_engines=True)
    plan = replace(plan_70b_a10, best_static=replace(plan_70b_a10.best_static, kind=kind))
    static = plan_json(plan)["best_static"]
    assert (static["virtual_engines"], static["host"]) == (True, {"step_seconds": 0.0073, "row_seconds": 0.0})
    assert "best static engine with virtual engines: " in plan_table(plan)


def test_the_output_ratio_curve_puts_resharding_on_top(monkeypatch):
    """The order of the paper's figure: PP8 first at one token out, TP4PP2 once decode dominates, PP8->TP4PP2 always."""
    monkeypatch.setattr("seesaw_ds.plan.sensitivity.OUTPUT_RATIOS", (0.0, 0.05, 0.15))
    layouts = [ParallelLayout.parse(text) for text in ("P8", "T4P2")]
    rates = output_ratio_curves(RUN, MODEL, A10, [pair("P8->T4P2")], layouts).requests_per_second
    pipeline, tensor, both = (rates[name] for name in ("P8, static engine", "T4P2, static engine", "P8->T4P2"))
    assert pipeline[0] > 1.5 * tensor[0]
    assert pipeline[2] < tensor[2]  # falls fast with the outputs' length
    assert all(pair > max(one, other) for one, other, pair in zip(pipeline, tensor, both))


def test_the_bandwidth_curve_has_resharding_above_its_two_static_layouts(monkeypatch):
    monkeypatch.setattr("seesaw_ds.plan.sensitivity.BANDWIDTH_FACTORS", (0.1, 1.0, 10.0))
    model = shape("codellama-34b")
    lengths = workload_lengths("arxiv", 100)
    layouts = [ParallelLayout.parse(text) for text in ("D2P4", "D2T4")]
    run = run_config("auto", lengths, 640.0)
    rates = bandwidth_curves(run, model, A10, [pair("D2P4->D2T4")], layouts, lengths).requests_per_second
    pipeline, tensor, both = (rates[name] for name in ("D2P4, static engine", "D2T4, static engine", "D2P4->D2T4"))
    assert pipeline[0] == pytest.approx(pipeline[-1])  # a pipeline has no all-reduce
    assert tensor[0] < tensor[-1]
    assert all(pair > max(one, other) for one, other, pair in zip(pipeline, tensor, both))


def test_a_curve_has_a_gap_where_layouts_do_not_fit(monkeypatch):
    monkeypatch.setattr("seesaw_ds.plan.sensitivity.OUTPUT_RATIOS", (0.0,))
    points = []
    layouts = [ParallelLayout.parse("D4T2")]
    curves = output_ratio_curves(RUN, MODEL, A10, [pair("D4P2->D4T2")], layouts, on_point=lambda: points.append(1))
    assert curves.requests_per_second == {"D4P2->D4T2": [None], "D4T2, static engine": [None]}
    assert len(points) == 2


def test_the_command_line_prints_json_and_names_mistakes():
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--model-shape", "llama2-70b", "--hardware", "a10"]
    command += ["--workload", "arxiv", "--requests", "50", "--kv-offloading-size", "640"]
    wanted = [*command, "--gpus", "8", "--json", "--static-virtual-engines"]
    done = subprocess.run(wanted, capture_output=True, text=True, check=True, timeout=120)
    values = json.loads(done.stdout)
    assert {"best", "best_static", "speedup"} <= set(values)
    assert values["best_static"]["virtual_engines"]
    failed = subprocess.run([*command, "--gpus", "2"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: no layout of 2 x a10 fits")
    assert "Traceback" not in failed.stderr


def test_a_plot_is_drawn_of_the_best_pair_and_its_layouts(tmp_path):
    """With matplotlib installed; without it the command says so before it plans."""
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--model-shape", "llama3-8b", "--hardware", "h100"]
    command += ["--workload", "300x30", "--requests", "40", "--gpus", "2", "--kv-offloading-size", "16"]
    picture = tmp_path / "plot.png"
    done = subprocess.run([*command, "--plot", str(picture)], capture_output=True, text=True, timeout=240)
    if importlib.util.find_spec("matplotlib") is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: --plot: needs matplotlib")
    else:
        assert done.returncode == 0, done.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")

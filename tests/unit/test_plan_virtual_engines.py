"""The simulated static engine whose pipeline groups have queues and KV room of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan_cases import hardware, run_config, shape
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.static_engine import BatchPolicy, HostWork, StaticEngineLimits, run_static_engine
from seesaw_ds.plan.static_queue import KvQueue, StaticRequest
from seesaw_ds.plan.static_search import StaticEngineKind, best_static_plan, static_kv_tokens
from seesaw_ds.plan.workloads import RequestLength, workload_lengths

MODEL, A10 = shape("llama2-70b"), hardware("a10")
VIRTUAL = StaticEngineKind(has_virtual_engines=True)


def simulate(lengths, layout, kv_tokens, has_virtual_engines, policy=BatchPolicy.CHUNKED):
    """One run with `kv_tokens` of KV room a replica."""
    parsed = ParallelLayout.parse(layout)
    num_queues = parsed.pp if has_virtual_engines else 1
    limits = StaticEngineLimits(kv_tokens // num_queues, 256, 512, num_queues=num_queues)
    return run_static_engine(MODEL, A10, parsed, limits, policy, lengths)


def best(lengths, layout, kind, machine=A10):
    run = run_config("auto", lengths, 640.0)
    return best_static_plan(run, MODEL, machine, [ParallelLayout.parse(layout)], lengths, kind)


@pytest.mark.parametrize("policy", BatchPolicy)
@pytest.mark.parametrize("layout", ["T4P2", "D2T2P2", "P8"])
def test_every_output_token_after_the_first_is_one_row_of_a_step(policy, layout):
    lengths = workload_lengths("arxiv", 41)
    run = simulate(lengths, layout, 400_000, True, policy)
    assert run.num_evictions == 0
    num_steps = sum(length.output_tokens - 1 for length in lengths) / run.mean_decode_batch
    assert num_steps == pytest.approx(round(num_steps))


@pytest.mark.parametrize("policy", BatchPolicy)
@pytest.mark.parametrize("layout", ["T4P2", "P8"])
def test_crowded_queues_preempt_and_run_all_to_their_ends(policy, layout):
    lengths = [RequestLength(300, 700)] * 61
    run = simulate(lengths, layout, ParallelLayout.parse(layout).pp * 2_500, True, policy)
    assert run.num_evictions > 0
    assert run.decode_seconds > 0


@pytest.mark.parametrize("layout", ["T8", "D2T4"])
@pytest.mark.parametrize("kv_tokens", [130_000, 8_000])
def test_without_stages_both_kinds_are_one(layout, kv_tokens):
    lengths = workload_lengths("sharegpt", 100)
    assert simulate(lengths, layout, kv_tokens, True) == simulate(lengths, layout, kv_tokens, False)


def test_a_queue_with_the_long_requests_ends_last():
    lengths = [RequestLength(500, 400), RequestLength(500, 20)] * 40
    shared, own = (simulate(lengths, "T4P2", 60_000, is_virtual) for is_virtual in (False, True))
    assert own.seconds > 1.2 * shared.seconds


def test_requests_of_one_length_lose_little_to_their_own_queues():
    lengths = [RequestLength(500, 100)] * 80
    shared, own = (simulate(lengths, "T4P2", 60_000, is_virtual) for is_virtual in (False, True))
    assert own.seconds == pytest.approx(shared.seconds, rel=0.05)


def test_a_request_must_fit_the_share_of_one_queue():
    lengths = [RequestLength(2000, 100)]
    simulate(lengths, "T4P2", 4_000, False)
    with pytest.raises(ValueError, match="num_kv_tokens=2000: the longest request has 2100 tokens"):
        simulate(lengths, "T4P2", 4_000, True)


def test_the_search_leaves_out_layouts_whose_share_is_too_small():
    probe = [RequestLength(64, 8)]
    room = static_kv_tokens(run_config("auto", probe, 640.0), MODEL, A10, ParallelLayout.parse("P8"), 256)
    lengths = [RequestLength(room // 8, 8)]
    assert best(lengths, "P8", VIRTUAL) is None
    plan = best(lengths, "P8", StaticEngineKind())
    assert plan is not None
    assert not plan.kind.has_virtual_engines


def test_virtual_engines_and_a_slow_host_both_cost_throughput():
    lengths = [RequestLength(500, 400), RequestLength(500, 20)] * 40
    rates = [
        best(lengths, "T4P2", kind).simulated.requests_per_second
        for kind in (StaticEngineKind(), VIRTUAL, replace(VIRTUAL, host=HostWork(20e-3, 0.0)))
    ]
    assert rates[0] > 1.05 * rates[1] > 1.05 * rates[2]


def test_a_queue_gives_back_what_it_took():
    queue = KvQueue(100, 16)
    queue.waiting.extend([StaticRequest(60, 30), StaticRequest(40, 5)])
    first = queue.start()
    assert not queue.can_start()  # 100 - (60 + 8) leaves less than 40 + 8
    assert queue.can_grow(32)
    queue.grow(32)
    assert not queue.can_grow(1)
    queue.preempt(first, 10)
    queue.release(StaticRequest(0, 0), 22 - 8)
    assert (first.prompt, first.output, first.computed) == (70, 20, 0)
    assert queue.waiting[0] is first
    assert queue.can_grow(100)
    assert not queue.can_grow(101)

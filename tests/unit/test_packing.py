"""Costs of chunks, sizes of micro-batches, and the pipeline time they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw_ds.sched.packing import MicroBatchRoom, chunk_cost, micro_batch_cost, tokens_within_cost

repeatable = settings(deadline=None, derandomize=True)
PAIRS = st.sampled_from([1, 16, 1000, 8192])


def pipeline_time(costs: list[int], num_stages: int) -> int:
    """When the last stage is done: each stage takes micro-batches in order, one at a time."""
    free_at = [0] * num_stages
    for cost in costs:
        ready = 0
        for stage in range(num_stages):
            ready = free_at[stage] = max(free_at[stage], ready) + cost
    return free_at[-1]


@repeatable
@given(st.integers(0, 200), st.integers(0, 200), PAIRS)
def test_cost_counts_tokens_and_pairs(start: int, num_tokens: int, pairs_per_token: int) -> None:
    one_by_one = sum(pairs_per_token + index + 1 for index in range(start, start + num_tokens))
    assert chunk_cost(start, num_tokens, pairs_per_token) == one_by_one


@repeatable
@given(st.integers(0, 10**6), st.integers(0, 10**12), PAIRS)
def test_tokens_within_cost_is_the_most_that_fits(start: int, cost: int, pairs_per_token: int) -> None:
    num_tokens = tokens_within_cost(start, cost, pairs_per_token)
    assert chunk_cost(start, num_tokens, pairs_per_token) <= cost
    assert chunk_cost(start, num_tokens + 1, pairs_per_token) > cost


@repeatable
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_pipeline_time_depends_on_the_sum_and_the_largest_only(costs: list[int], num_stages: int) -> None:
    expected = sum(costs) + (num_stages - 1) * max(costs)
    assert pipeline_time(costs, num_stages) == expected
    assert pipeline_time(sorted(costs), num_stages) == expected


@pytest.mark.parametrize("num_stages", [2, 4, 8])
@pytest.mark.parametrize("work", [2_000, 30_000, 1_000_000])
def test_micro_batch_cost_is_near_the_best(work: int, num_stages: int) -> None:
    overhead, full = 100, 8_000

    def time_of(size: int) -> int:
        whole, rest = divmod(work, size)
        return pipeline_time([size + overhead] * whole + [rest + overhead] * (rest > 0), num_stages)

    best = min(time_of(size) for size in range(overhead, full + 1, 10))
    assert time_of(micro_batch_cost(work, num_stages, overhead, full)) <= 1.1 * best


def test_micro_batch_cost_keeps_its_bounds() -> None:
    assert micro_batch_cost(10**9, 1, 100, 8000) == 8000
    assert micro_batch_cost(10**9, 4, 100, 8000) == 8000
    assert micro_batch_cost(1, 4, 100, 8000) == 100
    assert micro_batch_cost(1, 4, 100, 50) == 50


@repeatable
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(1, 40),
    st.integers(1, 3000),
    PAIRS,
)
def test_room_keeps_both_budgets(prompts: list[int], num_tokens: int, cost: int, pairs_per_token: int) -> None:
    room = MicroBatchRoom(num_tokens, cost, pairs_per_token)
    taken: list[tuple[int, int]] = []
    for prompt in prompts:
        fit = room.fit(0, prompt)
        if fit == 0:
            break
        room.take(0, fit)
        taken.append((fit, prompt))
        if fit < prompt:
            assert room.fit(fit, prompt - fit) == 0
            break
    assert taken
    assert sum(fit for fit, _ in taken) <= num_tokens
    if taken != [(1, taken[0][1])]:
        assert sum(chunk_cost(0, fit, pairs_per_token) for fit, _ in taken) <= cost


def test_room_is_filled_to_the_last_token() -> None:
    room = MicroBatchRoom(10, chunk_cost(0, 1000, 16), 16)
    assert (room.fit(0, 7), room.is_full) == (7, False)
    room.take(0, 7)
    assert room.fit(5, 100) == 3
    room.take(5, 3)
    assert (room.fit(8, 92), room.is_full) == (0, True)


def test_only_an_empty_micro_batch_takes_a_token_beyond_its_cost() -> None:
    room = MicroBatchRoom(10, 5, 16)
    assert room.fit(100, 50) == 1
    room.take(100, 1)
    assert room.is_full
    assert room.fit(101, 49) == 0


def test_long_context_gets_fewer_tokens() -> None:
    cost = chunk_cost(0, 1024, 8192)
    early = MicroBatchRoom(1024, cost, 8192).fit(0, 100_000)
    late = MicroBatchRoom(1024, cost, 8192).fit(32768, 100_000)
    assert early == 1024
    assert late == 217  # a token costs about five times as much there

"""Random workloads, pools, delays and aborts: the scheduler always ends, never leaks and never mixes blocks up."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler_executor import STOP, Job, ShadowExecutor
from seesaw_ds.sched import residency
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.output import PreloadSize, SchedulerLimits, SequenceSpec
from seesaw_ds.sched.scheduler import Scheduler
from seesaw_ds.sched.staying import LiveBatch

many = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def make_jobs(seed: int, num_jobs: int, max_prompt: int, max_tokens: int) -> list[Job]:
    """Random sequences: some end at their first token, some at a stop token, some at `max_tokens`."""
    rng = random.Random(seed)
    jobs = []
    for seq_id in range(num_jobs):
        limit = rng.randint(1, max_tokens)
        stops = frozenset({STOP}) if rng.random() < 0.7 else frozenset()
        spec = SequenceSpec(seq_id, rng.randint(1, max_prompt), limit, rng.randint(0, limit), stops)
        tokens = tuple(STOP if rng.random() < 0.1 else 0 for _ in range(limit))
        jobs.append(Job(spec, tokens))
    return jobs


@st.composite
def runs(draw):
    """A scheduler, its jobs and a seed; pools from just enough for the largest sequence to ample."""
    seed = draw(st.integers(0, 2**32))
    block_size = draw(st.sampled_from([1, 2, 4]))
    jobs = make_jobs(
        seed, draw(st.integers(1, 24)), draw(st.sampled_from([1, 6, 20])), draw(st.sampled_from([1, 8, 24]))
    )
    peak = max(blocks_for(job.spec.num_prompt_tokens + job.spec.max_tokens - 1, block_size) for job in jobs)
    spare = st.sampled_from([0, 0, 1, 3, 10, 60])
    limits = SchedulerLimits(
        block_size=block_size,
        num_gpu_blocks=peak + draw(spare),
        num_host_blocks=peak + draw(spare),
        max_num_seqs=draw(st.sampled_from([1, 2, 5, 30])),
        max_num_batched_tokens=draw(st.sampled_from([1, 3, 8, 64])),
        prefill_stages=draw(st.integers(1, 3)),
        decode_stages=draw(st.integers(1, 3)),
        mixes_steps=draw(st.booleans()),
        is_static=draw(st.booleans()),
        preload=draw(st.none() | st.builds(PreloadSize, st.integers(1, 4), st.integers(1, 6))),
    )
    scheduler = Scheduler(
        limits,
        pairs_per_token=draw(st.sampled_from([1, 16, 8192])),
        expected_output_tokens=draw(st.sampled_from([None, 1, 1, 8])),
    )
    return scheduler, jobs, seed


class AlwaysStay:
    """A layout chooser that never takes the decode layout."""

    def num_left_to_switch(self, batch: LiveBatch) -> int | None:
        return 0


def check_empty(scheduler: Scheduler) -> None:
    stats = scheduler.stats()
    assert (stats.num_gpu_blocks_used, stats.num_host_blocks_used) == (0, 0)
    assert (stats.num_waiting, stats.num_prefilling, stats.num_host, stats.num_running) == (0, 0, 0, 0)
    scheduler.check_integrity()


@many
@given(runs())
def test_every_sequence_ends_with_its_tokens(run) -> None:
    scheduler, jobs, seed = run
    executor = ShadowExecutor(scheduler, jobs, seed)
    executor.run()
    assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}
    check_empty(scheduler)
    assert scheduler.stats().num_finished == len(jobs)


@many
@given(runs(), st.sampled_from([1, 3]), st.sampled_from([1, 6, 128]))
def test_rotation_at_the_end_of_a_run_keeps_all_rules(run, yield_tokens: int, fill_tokens: int) -> None:
    scheduler, jobs, seed = run
    with mock.patch.multiple("seesaw_ds.sched.residency", _YIELD_TOKENS=yield_tokens, _FILL_TOKENS=fill_tokens):
        executor = ShadowExecutor(scheduler, jobs, seed)
        executor.run()
    assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}
    check_empty(scheduler)


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize(
    ("num_jobs", "max_tokens", "num_gpu_blocks", "num_host_blocks"),
    [(12, 12, 40, 24), (12, 12, 24, 30), (20, 20, 60, 44), (12, 20, 40, 44)],
    ids=["two yield to one", "the designated yields", "no room to yield to", "no room, fewer"],
)
def test_equal_sequences_rotate_through_a_small_host_pool(
    is_static: bool, num_jobs: int, max_tokens: int, num_gpu_blocks: int, num_host_blocks: int
) -> None:
    limits = SchedulerLimits(
        block_size=1,
        num_gpu_blocks=num_gpu_blocks,
        num_host_blocks=num_host_blocks,
        max_num_seqs=9,
        max_num_batched_tokens=8,
        prefill_stages=1,
        decode_stages=1,
        is_static=is_static,
    )
    with mock.patch("seesaw_ds.sched.residency._YIELD_TOKENS", 1):
        for num_prompt_tokens in (8, 12):
            jobs = [Job(SequenceSpec(i, num_prompt_tokens, max_tokens), (0,) * max_tokens) for i in range(num_jobs)]
            for seed in range(4):
                executor = ShadowExecutor(Scheduler(limits), jobs, seed)
                executor.run()
                assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}


@many
@given(runs(), st.sampled_from([0.01, 0.05, 0.2]))
def test_aborts_leave_nothing_behind(run, abort_rate: float) -> None:
    scheduler, jobs, seed = run
    executor = ShadowExecutor(scheduler, jobs, seed, abort_rate)
    executor.run()
    assert executor.finished == {
        job.spec.seq_id: job.expected for job in jobs if job.spec.seq_id not in executor.aborted
    }
    check_empty(scheduler)


@pytest.mark.parametrize("stays", [False, True])
def test_sequences_change_places_in_the_end_game_while_the_pools_are_full(monkeypatch, stays: bool) -> None:
    """Whoever makes room fits the host beside others that do, and is never the one whose end all wait for."""
    monkeypatch.setattr(residency, "_YIELD_TOKENS", 1)
    num_evictions = 0
    for seed in range(40):
        rng = random.Random(seed)
        lengths = [(rng.randint(1, 12), rng.randint(2, 40)) for _ in range(rng.randint(4, 20))]
        jobs = [Job(SequenceSpec(i, prompt, tokens), (0,) * tokens) for i, (prompt, tokens) in enumerate(lengths)]
        limits = SchedulerLimits(
            block_size=2,
            num_gpu_blocks=rng.choice([30, 40, 60]),
            num_host_blocks=rng.choice([27, 28, 30, 40]),
            max_num_seqs=rng.choice([3, 6, 12]),
            max_num_batched_tokens=16,
            prefill_stages=2,
            decode_stages=1,
        )
        scheduler = Scheduler(limits, layout_chooser=AlwaysStay() if stays else None)
        executor = ShadowExecutor(scheduler, jobs, seed, stays=stays)
        executor.run()
        assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}
        check_empty(scheduler)
        num_evictions += executor.counts["Evict"]
    assert num_evictions > 100


@pytest.mark.parametrize(
    ("mode", "least"),
    [
        ({}, {"Evict": 5, "SwitchPhase": 5}),
        ({"mixes_steps": False}, {"Evict": 5, "SwitchPhase": 5}),
        ({"is_static": True}, {"Evict": 20}),
    ],
    ids=["mixed", "separated", "one phase"],
)
def test_tight_pools_evict_and_change_phase_often(mode: dict[str, bool], least: dict[str, int]) -> None:
    """Sequences go on for longer than expected: they are evicted and stalled, and all the same end as they should."""
    jobs = []
    for seq_id in range(40):
        length = 10 + 7 * seq_id % 23
        spec = SequenceSpec(seq_id, 3 + seq_id % 5, 24, stop_token_ids=frozenset({STOP}))
        jobs.append(Job(spec, tuple(STOP if count == length else 0 for count in range(1, 25))))
    limits = SchedulerLimits(
        block_size=2,
        num_gpu_blocks=16,
        num_host_blocks=40,
        max_num_seqs=12,
        max_num_batched_tokens=8,
        prefill_stages=2,
        decode_stages=2,
        **mode,
    )
    scheduler = Scheduler(limits, expected_output_tokens=1)
    executor = ShadowExecutor(scheduler, jobs, seed=7)
    executor.run()
    assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}
    for kind, count in least.items():
        assert executor.counts[kind] >= count
    check_empty(scheduler)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("mixes_steps", [False, True])
def test_making_room_in_the_end_game_leaves_a_way_to_the_end(monkeypatch, mixes_steps: bool, is_static: bool) -> None:
    """Sequences yield to longer ones as soon as they are two tokens ahead, in pools that hold one or two of them."""
    monkeypatch.setattr(residency, "_YIELD_TOKENS", 2)
    num_evictions = 0
    for seed in range(40):
        rng = random.Random(seed)
        specs = [SequenceSpec(seq_id, rng.randint(1, 8), rng.choice([12, 18, 24])) for seq_id in range(14)]
        limits = SchedulerLimits(
            block_size=2,
            num_gpu_blocks=rng.choice([24, 32, 40]),
            num_host_blocks=rng.choice([16, 24, 32]),
            max_num_seqs=16,
            max_num_batched_tokens=8,
            prefill_stages=1,
            decode_stages=1,
            mixes_steps=mixes_steps,
            is_static=is_static,
        )
        scheduler = Scheduler(limits, expected_output_tokens=rng.choice([1, 20, None]))
        executor = ShadowExecutor(scheduler, [Job(spec, (0,) * spec.max_tokens) for spec in specs], seed)
        executor.run()
        num_evictions += executor.counts["Evict"]
        check_empty(scheduler)
    assert num_evictions > 100

"""Weights come early into KV blocks: when few prompts are left, and only into what nobody will need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler_executor import Job, ShadowExecutor
from seesaw_ds.layout import Phase
from seesaw_ds.sched.output import (
    PhaseSwitched,
    PrefillBatch,
    PrefillDone,
    Preload,
    PreloadSize,
    SchedulerLimits,
    SequenceSpec,
    SwitchPhase,
)
from seesaw_ds.sched.scheduler import Scheduler

LIMITS = SchedulerLimits(
    block_size=2,
    num_gpu_blocks=100,
    num_host_blocks=100,
    max_num_seqs=50,
    max_num_batched_tokens=8,
    prefill_stages=1,
    decode_stages=1,
    preload=PreloadSize(num_rounds=6, round_blocks=5),
)


def scheduler_with(num_sequences: int, max_tokens: int = 5, **changes: object) -> Scheduler:
    """Sequences of 4 prompt tokens, so that each needs 4 blocks at most with five to generate."""
    scheduler = Scheduler(replace(LIMITS, **changes))
    for seq_id in range(num_sequences):
        scheduler.add(SequenceSpec(seq_id, 4, max_tokens))
    return scheduler


def test_all_that_moves_comes_once_the_input_is_closed() -> None:
    scheduler = scheduler_with(17)
    assert isinstance(scheduler.schedule(), PrefillBatch)
    scheduler.close_input()
    preload = scheduler.schedule()
    assert isinstance(preload, Preload)
    assert preload.num_rounds == 6
    assert len(set(preload.gpu_block_ids)) == 30
    assert isinstance(scheduler.schedule(), PrefillBatch)
    scheduler.check_integrity()


@pytest.mark.parametrize(("num_sequences", "num_rounds"), [(18, 5), (22, 2), (23, 1), (24, 0)])
def test_as_many_rounds_come_as_room_is_left_beside_all_at_their_full_length(num_sequences, num_rounds) -> None:
    scheduler = scheduler_with(num_sequences)
    scheduler.close_input()
    action = scheduler.schedule()
    assert isinstance(action, Preload) == (num_rounds > 0)
    if isinstance(action, Preload):
        assert (action.num_rounds, len(action.gpu_block_ids)) == (num_rounds, 5 * num_rounds)


def test_more_comes_when_more_is_free() -> None:
    scheduler = scheduler_with(22, max_num_batched_tokens=4)
    scheduler.close_input()
    first = scheduler.schedule()
    assert isinstance(first, Preload)
    assert first.num_rounds == 2
    batch = scheduler.schedule()
    assert isinstance(batch, PrefillBatch)
    scheduler.abort(20)
    scheduler.abort(21)
    second = scheduler.schedule()
    assert isinstance(second, Preload)
    assert second.num_rounds == 2  # 80 blocks at their full length, and 20 lent
    assert not set(first.gpu_block_ids) & set(second.gpu_block_ids)
    assert not any(isinstance(action, Preload) for action in iter(scheduler.schedule, None))
    scheduler.check_integrity()


def test_there_is_room_when_others_have_ended() -> None:
    scheduler = scheduler_with(24, max_num_batched_tokens=4)
    scheduler.abort(23)
    scheduler.close_input()
    assert isinstance(scheduler.schedule(), Preload)


def test_nothing_comes_while_many_prompts_are_left() -> None:
    # 48 micro-batches of 4 tokens are 96 blocks.
    scheduler = scheduler_with(50, max_num_batched_tokens=4, num_gpu_blocks=1000, mixes_steps=False)
    scheduler.close_input()
    action = scheduler.schedule()
    num_batches = 0
    while isinstance(action, PrefillBatch):
        num_batches += 1
        scheduler.update(PrefillDone(action.step_id, tuple((chunk.seq_id, 0) for chunk in action.chunks)))
        action = next(action for action in iter(scheduler.schedule, None) if isinstance(action, PrefillBatch | Preload))
    assert isinstance(action, Preload)
    assert num_batches == 2


@pytest.mark.parametrize("changes", [{"preload": None}, {"is_static": True, "preload": None}, {"max_tokens": 1}])
def test_nothing_comes_where_nothing_changes_layout(changes) -> None:
    scheduler = scheduler_with(10, **changes)
    scheduler.close_input()
    assert isinstance(scheduler.schedule(), PrefillBatch)


def test_blocks_are_back_when_the_layout_has_changed() -> None:
    scheduler = scheduler_with(2)
    scheduler.close_input()
    assert isinstance(scheduler.schedule(), Preload)
    batch = scheduler.schedule()
    assert isinstance(batch, PrefillBatch)
    scheduler.update(PrefillDone(batch.step_id, tuple((chunk.seq_id, 0) for chunk in batch.chunks)))
    actions = list(iter(scheduler.schedule, None))
    switch = actions[-1]
    assert isinstance(switch, SwitchPhase)
    assert switch.to is Phase.DECODE
    assert scheduler.stats().num_gpu_blocks_used == len(switch.gpu_block_ids)
    scheduler.update(PhaseSwitched(Phase.DECODE))
    assert not scheduler._pools.lent_blocks
    scheduler.check_integrity()


@pytest.mark.parametrize("mixes_steps", [True, False])
def test_runs_end_as_they_should_with_weights_in_their_blocks(mixes_steps: bool) -> None:
    num_preloads = 0
    for seed in range(20):
        jobs = [Job(SequenceSpec(i, 3 + i % 5, 1 + (i + seed) % 9), (0,) * (1 + (i + seed) % 9)) for i in range(40)]
        limits = replace(LIMITS, num_gpu_blocks=100 + 10 * seed, num_host_blocks=60, mixes_steps=mixes_steps)
        executor = ShadowExecutor(Scheduler(limits), jobs, seed)
        executor.run()
        assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}
        num_preloads += executor.counts["Preload"]
    assert num_preloads >= 10

"""Decoding on in the prefill layout: when the scheduler asks, what it does then, and that nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_executor import Job, ShadowExecutor
from seesaw_ds.layout import Phase
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.output import SchedulerLimits, SequenceSpec
from seesaw_ds.sched.scheduler import Scheduler
from seesaw_ds.sched.stats import TransitionReason
from seesaw_ds.sched.staying import LiveBatch
from test_scheduler_properties import check_empty, make_jobs, many

SWITCH = None
NEVER = 0


class Chooser:
    """Answers by a function of the batch, and keeps what it was asked."""

    def __init__(self, answer: Callable[[LiveBatch], int | None]) -> None:
        self._answer = answer
        self.asked: list[LiveBatch] = []

    def num_left_to_switch(self, batch: LiveBatch) -> int | None:
        self.asked.append(batch)
        return self._answer(batch)


def until(num_left: int) -> Callable[[LiveBatch], int | None]:
    """Stay until so many sequences are left."""
    return lambda batch: num_left if batch.num_sequences > num_left else SWITCH


def jobs_of(lengths: list[tuple[int, int]]) -> list[Job]:
    return [Job(SequenceSpec(i, prompt, tokens), (0,) * tokens) for i, (prompt, tokens) in enumerate(lengths)]


def run(chooser: Chooser | None, jobs: list[Job], **changes: int) -> tuple[Scheduler, ShadowExecutor]:
    sizes = {
        "block_size": 2,
        "num_gpu_blocks": 200,
        "num_host_blocks": 200,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 16,
        "prefill_stages": 2,
        "decode_stages": 1,
    }
    scheduler = Scheduler(SchedulerLimits(**(sizes | changes)), layout_chooser=chooser)
    executor = ShadowExecutor(scheduler, jobs, seed=3, stays=chooser is not None)
    executor.run()
    assert executor.finished == {job.spec.seq_id: job.expected for job in jobs}
    check_empty(scheduler)
    return scheduler, executor


ONE_BATCH = jobs_of([(4, 6 + 3 * i) for i in range(12)])
# The pools hold about four of them.
MANY_BATCHES = jobs_of([(9, 5 + i % 4) for i in range(30)])
SMALL = {"num_gpu_blocks": 24, "num_host_blocks": 24}


def test_a_chooser_that_never_stays_changes_nothing():
    for jobs, sizes in ((ONE_BATCH, {}), (MANY_BATCHES, SMALL)):
        scheduler, executor = run(Chooser(lambda _: SWITCH), jobs, **sizes)
        plain, plain_executor = run(None, jobs, **sizes)
        assert scheduler.transitions == plain.transitions
        assert executor.counts == plain_executor.counts
        assert scheduler.num_left_after_stay is None


def test_a_stay_to_the_end_makes_no_transition():
    chooser = Chooser(lambda _: NEVER)
    scheduler, executor = run(chooser, ONE_BATCH)
    assert scheduler.transitions == []
    assert scheduler.phase is Phase.PREFILL
    assert executor.counts["stay"] > 0
    assert scheduler.num_left_after_stay == 0
    assert not any(batch.num_prompts_left for batch in chooser.asked)


def test_the_layout_changes_for_the_last_sequences():
    chooser = Chooser(until(4))
    scheduler, executor = run(chooser, ONE_BATCH)
    assert scheduler.transitions == [TransitionReason.FEW_LEFT]
    assert scheduler.num_left_after_stay == 4
    assert 0 < executor.counts["stay"] < executor.counts["DecodeBatch"] + executor.counts["stay"]
    sizes = [batch.num_sequences for batch in chooser.asked]
    # Asked again whenever a quarter has ended, and when as many are left as it said.
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 4
    assert all(later >= size - -(-size // 4) for size, later in pairwise(sizes))


def test_prompts_go_on_without_a_transition_while_the_pools_are_full():
    chooser = Chooser(lambda _: NEVER)
    scheduler, executor = run(chooser, MANY_BATCHES, **SMALL)
    assert scheduler.transitions == []
    assert executor.counts["stay"] > 0
    assert chooser.asked[0].num_prompts_left > 0
    assert chooser.asked[-1].num_prompts_left == 0
    _, plain = run(None, MANY_BATCHES, **SMALL)
    assert plain.counts["SwitchPhase"] > 3


def test_a_stay_with_prompts_left_can_end():
    answers = iter([NEVER, SWITCH])
    chooser = Chooser(lambda batch: next(answers, SWITCH))
    scheduler, executor = run(chooser, MANY_BATCHES, **SMALL)
    assert executor.counts["stay"] > 0
    assert scheduler.transitions[0] is TransitionReason.HOST_FULL
    assert scheduler.transitions[-1] is TransitionReason.NO_PROMPT_LEFT


def test_the_chooser_is_told_of_every_live_sequence():
    chooser = Chooser(lambda _: SWITCH)
    run(chooser, MANY_BATCHES, **SMALL)
    batch = chooser.asked[0]
    assert batch.on_gpu
    assert batch.on_host
    for seq in batch.on_gpu + batch.on_host:
        assert seq.num_stored_tokens >= 9
        assert 1 <= seq.num_remaining_tokens < 8
    assert batch.mean_tokens == float("inf")


def test_only_mixed_steps_in_two_layouts_can_stay():
    for changes in ({"mixes_steps": False}, {"is_static": True}):
        with pytest.raises(AssertionError):
            run(Chooser(lambda _: SWITCH), ONE_BATCH, **changes)


@many
@given(st.data())
def test_every_sequence_ends_with_its_tokens_whatever_the_chooser_says(data) -> None:
    seed = data.draw(st.integers(0, 2**32))
    block_size = data.draw(st.sampled_from([1, 2, 4]))
    jobs = make_jobs(
        seed, data.draw(st.integers(1, 24)), data.draw(st.sampled_from([1, 6, 20])), data.draw(st.sampled_from([8, 24]))
    )
    peak = max(blocks_for(job.spec.num_prompt_tokens + job.spec.max_tokens - 1, block_size) for job in jobs)
    spare = st.sampled_from([0, 0, 1, 3, 10, 60])
    limits = SchedulerLimits(
        block_size=block_size,
        num_gpu_blocks=peak + data.draw(spare),
        num_host_blocks=peak + data.draw(spare),
        max_num_seqs=data.draw(st.sampled_from([1, 2, 5, 30])),
        max_num_batched_tokens=data.draw(st.sampled_from([1, 3, 8, 64])),
        prefill_stages=data.draw(st.integers(1, 3)),
        decode_stages=data.draw(st.integers(1, 3)),
    )
    choice = random.Random(seed)
    switch_rate = data.draw(st.sampled_from([0.0, 0.3, 0.8]))

    def answer(batch: LiveBatch) -> int | None:
        return SWITCH if choice.random() < switch_rate else choice.randrange(batch.num_sequences)

    expected = data.draw(st.sampled_from([None, 1, 8]))
    scheduler = Scheduler(limits, expected_output_tokens=expected, layout_chooser=Chooser(answer))
    executor = ShadowExecutor(scheduler, jobs, seed, data.draw(st.sampled_from([0.0, 0.05])), stays=True)
    executor.run()
    assert executor.finished == {
        job.spec.seq_id: job.expected for job in jobs if job.spec.seq_id not in executor.aborted
    }
    check_empty(scheduler)

"""When to leave the prefill layout: a batch's way to its end, the choice on slow and fast links, its corrections."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from plan_cases import hardware, limits_of, pair, run_config, shape
from seesaw_ds.layout import Phase
from seesaw_ds.plan.corrections import Corrections, WorkKind
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.layout_choice import LayoutChoice, choice_text
from seesaw_ds.plan.rundown import Room, refill, run_down, tokens_to_go
from seesaw_ds.plan.transfers import reshard_seconds
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.staying import LiveBatch, LiveSequence

MODEL = shape("llama2-70b")
A10 = hardware("a10")
SLOW = A10.with_all_reduce_scaled(0.1)
FAST = hardware("h200-nvlink")
PAIR = pair("P8->T8")
ROOM = Room(100_000, 256)


def live(num_gpu: int, num_host: int = 0, num_prompts_left: int = 0, tokens: int = 300) -> LiveBatch:
    """Sequences of 1000 tokens with a third to all of `tokens` to go."""
    sequences = [LiveSequence(1000, tokens * (10 + i % 21) // 30) for i in range(num_gpu + num_host)]
    return LiveBatch(tuple(sequences[:num_gpu]), tuple(sequences[num_gpu:]), math.inf, num_prompts_left)


def choice(machine: HardwareProfile, unit: int = 1, **changes) -> LayoutChoice:
    run = run_config(str(PAIR), [RequestLength(1000, 300)], 64.0, max_num_batched_tokens=512)
    limits = limits_of(run, MODEL, replace(machine, memory_bytes=max(machine.memory_bytes, A10.memory_bytes)))
    costs = {phase: CostModel(MODEL, machine, PAIR[phase], "bfloat16") for phase in Phase}
    reshard = reshard_seconds(MODEL, PAIR, machine, "bfloat16", "exchange", limits.block_size)
    return LayoutChoice(costs, reshard, limits, unit=unit, **changes)


# The way of a batch to its end


def test_a_rundown_makes_every_step_of_every_sequence():
    batch = live(200)
    spans = run_down(batch, math.inf, ROOM)
    num_steps = sum(seq.num_remaining_tokens for seq in batch.on_gpu)
    assert sum(span.num_steps * span.num_rows for span in spans) == pytest.approx(num_steps, rel=0.02)
    assert sum(span.num_steps for span in spans) == 300
    assert [span.num_left for span in spans] == sorted({span.num_left for span in spans}, reverse=True)
    assert spans[0].num_left == 200
    assert spans[0].num_gpu_tokens == 200_000
    assert len(spans) < 60


def test_those_on_the_host_come_when_there_is_room():
    spans = run_down(live(60, 300), math.inf, ROOM)
    rows = [span.num_rows for span in spans]
    assert max(rows) <= 100
    assert min(rows[: len(rows) // 2]) > 50
    assert sum(span.num_steps for span in spans) > 3 * 300
    slots = run_down(live(60, 300), math.inf, Room(10**9, 80))
    assert max(span.num_rows for span in slots) == 80
    until_empty = run_down(live(60, 300), math.inf, ROOM, is_host_enough=True)
    assert until_empty[-1].num_rows > 50


def test_stops_are_spread_over_an_exponential_distribution():
    sequences = [LiveSequence(10, 10_000)] * 400
    tokens = tokens_to_go(sequences, mean_tokens=100)
    assert sum(tokens) / 400 == pytest.approx(100, rel=0.03)
    assert max(tokens) > 500
    assert tokens_to_go([LiveSequence(10, 5)] * 4, 1000) == [5, 5, 5, 5]


def test_a_filling_is_as_many_sequences_as_the_host_holds():
    full = refill(live(50, 20, num_prompts_left=500), math.inf, ROOM)
    assert full.num_prompts == 20
    assert full.prompt_tokens == 1000
    assert full.span.num_rows == 50
    few = refill(live(50, 20, num_prompts_left=3), math.inf, ROOM)
    assert few.num_prompts == 3
    assert few.span.num_steps < full.span.num_steps


# The choice


def test_a_slow_all_reduce_keeps_a_large_batch_and_gives_the_last_ones_to_the_decode_layout():
    num_left = choice(SLOW).num_left_to_switch(live(200))
    assert num_left is not None
    assert 0 < num_left < 100
    assert choice(SLOW).num_left_to_switch(live(num_left // 2)) is None


def test_fast_links_change_at_once():
    for num_sequences in (200, 20):
        assert choice(FAST).num_left_to_switch(live(num_sequences)) is None


def test_a_few_last_tokens_are_not_worth_a_transition():
    assert choice(A10).num_left_to_switch(live(10, tokens=6)) == 0
    assert choice(A10).num_left_to_switch(live(10, tokens=3000)) is None


def test_they_are_if_the_weights_are_there():
    last = live(10, tokens=10)
    assert choice(A10).num_left_to_switch(last) == 0
    assert choice(A10).num_left_to_switch(last._replace(preloaded=1.0)) is None


def test_with_prompts_left_it_is_all_or_nothing():
    assert choice(SLOW).num_left_to_switch(live(200, 100, num_prompts_left=300)) == 0
    assert choice(A10).num_left_to_switch(live(60, 100, num_prompts_left=300)) is None


def test_units_change_no_choice():
    def in_units(batch: LiveBatch, unit: int) -> LiveBatch:
        def scaled(sequences):
            return tuple(LiveSequence(stored // unit, most // unit) for stored, most in sequences)

        return batch._replace(on_gpu=scaled(batch.on_gpu), on_host=scaled(batch.on_host))

    batch = live(200, tokens=2400)
    assert choice(SLOW, unit=8).num_left_to_switch(in_units(batch, 8)) == choice(SLOW).num_left_to_switch(batch)


def test_bundles_stand_for_all_their_sequences():
    bundles = live(32)
    batch = bundles._replace(on_gpu=tuple(seq for seq in bundles.on_gpu for _ in range(4)))
    num_left = choice(SLOW).num_left_to_switch(batch)
    assert num_left is not None
    assert 0 < num_left < 128
    assert choice(SLOW, bundle=4).num_left_to_switch(bundles) == num_left // 4
    assert choice(FAST, bundle=4).num_left_to_switch(bundles) is None


def test_choices_in_words():
    texts = [choice_text(PAIR, each) for each in (None, 0, 24)]
    assert texts == ["decode in T8", "decode on in P8", "decode in P8 until 24 sequences are left"]


# Corrections


def observe(made: LayoutChoice, kind: WorkKind, ratio: float) -> None:
    for _ in range(8):
        made.corrections.add(kind, ratio, 1.0)


def test_corrections_flip_the_choice_only_above_five_percent():
    batch = live(200)
    plain = choice(A10)
    assert plain.num_left_to_switch(batch) is None
    assert plain.take_choices() == []
    taken = {}
    for ratio in [1 + i / 50 for i in range(100)]:
        made = choice(A10)
        observe(made, WorkKind.DECODE_LAYOUT_STEP, ratio)
        observe(made, WorkKind.PREFILL_LAYOUT_STEP, 1.0)
        taken[ratio] = made.num_left_to_switch(batch)
        changes = made.take_choices()
        assert len(changes) == (taken[ratio] is not None)
        for change in changes:
            assert change.is_changed
            assert change.other is None
            assert change.taken == taken[ratio]
            assert change.taken_seconds < 0.95 * change.other_seconds
    first = next(ratio for ratio, num_left in taken.items() if num_left is not None)
    assert all((num_left is None) == (ratio < first) for ratio, num_left in taken.items())
    below = choice(A10)
    observe(below, WorkKind.DECODE_LAYOUT_STEP, first - 0.02)
    observe(below, WorkKind.PREFILL_LAYOUT_STEP, 1.0)
    # There is some gain below, too little to leave the plan.
    options = below._options(batch, batch.mean_tokens, below.corrections)
    assert 0.95 < options.seconds(options.best()) / options.seconds(None) < 1


def test_a_change_is_told_once_until_the_choice_is_another():
    made = choice(A10)
    observe(made, WorkKind.DECODE_LAYOUT_STEP, 5.0)
    observe(made, WorkKind.PREFILL_LAYOUT_STEP, 1.0)
    for num_sequences in (200, 150, 110):
        assert made.num_left_to_switch(live(num_sequences)) is not None
    assert len(made.take_choices()) == 1
    assert made.num_left_to_switch(live(1)) is None
    assert made.num_left_to_switch(live(200)) is not None
    assert len(made.take_choices()) == 1


def test_shorter_outputs_than_planned_correct_the_choice():
    batch = live(10, tokens=3000)
    made = choice(A10)
    assert made.num_left_to_switch(batch) is None
    assert made.num_left_to_switch(batch._replace(mean_tokens=1.0)) == 0
    (change,) = made.take_choices()
    assert change.is_changed
    planned = choice(A10, planned_mean_tokens=1.0)
    assert planned.num_left_to_switch(batch._replace(mean_tokens=1.0)) == 0
    (stay,) = planned.take_choices()
    assert not stay.is_changed


def test_a_factor_is_the_median_of_enough_samples():
    corrections = Corrections()
    for ratio in (50.0, 2.0, 2.1):
        corrections.add(WorkKind.DECODE_LAYOUT_STEP, ratio, 1.0)
    assert corrections.factor(WorkKind.DECODE_LAYOUT_STEP) == 1.0
    corrections.add(WorkKind.DECODE_LAYOUT_STEP, 1.9, 1.0)
    assert corrections.factor(WorkKind.DECODE_LAYOUT_STEP) == 2.0
    assert corrections.factor(WorkKind.MICRO_BATCH) == 1.0
    for _ in range(40):
        corrections.add(WorkKind.DECODE_LAYOUT_STEP, 3.0, 1.0)
    assert corrections.factor(WorkKind.DECODE_LAYOUT_STEP) == 3.0


def test_what_was_not_observed_takes_the_factor_of_its_kin():
    corrections = Corrections()
    for kind, ratio in ((WorkKind.MICRO_BATCH, 4.0), (WorkKind.TO_DECODE, 9.0)):
        for _ in range(4):
            corrections.add(kind, ratio, 1.0)
    assert corrections.factor(WorkKind.PREFILL_LAYOUT_STEP) == corrections.factor(WorkKind.DECODE_LAYOUT_STEP) == 4.0
    assert corrections.factor(WorkKind.TO_PREFILL) == 9.0
    for _ in range(4):
        corrections.add(WorkKind.PREFILL_LAYOUT_STEP, 2.0, 1.0)
    assert corrections.factor(WorkKind.DECODE_LAYOUT_STEP) == 2.0

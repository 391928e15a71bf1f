"""The scheduler's decisions, one at a time, on small hand-made cases."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import deque

import pytest

from scheduler_executor import STOP, Job, ShadowExecutor
from seesaw_ds.layout import Phase
from seesaw_ds.requests import FinishReason
from seesaw_ds.sched.decode import DecodeGroups
from seesaw_ds.sched.forecast import LengthForecast, stay_within
from seesaw_ds.sched.output import (
    Action,
    Activate,
    DecodeBatch,
    DecodeDone,
    DecodeRow,
    Event,
    Evict,
    EvictDone,
    Finished,
    PhaseSwitched,
    PrefillBatch,
    PrefillDone,
    SchedulerLimits,
    SequenceSpec,
    SwapIn,
    SwapInDone,
    SwapOutDone,
    SwitchPhase,
)
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.scheduler import Scheduler
from seesaw_ds.sched.sequence import Sequence
from seesaw_ds.sched.stats import TransitionReason

MODES = {
    "mixed": {},
    "separated": {"mixes_steps": False},
    "one layout, separated": {"mixes_steps": False, "is_static": True},
    "one phase": {"is_static": True},
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def limits(**changes: int) -> SchedulerLimits:
    sizes = {
        "block_size": 4,
        "num_gpu_blocks": 100,
        "num_host_blocks": 100,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "prefill_stages": 1,
        "decode_stages": 1,
    }
    return SchedulerLimits(**{**sizes, **changes})


def drain(scheduler: Scheduler) -> list[Action]:
    """All actions that can start now."""
    return list(iter(scheduler.schedule, None))


def answer(action: Action, token: int = 0) -> list[Event]:
    """The events that answer an action when every sampled token is `token`."""
    if isinstance(action, PrefillBatch):
        ends = [chunk for chunk in action.chunks if chunk.is_last]
        ids = [row.seq_id for row in action.rows] + [chunk.seq_id for chunk in ends]
        swap_outs = [SwapOutDone(chunk.seq_id) for chunk in ends if chunk.host_block_ids]
        return [PrefillDone(action.step_id, tuple((i, token) for i in ids)), *swap_outs]
    if isinstance(action, DecodeBatch):
        return [DecodeDone(action.step_id, tuple((row.seq_id, token) for row in action.rows))]
    if isinstance(action, SwapIn):
        return [SwapInDone(action.seq_id)]
    if isinstance(action, Evict):
        return [EvictDone(action.seq_id)]
    return [PhaseSwitched(action.to)] if isinstance(action, SwitchPhase) else []


def settle(scheduler: Scheduler, actions: list[Action], token: int = 0) -> list[Finished]:
    return [done for action in actions for event in answer(action, token) for done in scheduler.update(event)]


def start_decode(scheduler: Scheduler) -> list[Action]:
    """Prefill everything, close the input, and return the first actions of the decode phase."""
    scheduler.close_input()
    while True:
        actions = drain(scheduler)
        if any(isinstance(action, DecodeBatch) for action in actions):
            return actions
        assert actions
        settle(scheduler, actions)


def run_to_end(scheduler: Scheduler) -> list[Action]:
    """Close the input and answer everything at once until all is done; returns all actions."""
    scheduler.close_input()
    actions: list[Action] = []
    while new := drain(scheduler):
        actions += new
        settle(scheduler, new)
        scheduler.check_integrity()
    assert scheduler.is_done
    return actions


def add_all(scheduler: Scheduler, *sizes: tuple[int, int]) -> None:
    """Add sequences 0, 1, ... of (prompt tokens, max_tokens)."""
    for seq_id, (num_prompt_tokens, max_tokens) in enumerate(sizes):
        scheduler.add(SequenceSpec(seq_id, num_prompt_tokens, max_tokens))


def shapes(batch: Action) -> list[tuple[int, int, int, bool]]:
    assert isinstance(batch, PrefillBatch)
    return [(chunk.seq_id, chunk.start, chunk.num_tokens, chunk.is_last) for chunk in batch.chunks]


def num_tokens_of(batch: PrefillBatch) -> int:
    return sum(chunk.num_tokens for chunk in batch.chunks)


def goes_to_host(batches: list[Action]) -> dict[int, bool]:
    """Of each prompt that ends in `batches`, whether it goes to the host."""
    return {chunk.seq_id: bool(chunk.host_block_ids) for batch in batches for chunk in batch.chunks if chunk.is_last}


class TestAdd:
    @pytest.mark.parametrize(
        ("pool", "prompt", "max_tokens"),
        [("num_gpu_blocks", 9, 1), ("num_gpu_blocks", 8, 2), ("num_host_blocks", 1, 9)],
    )
    def test_too_large_for_a_pool(self, pool: str, prompt: int, max_tokens: int) -> None:
        scheduler = Scheduler(limits(**{pool: 2}))
        with pytest.raises(ValueError, match=rf"seq_id=7: .* need 3 blocks of 4, but {pool}=2"):
            scheduler.add(SequenceSpec(7, prompt, max_tokens))

    def test_last_token_needs_no_room(self) -> None:
        Scheduler(limits(num_gpu_blocks=2, num_host_blocks=2)).add(SequenceSpec(0, 7, 2))

    @pytest.mark.parametrize(("prompt", "max_tokens"), [(0, 5), (5, 0)])
    def test_empty(self, prompt: int, max_tokens: int) -> None:
        with pytest.raises(ValueError, match="must both be at least 1"):
            Scheduler(limits()).add(SequenceSpec(0, prompt, max_tokens))

    def test_repeated_id(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 5, 5))
        with pytest.raises(ValueError, match="seq_id=0: already scheduled"):
            scheduler.add(SequenceSpec(0, 5, 5))

    def test_after_close(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.close_input()
        with pytest.raises(RuntimeError, match="the input is closed"):
            scheduler.add(SequenceSpec(0, 5, 5))

    def test_wants_input_until_prompts_fill_the_pools_and_a_micro_batch(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=6, num_host_blocks=10, max_num_batched_tokens=8))
        num_added = 0
        while scheduler.wants_input:
            scheduler.add(SequenceSpec(num_added, 4, 2))
            num_added += 1
        assert num_added == 6 + 10 + 2
        scheduler.abort(0)
        assert scheduler.wants_input
        scheduler.close_input()
        assert not scheduler.wants_input


class TestPrefill:
    def test_short_prompts_share_a_micro_batch_and_long_ones_are_cut(self) -> None:
        scheduler = Scheduler(limits(max_num_batched_tokens=18))
        add_all(scheduler, (3, 4), (40, 4), (2, 4))
        first, second = drain(scheduler)
        assert shapes(first) == [(0, 0, 3, True), (1, 0, 15, False)]
        assert shapes(second) == [(1, 15, 18, False)]
        assert len(first.chunks[1].block_ids) == 10
        assert first.chunks[1].block_ids == second.chunks[0].block_ids
        settle(scheduler, [first])
        third = drain(scheduler)[-1]
        assert shapes(third) == [(1, 33, 7, True), (2, 0, 2, True)]
        assert third.chunks[0].block_ids == first.chunks[1].block_ids

    def test_host_blocks_are_named_with_the_last_chunk(self) -> None:
        scheduler = Scheduler(limits(max_num_batched_tokens=20, max_num_seqs=1))
        add_all(scheduler, (3, 4), (30, 4), (2, 4))
        first, second = drain(scheduler)
        assert [len(chunk.host_block_ids) for chunk in first.chunks] == [0, 0]
        assert shapes(second) == [(1, 17, 13, True), (2, 0, 2, True)]
        assert [len(chunk.host_block_ids) for chunk in second.chunks] == [8, 1]

    @pytest.mark.parametrize("num_stages", [1, 2, 4])
    def test_one_micro_batch_more_than_stages_in_flight(self, num_stages: int) -> None:
        scheduler = Scheduler(limits(prefill_stages=num_stages, max_num_batched_tokens=4))
        add_all(scheduler, *[(4, 4)] * 20)
        assert [type(action) for action in drain(scheduler)] == [PrefillBatch] * (num_stages + 1)

    def test_less_work_makes_smaller_micro_batches(self) -> None:
        def largest(num_prompts: int) -> int:
            sizes = {"num_gpu_blocks": 10**5, "num_host_blocks": 10**5, "max_num_batched_tokens": 8192}
            scheduler = Scheduler(limits(prefill_stages=2, **sizes))
            add_all(scheduler, *[(100, 4)] * num_prompts)
            return max(num_tokens_of(batch) for batch in drain(scheduler))

        assert largest(20) < 1000 < largest(200) < 8192 == largest(4000)

    def test_first_token_may_be_the_last(self) -> None:
        scheduler = Scheduler(limits(max_num_seqs=1))
        scheduler.add(SequenceSpec(0, 5, 9, stop_token_ids=frozenset({STOP})))
        scheduler.add(SequenceSpec(1, 5, 9, stop_token_ids=frozenset({STOP})))
        scheduler.close_input()
        (batch,) = drain(scheduler)
        assert goes_to_host([batch]) == {0: False, 1: True}
        done = scheduler.update(PrefillDone(batch.step_id, ((0, STOP), (1, STOP))))
        assert done == [Finished(0, FinishReason.STOP, 1), Finished(1, FinishReason.STOP, 1)]
        assert drain(scheduler) == []
        stats = scheduler.stats()
        assert (stats.num_gpu_blocks_used, stats.num_host_blocks_used) == (2, 2)  # the swap-out is under way
        scheduler.update(SwapOutDone(1))
        stats = scheduler.stats()
        assert (stats.num_gpu_blocks_used, stats.num_host_blocks_used) == (0, 0)
        assert scheduler.is_done
        assert scheduler.transitions == []

    @each_mode
    def test_prompts_of_one_token_take_neither_slot_nor_host_blocks(self, mode: dict[str, bool]) -> None:
        scheduler = Scheduler(limits(max_num_seqs=1, **mode))
        add_all(scheduler, (4, 9), *[(5, 1)] * 6)
        (batch,) = drain(scheduler)
        assert goes_to_host([batch]) == dict.fromkeys(range(7), False)
        assert scheduler.stats().num_host_blocks_used == 0
        finished = settle(scheduler, [batch])
        assert finished == [Finished(seq_id, FinishReason.LENGTH, 1) for seq_id in range(1, 7)]
        assert scheduler.stats().num_gpu_blocks_used == 1
        activated = [action.seq_id for action in drain(scheduler) if isinstance(action, Activate)]
        assert activated == [0]


class TestDestination:
    """Whether a prompt's KV stays on the GPU or goes on to the host."""

    def test_residents_leave_room_to_grow_and_a_transit_margin(self) -> None:
        """Half of 16 blocks is for transit; of the rest each resident wants its own and one more."""
        scheduler = Scheduler(limits(num_gpu_blocks=16))
        add_all(scheduler, *[(4, 2)] * 7)
        assert goes_to_host(drain(scheduler)) == {0: False, 1: False, 2: False, 3: False, 4: True, 5: True, 6: False}

    @pytest.mark.parametrize(("num_stages", "num_staying"), [(1, 15), (2, 14), (4, 12)])
    def test_margin_is_for_a_full_pipeline_and_two_prompts(self, num_stages: int, num_staying: int) -> None:
        """Of 40 blocks, (stages + 3) micro-batches of 2 blocks and two prompts of 1; a resident wants 2."""
        scheduler = Scheduler(
            limits(
                num_gpu_blocks=40,
                max_num_seqs=40,
                max_num_batched_tokens=8,
                prefill_stages=num_stages,
                mixes_steps=False,
            )
        )
        add_all(scheduler, *[(4, 2)] * 60)
        destinations: dict[int, bool] = {}
        while batches := [action for action in drain(scheduler) if isinstance(action, PrefillBatch)]:
            destinations |= goes_to_host(batches)
            settle(scheduler, batches)
        assert destinations == {seq_id: seq_id >= num_staying for seq_id in range(59)} | {59: False}

    def test_a_lone_resident_needs_no_margin(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=6, num_host_blocks=6))
        add_all(scheduler, (4, 20), (4, 20), (4, 20))
        assert goes_to_host(drain(scheduler)) == {0: False, 1: True, 2: True}

    def test_waits_for_swap_outs_when_the_transit_share_is_used(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=8, max_num_seqs=1))
        add_all(scheduler, *[(4, 4)] * 7)
        (batch,) = drain(scheduler)
        assert goes_to_host([batch]) == {0: False, 1: True, 2: True, 3: True, 4: True}
        scheduler.update(PrefillDone(batch.step_id, tuple((seq_id, 0) for seq_id in range(5))))
        assert [type(action) for action in drain(scheduler)] == [Activate]
        scheduler.update(SwapOutDone(1))
        (batch,) = drain(scheduler)
        assert goes_to_host([batch]) == {5: True}

    def test_one_phase_spills_nothing_while_input_is_open_and_never_switches(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=12, prefill_stages=2, decode_stages=2, is_static=True))
        add_all(scheduler, *[(6, 1 + seq_id % 9) for seq_id in range(40)])
        kinds = set()
        while actions := drain(scheduler):
            kinds |= {type(action) for action in actions}
            settle(scheduler, actions)
        assert kinds == {PrefillBatch, Activate, DecodeBatch}
        assert (scheduler.phase, scheduler.transitions) == (Phase.PREFILL, [])
        assert scheduler.stats().num_finished == 40

    def test_one_phase_spills_the_last_prompts_once_the_host_has_room_for_all_of_them(self) -> None:
        sizes = {"num_gpu_blocks": 24, "num_host_blocks": 12, "max_num_batched_tokens": 8, "is_static": True}
        scheduler = Scheduler(limits(**sizes))
        add_all(scheduler, *[(8, 33)] * 12)
        actions = run_to_end(scheduler)
        batches = [action for action in actions if isinstance(action, PrefillBatch)]
        spilled = [seq_id for seq_id, leaves in goes_to_host(batches).items() if leaves]
        assert spilled
        assert min(spilled) >= 12 - 12 // 2, "two blocks a prompt: six prompts fit the host"
        assert SwapIn in {type(action) for action in actions}
        assert scheduler.transitions == []

    def test_one_phase_brings_back_the_evicted_before_new_prompts(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=6, max_num_seqs=2, is_static=True), expected_output_tokens=1)
        add_all(scheduler, (4, 17), (4, 17), (4, 2))
        actions = []
        while new := drain(scheduler):
            actions += new
            settle(scheduler, new)
        order = [type(a) for a in actions if isinstance(a, PrefillBatch | Evict | SwapIn)]
        assert order == [PrefillBatch, Evict, SwapIn, PrefillBatch]

    def test_one_phase_takes_as_many_prompts_of_one_token_as_otherwise(self) -> None:
        first = [Scheduler(limits(num_gpu_blocks=20, **MODES[mode])) for mode in ("mixed", "one phase")]
        for scheduler in first:
            add_all(scheduler, *[(4, 1)] * 30)
        mixed, one_phase = (drain(scheduler) for scheduler in first)
        assert mixed == one_phase
        assert [len(batch.chunks) for batch in mixed] == [10]


class TestRiding:
    """Decode rows in prefill micro-batches."""

    def start(self, num_prompts: int, **changes: int) -> tuple[Scheduler, list[PrefillBatch]]:
        """Sequences of one prompt token with much to decode, then one with a long prompt; what is in flight."""
        scheduler = Scheduler(limits(num_gpu_blocks=2000, num_host_blocks=2000, max_num_seqs=200, **changes))
        add_all(scheduler, *[(1, 40)] * num_prompts, (400, 40))
        return scheduler, [action for action in drain(scheduler) if isinstance(action, PrefillBatch)]

    def follow(self, scheduler: Scheduler, in_flight: list[PrefillBatch], num_batches: int) -> list[PrefillBatch]:
        """Answer micro-batches one by one and return the next ones."""
        batches: list[PrefillBatch] = []
        while len(batches) < num_batches:
            settle(scheduler, [in_flight.pop(0)])
            new = [action for action in drain(scheduler) if isinstance(action, PrefillBatch)]
            batches += new
            in_flight += new
        return batches

    @pytest.mark.parametrize("num_stages", [1, 2, 3])
    def test_groups_take_turns(self, num_stages: int) -> None:
        scheduler, in_flight = self.start(6, prefill_stages=num_stages, max_num_batched_tokens=12)
        batches = [*in_flight, *self.follow(scheduler, in_flight, 12)]
        assert [batch.group for batch in batches] == [step % num_stages for step in range(len(batches))]
        rows = {seq_id: [] for seq_id in range(6)}
        for batch in batches[num_stages + 1 :]:
            assert len(batch.rows) == 6 // num_stages
            for row in batch.rows:
                rows[row.seq_id].append((batch.group, row.position))
        for steps in rows.values():
            assert len({group for group, _ in steps}) == 1
            assert [position for _, position in steps] == list(range(1, 1 + len(steps)))

    def test_rows_count_in_the_token_budget(self) -> None:
        scheduler, in_flight = self.start(6, prefill_stages=2, max_num_batched_tokens=12)
        for batch in self.follow(scheduler, in_flight, 8):
            assert (len(batch.rows), num_tokens_of(batch)) == (3, 9)

    @pytest.mark.parametrize(("num_rows", "num_prompt_tokens"), [(11, 5), (13, 3), (14, 2), (15, 2), (30, 2)])
    def test_prompts_keep_an_eighth_of_the_tokens(self, num_rows: int, num_prompt_tokens: int) -> None:
        scheduler, in_flight = self.start(num_rows, max_num_batched_tokens=16)
        batch = self.follow(scheduler, in_flight, 6)[-1]
        assert (len(batch.rows), num_tokens_of(batch)) == (num_rows, num_prompt_tokens)

    def test_prompts_keep_an_eighth_of_the_cost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A phase with little work has small micro-batches, here of sqrt(520 x 4) = 45 tokens; rows are 60."""
        monkeypatch.setattr("seesaw_ds.sched.prefill.MICRO_BATCH_OVERHEAD_TOKENS", 4)
        scheduler, in_flight = self.start(120, prefill_stages=2)
        batch = self.follow(scheduler, in_flight, 6)[-1]
        assert (len(batch.rows), num_tokens_of(batch)) == (60, 5)

    def test_activate_precedes_the_first_row(self) -> None:
        scheduler, in_flight = self.start(3, max_num_batched_tokens=12)
        settle(scheduler, in_flight[:1])
        actions = drain(scheduler)
        assert [type(action) for action in actions] == [Activate] * 3 + [PrefillBatch]
        activated = {action.seq_id: action for action in actions[:3]}
        for row, chunk in zip(actions[3].rows, in_flight[0].chunks[:3], strict=True):
            activate = activated[row.seq_id]
            assert (activate.slot, activate.num_tokens, activate.gpu_block_ids) == (row.slot, 1, chunk.block_ids)
            assert row.position == 1

    def test_one_phase_issues_no_decode_step_into_a_full_pipeline(self) -> None:
        scheduler, in_flight = self.start(6, prefill_stages=2, max_num_batched_tokens=12, is_static=True)
        for _ in range(8):
            settle(scheduler, [in_flight.pop(0)])
            in_flight += [action for action in drain(scheduler) if not isinstance(action, Activate)]
            assert [type(action) for action in in_flight] == [PrefillBatch] * 3

    def test_nobody_rides_when_steps_are_not_mixed(self) -> None:
        scheduler, in_flight = self.start(6, max_num_batched_tokens=12, mixes_steps=False)
        assert not any(batch.rows for batch in self.follow(scheduler, in_flight, 8))

    def test_evictions_in_a_prefill_phase(self) -> None:
        """Residents outgrow the GPU while prompts go on coming: the newest is evicted to the host beside them."""
        scheduler = Scheduler(
            limits(num_gpu_blocks=12, max_num_batched_tokens=4, max_num_seqs=3), expected_output_tokens=1
        )
        add_all(scheduler, *[(4, 40)] * 3, *[(4, 2)] * 60)
        scheduler.close_input()
        evicted: list[int] = []
        while not scheduler.transitions and not scheduler.is_done:
            actions = drain(scheduler)
            evicted += [action.seq_id for action in actions if isinstance(action, Evict)]
            settle(scheduler, actions)
            scheduler.check_integrity()
        assert evicted
        run_to_end(scheduler)
        assert scheduler.stats().num_finished == 63


class TestStopRule:
    def append_all(self, spec: SequenceSpec, tokens: list[int]) -> list[FinishReason | None]:
        seq = Sequence(spec, order=0, block_size=4)
        return [seq.append(token) for token in tokens]

    def test_stop_token(self) -> None:
        spec = SequenceSpec(0, 1, 5, stop_token_ids=frozenset({7, 8}))
        assert self.append_all(spec, [0, 8]) == [None, FinishReason.STOP]

    def test_not_before_min_tokens(self) -> None:
        spec = SequenceSpec(0, 1, 5, min_tokens=2, stop_token_ids=frozenset({7}))
        assert self.append_all(spec, [7, 7, 7]) == [None, None, FinishReason.STOP]

    def test_stop_token_at_max_tokens_counts_as_stop(self) -> None:
        spec = SequenceSpec(0, 1, 2, stop_token_ids=frozenset({7}))
        assert self.append_all(spec, [0, 7]) == [None, FinishReason.STOP]
        assert self.append_all(spec, [0, 0]) == [None, FinishReason.LENGTH]


class TestDecode:
    def test_two_steps_ahead_with_positions_and_new_blocks(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 7, 4))
        first, second = start_decode(scheduler)
        assert first.rows == (DecodeRow(0, 0, 7),)
        (row,) = second.rows
        assert (row.position, len(row.new_block_ids)) == (8, 1)
        assert settle(scheduler, [first]) == []
        (third,) = drain(scheduler)
        assert third.rows[0].position == 9
        assert settle(scheduler, [second, third]) == [Finished(0, FinishReason.LENGTH, 4)]
        assert scheduler.is_done

    def test_late_stop_frees_blocks_after_the_step_in_flight(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 7, 9, stop_token_ids=frozenset({STOP})))
        first, second = start_decode(scheduler)
        assert settle(scheduler, [first], STOP) == [Finished(0, FinishReason.STOP, 2)]
        assert drain(scheduler) == []
        assert scheduler.stats().num_gpu_blocks_used == 3
        assert not scheduler.is_done
        assert settle(scheduler, [second], STOP) == []
        assert scheduler.stats().num_gpu_blocks_used == 0
        assert scheduler.is_done

    @pytest.mark.parametrize("num_stages", [1, 2, 3])
    def test_groups_take_turns_and_are_of_equal_size(self, num_stages: int) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=1000, decode_stages=num_stages))
        add_all(scheduler, *[(4, 40)] * 7)
        settle(scheduler, [a for a in start_decode(scheduler) if isinstance(a, DecodeBatch)])
        batches = drain(scheduler)
        assert [batch.group for batch in batches] == [*range(num_stages)] * 2
        sizes = [len(batch.rows) for batch in batches[:num_stages]]
        assert sum(sizes) == 7
        assert max(sizes) - min(sizes) <= 1
        settle(scheduler, batches[:1])
        assert [batch.group for batch in drain(scheduler)] == [0]

    def test_groups_are_evened_out_when_sequences_end(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=1000, decode_stages=2))
        add_all(scheduler, *[(4, 4), (4, 60)] * 4)
        actions = start_decode(scheduler)
        for _ in range(8):
            settle(scheduler, actions)
            actions = drain(scheduler)
        assert [len(batch.rows) for batch in actions] == [2, 2, 2, 2]

    @pytest.mark.parametrize(("prefill_stages", "decode_stages"), [(1, 3), (3, 1), (2, 3), (3, 2)])
    def test_regrouped_at_a_switch(self, prefill_stages: int, decode_stages: int) -> None:
        """Rows of the micro-batches in flight at the switch step again at once, in their new groups."""
        scheduler = Scheduler(
            limits(
                num_gpu_blocks=1000,
                max_num_batched_tokens=12,
                prefill_stages=prefill_stages,
                decode_stages=decode_stages,
            )
        )
        add_all(scheduler, *[(1, 40)] * 6, (70, 40))
        scheduler.close_input()
        in_flight: list[Action] = []
        while not scheduler.transitions:
            in_flight += [action for action in drain(scheduler) if not isinstance(action, Activate)]
            if not scheduler.transitions:
                settle(scheduler, [in_flight.pop(0)])
        switch = in_flight.pop()
        assert isinstance(switch, SwitchPhase)
        last_position = {row.seq_id: row.position for batch in in_flight for row in batch.rows}
        assert last_position
        settle(scheduler, [switch])
        steps = drain(scheduler)[:decode_stages]
        assert [step.group for step in steps] == [*range(decode_stages)]
        sizes = [len(step.rows) for step in steps]
        assert sum(sizes) == 6
        assert max(sizes) - min(sizes) <= 1
        for row in (row for step in steps for row in step.rows if row.seq_id in last_position):
            assert row.position == last_position[row.seq_id] + 1


class TestTransitions:
    def test_to_decode_when_nothing_has_room_and_back_when_the_host_is_empty(self) -> None:
        scheduler = Scheduler(limits(num_host_blocks=6, num_gpu_blocks=4, max_num_seqs=2))
        add_all(scheduler, *[(4, 4)] * 20)
        prefilled: list[list[int]] = [[]]
        for action in run_to_end(scheduler):
            if isinstance(action, PrefillBatch):
                prefilled[-1] += [chunk.seq_id for chunk in action.chunks]
            elif isinstance(action, SwitchPhase) and action.to is Phase.PREFILL:
                prefilled.append([])
        assert [seq_id for phase in prefilled for seq_id in phase] == list(range(20))
        reasons = scheduler.transitions
        assert reasons[::2] == [TransitionReason.HOST_FULL] * (len(prefilled) - 1) + [TransitionReason.NO_PROMPT_LEFT]
        assert reasons[1::2] == [TransitionReason.HOST_EMPTY] * (len(prefilled) - 1)
        assert 3 <= len(prefilled) <= 5

    def test_host_full_only_when_nothing_is_in_flight(self) -> None:
        """Each event may make room for the next prompt; with the last one answered it has made none."""
        scheduler = Scheduler(limits(num_gpu_blocks=8, num_host_blocks=3, max_num_seqs=1, max_num_batched_tokens=8))
        add_all(scheduler, *[(4, 4)] * 6)
        first, second = drain(scheduler)
        assert goes_to_host([first, second]) == {0: False, 1: True, 2: True, 3: True}
        gpu_blocks = first.chunks[0].block_ids
        events = [answered for batch in (first, second) for answered in answer(batch)]
        for event in events[:-1]:
            scheduler.update(event)
            assert all(isinstance(action, Activate) for action in drain(scheduler))
        assert scheduler.update(events[-1]) == []
        assert drain(scheduler) == [SwitchPhase(Phase.DECODE, gpu_blocks)]
        assert scheduler.transitions == [TransitionReason.HOST_FULL]

    def test_waits_for_rows_in_flight_that_may_end(self) -> None:
        """The row that rides in the last micro-batch is its sequence's last: it makes room for one prompt more."""
        scheduler = Scheduler(limits(num_gpu_blocks=8, num_host_blocks=2, max_num_seqs=1, max_num_batched_tokens=4))
        add_all(scheduler, (4, 2), (4, 4), (3, 4), (4, 4), (4, 4))
        first, second = drain(scheduler)
        settle(scheduler, [first])
        activate, third = drain(scheduler)
        assert isinstance(activate, Activate)
        assert [row.seq_id for row in third.rows] == [0]
        settle(scheduler, [second])
        assert drain(scheduler) == []
        assert settle(scheduler, [third]) == [Finished(0, FinishReason.LENGTH, 2)]
        swap_in, *_ = drain(scheduler)
        assert isinstance(swap_in, SwapIn)
        assert scheduler.transitions == []

    def test_waits_for_a_swap_in_that_frees_host_room(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=8, num_host_blocks=1, max_num_seqs=1))
        add_all(scheduler, (3, 2), (3, 2), (3, 2))
        scheduler.close_input()
        (batch,) = drain(scheduler)
        assert goes_to_host([batch]) == {0: False, 1: True}
        scheduler.abort(0)
        settle(scheduler, [batch])
        (swap_in,) = drain(scheduler)
        assert (type(swap_in), swap_in.seq_id) == (SwapIn, 1)
        scheduler.update(SwapInDone(1))
        batch, switch = drain(scheduler)
        assert goes_to_host([batch]) == {2: True}
        assert shapes(batch) == [(2, 0, 3, True)]
        assert [row.seq_id for row in batch.rows] == [1]
        assert switch == SwitchPhase(Phase.DECODE)  # sequence 1 needs its blocks no more
        assert scheduler.transitions == [TransitionReason.NO_PROMPT_LEFT]

    def test_open_input_is_waited_for(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 4, 4))
        settle(scheduler, drain(scheduler))
        (activate,) = drain(scheduler)
        assert isinstance(activate, Activate)
        assert scheduler.wants_input
        scheduler.close_input()
        assert drain(scheduler) == [SwitchPhase(Phase.DECODE, activate.gpu_block_ids)]
        assert scheduler.transitions == [TransitionReason.NO_PROMPT_LEFT]

    def test_no_compute_between_switch_and_answer(self) -> None:
        scheduler = Scheduler(limits())
        add_all(scheduler, *[(4, 4)] * 2)
        scheduler.close_input()
        settle(scheduler, drain(scheduler))
        *_, switch = drain(scheduler)
        assert drain(scheduler) == []
        scheduler.update(PhaseSwitched(switch.to))
        assert [type(action) for action in drain(scheduler)] == [DecodeBatch, DecodeBatch]

    def test_a_prompt_that_ends_after_the_switch_is_activated_before_the_answer(self) -> None:
        scheduler = Scheduler(limits())
        add_all(scheduler, (40, 4), (40, 4))
        scheduler.close_input()
        first, second = drain(scheduler)
        settle(scheduler, [first])
        activate, switch = drain(scheduler)
        assert (type(activate), type(switch)) == (Activate, SwitchPhase)
        settle(scheduler, [second])
        (activate,) = drain(scheduler)
        assert (type(activate), activate.seq_id) == (Activate, 1)
        settle(scheduler, [switch])
        assert {row.seq_id for row in drain(scheduler)[0].rows} == {0, 1}

    @pytest.mark.parametrize("is_static", [False, True])
    def test_switch_names_the_blocks_still_needed(self, is_static: bool) -> None:
        """Not those of a prompt on its way to the host, nor of a row that is its sequence's last; none if static."""
        changed = {"mixes_steps": not is_static, "is_static": is_static}
        scheduler = Scheduler(limits(max_num_seqs=3, max_num_batched_tokens=8, **changed))
        add_all(scheduler, (4, 2), (4, 9), (8, 9), (4, 9))
        scheduler.close_input()
        first, second = drain(scheduler)
        settle(scheduler, [first])
        *_, third, switch = drain(scheduler)
        assert goes_to_host([first, second, third]) == {0: False, 1: False, 2: False, 3: True}
        assert isinstance(switch, SwitchPhase)
        table = {chunk.seq_id: chunk.block_ids for batch in (first, second) for chunk in batch.chunks}
        assert [row.seq_id for row in third.rows] == ([] if is_static else [0, 1])
        grown = tuple(block_id for row in third.rows for block_id in row.new_block_ids if row.seq_id == 1)
        needed = () if is_static else table[1] + grown + table[2]
        assert (len(grown), sorted(switch.gpu_block_ids)) == (int(not is_static), sorted(needed))

    def test_prompts_of_one_token_never_leave_prefill(self) -> None:
        scheduler = Scheduler(limits(num_host_blocks=3, num_gpu_blocks=3))
        jobs = [Job(SequenceSpec(seq_id, 7, 1), (0,)) for seq_id in range(20)]
        executor = ShadowExecutor(scheduler, jobs, seed=0)
        executor.run()
        assert len(executor.finished) == 20
        assert scheduler.transitions == []


class TestEviction:
    def two_sequences(self) -> tuple[Scheduler, list[Action]]:
        """Two sequences of 1 block that want 5 each, on a GPU of 6, believed to end at once."""
        scheduler = Scheduler(limits(num_gpu_blocks=6, num_host_blocks=20), expected_output_tokens=1)
        scheduler.add(SequenceSpec(0, 4, 17))
        scheduler.add(SequenceSpec(1, 4, 17))
        return scheduler, start_decode(scheduler)

    def test_the_newest_goes_to_the_host_and_comes_back(self) -> None:
        scheduler, actions = self.two_sequences()
        order: list[tuple[str, int]] = []
        finished: list[Finished] = []
        while not scheduler.is_done:
            order += [(type(a).__name__, a.seq_id) for a in actions if isinstance(a, Evict | SwapIn)]
            finished += settle(scheduler, actions)
            scheduler.check_integrity()
            actions = drain(scheduler)
        assert order == [("Evict", 1), ("SwapIn", 1)]
        assert [done.seq_id for done in finished] == [0, 1]
        assert {done.num_output_tokens for done in finished} == {17}
        assert scheduler.stats().num_evictions == 1

    def test_resumes_at_the_position_where_it_stopped(self) -> None:
        scheduler, actions = self.two_sequences()
        positions = []
        while not scheduler.is_done:
            rows = [row for action in actions if isinstance(action, DecodeBatch) for row in action.rows]
            positions += [row.position for row in rows if row.seq_id == 1]
            settle(scheduler, actions)
            actions = drain(scheduler)
        assert positions == list(range(4, 20))

    def test_nobody_is_evicted_while_the_forecast_holds(self) -> None:
        scheduler = Scheduler(limits(num_gpu_blocks=6, num_host_blocks=20))
        jobs = [Job(SequenceSpec(seq_id, 4, 17), (0,) * 17) for seq_id in range(6)]
        ShadowExecutor(scheduler, jobs, seed=0).run()
        assert scheduler.stats().num_evictions == 0


def test_a_group_that_joins_late_steps_in_turn_with_one_that_is_ahead() -> None:
    sizes = limits(prefill_stages=2)
    pools = KvPools(sizes)
    groups = DecodeGroups(sizes, pools)

    def join(seq_id: int) -> None:
        seq = Sequence(SequenceSpec(seq_id, 4, 9), seq_id, block_size=4)
        pools.admit(seq, stays=True)
        seq.num_issued_tokens = seq.num_output_tokens = 1
        groups.join(seq)

    def answer_step(step_id: int) -> None:
        for seq in groups.finish_batch(step_id):
            seq.in_flight -= 1
            seq.append(0)

    steps: list[int] = []

    def issue() -> None:
        while (batch := groups.next_batch(len(steps))) is not None:
            steps.append(batch.group)

    join(0)
    issue()
    assert steps == [0, 0]
    join(1)
    issue()
    assert steps == [0, 0, 1]
    for step_id in range(4):
        answer_step(step_id)
        issue()
    assert steps == [0, 0, 1, 0, 1, 0, 1, 0]


class TestVictims:
    """Who gives way on a full GPU; each sequence holds whole blocks of 4 tokens and wants one more."""

    def build(self, sizes: list[int], **changes: int) -> tuple[KvPools, DecodeGroups, list[Sequence]]:
        sizes_limits = limits(**{"num_gpu_blocks": sum(sizes), **changes})
        pools = KvPools(sizes_limits)
        groups = DecodeGroups(sizes_limits, pools)
        sequences = []
        for order, size in enumerate(sizes):
            seq = Sequence(SequenceSpec(order, 4 * size, 9), order, block_size=4)
            pools.admit(seq, stays=True)
            seq.num_issued_tokens = seq.num_output_tokens = 1
            groups.join(seq)
            sequences.append(seq)
        return pools, groups, sequences

    def victims(self, groups: DecodeGroups) -> list[int]:
        assert groups.next_batch(0) is None
        return [seq.seq_id for seq in iter(groups.pop_victim, None)]

    def test_the_newest_even_if_it_lacks_a_block_itself(self) -> None:
        _, groups, _ = self.build([2, 2, 2])
        assert self.victims(groups) == [2]

    def test_as_many_as_the_rows_lack(self) -> None:
        _, groups, _ = self.build([1, 1, 1, 1, 1])
        assert self.victims(groups) == [4, 3, 2]

    def test_never_the_designated(self) -> None:
        pools, groups, _ = self.build([3, 3], num_host_blocks=5)
        pools.reserve.designate(1)
        assert self.victims(groups) == [0]

    def test_none_while_a_sequence_in_its_last_step_will_free_enough(self) -> None:
        _, groups, sequences = self.build([3, 1, 1])
        sequences[0].num_issued_tokens = sequences[0].spec.max_tokens
        assert self.victims(groups) == []

    def test_spared_at_a_switch(self) -> None:
        _, groups, sequences = self.build([2, 2, 2])
        assert groups.next_batch(0) is None
        groups.start_phase(2)
        assert groups.pop_victim() is None
        assert sequences[2] in groups.members()

    def test_only_as_many_as_the_host_takes(self) -> None:
        pools, groups, _ = self.build([3, 3, 3, 1, 1, 1, 1], num_host_blocks=40)
        pools.host.allocate(pools.host.num_free - 1)
        assert self.victims(groups) == [6]


class TestAbort:
    @each_mode
    def test_in_every_state(self, mode: dict[str, bool]) -> None:
        """Abort after each number of events; what is left of the run must free everything."""
        for num_events in range(60):
            scheduler = Scheduler(limits(num_gpu_blocks=6, num_host_blocks=6, **mode), expected_output_tokens=1)
            for seq_id in range(3):
                scheduler.add(SequenceSpec(seq_id, 9, 8))
            scheduler.close_input()
            events: deque[Event] = deque()
            finished: list[Finished] = []
            for step in range(1000):
                if step == num_events:
                    scheduler.abort(1)
                    scheduler.abort(99)
                events += [event for action in drain(scheduler) for event in answer(action)]
                if not events:
                    break
                finished += scheduler.update(events.popleft())
                scheduler.check_integrity()
            assert scheduler.is_done
            assert {done.seq_id for done in finished} - {1} == {0, 2}
            assert scheduler.stats().num_gpu_blocks_used == scheduler.stats().num_host_blocks_used == 0

    def test_waiting_sequence_never_starts(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 4, 4))
        scheduler.abort(0)
        scheduler.close_input()
        assert drain(scheduler) == []
        assert scheduler.is_done


class TestForecast:
    def expect_peak(self, num_blocks: int, residents: list[tuple[int, int, int]], mean_tokens: float) -> None:
        assert stay_within(num_blocks, residents, 4, mean_tokens)
        assert not stay_within(num_blocks - 1, residents, 4, mean_tokens)

    def test_expected_peak_when_nobody_stops_early(self) -> None:
        residents = [(8, 3, 2), (20, 3, 5)]
        self.expect_peak(10, residents, float("inf"))  # both, just before the second ends
        self.expect_peak(8, residents[1:], float("inf"))
        self.expect_peak(7, [(20, 3, 4)], float("inf"))
        assert stay_within(0, [], 4, float("inf"))

    def test_expected_peak_is_now_when_most_stop_soon(self) -> None:
        residents = [(2000, 30, 500)] * 10
        self.expect_peak(300, residents, mean_tokens=50)
        assert not stay_within(300, residents, 4, mean_tokens=500)
        assert stay_within(2000, residents, 4, mean_tokens=500)

    def test_mean_is_tokens_per_stopped_sequence(self) -> None:
        forecast = LengthForecast(None)
        forecast.add_tokens(30)
        assert forecast.mean_tokens == float("inf")
        forecast.add_stopped()
        forecast.add_stopped()
        assert forecast.mean_tokens == 15
        assert LengthForecast(200).mean_tokens == 200

    def test_guess_below_one(self) -> None:
        with pytest.raises(ValueError, match="expected_output_tokens=0: must be at least 1"):
            Scheduler(limits(), expected_output_tokens=0)


def test_stats_count_every_live_sequence_once() -> None:
    scheduler = Scheduler(limits(num_gpu_blocks=10, num_host_blocks=10, prefill_stages=2, max_num_batched_tokens=8))
    for seq_id in range(20):
        scheduler.add(SequenceSpec(seq_id, 8, 8))
    scheduler.close_input()
    events: deque[Event] = deque()
    aborted_or_done = 0
    while not scheduler.is_done:
        events += [event for action in drain(scheduler) for event in answer(action)]
        aborted_or_done += len(scheduler.update(events.popleft()))
        stats = scheduler.stats()
        live = stats.num_waiting + stats.num_prefilling + stats.num_host + stats.num_running
        assert live + stats.num_finished == 20
        assert stats.num_finished == aborted_or_done
    assert stats.num_transitions == len(scheduler.transitions) >= 3


def test_equal_calls_give_equal_actions() -> None:
    def trace() -> list[Action]:
        scheduler = Scheduler(limits(num_gpu_blocks=12, num_host_blocks=12, decode_stages=2))
        rng = random.Random(3)
        for seq_id in range(20):
            scheduler.add(SequenceSpec(seq_id, rng.randint(1, 12), rng.randint(1, 12)))
        scheduler.close_input()
        actions: list[Action] = []
        while new := drain(scheduler):
            actions += new
            settle(scheduler, new)
        assert scheduler.is_done
        return actions

    assert trace() == trace()


@pytest.mark.parametrize(("num_host_blocks", "num_transitions"), [(10_000, 9), (100_000, 3)])
def test_thousands_of_sequences(num_host_blocks: int, num_transitions: int) -> None:
    scheduler = Scheduler(
        SchedulerLimits(
            block_size=16,
            num_gpu_blocks=8000,
            num_host_blocks=num_host_blocks,
            max_num_seqs=512,
            max_num_batched_tokens=8192,
            prefill_stages=2,
            decode_stages=2,
        )
    )
    rng = random.Random(0)
    specs = [SequenceSpec(seq_id, rng.randint(8, 800), rng.randint(1, 200)) for seq_id in range(1500)]
    for spec in specs:
        scheduler.add(spec)
    scheduler.close_input()
    finished: dict[int, int] = {}
    while actions := drain(scheduler):
        finished |= {done.seq_id: done.num_output_tokens for done in settle(scheduler, actions)}
    assert scheduler.is_done
    assert finished == {spec.seq_id: spec.max_tokens for spec in specs}
    assert len(scheduler.transitions) <= num_transitions
    scheduler.check_integrity()


def test_imports_no_framework() -> None:
    """The simulator and these tests run the scheduler where torch, DeepSpeed and Megatron-core are absent."""
    code = (
        "import pkgutil, sys, importlib, seesaw_ds.sched as sched\n"
        "names = [m.name for m in pkgutil.iter_modules(sched.__path__, 'seesaw_ds.sched.')]\n"
        "assert 'seesaw_ds.sched.scheduler' in names\n"
        "for name in names: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'deepspeed', 'megatron', 'numpy', 'transformers') if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

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
from seesaw_ds.sched.forecast import LengthForecast, Resident, expected_peak
from seesaw_ds.sched.output import (
    Action,
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


def limits(**changes: int) -> SchedulerLimits:
    sizes = {
        "block_size": 4,
        "num_prefill_blocks": 100,
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
        ids = [chunk.seq_id for chunk in action.chunks if chunk.is_last]
        return [PrefillDone(action.step_id, tuple((i, token) for i in ids)), *(SwapOutDone(i) for i in ids)]
    if isinstance(action, DecodeBatch):
        return [DecodeDone(action.step_id, tuple((row.seq_id, token) for row in action.rows))]
    if isinstance(action, SwapIn):
        return [SwapInDone(action.seq_id)]
    if isinstance(action, Evict):
        return [EvictDone(action.seq_id)]
    return [PhaseSwitched(action.to)]


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


class TestAdd:
    @pytest.mark.parametrize(
        ("pool", "prompt", "max_tokens"),
        [("num_prefill_blocks", 9, 1), ("num_gpu_blocks", 8, 2), ("num_host_blocks", 1, 9)],
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

    def test_wants_input_until_prompts_fill_the_host(self) -> None:
        scheduler = Scheduler(limits(num_host_blocks=10, max_num_batched_tokens=8))
        num_added = 0
        while scheduler.wants_input:
            scheduler.add(SequenceSpec(num_added, 4, 2))
            num_added += 1
        assert num_added == 12
        scheduler.abort(0)
        assert scheduler.wants_input
        scheduler.close_input()
        assert not scheduler.wants_input


class TestPrefill:
    def test_short_prompts_share_a_micro_batch_and_long_ones_are_cut_at_blocks(self) -> None:
        scheduler = Scheduler(limits(max_num_batched_tokens=18))
        for seq_id, prompt in enumerate((3, 30, 2)):
            scheduler.add(SequenceSpec(seq_id, prompt, 4))
        first, second = drain(scheduler)
        shapes = [[(c.seq_id, c.start, c.num_tokens, c.is_last) for c in b.chunks] for b in (first, second)]
        assert shapes == [[(0, 0, 3, True), (1, 0, 12, False)], [(1, 12, 16, False)]]
        assert len(first.chunks[0].host_block_ids) == 1
        assert first.chunks[1].host_block_ids == ()
        assert first.chunks[1].block_ids == second.chunks[0].block_ids
        settle(scheduler, [first])
        (third,) = (action for action in drain(scheduler) if isinstance(action, PrefillBatch))
        assert [(c.seq_id, c.start, c.num_tokens, c.is_last) for c in third.chunks] == [
            (1, 28, 2, True),
            (2, 0, 2, True),
        ]
        assert third.chunks[0].block_ids == first.chunks[1].block_ids
        assert len(third.chunks[0].host_block_ids) == 8

    @pytest.mark.parametrize("num_stages", [1, 2, 4])
    def test_one_micro_batch_more_than_stages_in_flight(self, num_stages: int) -> None:
        scheduler = Scheduler(limits(prefill_stages=num_stages, max_num_batched_tokens=4))
        for seq_id in range(20):
            scheduler.add(SequenceSpec(seq_id, 4, 4))
        assert len(drain(scheduler)) == num_stages + 1

    def test_waits_for_swap_outs_when_the_prefill_pool_is_full(self) -> None:
        scheduler = Scheduler(limits(num_prefill_blocks=2))
        for seq_id in range(3):
            scheduler.add(SequenceSpec(seq_id, 4, 4))
        (batch,) = drain(scheduler)
        assert [c.seq_id for c in batch.chunks] == [0, 1]
        scheduler.update(PrefillDone(batch.step_id, ((0, 0), (1, 0))))
        assert drain(scheduler) == []
        scheduler.update(SwapOutDone(1))
        actions = drain(scheduler)
        assert [c.seq_id for a in actions if isinstance(a, PrefillBatch) for c in a.chunks] == [2]

    def test_less_work_makes_smaller_micro_batches(self) -> None:
        def largest(num_prompts: int) -> int:
            scheduler = Scheduler(
                limits(
                    prefill_stages=2,
                    max_num_batched_tokens=8192,
                    num_prefill_blocks=10**5,
                    num_gpu_blocks=10**5,
                    num_host_blocks=10**5,
                )
            )
            for seq_id in range(num_prompts):
                scheduler.add(SequenceSpec(seq_id, 100, 4))
            return max(sum(c.num_tokens for c in batch.chunks) for batch in drain(scheduler))

        assert largest(20) < 1000 < largest(200) < 8192 == -(-largest(4000) // 100) * 100 - 8

    def test_first_token_may_be_the_last(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 5, 1))
        scheduler.add(SequenceSpec(1, 5, 9, stop_token_ids=frozenset({STOP})))
        scheduler.close_input()
        (batch,) = drain(scheduler)
        done = scheduler.update(PrefillDone(batch.step_id, ((0, 0), (1, STOP))))
        assert done == [Finished(0, FinishReason.LENGTH, 1), Finished(1, FinishReason.STOP, 1)]
        assert drain(scheduler) == []
        assert scheduler.stats().num_host_blocks_used == 4
        scheduler.update(SwapOutDone(0))
        scheduler.update(SwapOutDone(1))
        assert scheduler.stats().num_host_blocks_used == 0
        assert scheduler.is_done
        assert scheduler.transitions == []


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
        scheduler = Scheduler(limits(decode_stages=num_stages))
        for seq_id in range(7):
            scheduler.add(SequenceSpec(seq_id, 4, 40))
        settle(scheduler, [a for a in start_decode(scheduler) if isinstance(a, DecodeBatch)])
        batches = drain(scheduler)
        assert [batch.group for batch in batches] == [*range(num_stages)] * 2
        sizes = [len(batch.rows) for batch in batches[:num_stages]]
        assert sum(sizes) == 7
        assert max(sizes) - min(sizes) <= 1
        settle(scheduler, batches[:1])
        assert [batch.group for batch in drain(scheduler)] == [0]

    def test_groups_are_evened_out_when_sequences_end(self) -> None:
        scheduler = Scheduler(limits(decode_stages=2))
        for seq_id in range(8):
            scheduler.add(SequenceSpec(seq_id, 4, 4 if seq_id % 2 else 60))
        actions = start_decode(scheduler)
        for _ in range(8):
            settle(scheduler, actions)
            actions = drain(scheduler)
        assert [len(batch.rows) for batch in actions] == [2, 2, 2, 2]


class TestTransitions:
    def test_to_decode_when_the_host_is_full_and_back_when_it_is_empty(self) -> None:
        scheduler = Scheduler(limits(num_host_blocks=6, num_gpu_blocks=4, max_num_seqs=2, block_size=4))
        for seq_id in range(20):
            scheduler.add(SequenceSpec(seq_id, 4, 4))
        scheduler.close_input()
        prefilled: list[list[int]] = [[]]
        while not scheduler.is_done:
            actions = drain(scheduler)
            for action in actions:
                if isinstance(action, PrefillBatch):
                    prefilled[-1] += [chunk.seq_id for chunk in action.chunks]
                elif isinstance(action, SwitchPhase) and action.to is Phase.PREFILL:
                    prefilled.append([])
            settle(scheduler, actions)
        assert [seq_id for phase in prefilled for seq_id in phase] == list(range(20))
        reasons = scheduler.transitions
        assert reasons[::2] == [TransitionReason.HOST_FULL] * (len(prefilled) - 1) + [TransitionReason.NO_PROMPT_LEFT]
        assert reasons[1::2] == [TransitionReason.HOST_EMPTY] * (len(prefilled) - 1)
        assert 3 <= len(prefilled) <= 5

    def test_waits_for_a_swap_in_that_frees_host_room(self) -> None:
        scheduler = Scheduler(limits(num_host_blocks=3, num_gpu_blocks=12))
        for seq_id in range(2):
            scheduler.add(SequenceSpec(seq_id, 8, 2))
        scheduler.close_input()
        (batch,) = drain(scheduler)
        assert len(batch.chunks) == 1
        scheduler.update(PrefillDone(batch.step_id, ((0, 0),)))
        assert drain(scheduler) == []
        scheduler.update(SwapOutDone(0))
        (swap_in,) = drain(scheduler)
        assert isinstance(swap_in, SwapIn)
        scheduler.update(SwapInDone(0))
        batch, switch = drain(scheduler)
        assert [chunk.seq_id for chunk in batch.chunks] == [1]
        assert switch == SwitchPhase(Phase.DECODE)
        assert scheduler.transitions == [TransitionReason.NO_PROMPT_LEFT]

    def test_open_input_is_waited_for(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 4, 4))
        settle(scheduler, drain(scheduler))
        assert [type(action) for action in drain(scheduler)] == [SwapIn]
        assert scheduler.wants_input
        scheduler.close_input()
        assert drain(scheduler) == [SwitchPhase(Phase.DECODE)]
        assert scheduler.transitions == [TransitionReason.NO_PROMPT_LEFT]

    def test_no_compute_between_switch_and_answer(self) -> None:
        scheduler = Scheduler(limits())
        scheduler.add(SequenceSpec(0, 4, 4))
        scheduler.close_input()
        settle(scheduler, drain(scheduler))
        swap_in, switch = drain(scheduler)
        scheduler.update(SwapInDone(swap_in.seq_id))
        assert drain(scheduler) == []
        scheduler.update(PhaseSwitched(switch.to))
        assert all(isinstance(action, DecodeBatch) for action in drain(scheduler))

    def test_prompts_of_one_token_never_leave_prefill(self) -> None:
        scheduler = Scheduler(limits(num_host_blocks=3, num_prefill_blocks=3))
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


class TestVictims:
    """Who gives way on a full GPU; each sequence holds whole blocks of 4 tokens and wants one more."""

    def build(self, sizes: list[int], **changes: int) -> tuple[KvPools, DecodeGroups, list[Sequence]]:
        sizes_limits = limits(**{"num_gpu_blocks": sum(sizes), **changes})
        pools = KvPools(sizes_limits)
        groups = DecodeGroups(sizes_limits, pools)
        sequences = []
        for order, size in enumerate(sizes):
            seq = Sequence(SequenceSpec(order, 4 * size, 9), order, block_size=4)
            pools.admit(seq)
            pools.free_prefill(seq)
            seq.num_issued_tokens = seq.num_output_tokens = 1
            pools.start_swap_in(seq)
            pools.finish_swap_in(seq)
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

    def test_spared_ones_run_on(self) -> None:
        _, groups, sequences = self.build([2, 2, 2])
        assert groups.next_batch(0) is None
        groups.spare_victims()
        assert groups.pop_victim() is None
        assert sequences[2] in groups.members()

    def test_only_as_many_as_the_host_takes(self) -> None:
        pools, groups, _ = self.build([3, 3, 3, 1, 1, 1, 1], num_host_blocks=40)
        pools.host.allocate(pools.host.num_free - 1)
        assert self.victims(groups) == [6]


class TestAbort:
    def test_in_every_state(self) -> None:
        """Abort after each number of events; what is left of the run must free everything."""
        for num_events in range(60):
            scheduler = Scheduler(limits(num_gpu_blocks=6, num_host_blocks=6), expected_output_tokens=1)
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
    def test_expected_peak_when_nobody_stops_early(self) -> None:
        residents = [Resident(8, 3, 2), Resident(20, 3, 5)]
        assert expected_peak(residents, 4, float("inf")) == 10  # both, just before the second ends
        assert expected_peak(residents[1:], 4, float("inf")) == 8
        assert expected_peak([Resident(20, 3, 4)], 4, float("inf")) == 7
        assert expected_peak([], 4, float("inf")) == 0

    def test_expected_peak_is_now_when_most_stop_soon(self) -> None:
        residents = [Resident(2000, 30, 500)] * 10
        assert expected_peak(residents, 4, mean_tokens=50) == 300
        assert 300 < expected_peak(residents, 4, mean_tokens=500) < 2000

    def test_mean_is_tokens_per_stopped_sequence(self) -> None:
        forecast = LengthForecast(None)
        for _ in range(30):
            forecast.add_token()
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


def test_thousands_of_sequences() -> None:
    scheduler = Scheduler(
        SchedulerLimits(
            block_size=16,
            num_prefill_blocks=2000,
            num_gpu_blocks=8000,
            num_host_blocks=10000,
            max_num_seqs=512,
            max_num_batched_tokens=8192,
            prefill_stages=2,
            decode_stages=2,
        )
    )
    rng = random.Random(0)
    specs = [SequenceSpec(seq_id, rng.randint(8, 800), rng.randint(1, 200)) for seq_id in range(2000)]
    for spec in specs:
        scheduler.add(spec)
    scheduler.close_input()
    finished: dict[int, int] = {}
    while actions := drain(scheduler):
        finished |= {done.seq_id: done.num_output_tokens for done in settle(scheduler, actions)}
    assert scheduler.is_done
    assert finished == {spec.seq_id: spec.max_tokens for spec in specs}
    assert len(scheduler.transitions) <= 9
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

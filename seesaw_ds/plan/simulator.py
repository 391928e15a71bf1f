"""A discrete-event simulator of the engine: the real scheduler decides, the cost model is the clock.

Each replica has a scheduler of its own and as many pipeline stages as its layout of the phase has; all replicas draw
from one queue of requests, a batch at a time, whose longest outputs they start first. Actions are executed as
`seesaw_ds.sched.output` says: compute in the order given, copies beside it. Equal inputs give equal runs.

To go faster a simulation may count in units of several tokens: lengths and blocks shrink by that factor, and one
simulated decode step stands for as many real ones, one after the other. All requests stay, and so do the pools, the
batch sizes and the transitions; what is lost is the rounding of lengths to whole units. Micro-batches shrink too,
unless decode rows ride in them. A row goes on by a whole unit, so a simulated micro-batch is then as many real ones of
its group, one after the other, as a unit has tokens; they are taken to be alike::

    2 stages     unit 1   group 0, 1, 0, 1, 0, 1, 0, 1
                 unit 2   group 0 twice, 1 twice, 0 twice, 1 twice

It may also count in bundles of several sequences: those of a batch with about equal outputs go through everything
together, and all that sequences share, which is slots, pools and micro-batches, shrinks by that factor. The number of
steps stays, and so does the way in which a batch runs out; what is lost is that sequences start and end one by one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, repeat
from operator import attrgetter

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.plan.cost import CostModel, StepWork, add_work, chunk_work
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.layout_choice import LayoutChoice
from seesaw_ds.plan.outcome import SimulatedRun, TookTooLong
from seesaw_ds.plan.transfers import CopyLanes, ReshardSeconds, preload_size, reshard_seconds
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.output import (
    Action,
    Activate,
    DecodeBatch,
    DecodeDone,
    DecodeRow,
    Event,
    Evict,
    EvictDone,
    PhaseSwitched,
    PrefillBatch,
    PrefillDone,
    Preload,
    SchedulerLimits,
    SequenceSpec,
    SwapIn,
    SwapInDone,
    SwapOutDone,
    SwitchPhase,
)
from seesaw_ds.sched.scheduler import Scheduler
from seesaw_ds.shapes import ModelShape


class _Replica:
    """One replica's devices: when each is free, and what will be answered when."""

    def __init__(
        self,
        limits: SchedulerLimits,
        costs: dict[Phase, CostModel],
        reshard: ReshardSeconds,
        hardware: HardwareProfile,
        unit: int,
        bundle: int = 1,
        stays: bool = True,
    ) -> None:
        shape = costs[Phase.PREFILL].shape
        self._rounds = unit if limits.mixes_steps else 1  # real micro-batches in a simulated one
        counted_limits = replace(
            limits,
            block_size=limits.block_size // unit,
            num_gpu_blocks=limits.num_gpu_blocks // bundle,
            num_host_blocks=limits.num_host_blocks // bundle,
            max_num_seqs=limits.max_num_seqs // bundle,
            max_num_batched_tokens=max(1, limits.max_num_batched_tokens // unit * self._rounds // bundle),
            preload=limits.preload and limits.preload._replace(round_blocks=-(-limits.preload.round_blocks // bundle)),
        )
        chooser = LayoutChoice(costs, reshard, limits, unit=unit, bundle=bundle) if stays and limits.may_stay else None
        pairs = max(1, shape.pairs_per_token // unit)
        self.scheduler = Scheduler(counted_limits, pairs, layout_chooser=chooser, unit=unit)
        self.events: list[tuple[float, int, Event]] = []
        self.end = 0.0
        self.phase_seconds = dict.fromkeys(Phase, 0.0)
        self.transition_seconds = 0.0
        self.busy_seconds = 0.0
        self.num_decode_steps = 0
        self.num_decode_rows = 0
        self.num_riding_rows = 0
        self._unit = unit
        self._bundle = bundle
        self._costs = costs
        self._reshard = reshard
        self._num_answers = 0
        self._phase = Phase.PREFILL
        self._part_end = 0.0
        self._preloaded = 0.0  # a share of the weights, and when they are there
        self._preload_end = 0.0
        self._stage_free = [0.0] * costs[Phase.PREFILL].layout.pp
        self._group_ready = [0.0] * costs[Phase.PREFILL].layout.pp
        self._lanes = [CopyLanes(hardware) for _ in range(max(cost.layout.pp for cost in costs.values()))]
        self._rank_block_bytes = {  # of the block of each sequence in a bundle
            phase: bundle * limits.block_size * cost.rank_kv_token_bytes for phase, cost in costs.items()
        }

    def run_ahead(self, now: float) -> None:
        """Execute whatever the scheduler wants done now."""
        while (action := self.scheduler.schedule()) is not None:
            self._execute(action, now)

    def take_event(self) -> float:
        """Give the earliest answer to the scheduler; returns its time."""
        now, _, event = heapq.heappop(self.events)
        self.scheduler.update(event)
        self.end = now
        return now

    @property
    def host_pool_share(self) -> float:
        """The most of the host pool that was used at once."""
        return self.scheduler.most_host_blocks_used / self.scheduler.limits.num_host_blocks

    def close(self) -> None:
        """Count the last seconds."""
        self._count_seconds(self._phase, self.end)

    def _count_seconds(self, part: Phase, until: float) -> None:
        self.phase_seconds[part] += until - self._part_end
        self._part_end = until

    def _answer(self, time: float, event: Event) -> None:
        self._num_answers += 1
        heapq.heappush(self.events, (time, self._num_answers, event))

    def _execute(self, action: Action, now: float) -> None:
        if isinstance(action, DecodeBatch):
            self._decode(action, now)
        elif isinstance(action, PrefillBatch):
            self._prefill(action, now)
        elif isinstance(action, SwapIn):
            num_bytes = len(action.host_block_ids) * self._rank_block_bytes[self._phase]
            self._answer(self._lanes[0].copy_in(now, num_bytes), SwapInDone(action.seq_id))
        elif isinstance(action, Evict):
            num_bytes = len(action.gpu_block_ids) * self._rank_block_bytes[self._phase]
            self._answer(self._lanes[0].copy_out(now, num_bytes), EvictDone(action.seq_id))
        elif isinstance(action, Preload):
            assert self.scheduler.limits.preload is not None
            share = action.num_rounds / self.scheduler.limits.preload.num_rounds
            self._preloaded += share
            self._preload_end = max(now, self._preload_end) + share * self._reshard.to_decode.early
        elif isinstance(action, SwitchPhase):
            self._switch(action, now)
        else:
            assert isinstance(action, Activate)  # copies nothing and has no answer

    def _run_stages(self, ready: float, seconds: list[float], send: float, rounds: int = 1) -> list[float]:
        """Pass `rounds` equal micro-batches through the stages, which take `seconds` each; when each stage ends."""
        ends = []
        last_ready = ready
        for stage, once in enumerate(seconds):
            start = max(ready, self._stage_free[stage])
            end = max(start + rounds * once, last_ready + once)
            self._stage_free[stage] = end
            ends.append(end)
            ready, last_ready = start + once + send, end + send
            self.busy_seconds += rounds * once / len(seconds)
        return ends

    def _prefill(self, batch: PrefillBatch, now: float) -> None:
        cost = self._costs[Phase.PREFILL]
        unit, rounds, chunks = self._unit, self._rounds, batch.chunks
        prompts = add_work(
            *(chunk_work(unit * chunk.start, unit * chunk.num_tokens, chunk.is_last) for chunk in chunks)
        )
        # A bundle's prompts come one after the other in longer chunks, which read what is before them less often.
        prompts = prompts.times(self._bundle)._replace(prefill_context=prompts.prefill_context)
        rows = self._rows_work(batch.rows)
        work = add_work(prompts.divided_by(rounds), rows)
        seconds, send = cost.stage_seconds(work), self._send_seconds(cost, work)
        if batch.rows:
            now = max(now, self._group_ready[batch.group])
            if rounds > 1:  # the rows of a round follow on its tokens, after one micro-batch of each other group
                period = _round_trip(cost, seconds, send, work.num_rows) / len(seconds)
                seconds = [max(once, period) for once in seconds]
        ends = self._run_stages(now, seconds, send, rounds)
        self._count_seconds(Phase.PREFILL, ends[-1])
        done = ends[-1] + cost.sample_seconds(work.num_rows)
        if batch.rows:
            self._group_ready[batch.group] = done
            self.num_riding_rows += rows.num_rows
        last = [(chunk.seq_id, 0) for chunk in chunks if chunk.is_last]
        self._answer(done, PrefillDone(batch.step_id, (*_tokens(batch.rows), *last)))
        for chunk in chunks:
            if chunk.host_block_ids:
                num_bytes = len(chunk.host_block_ids) * self._rank_block_bytes[self._phase]
                done = max(self._lanes[stage].copy_out(end, num_bytes) for stage, end in enumerate(ends))
                self._answer(done, SwapOutDone(chunk.seq_id))

    def _decode(self, batch: DecodeBatch, now: float) -> None:
        cost = self._costs[self._phase]
        work = self._rows_work(batch.rows)
        unit = self._unit
        seconds = [unit * once for once in cost.stage_seconds(work)]
        ready = max(now, self._group_ready[batch.group])
        ends = self._run_stages(ready, seconds, unit * self._send_seconds(cost, work))
        self._count_seconds(Phase.DECODE, ends[-1])
        done = ends[-1] + unit * cost.sample_seconds(work.num_rows)
        self._group_ready[batch.group] = done
        self._answer(done, DecodeDone(batch.step_id, tuple(_tokens(batch.rows))))

    def _rows_work(self, rows: Sequence[DecodeRow]) -> StepWork:
        """The work of one token of each row, for all sequences of its bundle."""
        work = self._costs[self._phase].decode_work([self._unit * (row.position + 1) for row in rows])
        work = work.times(self._bundle)
        self.num_decode_steps += work.num_rows > 0
        self.num_decode_rows += work.num_rows
        return work

    def _send_seconds(self, cost: CostModel, work: StepWork) -> float:
        return cost.send_seconds(work.num_tokens) if len(self._stage_free) > 1 else 0.0

    def _switch(self, action: SwitchPhase, now: float) -> None:
        copies = [max(lanes.in_free, lanes.out_free) for lanes in self._lanes]
        start = max(now, *self._stage_free, *copies)
        self._count_seconds(self._phase, start)
        if self._preload_end > start:  # what has not come is left to the exchange
            self._preloaded -= (self._preload_end - start) / self._reshard.to_decode.early
        end = start + self._reshard.to(action.to, self._bundle * len(action.gpu_block_ids), self._preloaded)
        self._preloaded = self._preload_end = 0.0
        self.transition_seconds += end - start
        self._part_end = end
        self._phase = action.to
        num_stages = self._costs[action.to].layout.pp
        self._stage_free = [end] * num_stages
        self._group_ready = [end] * num_stages
        self._answer(end, PhaseSwitched(action.to))


def _tokens(rows: Iterable[DecodeRow]) -> Iterator[tuple[int, int]]:
    """A token for each row; which one it is does not matter."""
    return zip(map(attrgetter("seq_id"), rows), repeat(0), strict=False)


def _round_trip(cost: CostModel, seconds: list[float], send: float, num_rows: int) -> float:
    """From the start of a micro-batch until its tokens are known to the first stage."""
    return sum(seconds) + (len(seconds) - 1) * send + cost.sample_seconds(num_rows)


def _bundled(batch: list[RequestLength], size: int) -> list[RequestLength]:
    """The mean lengths of bundles of neighbours in `batch`, which is sorted.

    Where it cannot be cut into whole bundles, all lengths change a little, so that all tokens together stay as many.
    """
    if size == 1:
        return batch
    num_bundles = max(1, round(len(batch) / size))
    cuts = [i * len(batch) // num_bundles for i in range(num_bundles + 1)]
    scale = len(batch) / (num_bundles * size)

    def mean(values: list[int]) -> int:
        return max(1, round(scale * sum(values) / len(values)))

    members = [batch[start:stop] for start, stop in pairwise(cuts)]
    return [
        RequestLength(mean([each.input_tokens for each in group]), mean([each.output_tokens for each in group]))
        for group in members
    ]


@dataclass
class Simulator:
    """Runs requests through an engine of `pair` on `hardware`; `limits` are those of one replica.

    The outputs run to the lengths given. `unit` is how many tokens to count as one; it divides the block size. `bundle`
    is how many sequences to count as one. `stays`: sequences may decode on in the prefill layout where that is
    predicted to be faster, as in a run with a profile. Raises ValueError when a request cannot fit the pools.
    """

    shape: ModelShape
    hardware: HardwareProfile
    pair: LayoutPair
    limits: SchedulerLimits
    dtype: str = "bfloat16"
    weight_reshard: str = "exchange"
    unit: int = 1
    bundle: int = 1
    stays: bool = True
    _replicas: list[_Replica] = field(init=False, default_factory=list)
    _waiting: deque[RequestLength] = field(init=False, default_factory=deque)
    _num_dealt: int = field(init=False, default=0)

    def run(self, lengths: Sequence[RequestLength], stop_after: float = math.inf) -> SimulatedRun:
        """Simulate the whole input, from the first micro-batch to the last result.

        Raises TookTooLong when that takes `stop_after` simulated seconds or more.
        """
        costs = {phase: CostModel(self.shape, self.hardware, self.pair[phase], self.dtype) for phase in Phase}
        reshard = reshard_seconds(
            self.shape, self.pair, self.hardware, self.dtype, self.weight_reshard, self.limits.block_size
        )
        size = preload_size(self.shape, self.pair, self.dtype, self.weight_reshard, self.limits.block_size)
        limits = replace(self.limits, preload=size)
        self._replicas = [
            _Replica(limits, costs, reshard, self.hardware, self.unit, self.bundle, self.stays)
            for _ in range(self.pair.dp)
        ]
        self._waiting, self._num_dealt = deque(lengths), 0
        self._deal()
        order: list[tuple[float, int]] = []
        for index, replica in enumerate(self._replicas):
            replica.run_ahead(0.0)
            if replica.events:
                heapq.heappush(order, (replica.events[0][0], index))
        while order:
            _, index = heapq.heappop(order)
            replica = self._replicas[index]
            now = replica.take_event()
            if now >= stop_after:
                raise TookTooLong
            if self._waiting and replica.scheduler.wants_input:
                self._deal()
            replica.run_ahead(now)
            if replica.events:
                heapq.heappush(order, (replica.events[0][0], index))
        assert all(replica.scheduler.is_done for replica in self._replicas), "the simulated engine stalled"
        return self._outcome(len(lengths))

    def _spec(self, length: RequestLength) -> SequenceSpec:
        """The next request in units; it needs no more blocks than the real one."""
        prompt = max(1, round(length.input_tokens / self.unit))
        stored = round((length.input_tokens + length.output_tokens - 1) / self.unit)
        self._num_dealt += 1
        return SequenceSpec(self._num_dealt, prompt, max_tokens=max(1, stored - prompt + 1))

    def _deal(self) -> None:
        """Give waiting requests to the replicas that want some: a batch each in turn, longest outputs first."""
        while self._waiting:
            wanting = [replica for replica in self._replicas if replica.scheduler.wants_input]
            if not wanting:
                return
            even_share = -(-len(self._waiting) // len(wanting))
            for replica in wanting:
                num_requests = min(self.limits.max_num_seqs, even_share, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(num_requests)]
                batch.sort(key=lambda length: -length.output_tokens)
                for length in _bundled(batch, self.bundle):
                    replica.scheduler.add(self._spec(length))
        for replica in self._replicas:
            replica.scheduler.close_input()

    def _outcome(self, num_requests: int) -> SimulatedRun:
        for replica in self._replicas:
            replica.close()
        last = max(self._replicas, key=lambda replica: replica.end)
        num_left = last.scheduler.num_left_after_stay
        num_steps = sum(replica.num_decode_steps for replica in self._replicas)
        num_rows = sum(replica.num_decode_rows for replica in self._replicas)
        return SimulatedRun(
            num_requests=num_requests,
            seconds=last.end,
            prefill_seconds=last.phase_seconds[Phase.PREFILL],
            decode_seconds=last.phase_seconds[Phase.DECODE],
            transition_seconds=last.transition_seconds,
            num_transitions=len(last.scheduler.transitions),
            num_left_after_stay=None if num_left is None else self.bundle * num_left,
            num_evictions=self.bundle * sum(replica.scheduler.stats().num_evictions for replica in self._replicas),
            busy_share=sum(replica.busy_seconds for replica in self._replicas) / (last.end * len(self._replicas)),
            mean_decode_batch=num_rows / num_steps if num_steps else 0.0,
            riding_share=sum(replica.num_riding_rows for replica in self._replicas) / num_rows if num_rows else 0.0,
            host_pool_share=max(replica.host_pool_share for replica in self._replicas),
        )

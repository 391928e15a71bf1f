"""A simulated engine in the manner of vLLM: one layout for both phases, no host pool, its own batching policy.

It is what a phase-separated run is compared with. Each replica has as many groups as pipeline stages; a group has its
own running sequences and at most one step in flight. The groups of a replica share one queue and all KV room, as in
vLLM since its V1 engine, or each has a queue and an equal share of the room to itself (vLLM's "virtual engines" before
V1: RFC vllm-project/vllm#4461, issue #7039). A sequence that finds no room as it grows gives way to older ones of its
group and is computed again (preemption by recomputing, newest first); a group's last sequence stays, so that each group
makes progress.

The host's work of a step, which no other step of the group hides, is the machine's `step_seconds`. `HostWork` is that
of an engine whose host is slower.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.cost import CostModel, StepWork, add_work, chunk_work
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun, TookTooLong
from seesaw_ds.plan.static_queue import KvQueue, StaticRequest
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape


class BatchPolicy(str, enum.Enum):
    """What a step is made of.

    PREFILL_FIRST runs waiting prompts whenever there is room, and else decodes. DECODE_FIRST fills up with prompts,
    then decodes until all of them have ended. CHUNKED has the running sequences in every step, and fills it up with
    chunks of prompts.
    """

    PREFILL_FIRST = "prefill-first"
    DECODE_FIRST = "decode-first"
    CHUNKED = "chunked"


@dataclass(frozen=True, slots=True)
class HostWork:
    """Seconds in which a replica's one host process makes a step: for each step, and for each row that it samples.

    The step starts after that, and the host makes one step after the other, of whatever group.
    """

    step_seconds: float
    row_seconds: float


@dataclass(frozen=True, slots=True)
class StaticEngineLimits:
    """Sizes: KV tokens that one queue has room for, sequences decoding in one group, tokens in a step.

    A replica has `num_queues` queues, 1 or as many as pipeline stages. Without chunks a prompt longer than
    `max_num_batched_tokens` is a step of its own.
    """

    num_kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 16
    num_queues: int = 1

    def holds(self, lengths: Sequence[RequestLength]) -> bool:
        """Whether each request alone finds room in a queue's."""
        longest = max(length.input_tokens + length.output_tokens for length in lengths)
        return longest + self.block_size <= self.num_kv_tokens


@dataclass(slots=True)
class _Group:
    """The sequences of one pipeline group. `step` counts its decode steps; `ends` holds (last step, join number)."""

    queue: KvQueue
    step: int = 0
    context: int = 0
    running: dict[int, StaticRequest] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)
    partial: StaticRequest | None = None
    is_filling: bool = True


class _Replica:
    def __init__(self, cost: CostModel, policy: BatchPolicy, limits: StaticEngineLimits, host: HostWork | None) -> None:
        self.end = 0.0
        self.prefill_seconds = 0.0
        self.busy_seconds = 0.0
        self.num_decode_steps = 0
        self.num_decode_rows = 0
        self.num_riding_rows = 0
        self.num_preemptions = 0
        self.queues = [KvQueue(limits.num_kv_tokens, limits.block_size) for _ in range(limits.num_queues)]
        self._cost = cost
        self._policy = policy
        self._limits = limits
        self._host = host
        self._host_free = 0.0
        self._num_joined = 0
        self._groups = [_Group(self.queues[index % limits.num_queues]) for index in range(cost.layout.pp)]
        self._stage_free = [0.0] * cost.layout.pp

    def run(self, stop_after: float) -> None:
        """Run all waiting requests to their ends. Raises TookTooLong when that takes `stop_after` seconds or more."""
        ready = [(0.0, index) for index in range(len(self._groups))]
        while ready:
            now, index = heapq.heappop(ready)
            if now >= stop_after:
                raise TookTooLong
            group = self._groups[index]
            work, finish = self._next_step(group)
            if work.num_tokens == 0:
                group.queue.idle.append(index)  # until another group of the queue gives room or requests back
                continue
            end = self._pass_through(work, now)
            self._finish_step(group, finish)
            heapq.heappush(ready, (end, index))
            for other in group.queue.idle:
                heapq.heappush(ready, (end, other))
            group.queue.idle.clear()
        assert not any(queue.waiting for queue in self.queues), "the simulated engine stalled"

    def _pass_through(self, work: StepWork, ready: float) -> float:
        after = self._cost.sample_seconds(work.num_rows)
        if self._host is not None:
            seconds = self._host.step_seconds + work.num_rows * self._host.row_seconds
            ready = self._host_free = max(ready, self._host_free) + seconds
            after = self._cost.feedback_seconds()
        send = self._cost.send_seconds(work.num_tokens) if len(self._stage_free) > 1 else 0.0
        start = max(ready, self._stage_free[0])
        for stage, seconds in enumerate(self._cost.stage_seconds(work)):
            end = max(ready, self._stage_free[stage]) + seconds
            self._stage_free[stage] = end
            ready = end + send
            self.busy_seconds += seconds / len(self._stage_free)
        if work.prefill_pairs:
            self.prefill_seconds += (end - start) / len(self._stage_free)
        self.end = end + after
        return self.end

    # Making a step

    def _next_step(self, group: _Group) -> tuple[StepWork, list[StaticRequest]]:
        """The group's next step, and the requests whose prompt ends in it. Decode rows are counted here."""
        if self._policy is BatchPolicy.CHUNKED:
            decode = self._decode_rows(group)
            prompts, finish = self._chunks(group, self._limits.max_num_batched_tokens - decode.num_rows)
            if prompts.num_tokens:
                self.num_riding_rows += decode.num_rows
            return add_work(decode, prompts), finish
        if self._policy is BatchPolicy.DECODE_FIRST:
            group.is_filling |= not group.running
        if group.is_filling:
            prompts, finish = self._whole_prompts(group)
            if finish:
                return prompts, finish
            group.is_filling = self._policy is BatchPolicy.PREFILL_FIRST
        return self._decode_rows(group), []

    def _decode_rows(self, group: _Group) -> StepWork:
        """One token for every running sequence, after as many have given way as room asks."""
        while len(group.running) > 1 and not group.queue.can_grow(len(group.running)):
            self._preempt(group)
        num_rows = len(group.running)
        if num_rows == 0:
            return StepWork()
        self.num_decode_steps += 1
        self.num_decode_rows += num_rows
        group.step += 1
        group.context += num_rows
        group.queue.grow(num_rows)
        return StepWork(num_tokens=num_rows, decode_context=group.context, num_rows=num_rows)

    def _preempt(self, group: _Group) -> None:
        _, request = group.running.popitem()
        num_done = group.step - request.join_step
        group.context -= request.prompt + num_done
        group.queue.preempt(request, num_done)
        self.num_preemptions += 1

    def _may_start(self, group: _Group, num_starting: int) -> bool:
        return len(group.running) + num_starting < self._limits.max_num_seqs and group.queue.can_start()

    def _whole_prompts(self, group: _Group) -> tuple[StepWork, list[StaticRequest]]:
        parts: list[StepWork] = []
        finish: list[StaticRequest] = []
        num_tokens = 0
        while self._may_start(group, len(finish)):
            prompt = group.queue.waiting[0].prompt
            if finish and num_tokens + prompt > self._limits.max_num_batched_tokens:
                break
            num_tokens += prompt
            parts.append(chunk_work(0, prompt, True))
            finish.append(group.queue.start())
        return add_work(*parts), finish

    def _chunks(self, group: _Group, num_left: int) -> tuple[StepWork, list[StaticRequest]]:
        parts: list[StepWork] = []
        finish: list[StaticRequest] = []
        while num_left > 0:
            if group.partial is None:
                if not self._may_start(group, len(finish)):
                    break
                group.partial = group.queue.start()
            request = group.partial
            num_tokens = min(num_left, request.prompt - request.computed)
            is_last = request.computed + num_tokens == request.prompt
            parts.append(chunk_work(request.computed, num_tokens, is_last))
            request.computed += num_tokens
            num_left -= num_tokens
            if is_last:
                finish.append(request)
                group.partial = None
        return add_work(*parts), finish

    # After a step

    def _finish_step(self, group: _Group, finish: list[StaticRequest]) -> None:
        while group.ends and group.ends[0][0] <= group.step:
            _, number = heapq.heappop(group.ends)
            request = group.running.get(number)
            if request is not None:
                del group.running[number]
                group.context -= request.prompt + request.output - 1
                group.queue.release(request, request.output - 1)
        for request in finish:
            if request.output == 1:
                group.queue.release(request, 0)
                continue
            self._num_joined += 1
            request.join_step = group.step
            group.context += request.prompt
            group.running[self._num_joined] = request
            heapq.heappush(group.ends, (group.step + request.output - 1, self._num_joined))


def run_static_engine(
    shape: ModelShape,
    hardware: HardwareProfile,
    layout: ParallelLayout,
    limits: StaticEngineLimits,
    policy: BatchPolicy,
    lengths: Sequence[RequestLength],
    dtype: str = "bfloat16",
    host: HostWork | None = None,
    stop_after: float = math.inf,
) -> SimulatedRun:
    """Simulate the whole input; requests go to the replicas in turn, and there to its queues in turn.

    Raises ValueError when a request cannot fit the KV room of a queue, TookTooLong when the run takes `stop_after`
    simulated seconds or more.
    """
    assert limits.num_queues in (1, layout.pp), f"num_queues={limits.num_queues}: 1, or one a pipeline stage"
    if not limits.holds(lengths):
        longest = max(sum(length) for length in lengths)
        raise ValueError(
            f"num_kv_tokens={limits.num_kv_tokens}: the longest request has {longest} tokens; "
            "use more devices, or shorten it"
        )
    cost = CostModel(shape, hardware, layout, dtype, is_ours=False)
    replicas = [_Replica(cost, policy, limits, host) for _ in range(layout.dp)]
    for index, length in enumerate(lengths):
        turn, replica_index = divmod(index, layout.dp)
        queue = replicas[replica_index].queues[turn % limits.num_queues]
        queue.waiting.append(StaticRequest(length.input_tokens, length.output_tokens))
    for replica in replicas:
        replica.run(stop_after)
    last = max(replicas, key=lambda replica: replica.end)
    num_steps = sum(replica.num_decode_steps for replica in replicas)
    num_rows = sum(replica.num_decode_rows for replica in replicas)
    return SimulatedRun(
        num_requests=len(lengths),
        seconds=last.end,
        prefill_seconds=last.prefill_seconds,
        decode_seconds=last.end - last.prefill_seconds,
        transition_seconds=0.0,
        num_transitions=0,
        num_evictions=sum(replica.num_preemptions for replica in replicas),
        busy_share=sum(replica.busy_seconds for replica in replicas) / (last.end * len(replicas)),
        mean_decode_batch=num_rows / num_steps if num_steps else 0.0,
        riding_share=sum(replica.num_riding_rows for replica in replicas) / num_rows if num_rows else 0.0,
    )

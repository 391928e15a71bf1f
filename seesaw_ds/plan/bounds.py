"""A closed form for the seconds of a run, optimistic in every part: what no simulated run of the pair gets below.

Prefill is full micro-batches through the slowest stage, without filling or draining the pipeline. Decode runs at the
largest batch that the GPU pool, the slots and the input allow from its first step to its last. Transitions are as few
as the two pools allow. Copies are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from seesaw_ds.layout import LayoutPair
from seesaw_ds.plan.cost import CostModel, StepWork
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.transfers import reshard_seconds
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.shapes import ModelShape


class InputTotals(NamedTuple):
    """Sums over the requests of an input. `attention_pairs` are of prefill, `decode_context` of all decode steps."""

    num_requests: int
    input_tokens: int
    output_tokens: int
    attention_pairs: int
    decode_context: int
    longest_output: int
    shortest_input: int

    @classmethod
    def of(cls, lengths: Sequence[RequestLength]) -> InputTotals:
        """Add up `lengths`, of which there is at least one."""
        return cls(
            num_requests=len(lengths),
            input_tokens=sum(length.input_tokens for length in lengths),
            output_tokens=sum(length.output_tokens for length in lengths),
            attention_pairs=sum(length.input_tokens * (length.input_tokens + 1) // 2 for length in lengths),
            decode_context=sum(
                (steps := length.output_tokens - 1) * length.input_tokens + steps * (steps + 1) // 2
                for length in lengths
            ),
            longest_output=max(length.output_tokens for length in lengths),
            shortest_input=min(length.input_tokens for length in lengths),
        )


class SecondsByPart(NamedTuple):
    """Seconds of a run by what they are spent on."""

    prefill: float
    decode: float
    transition: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self)


def bound_seconds(
    shape: ModelShape,
    hardware: HardwareProfile,
    pair: LayoutPair,
    limits: SchedulerLimits,
    totals: InputTotals,
    dtype: str,
    weight_reshard: str,
) -> SecondsByPart:
    """The closed form for the whole input, which `pair.dp` replicas share evenly."""
    reshard = reshard_seconds(shape, pair, hardware, dtype, weight_reshard)
    prompt_blocks = totals.input_tokens // limits.block_size // pair.dp
    num_cycles = max(1, prompt_blocks // (limits.num_host_blocks + limits.num_gpu_blocks))
    transition = reshard.to_decode * num_cycles + reshard.to_prefill * (num_cycles - 1)
    return SecondsByPart(
        _prefill_bound(CostModel(shape, hardware, pair.prefill, dtype), limits, totals),
        _decode_bound(CostModel(shape, hardware, pair.decode, dtype), limits, totals),
        transition if totals.output_tokens > totals.num_requests else 0.0,
    )


def _prefill_bound(cost: CostModel, limits: SchedulerLimits, totals: InputTotals) -> float:
    dp = cost.layout.dp
    tokens = totals.input_tokens / dp
    num_batches = max(1.0, tokens / limits.max_num_batched_tokens)
    work = StepWork(
        num_tokens=int(tokens / num_batches),
        prefill_pairs=int(totals.attention_pairs / dp / num_batches),
        num_rows=int(totals.num_requests / dp / num_batches),
    )
    return num_batches * max(cost.stage_seconds(work))


def _decode_bound(cost: CostModel, limits: SchedulerLimits, totals: InputTotals) -> float:
    """The larger of the stages' work at full batch and of the longest output's steps, one after the other."""
    layout = cost.layout
    num_rows = (totals.output_tokens - totals.num_requests) / layout.dp
    if num_rows == 0:
        return 0.0
    mean_context = totals.decode_context / (totals.output_tokens - totals.num_requests)
    room = limits.num_gpu_blocks * limits.block_size / mean_context
    batch = min(room, limits.max_num_seqs, -(-totals.num_requests // layout.dp)) / layout.pp
    batch = max(1.0, batch)
    work = StepWork(num_tokens=int(batch + 0.999), decode_context=int(batch * mean_context), num_rows=int(batch))
    stages = cost.stage_seconds(work)
    latency = sum(stages) + (layout.pp - 1) * cost.send_seconds(int(batch)) + cost.sample_seconds()
    at_full_batch = num_rows / batch * max(max(stages), latency / layout.pp)
    alone = StepWork(num_tokens=1, decode_context=totals.shortest_input, num_rows=1)
    one_step = sum(cost.stage_seconds(alone)) + cost.sample_seconds()
    return max(at_full_batch, (totals.longest_output - 1) * one_step)

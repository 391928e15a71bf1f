"""A closed form for the seconds of a run, optimistic in every part: what no simulated run of the pair gets below.

Prefill is full micro-batches through the slowest stage, without filling or draining the pipeline. Decode runs at the
largest batch that the GPU pool, the slots and the input allow from its first step to its last. Transitions are as few
as the two pools allow, and all weights that are exchanged for the last one come early. Copies are free.

With mixed steps as many decode rows as are on the GPU ride in every micro-batch. They cost what they add to it: in
compute-bound micro-batches their share of the matrices and the reading of their KV, but no reading of weights. The rest
is decoded in whichever layout is faster for it. The longest output's steps take their time one after the other in
either layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.plan.cost import CostModel, StepWork
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.transfers import reshard_seconds
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.sched.packing import LEAST_PROMPT_SHARE, MICRO_BATCH_OVERHEAD_TOKENS
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
    counts_longest: bool = True,
) -> SecondsByPart:
    """The closed form for the whole input, which `pair.dp` replicas share evenly.

    `counts_longest` has the longest output's steps as a floor. Without it the closed form tells stages of other depths
    apart, which the floor hides: they change what a full pipeline takes, and not the steps of one sequence.
    """
    reshard = reshard_seconds(shape, pair, hardware, dtype, weight_reshard, limits.block_size)
    prefill = CostModel(shape, hardware, pair.prefill, dtype)
    decode = CostModel(shape, hardware, pair.decode, dtype)
    work = _Work.of(totals, pair.dp)
    if work.num_rows == 0:
        return SecondsByPart(_prefill_seconds(prefill, limits, work, 0), 0.0, 0.0)
    batch = _largest_batch(limits, work)
    row_seconds = _row_seconds(decode, work, batch)
    floor_steps = totals.longest_output - 1 if counts_longest else 0
    alone = _alone_seconds(decode, totals) * floor_steps
    last = reshard.to(Phase.DECODE, preloaded=float(weight_reshard == "exchange"))
    if not limits.mixes_steps:
        blocks = work.input_tokens // limits.block_size
        num_cycles = max(1, int(blocks // (limits.num_host_blocks + limits.num_gpu_blocks)))
        transition = last + (num_cycles - 1) * (reshard.to(Phase.DECODE) + reshard.to(Phase.PREFILL))
        seconds = _prefill_seconds(prefill, limits, work, 0)
        return SecondsByPart(seconds, max(work.num_rows * row_seconds, alone), transition)
    alone = min(alone, _alone_seconds(prefill, totals) * floor_steps)
    stay_seconds = _row_seconds(prefill, work, batch)
    most = _most_riding_rows(limits, work, batch / pair.prefill.pp)
    options = []
    for riding in (0.0, most / 2, most):
        seconds = _prefill_seconds(prefill, limits, work, riding)
        # With a change of layout, sooner or later; and without one.
        for once, transition in ((min(row_seconds, stay_seconds), last), (stay_seconds, 0.0)):
            rest = (work.num_rows - riding) * once
            options.append(SecondsByPart(seconds, max(rest, alone - seconds), transition))
    return min(options, key=lambda option: option.total)


def typical_steps(pair: LayoutPair, limits: SchedulerLimits, totals: InputTotals) -> dict[Phase, StepWork]:
    """What the closed form has in a step of each phase: a micro-batch with all rows that can ride, a group's decode."""
    work = _Work.of(totals, pair.dp)
    if work.num_rows == 0:
        return {Phase.PREFILL: _prefill_step(_prompt_tokens(limits, work), work, 0)[1], Phase.DECODE: StepWork()}
    batch = _largest_batch(limits, work)
    riding = _most_riding_rows(limits, work, batch / pair.prefill.pp) if limits.mixes_steps else 0
    return {
        Phase.PREFILL: _prefill_step(_prompt_tokens(limits, work), work, riding)[1],
        Phase.DECODE: _decode_step(max(1.0, batch / pair.decode.pp), work),
    }


class _Work(NamedTuple):
    """One replica's even share of the input. `num_rows` are all tokens after the first ones, in one row each."""

    num_requests: float
    input_tokens: float
    attention_pairs: float
    num_rows: float
    mean_context: float

    @classmethod
    def of(cls, totals: InputTotals, dp: int) -> _Work:
        num_rows = totals.output_tokens - totals.num_requests
        return cls(
            totals.num_requests / dp,
            totals.input_tokens / dp,
            totals.attention_pairs / dp,
            num_rows / dp,
            totals.decode_context / num_rows if num_rows else 0.0,
        )


def _largest_batch(limits: SchedulerLimits, work: _Work) -> float:
    """The most sequences that decode at once."""
    room = limits.num_gpu_blocks * limits.block_size / work.mean_context
    return max(1.0, min(room, limits.max_num_seqs, -(-work.num_requests // 1)))


def _prompt_tokens(limits: SchedulerLimits, work: _Work) -> float:
    """Tokens of a micro-batch without rows: a phase with little work has smaller ones, as the scheduler cuts them."""
    if limits.prefill_stages == 1:
        return float(limits.max_num_batched_tokens)
    best = math.sqrt(work.input_tokens * MICRO_BATCH_OVERHEAD_TOKENS / (limits.prefill_stages - 1))
    return min(limits.max_num_batched_tokens, max(MICRO_BATCH_OVERHEAD_TOKENS, best / 2))


def _most_riding_rows(limits: SchedulerLimits, work: _Work, group: float) -> float:
    """Rows that ride when each micro-batch has a whole group of `group` rows and prompts fill the rest of it."""
    num_tokens = _prompt_tokens(limits, work)
    prompt_tokens = max(num_tokens - group, num_tokens / LEAST_PROMPT_SHARE)
    return min(work.num_rows, (work.input_tokens / prompt_tokens + limits.prefill_stages) * group)


def _prefill_seconds(cost: CostModel, limits: SchedulerLimits, work: _Work, riding: float) -> float:
    """All prompts and `riding` rows through the slowest stage, in equal micro-batches of the best size allowed."""
    sizes = [limits.max_num_batched_tokens]
    while sizes[-1] >= 2 * MICRO_BATCH_OVERHEAD_TOKENS:
        sizes.append(sizes[-1] // 2)
    return min(_seconds_in_batches(cost, size, work, riding) for size in sizes)


def _seconds_in_batches(cost: CostModel, size: float, work: _Work, riding: float) -> float:
    num_batches, step = _prefill_step(size, work, riding)
    return num_batches * max(cost.stage_seconds(step))


def _prefill_step(size: float, work: _Work, riding: float) -> tuple[float, StepWork]:
    """How many micro-batches of `size` tokens take all prompts and `riding` rows, and what is in each."""
    num_tokens = work.input_tokens + riding
    num_batches = max(1.0, min(num_tokens / size, work.input_tokens * LEAST_PROMPT_SHARE / size))
    step = StepWork(
        num_tokens=int(num_tokens / num_batches),
        prefill_pairs=int(work.attention_pairs / num_batches),
        decode_context=int(riding * work.mean_context / num_batches),
        num_rows=int((work.num_requests + riding) / num_batches),
    )
    return num_batches, step


def _row_seconds(cost: CostModel, work: _Work, batch: float) -> float:
    """Seconds of one row, in a step of its own with as many others as there can be."""
    num_stages = cost.layout.pp
    rows = max(1.0, batch / num_stages)
    stages = cost.stage_seconds(_decode_step(rows, work))
    latency = sum(stages) + (num_stages - 1) * cost.send_seconds(int(rows)) + cost.sample_seconds()
    return max(max(stages), latency / num_stages) / rows


def _decode_step(rows: float, work: _Work) -> StepWork:
    return StepWork(num_tokens=int(rows + 0.999), decode_context=int(rows * work.mean_context), num_rows=int(rows))


def _alone_seconds(cost: CostModel, totals: InputTotals) -> float:
    """One step of one sequence."""
    step = StepWork(num_tokens=1, decode_context=totals.shortest_input, num_rows=1)
    return sum(cost.stage_seconds(step)) + cost.sample_seconds()

"""The best that an engine with one layout and no host pool could do: the planner's yardstick.

Its layouts are all that fit, its policy and its step's tokens the best of those tried, as a user would tune them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from seesaw_ds.config import RunConfig, dtype_name
from seesaw_ds.layout import LayoutPair, ParallelLayout
from seesaw_ds.plan.candidates import broken_rule, layout_pairs, num_seqs_to_try
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun, TookTooLong
from seesaw_ds.plan.static_engine import BatchPolicy, HostWork, StaticEngineLimits, run_static_engine
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape

CHUNK_TOKENS = (256, 512, 1024, 2048, 4096)
"""Sizes of a chunked step that are tried; whole prompts are tried with the largest."""

_FIRST_TRY = (BatchPolicy.CHUNKED, 512)
_NUM_FINALISTS = 3


@dataclass(frozen=True, slots=True)
class StaticEngineKind:
    """Which engine is simulated: with the host's work of `host` in place of the machine's `step_seconds`, if given.

    With virtual engines each pipeline group has its own queue and its own share of the KV room.
    """

    host: HostWork | None = None
    has_virtual_engines: bool = False


CURRENT_ENGINE = StaticEngineKind()


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """A static layout of an engine with its policy, and the simulated run."""

    kind: StaticEngineKind
    layout: ParallelLayout
    policy: BatchPolicy
    max_num_batched_tokens: int
    max_num_seqs: int
    simulated: SimulatedRun


def static_kv_tokens(
    run: RunConfig, shape: ModelShape, hardware: HardwareProfile, layout: ParallelLayout, step_tokens: int
) -> int:
    """KV tokens that a replica has room for beside its weights and the activations of a step; 0 when there is none."""
    dtype = dtype_name(run, shape)
    itemsize = DTYPE_BYTES[dtype]
    num_layers = max(layers.size for layers in layout.stage_layers(shape.num_layers))
    table = shape.vocab_size * shape.hidden_size * itemsize / layout.tp
    weights = num_layers * shape.layer_parameters * itemsize / layout.tp + table * (2 if layout.pp == 1 else 1)
    width = 6 * shape.hidden_size + 3 * (shape.intermediate_size + shape.num_heads * shape.head_dim) / layout.tp
    activations = step_tokens * width * itemsize + 3 * run.max_num_seqs * shape.vocab_size * 4
    budget = hardware.memory_bytes * run.gpu_memory_utilization - hardware.runtime_bytes
    room = budget - weights - activations
    token_bytes = shape.kv_block_bytes(num_layers, shape.num_kv_heads, 1, dtype) / layout.tp
    return max(0, int(room / token_bytes))


def static_layouts(shape: ModelShape, num_devices: int, devices_per_node: int) -> list[ParallelLayout]:
    """Every single layout that the heads and layers allow."""
    pairs = [pair for pair in layout_pairs(num_devices, devices_per_node) if pair.is_static]
    return [pair.prefill for pair in pairs if broken_rule(shape, LayoutPair(pair.prefill, pair.prefill)) is None]


def best_static_plan(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    layouts: Sequence[ParallelLayout],
    lengths: Sequence[RequestLength],
    kind: StaticEngineKind = CURRENT_ENGINE,
) -> StaticPlan | None:
    """The fastest of `layouts` with any policy, step size and number of sequences at once; None when none fits.

    All layouts are simulated in chunks of the middle size; the few fastest then with every other setting. So far with
    the fewest sequences at once; the best setting then with more, while that helps.
    """

    def simulate(
        layout: ParallelLayout, policy: BatchPolicy, step_tokens: int, num_seqs: int, stop_after: float
    ) -> StaticPlan | None:
        settings = replace(run, max_num_seqs=num_seqs)
        try:
            return _simulate(settings, shape, hardware, layout, policy, step_tokens, lengths, kind, stop_after)
        except TookTooLong:
            return None

    fewest, *more = reversed(num_seqs_to_try(run, num_requests=run.max_num_seqs, dp=1))
    first: list[StaticPlan] = []
    for layout in layouts:
        last = first[_NUM_FINALISTS - 1].simulated.seconds if len(first) >= _NUM_FINALISTS else math.inf
        if plan := simulate(layout, *_FIRST_TRY, fewest, stop_after=last):
            first.append(plan)
            first.sort(key=lambda plan: plan.simulated.seconds)
    settings = [(BatchPolicy.CHUNKED, tokens) for tokens in CHUNK_TOKENS]
    settings += [(policy, CHUNK_TOKENS[-1]) for policy in (BatchPolicy.PREFILL_FIRST, BatchPolicy.DECODE_FIRST)]
    settings.remove(_FIRST_TRY)
    if not first:
        return None
    best = first[0]
    for finalist in first[:_NUM_FINALISTS]:
        for policy, tokens in settings:
            best = simulate(finalist.layout, policy, tokens, fewest, best.simulated.seconds) or best
    for num_seqs in more:
        faster = simulate(best.layout, best.policy, best.max_num_batched_tokens, num_seqs, best.simulated.seconds)
        if faster is None:
            break
        best = faster
    return best


def _simulate(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    layout: ParallelLayout,
    policy: BatchPolicy,
    step_tokens: int,
    lengths: Sequence[RequestLength],
    kind: StaticEngineKind,
    stop_after: float,
) -> StaticPlan | None:
    """One simulation; None when the longest request does not fit beside the weights."""
    num_queues = layout.pp if kind.has_virtual_engines else 1
    num_kv_tokens = static_kv_tokens(run, shape, hardware, layout, step_tokens) // num_queues
    limits = StaticEngineLimits(num_kv_tokens, run.max_num_seqs, step_tokens, run.kv_block_size, num_queues)
    if not limits.holds(lengths):
        return None
    dtype = dtype_name(run, shape)
    simulated = run_static_engine(shape, hardware, layout, limits, policy, lengths, dtype, kind.host, stop_after)
    return StaticPlan(kind, layout, policy, step_tokens, run.max_num_seqs, simulated)

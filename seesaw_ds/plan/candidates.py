"""Which layouts a machine could run a model in, and the memory of each: the planner's search space."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from seesaw_ds.config import RunConfig, dtype_name, max_model_len
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase
from seesaw_ds.plan.bounds import InputTotals, SecondsByPart, bound_seconds, typical_steps
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.hardware import GIB, HardwareProfile
from seesaw_ds.plan.memory import PoolSizes, size_pools
from seesaw_ds.plan.stages import StageTimes, unequal_splits
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape

MICRO_BATCH_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
"""Micro-batch sizes that are tried; attention backends and all-reduces gain nothing from larger ones."""

NUM_SEQS = (256, 512, 1024)
"""Most sequences at once that are tried, beside the most that the run allows and its input has."""

MOST_DEVICES_A_NODE = 16
"""How far to look for a number of devices that would do."""


LEAST_GAIN = 0.005
"""The share of a run's seconds that stages of unequal depth must save to be taken."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration of the engine that fits: its run settings, pools, and the closed form's seconds.

    `stages` are those of each phase. `alternative` has the layers split in another way, into equal stages where this
    one's are not; its closed form promises less.
    """

    run: RunConfig
    pools: PoolSizes
    limits: SchedulerLimits
    bound: SecondsByPart
    stages: Mapping[Phase, StageTimes]
    alternative: Candidate | None = None

    @property
    def pair(self) -> LayoutPair:
        """Its layouts."""
        return self.run.layout_pair

    @property
    def least_seconds(self) -> float:
        """What neither it nor its alternative gets below."""
        return min(self.bound.total, self.alternative.bound.total if self.alternative else math.inf)


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the machine and the checkpoint at hand rule out.

    micro_batch_tokens   sizes of prefill micro-batches to try
    host_bytes           free memory of a node, for the KV pools and copies of the weights; None: enough
    folder_cells         cells of a layer in a checkpoint of the cells format; None: any other format
    host_pool_seconds    what a GiB of the host pool takes to provide and to give back; 0: the pool's size is given
    """

    micro_batch_tokens: tuple[int, ...] = MICRO_BATCH_TOKENS
    host_bytes: int | None = None
    folder_cells: int | None = None
    host_pool_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Rejected:
    """Layouts that cannot run, and the rule that they break."""

    layouts: str
    reason: str


_NO_CONSTRAINTS = Constraints()


def replica_layouts(replica_size: int) -> Iterator[tuple[int, int]]:
    """Every (tp, pp) of `replica_size` devices."""
    for tp in range(1, replica_size + 1):
        if replica_size % tp == 0:
            yield tp, replica_size // tp


def layout_pairs(num_devices: int, devices_per_node: int) -> Iterator[LayoutPair]:
    """Every pair of layouts over all devices whose replicas lie within a node, where they can share their KV."""
    for replica_size in range(1, min(num_devices, devices_per_node) + 1):
        if num_devices % replica_size or devices_per_node % replica_size:
            continue
        dp = num_devices // replica_size
        for prefill_tp, prefill_pp in replica_layouts(replica_size):
            for decode_tp, decode_pp in replica_layouts(replica_size):
                yield LayoutPair(ParallelLayout(dp, prefill_tp, prefill_pp), ParallelLayout(dp, decode_tp, decode_pp))


def broken_rule(shape: ModelShape, pair: LayoutPair, folder_cells: int | None = None) -> str | None:
    """The rule of heads, layers and cells of the checkpoint that `pair` breaks, if any."""
    cells = pair.cells_per_layer
    for name, size in (
        ("num_attention_heads", shape.num_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("intermediate_size", shape.intermediate_size),
    ):
        if size % cells:
            return f"{name}={size} is not a multiple of {cells}"
    deepest = max(pair.prefill.pp, pair.decode.pp)
    if deepest > shape.num_layers:
        return f"{deepest} stages for num_hidden_layers={shape.num_layers}"
    if folder_cells is not None and folder_cells % cells:
        return f"the checkpoint's {folder_cells} cells a layer cannot make {cells}; convert it with --max-tp {cells}"
    return None


def scheduler_limits(run: RunConfig, pools: PoolSizes) -> SchedulerLimits:
    """What one replica's scheduler is bounded by."""
    return SchedulerLimits(
        block_size=run.kv_block_size,
        num_gpu_blocks=pools.num_gpu_blocks,
        num_host_blocks=pools.num_host_blocks,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        prefill_stages=run.layout_pair.prefill.pp,
        decode_stages=run.layout_pair.decode.pp,
        mixes_steps=run.mixed_steps,
        is_static=run.layout_pair.is_static,
    )


def find_candidates(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    num_devices: int,
    devices_per_node: int,
    totals: InputTotals,
    constraints: Constraints = _NO_CONSTRAINTS,
) -> tuple[list[Candidate], list[Rejected]]:
    """Everything that fits, best bound first, and everything that does not; `run.layouts` is ignored."""
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    for pair in layout_pairs(num_devices, devices_per_node):
        reason = broken_rule(shape, pair, constraints.folder_cells)
        fitting = [] if reason else list(_sized(run, shape, hardware, pair, totals, constraints))
        candidates += [item for item in fitting if isinstance(item, Candidate)]
        if reason is None and all(isinstance(item, str) for item in fitting):
            reason = str(fitting[0])
        if reason is not None:
            rejected.append(Rejected(str(pair), reason))
    candidates.sort(key=lambda candidate: candidate.least_seconds)
    return candidates, rejected


def num_seqs_to_try(run: RunConfig, num_requests: int, dp: int) -> list[int]:
    """Most sequences at once in a replica, the largest first: none more than the run allows, or than there are."""
    most = min(run.max_num_seqs, -(-num_requests // dp))
    return [most, *(num_seqs for num_seqs in reversed(NUM_SEQS) if num_seqs < most)]


def _sized(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    pair: LayoutPair,
    totals: InputTotals,
    constraints: Constraints,
) -> Iterator[Candidate | str]:
    """For each micro-batch size a candidate, with as many sequences at once as fit, or why there is none."""
    for num_tokens in constraints.micro_batch_tokens:
        for num_seqs in num_seqs_to_try(run, totals.num_requests, pair.dp):
            settings = replace(_settings(run, pair, num_tokens), max_num_seqs=num_seqs)
            sized = _candidate_or_reason(settings, shape, hardware, totals, constraints)
            if isinstance(sized, Candidate):
                break
        yield sized


def with_fewer_seqs(
    candidate: Candidate,
    shape: ModelShape,
    hardware: HardwareProfile,
    totals: InputTotals,
    constraints: Constraints = _NO_CONSTRAINTS,
) -> list[Candidate]:
    """The candidate's pair with the next smaller number of sequences at once, in all sizes; none when there is none."""
    pair = candidate.pair.with_equal_stages
    fewer = num_seqs_to_try(candidate.run, totals.num_requests, pair.dp)[1:]
    if not fewer:
        return []
    settings = replace(candidate.run, max_num_seqs=fewer[0])
    sized = _sized(settings, shape, hardware, pair, totals, constraints)
    return [item for item in sized if isinstance(item, Candidate)]


def _host_block_bytes(run: RunConfig, shape: ModelShape) -> int:
    """All layers and heads of a KV block."""
    return shape.kv_block_bytes(shape.num_layers, shape.num_kv_heads, run.kv_block_size, dtype_name(run, shape))


def _longest_blocks(run: RunConfig, shape: ModelShape) -> int:
    """KV blocks of one request of the longest length."""
    return blocks_for(max_model_len(run, shape), run.kv_block_size)


def least_host_gib(run: RunConfig, shape: ModelShape, dp: int) -> float:
    """GiB of host pools, over all replicas, in which each has room for one request of the longest length."""
    block_bytes, longest = _host_block_bytes(run, shape), _longest_blocks(run, shape)
    return dp * (longest + 1) * block_bytes / GIB


def with_host_pool(
    candidate: Candidate, gib: float, shape: ModelShape, hardware: HardwareProfile, totals: InputTotals
) -> Candidate:
    """The candidate with a host pool of `gib`, or as much as the longest request needs."""
    run = candidate.run
    size = max(gib, least_host_gib(run, shape, candidate.pair.dp))
    return make_candidate(replace(run, kv_offloading_size=size), shape, hardware, totals)


def _candidate_or_reason(
    run: RunConfig, shape: ModelShape, hardware: HardwareProfile, totals: InputTotals, constraints: Constraints
) -> Candidate | str:
    try:
        candidate = make_candidate(run, shape, hardware, totals)
    except UserError as error:
        return str(error)
    reason = _lacks_host_memory(run, shape, candidate.pools, constraints.host_bytes)
    return _balanced(candidate, shape, hardware, totals) if reason is None else reason


def make_candidate(run: RunConfig, shape: ModelShape, hardware: HardwareProfile, totals: InputTotals) -> Candidate:
    """The configuration of `run`. Raises UserError when it does not fit the memory."""
    pair, dtype = run.layout_pair, dtype_name(run, shape)
    pools = size_pools(run, shape, hardware.memory_bytes, hardware.runtime_bytes)
    limits = scheduler_limits(run, pools)
    bound = bound_seconds(shape, hardware, pair, limits, totals, dtype, run.weight_reshard)
    steps = typical_steps(pair, limits, totals)
    stages = {phase: StageTimes.of(CostModel(shape, hardware, pair[phase], dtype), steps[phase]) for phase in Phase}
    return Candidate(run, pools, limits, bound, stages)


def _balanced(equal: Candidate, shape: ModelShape, hardware: HardwareProfile, totals: InputTotals) -> Candidate:
    """`equal`, which has equal stages, or the split that balances them, by the closed form without its floor."""
    dtype = dtype_name(equal.run, shape)
    costs = {phase: CostModel(shape, hardware, equal.pair[phase], dtype) for phase in Phase}
    splits = []
    for pair in unequal_splits(costs, typical_steps(equal.pair, equal.limits, totals)):
        try:
            splits.append(make_candidate(replace(equal.run, layouts=str(pair)), shape, hardware, totals))
        except UserError:
            continue  # the stage with most layers does not fit
    if not splits:
        return equal

    def seconds(candidate: Candidate) -> float:
        pair, limits, reshard = candidate.pair, candidate.limits, candidate.run.weight_reshard
        return bound_seconds(shape, hardware, pair, limits, totals, dtype, reshard, counts_longest=False).total

    best = min(splits, key=seconds)
    if seconds(best) < (1 - LEAST_GAIN) * seconds(equal):
        return replace(best, alternative=equal)
    return replace(equal, alternative=best)


def _settings(run: RunConfig, pair: LayoutPair, num_tokens: int) -> RunConfig:
    """The run with these layouts; cells that cannot be exchanged are reloaded."""
    reshard = run.weight_reshard if pair.is_nested else "host"
    return replace(run, layouts=str(pair), weight_reshard=reshard, max_num_batched_tokens=num_tokens)


def _lacks_host_memory(run: RunConfig, shape: ModelShape, pools: PoolSizes, host_bytes: int | None) -> str | None:
    """How much host memory the run's replicas ask for, when a node's has less."""
    layer_bytes = shape.num_layers * shape.layer_parameters * DTYPE_BYTES[dtype_name(run, shape)]
    weights = layer_bytes if run.weight_reshard == "host" else 0
    needed = run.layout_pair.dp * (pools.host_bytes + weights)
    if host_bytes is None or needed <= host_bytes:
        return None
    copies = f" and {weights / GIB:.1f} GiB of weights" if weights else ""
    return (
        f"host memory: {run.layout_pair.dp} x {pools.host_bytes / GIB:.1f} GiB of KV{copies} are asked for, "
        f"{host_bytes / GIB:.1f} GiB are free; lower kv_offloading_size"
    )


def what_would_fit(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    num_devices: int,
    rejected: Sequence[Rejected],
    constraints: Constraints = _NO_CONSTRAINTS,
) -> str:
    """What an impossible demand lacks: devices for the weights, host memory, or what the layouts tried ask for."""
    itemsize = DTYPE_BYTES[dtype_name(run, shape)]
    weights = (shape.num_layers * shape.layer_parameters + 2 * shape.vocab_size * shape.hidden_size) * itemsize
    budget = hardware.memory_bytes * run.gpu_memory_utilization - hardware.runtime_bytes
    enough = _enough_devices(run, shape, hardware, num_devices, constraints)
    if weights >= budget * num_devices:
        needed = int(-(-weights // budget))
        return (
            f"the weights take {weights / GIB:.1f} GiB, and {num_devices} x {hardware.name} give "
            f"{budget * num_devices / GIB:.1f} GiB at gpu_memory_utilization={run.gpu_memory_utilization}: "
            f"at least {needed} devices are needed for them, and room for KV besides{enough}"
        )
    block_bytes, longest = _host_block_bytes(run, shape), _longest_blocks(run, shape)
    if run.num_host_kv_blocks is None and longest * block_bytes > run.kv_offloading_size * GIB:
        return (
            f"kv_offloading_size={run.kv_offloading_size:g}: one request of max_model_len={max_model_len(run, shape)} "
            f"needs {longest * block_bytes / GIB:.2f} GiB of host KV in each replica; raise it, or lower max_model_len"
        )
    layouts_by_reason: dict[str, list[str]] = {}
    for item in rejected:
        layouts_by_reason.setdefault(item.reason, []).append(item.layouts)
    return "; ".join(f"{', '.join(layouts)}: {reason}" for reason, layouts in layouts_by_reason.items()) + enough


def _enough_devices(
    run: RunConfig, shape: ModelShape, hardware: HardwareProfile, num_devices: int, constraints: Constraints
) -> str:
    """The next larger number of devices, within one node, that some layout fits on; nothing when none is found."""
    for more in range(num_devices + 1, max(MOST_DEVICES_A_NODE, num_devices) + 1):
        for pair in layout_pairs(more, more):
            if broken_rule(shape, pair, constraints.folder_cells) is not None:
                continue
            settings = _settings(run, pair, min(constraints.micro_batch_tokens))
            try:
                pools = size_pools(settings, shape, hardware.memory_bytes, hardware.runtime_bytes)
            except UserError:
                continue
            if _lacks_host_memory(settings, shape, pools, constraints.host_bytes) is None:
                return f"; {more} devices of one node would do, as {pair}"
    return ""

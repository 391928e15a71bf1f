"""``layouts: auto``: plans a run from the model, the machine, its free memory and the lengths of the input at hand."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import psutil

from seesaw_ds.checkpoint.cell_layout import check_cells, is_cells_folder
from seesaw_ds.config import ALL_HOST_MEMORY, RunConfig, dtype_name
from seesaw_ds.engine.hardware import device_name, find_hardware, is_cpu
from seesaw_ds.engine.input_lengths import input_lengths
from seesaw_ds.plan.candidates import MICRO_BATCH_TOKENS, Constraints, least_host_gib
from seesaw_ds.plan.hardware import GIB, HardwareProfile
from seesaw_ds.plan.layout_choice import choice_text
from seesaw_ds.plan.planner import Plan, make_plan
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

logger = logging.getLogger(__name__)

NUM_LOSERS_NAMED = 5

# Of the free memory, at most this part is the host pool's where the settings leave its size open.
_HOST_SHARE = 0.6
# On two H200 0.35 s a GiB until its pages are there and locked, and 0.3 s until they are given back.
_HOST_POOL_SECONDS = 0.65


def choose_layouts(run: RunConfig, world_size: int, node_size: int, overwrite: bool) -> RunConfig:
    """`run` with the layouts that are predicted to finish its input first, and says which and why on the log.

    `world_size` ranks, `node_size` of them on a node, have been launched. With the layouts come weights' way of moving,
    micro-batch tokens and sequences at once (at most those set), and the size of the host pool unless it is set. Raises
    UserError, with what would be needed, when nothing fits.
    """
    start = time.monotonic()
    shape = model_shape(read_hf_config(run.model))
    hardware = find_hardware(run.hardware)
    if is_cpu(device_name()):
        hardware = replace(hardware, memory_bytes=_rank_share_of_memory(node_size))
    # Where every line is at fault any layout will do to say so.
    lengths = input_lengths(run, shape, overwrite) or [RequestLength(1, 1)]
    constraints = _constraints(run, shape)
    if run.kv_offloading_size == ALL_HOST_MEMORY:
        run = replace(run, kv_offloading_size=_largest_host_pool(run, shape, lengths, world_size))
        constraints = replace(constraints, host_pool_seconds=_HOST_POOL_SECONDS)
    plan = make_plan(run, shape, hardware, world_size, lengths, node_size, with_static=False, constraints=constraints)
    _explain(plan, hardware, time.monotonic() - start)
    # The profile is named, so that the run goes on choosing by it.
    return replace(plan.best.candidate.run, hardware=run.hardware or hardware.name)


def _constraints(run: RunConfig, shape: ModelShape) -> Constraints:
    smaller = tuple(tokens for tokens in MICRO_BATCH_TOKENS if tokens < run.max_num_batched_tokens)
    folder_cells = None
    if run.load_format == "auto" and is_cells_folder(run.model):
        folder_cells = check_cells(run.model, shape)
    return Constraints((*smaller, run.max_num_batched_tokens), psutil.virtual_memory().available, folder_cells)


def _largest_host_pool(run: RunConfig, shape: ModelShape, lengths: list[RequestLength], world_size: int) -> float:
    """GiB of host pool: a part of what is free, but no more than all sequences fill together; the longest has room."""
    token_bytes = shape.kv_block_bytes(shape.num_layers, shape.num_kv_heads, 1, dtype_name(run, shape))
    all_gib = sum(map(sum, lengths)) * token_bytes / GIB
    free_gib = _HOST_SHARE * psutil.virtual_memory().available / GIB
    return max(min(free_gib, all_gib), least_host_gib(run, shape, world_size))


def _rank_share_of_memory(node_size: int) -> int:
    """Ranks on CPU share half of the free memory; the rest is for the host pool and processes."""
    return int(psutil.virtual_memory().available) // 2 // node_size


def _explain(plan: Plan, hardware: HardwareProfile, seconds: float) -> None:
    best = plan.best
    num_left = best.simulated.num_left_after_stay
    stay = "" if num_left is None else f"{choice_text(best.candidate.pair, num_left)}; "
    others = [f"{done.candidate.run.layouts} {done.seconds:.1f} s" for done in plan.ranking[1:]]
    others += [f"{candidate.run.layouts} over {candidate.bound.total:.1f} s" for candidate in plan.pruned]
    if len(others) > NUM_LOSERS_NAMED:
        others[NUM_LOSERS_NAMED:] = [f"{len(others) - NUM_LOSERS_NAMED} more"]
    if plan.rejected:
        others.append(f"{len(plan.rejected)} do not fit, such as {plan.rejected[0].layouts}: {plan.rejected[0].reason}")
    logger.info(
        "layouts=auto: %s, max_num_batched_tokens=%d, max_num_seqs=%d, kv_offloading_size=%.1f, "
        "predicted %.1f s for %d sequences: prefill %.1f, decode %.1f at a mean batch of %.0f, "
        "%d transitions %.1f (%splanned in %.1f s for hardware %s)",
        best.candidate.run.layouts,
        best.candidate.run.max_num_batched_tokens,
        best.candidate.run.max_num_seqs,
        best.candidate.run.kv_offloading_size,
        best.seconds,
        best.num_requests,
        best.prefill_seconds,
        best.decode_seconds,
        best.simulated.mean_decode_batch,
        best.simulated.num_transitions,
        best.transition_seconds,
        stay,
        seconds,
        hardware.name,
    )
    logger.info("layouts=auto: the others: %s", "; ".join(others) or "none")

"""How much memory a CUDA device has left for KV, measured after the largest steps have run once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from seesaw_ds.config import RunConfig
from seesaw_ds.errors import UserError
from seesaw_ds.kv.exchange import KV_SCRATCH_BYTES
from seesaw_ds.model.sampler import sampling_bytes
from seesaw_ds.plan.memory import GIB
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import ModelShape

logger = logging.getLogger(__name__)

# A captured graph of a step of 80 layers.
_GRAPH_BYTES = 8 << 20
_USUAL_GRAPHS = 32
# What the allocator loses between tensors that come and go.
_FRAGMENT_BYTES = 128 << 20


@dataclass(frozen=True)
class StepBytes:
    """What steps take beyond what is always there, as measured: a prefill micro-batch, the segments of one that are
    graphs, and a decode step.

    Graphs keep their memory, which `num_graphs` of them share; micro-batches that are not full need theirs besides.
    """

    micro_batch: int
    segments: int
    decode_step: int
    num_graphs: int


def peak_bytes(work: Callable[[], None]) -> int:
    """The most device memory that `work` had at once beyond what it found."""
    found = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - found


def measure_kv_blocks(
    run: RunConfig, shape: ModelShape, block_bytes: int, weight_bytes: int, most_rows: int, steps: StepBytes
) -> int:
    """KV blocks that fit this device within `gpu_memory_utilization`; says on the log where the memory goes.

    `weight_bytes` are those of the layers and the vocabulary's tables, `most_rows` the most that are sampled at once.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    budget = int(total * run.gpu_memory_utilization)
    logits_bytes = most_rows * shape.vocab_size * torch.float32.itemsize
    parts = {
        "weights": weight_bytes,
        "workspaces": torch.cuda.memory_allocated() - weight_bytes,
        "activations": max(steps.micro_batch, sampling_bytes(most_rows, shape.vocab_size)),
        "graphs": max(steps.segments, steps.decode_step + logits_bytes) + steps.num_graphs * _GRAPH_BYTES,
        "fragments": _FRAGMENT_BYTES,
        "CUDA, NCCL": total - free - torch.cuda.memory_reserved(),
    }
    num_blocks = max(0, budget - sum(parts.values())) // block_bytes
    if dist.get_rank() == 0:
        parts |= {"KV": num_blocks * block_bytes, "left free": total - budget}
        text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        logger.info("device memory, GiB of %.2f: %s", total / GIB, text)
    return num_blocks


def runtime_bytes() -> int:
    """What a run takes of a device beside weights, activations and KV, by what CUDA and NCCL take of this one now."""
    free, total = torch.cuda.mem_get_info()
    buffers = KV_SCRATCH_BYTES + _FRAGMENT_BYTES + _USUAL_GRAPHS * _GRAPH_BYTES
    return total - free - torch.cuda.memory_reserved() + buffers


def check_kv_blocks(run: RunConfig, longest: int, num_blocks: int) -> None:
    """Raises UserError when `num_blocks` cannot hold one request of `longest` tokens."""
    needed = blocks_for(longest, run.kv_block_size)
    if num_blocks < needed:
        raise UserError(
            f"gpu_memory_utilization={run.gpu_memory_utilization}: leaves {num_blocks} KV blocks on a device, where "
            f"one request of max_model_len={longest} tokens needs {needed}; use more GPUs, or lower max_model_len or "
            "max_num_batched_tokens"
        )


def log_memory_in_use(run: RunConfig, free_before_graphs: int) -> None:
    """Say on the log, from the first rank, what the device has in use once all is made."""
    free, total = torch.cuda.mem_get_info()
    if dist.get_rank() == 0:
        logger.info(
            "device memory in use: %.2f GiB, of %.2f to use; graphs took %.2f",
            (total - free) / GIB,
            total * run.gpu_memory_utilization / GIB,
            (free_before_graphs - free) / GIB,
        )

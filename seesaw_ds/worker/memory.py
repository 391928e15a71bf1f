"""How much memory a CUDA device has left for KV, measured after the largest prefill micro-batch has run."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from seesaw_ds.config import RunConfig
from seesaw_ds.errors import UserError
from seesaw_ds.plan.memory import GIB
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import ModelShape

logger = logging.getLogger(__name__)

# Decode graphs' own buffers, attention workspaces, copy engines' staging: seen to stay below.
_GRAPH_BYTES = 3 * GIB // 2
# The graphs of a second layout share the first one's buffers: what is assumed for the graphs themselves, not measured.
_SECOND_GRAPHS_BYTES = GIB // 2


def measure_kv_blocks(run: RunConfig, shape: ModelShape, block_bytes: int, arena: WeightArena) -> int:
    """KV blocks that fit this device within `gpu_memory_utilization`; says on the log where the memory goes."""
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    activations = torch.cuda.max_memory_allocated() - allocated
    outside_torch = total - free - torch.cuda.memory_reserved()
    logits = 2 * run.max_num_seqs * shape.vocab_size * 4
    budget = int(total * run.gpu_memory_utilization)
    graphs = _GRAPH_BYTES + (_SECOND_GRAPHS_BYTES if run.may_stay else 0)
    left = budget - outside_torch - allocated - activations - logits - graphs
    num_blocks = max(0, left // block_bytes)
    torch.cuda.empty_cache()  # the prefill's buffers come back in another shape
    if dist.get_rank() == 0:
        parts = {
            "weights": arena.nbytes,
            "embedding, LM head, workspaces": allocated - arena.nbytes,
            "KV": num_blocks * block_bytes,
            "activations": activations,
            "graphs, logits": logits + graphs,
            "CUDA, NCCL": outside_torch,
            "left free": total - budget,
        }
        text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        logger.info("device memory, GiB of %.2f: %s", total / GIB, text)
    return num_blocks


def check_kv_blocks(run: RunConfig, longest: int, num_blocks: int) -> None:
    """Raises UserError when `num_blocks` cannot hold one request of `longest` tokens."""
    needed = blocks_for(longest, run.kv_block_size)
    if num_blocks < needed:
        raise UserError(
            f"gpu_memory_utilization={run.gpu_memory_utilization}: leaves {num_blocks} KV blocks on a device, where "
            f"one request of max_model_len={longest} tokens needs {needed}; use more GPUs, or lower max_model_len or "
            "max_num_batched_tokens"
        )

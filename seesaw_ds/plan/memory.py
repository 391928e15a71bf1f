"""Where the memory goes: how many KV blocks of each pool a run can have."""

from __future__ import annotations

from dataclasses import dataclass

from seesaw_ds.config import RunConfig, dtype_name, max_model_len
from seesaw_ds.errors import UserError
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.packing import LEAST_PROMPT_SHARE
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What one rank's memory is spent on, in bytes, for the rank with room for the fewest KV blocks."""

    weights: int
    embeddings: int
    activations: int
    kv: int


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """KV pool sizes of one replica, in blocks, with the bytes behind them.

    The GPU pool holds prompts and running sequences, in the layout of the phase; the host pool those that the GPU has
    no room for.
    """

    num_gpu_blocks: int
    num_host_blocks: int
    host_bytes: int
    device: DeviceMemory


def most_step_tokens(run: RunConfig) -> int:
    """The most tokens of a prefill micro-batch with its decode rows, which leave prompts an eighth of it at least."""
    rows = -(-run.max_num_seqs // run.layout_pair.prefill.pp) if run.mixed_steps else 0
    return max(run.max_num_batched_tokens, rows + run.max_num_batched_tokens // LEAST_PROMPT_SHARE)


def size_pools(run: RunConfig, shape: ModelShape, device_bytes: int, runtime_bytes: int = 0) -> PoolSizes:
    """Size the pools of one replica for devices with `device_bytes` of usable memory each.

    `runtime_bytes` of what `gpu_memory_utilization` leaves go to CUDA, NCCL and the engine's own buffers.

    Raises UserError when the weights do not fit, or when a pool cannot hold one request of `max_model_len`.
    """
    pair = run.layout_pair
    dtype = dtype_name(run, shape)
    itemsize = DTYPE_BYTES[dtype]
    longest = blocks_for(max_model_len(run, shape), run.kv_block_size)

    activations = _activation_bytes(run, shape, itemsize)
    budget = int(device_bytes * run.gpu_memory_utilization) - runtime_bytes

    def blocks_on(rank: int) -> int:
        spent = _layer_bytes(run, shape, itemsize, rank) + _embedding_bytes(run, shape, itemsize, rank) + activations
        return (budget - spent) // kv_block_bytes(run, shape, dtype, rank)

    fullest = min(range(pair.replica_size), key=blocks_on)
    weights = _layer_bytes(run, shape, itemsize, fullest)
    embeddings = _embedding_bytes(run, shape, itemsize, fullest)
    num_gpu_blocks = min(blocks_on(fullest), run.max_num_seqs * longest)  # more than that nobody can use
    if run.num_gpu_kv_blocks is not None:
        num_gpu_blocks = run.num_gpu_kv_blocks
    if num_gpu_blocks < longest:
        _refuse_gpu(run, longest, num_gpu_blocks, budget, weights + embeddings + activations)

    row_bytes = shape.kv_block_bytes(shape.num_layers, shape.num_kv_heads, run.kv_block_size, dtype)
    num_host_blocks = int(run.kv_offloading_size * GIB / pair.dp) // row_bytes
    if run.num_host_kv_blocks is not None:
        num_host_blocks = run.num_host_kv_blocks
    if num_host_blocks < longest:
        raise UserError(
            f"num_host_kv_blocks={num_host_blocks}: one request of max_model_len tokens needs {longest} blocks of "
            f"kv_block_size={run.kv_block_size}; raise kv_offloading_size or num_host_kv_blocks, or lower max_model_len"
        )
    return PoolSizes(
        num_gpu_blocks=num_gpu_blocks,
        num_host_blocks=num_host_blocks,
        host_bytes=num_host_blocks * row_bytes,
        device=DeviceMemory(
            weights, embeddings, activations, num_gpu_blocks * kv_block_bytes(run, shape, dtype, fullest)
        ),
    )


def _refuse_gpu(run: RunConfig, longest: int, num_blocks: int, budget: int, spent: int) -> None:
    if run.num_gpu_kv_blocks is not None:
        raise UserError(
            f"num_gpu_kv_blocks={num_blocks}: one request of max_model_len tokens needs {longest} blocks of "
            f"kv_block_size={run.kv_block_size}; raise num_gpu_kv_blocks, or lower max_model_len"
        )
    raise UserError(
        f"gpu_memory_utilization={run.gpu_memory_utilization}: of {budget / GIB:.2f} GiB a device, weights and "
        f"activations take {spent / GIB:.2f} GiB, which leaves {max(0, num_blocks)} KV blocks "
        f"where one request of max_model_len tokens needs {longest}; use more GPUs, or lower max_model_len or "
        "max_num_batched_tokens"
    )


def _layer_bytes(run: RunConfig, shape: ModelShape, itemsize: int, rank: int) -> int:
    """The arena: the larger of the two phases' shards."""
    pair = run.layout_pair
    owned = (pair[p].shard(rank, shape.num_layers, shape.num_kv_heads).layers.size / pair[p].tp for p in Phase)
    return int(max(owned) * shape.layer_parameters * itemsize)


def _embedding_bytes(run: RunConfig, shape: ModelShape, itemsize: int, rank: int) -> int:
    """The larger of the two phases' shards of the embedding and the LM head; norms are whole on every rank."""
    pair = run.layout_pair
    table = shape.vocab_size * shape.hidden_size * itemsize
    is_shared = shape.tie_word_embeddings and all(pair[phase].pp == 1 for phase in Phase)

    def tables_in(layout: ParallelLayout) -> float:
        stage = layout.coords(rank).pp
        return ((stage == 0) + (stage == layout.pp - 1 and not is_shared)) / layout.tp

    norms = (2 * shape.num_layers + 1) * shape.hidden_size * itemsize
    return int(max(tables_in(pair[phase]) for phase in Phase) * table) + norms


def _activation_bytes(run: RunConfig, shape: ModelShape, itemsize: int) -> int:
    """An upper bound of live activations in a prefill micro-batch, and of the logits of a decode step in float32."""
    tp = min(run.layout_pair.prefill.tp, run.layout_pair.decode.tp)
    width = 6 * shape.hidden_size + 3 * (shape.intermediate_size + shape.num_heads * shape.head_dim) // tp
    return most_step_tokens(run) * width * itemsize + 3 * run.max_num_seqs * shape.vocab_size * 4


def kv_block_bytes(run: RunConfig, shape: ModelShape, dtype: str, rank: int) -> int:
    """Bytes of one KV block on `rank`, in the phase that needs more: its bytes are those of both phases."""
    shards = (run.layout_pair[phase].shard(rank, shape.num_layers, shape.num_kv_heads) for phase in Phase)
    return max(
        shape.kv_block_bytes(shard.layers.size, shard.kv_heads.size, run.kv_block_size, dtype) for shard in shards
    )

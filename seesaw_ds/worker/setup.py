"""Build what a worker runs on: groups, weights, pools. Each step is timed for the start-up report."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig

from seesaw_ds.config import RunConfig, dtype_name, max_model_len
from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.layout import Phase
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.model.build import build_stages, load_arena
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.rope import RotaryTables
from seesaw_ds.model.weights import DummySource, SafetensorsSource, WeightSource, cell_tensors
from seesaw_ds.parallel import device as devices
from seesaw_ds.parallel.all_reduce import choose_all_reduce
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.plan.memory import PoolSizes, blocks_for, size_pools
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.exchange import ExchangeReshard
from seesaw_ds.reshard.host import HostReshard, HostWeights
from seesaw_ds.reshard.plan import WeightReshard, plan_reshard
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape, model_shape, read_hf_config
from seesaw_ds.worker.decode import DecodeRunner
from seesaw_ds.worker.graphs import EagerExecutor, GraphExecutor
from seesaw_ds.worker.prefill import PrefillRunner

logger = logging.getLogger(__name__)


@dataclass
class StartUpTimer:
    """Seconds that each named part of start-up took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


@dataclass
class Engine:
    """All that a worker runs on."""

    state: ParallelState
    stages: dict[Phase, DecoderStage]
    arena: WeightArena
    reshard: WeightReshard
    prefill_pool: DeviceKVPool
    decode_pool: DeviceKVPool
    host_pool: HostKVPool
    prefill: PrefillRunner
    decode: DecodeRunner
    links: tuple[PipelineLink, ...]
    pool_sizes: PoolSizes

    def close(self) -> None:
        self.decode.read_all_tokens()  # the last steps' tokens: their sends complete only when somebody receives
        for link in self.links:
            link.drain()
        self.reshard.close()
        self.host_pool.close()


def init_distributed() -> None:
    """Join the launcher's ranks: NCCL on CUDA, gloo on CPU."""
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = (
        torch.device("cpu") if accelerator.device_name() == "cpu" else torch.device(accelerator.device_name(local_rank))
    )
    devices.set_device(device)
    # No device_id: it would make communicators eagerly, and then a pipeline's sends and receives queue behind each other.
    dist.init_process_group(accelerator.communication_backend_name())


def build_engine(run: RunConfig, timer: StartUpTimer) -> Engine:
    """Load the model in prefill layout and allocate the pools; `torch.distributed` must be up.

    Raises UserError when the model or the pools do not fit.
    """
    hf_config = read_hf_config(run.model)
    shape = model_shape(hf_config)
    layouts = run.layout_pair
    dtype = getattr(torch, dtype_name(run, shape))
    device = devices.device()
    pool_sizes = size_pools(run, shape, _usable_device_bytes(device))
    with timer.part("groups"):
        state = ParallelState(layouts)
    replica_rank = dist.get_rank() - state.replica_ranks[0]
    plan = plan_reshard(layouts, shape.num_layers)
    pieces = cell_tensors(shape, layouts.cells_per_layer)
    backends = choose_backends(
        shape, layouts, run.kv_block_size, run.max_num_seqs, pool_sizes.num_gpu_blocks, dtype, device
    )
    all_reduces = {
        phase: choose_all_reduce(state[phase].tp, device, backends.has_graphs and phase is Phase.DECODE)
        for phase in Phase
    }
    if layouts.is_static:
        all_reduces[Phase.PREFILL] = all_reduces[Phase.DECODE]
    with timer.part("weights"):
        arena = WeightArena(pieces, plan.num_slots[replica_rank], dtype, device)
        source = _source(run, shape, dtype, device)
        host_weights = None
        if run.weight_reshard == "host":
            num_bytes = HostWeights.required_bytes(pieces, shape.num_layers, layouts.cells_per_layer, dtype)
            mapping = _share(f"weights-{state.replica_ranks[0]}", num_bytes, replica_rank, device)
            host_weights = HostWeights(mapping, pieces, shape.num_layers, layouts.cells_per_layer, dtype)
        load_arena(arena, plan, replica_rank, source, host_weights, _log_progress)
        stages = build_stages(
            shape, layouts, state, plan, arena, replica_rank, source, backends.ops, all_reduces, dtype, device
        )
        dist.barrier(group=state.replica)
    if host_weights is not None:
        reshard: WeightReshard = HostReshard(plan, arena, host_weights, replica_rank)
    else:
        reshard = ExchangeReshard(plan, arena, state.replica, replica_rank, list(state.replica_ranks))
    with timer.part("kv pools"):
        itemsize = DTYPE_BYTES[dtype_name(run, shape)]
        layout = HostBlockLayout(
            layouts, shape.num_layers, shape.num_kv_heads, run.kv_block_size, shape.head_dim, itemsize
        )
        num_bytes = layout.row_bytes * pool_sizes.num_host_blocks
        mapping = _share(f"kv-{state.replica_ranks[0]}", num_bytes, replica_rank, device)
        host_pool = HostKVPool(mapping, layout, pool_sizes.num_host_blocks, dtype)
        pools = {
            phase: DeviceKVPool(
                layouts[phase].shard(replica_rank, shape.num_layers, shape.num_kv_heads),
                num_blocks,
                run.kv_block_size,
                shape.head_dim,
                dtype,
                device,
            )
            for phase, num_blocks in (
                (Phase.PREFILL, pool_sizes.num_prefill_blocks),
                (Phase.DECODE, pool_sizes.num_gpu_blocks + 1),  # one for DecodeRunner's padding
            )
        }
    longest = max_model_len(run, shape)
    rotary = RotaryTables(LlamaConfig(**hf_config), device, dtype, longest)
    links = tuple(PipelineLink(state[phase], shape.hidden_size, dtype, device) for phase in Phase)
    executor = (
        GraphExecutor(run.max_num_seqs, all_reduces[Phase.DECODE].after_capture)
        if backends.has_graphs
        else EagerExecutor()
    )
    return Engine(
        state=state,
        stages=stages,
        arena=arena,
        reshard=reshard,
        prefill_pool=pools[Phase.PREFILL],
        decode_pool=pools[Phase.DECODE],
        host_pool=host_pool,
        prefill=PrefillRunner(
            stages[Phase.PREFILL], links[0], rotary, backends.attention[Phase.PREFILL], pools[Phase.PREFILL], device
        ),
        decode=DecodeRunner(
            stages[Phase.DECODE],
            links[1],
            rotary,
            backends.attention[Phase.DECODE],
            executor,
            pools[Phase.DECODE],
            run.max_num_seqs,
            blocks_for(longest, run.kv_block_size),
            shape.hidden_size,
            device,
        ),
        links=links,
        pool_sizes=pool_sizes,
    )


def _source(run: RunConfig, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> WeightSource:
    if run.load_format == "dummy":
        return DummySource(shape, dtype, device, run.seed)
    return SafetensorsSource(shape, check_checkpoint(run.model, shape), dtype)


def _share(name: str, num_bytes: int, replica_rank: int, device: torch.device) -> NodeSharedMapping:
    """One mapping for all ranks of a replica; its first rank creates and populates it."""
    store = dist.distributed_c10d._get_default_store()
    if replica_rank == 0:
        mapping = NodeSharedMapping.create(name, num_bytes, store)
    else:
        mapping = NodeSharedMapping.attach(name, store)
    if devices.is_cuda(device):
        if replica_rank == 0:
            mapping.populate()
        mapping.register_for_dma()
    return mapping


def _usable_device_bytes(device: torch.device) -> int:
    """The memory of this rank's device; on CPU an equal share of half of what the node has free."""
    accelerator = get_accelerator()
    if devices.is_cuda(device):
        return int(accelerator.total_memory(device.index))
    return (
        int(accelerator.available_memory()) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"])
    )


def _log_progress(done: int, total: int) -> None:
    if dist.get_rank() == 0 and (done == total or done % max(1, total // 10) == 0):
        logger.info("weights: %d of %d cells", done, total)

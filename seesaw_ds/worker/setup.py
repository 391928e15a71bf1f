"""Build what a worker runs on: groups, weights, pools. Each step is timed for the start-up report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from seesaw_ds.checkpoint.cell_layout import is_cells_folder
from seesaw_ds.checkpoint.source import CellsSource, SafetensorsSource
from seesaw_ds.config import RunConfig, dtype_name, max_model_len
from seesaw_ds.kv.device_pool import DeviceKVPool, allocate_kv, block_numel
from seesaw_ds.kv.exchange import KVExchange
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.layout import Phase, Shard
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.model.build import build_stages, load_arena
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.model.weights import DummySource, WeightSource, cell_tensors
from seesaw_ds.parallel import device as devices
from seesaw_ds.parallel.all_reduce import AllReduce, BackendAllReduce, choose_all_reduce
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.parallel.shared_memory import share_mapping
from seesaw_ds.parallel.transport import BackendTransport, Transport, choose_transport
from seesaw_ds.plan.memory import PoolSizes, size_pools
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.exchange import ExchangeReshard
from seesaw_ds.reshard.host import HostReshard, HostWeights
from seesaw_ds.reshard.plan import WeightReshard, plan_reshard
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config
from seesaw_ds.worker.decode import DecodeRunner
from seesaw_ds.worker.graphs import EagerExecutor, GraphExecutor, GraphPool, StepExecutor
from seesaw_ds.worker.memory import check_kv_blocks, measure_kv_blocks
from seesaw_ds.worker.prefill import PrefillRunner
from seesaw_ds.worker.slots import DecodingSlots, TokenFeedback
from seesaw_ds.worker.warmup import warm_up_blocks, warm_up_prefill

logger = logging.getLogger(__name__)

LOAD_PROGRESS_SECONDS = 5.0


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
    """All that a worker runs on. `decode` has a runner for each phase in which there are decode steps."""

    state: ParallelState
    stages: dict[Phase, DecoderStage]
    arena: WeightArena
    reshard: WeightReshard
    pools: dict[Phase, DeviceKVPool]
    kv_exchange: KVExchange
    host_pool: HostKVPool
    slots: DecodingSlots
    prefill: PrefillRunner
    decode: dict[Phase, DecodeRunner]
    feedback: dict[Phase, TokenFeedback]
    links: tuple[PipelineLink, ...]
    pool_sizes: PoolSizes

    def drain(self) -> None:
        """Complete every transfer of the pipelines: the last steps' tokens are sent only when somebody receives."""
        for feedback in self.feedback.values():
            feedback.read_all()
        for link in self.links:
            link.drain()

    def close(self) -> None:
        """Give back host memory. `drain` comes first."""
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
    # No device_id: communicators would be made eagerly, and a pipeline's sends queue behind its receives.
    dist.init_process_group(accelerator.communication_backend_name())


def build_engine(run: RunConfig, timer: StartUpTimer) -> Engine:
    """Load the model in prefill layout, allocate the pools and warm up; `torch.distributed` must be up.

    Raises UserError when the model or the pools do not fit.
    """
    builder = _EngineBuilder(run, timer)
    with timer.part("weights"):
        builder.load_weights()
    with timer.part("kv pools"):
        builder.make_host_pool()
    with timer.part("warm-up"):
        builder.make_prefill()
        builder.warm_up_prefill()
        builder.make_decode()
        builder.warm_up_decode()
    return builder.engine()


class _EngineBuilder:
    """Builds an `Engine` part by part, in the order of the methods; each method is collective over the replica."""

    def __init__(self, run: RunConfig, timer: StartUpTimer) -> None:
        self._run = run
        self._hf_config = read_hf_config(run.model)
        self._shape = model_shape(self._hf_config)
        self._layouts = run.layout_pair
        self._dtype: torch.dtype = getattr(torch, dtype_name(run, self._shape))
        self._device = devices.device()
        self._longest = max_model_len(run, self._shape)
        self._sizes = size_pools(run, self._shape, _usable_device_bytes(self._device))
        with timer.part("groups"):
            self._state = ParallelState(self._layouts)
        self._replica_rank = dist.get_rank() - self._state.replica_ranks[0]
        self._plan = plan_reshard(self._layouts, self._shape.num_layers)
        self._backends = choose_backends(self._shape, run.kv_block_size, self._dtype, self._device)
        self._all_reduces = self._choose_all_reduces()
        self._transport = self._choose_transport()
        self._max_blocks_per_seq = blocks_for(self._longest, run.kv_block_size)
        self._slots = DecodingSlots(run.max_num_seqs, self._max_blocks_per_seq, self._shape.vocab_size, self._device)
        self._links: dict[Phase, PipelineLink] = {}
        self._feedback: dict[Phase, TokenFeedback] = {}
        for phase in Phase:
            self._make_links(phase)
        self._rotary = ModelRotation(self._hf_config, self._shape, self._device, self._longest)

    def _make_links(self, phase: Phase) -> None:
        """A static layout has one pipeline: its steps of both kinds follow each other on one link."""
        if self._layouts.is_static and self._links:
            self._links[phase], self._feedback[phase] = self._links[phase.other], self._feedback[phase.other]
            return
        groups = self._state[phase]
        self._links[phase] = PipelineLink(groups, self._shape.hidden_size, self._dtype, self._device)
        self._feedback[phase] = TokenFeedback(groups, self._links[phase], self._slots)

    def _choose_all_reduces(self) -> dict[Phase, AllReduce]:
        has_graphs = self._backends.has_graphs
        decode = choose_all_reduce(self._state[Phase.DECODE].tp, self._device, has_graphs)
        if self._layouts.is_static:
            prefill = decode
        elif self._run.may_stay:
            prefill = choose_all_reduce(self._state[Phase.PREFILL].tp, self._device, has_graphs)
        else:
            prefill = BackendAllReduce(self._state[Phase.PREFILL].tp)
        return {Phase.PREFILL: prefill, Phase.DECODE: decode}

    def _choose_transport(self) -> Transport:
        group = self._state.replica
        if self._layouts.is_static:  # nothing will travel
            return BackendTransport(group, self._device)
        return choose_transport(group, self._device)

    def load_weights(self) -> None:
        run, shape, plan = self._run, self._shape, self._plan
        pieces = cell_tensors(shape, self._layouts.cells_per_layer)
        self._arena = WeightArena(pieces, plan.num_slots[self._replica_rank], self._dtype, self._device)
        source = _source(run, shape, self._dtype, self._device)
        host_weights = None
        if run.weight_reshard == "host":
            cells = (pieces, shape.num_layers, self._layouts.cells_per_layer, self._dtype)
            num_bytes = HostWeights.required_bytes(*cells)
            layer_bytes = num_bytes // shape.num_layers
            mapping = share_mapping("weights", num_bytes, self._state.replica, self._device, layer_bytes)
            host_weights = HostWeights(mapping, *cells)
        load_arena(self._arena, plan, self._replica_rank, source, host_weights, _LoadProgress())
        self._stages = build_stages(
            shape,
            self._layouts,
            self._state,
            plan,
            self._arena,
            self._replica_rank,
            source,
            self._backends.ops,
            self._all_reduces,
            self._dtype,
            self._device,
        )
        dist.barrier(group=self._state.replica)
        self._reshard: WeightReshard
        if host_weights is not None:
            self._reshard = HostReshard(plan, self._arena, host_weights, self._replica_rank)
        else:
            ranks = list(self._state.replica_ranks)
            self._reshard = ExchangeReshard(plan, self._arena, self._transport, self._replica_rank, ranks)

    def make_host_pool(self) -> None:
        run, shape = self._run, self._shape
        layout = HostBlockLayout(
            self._layouts,
            shape.num_layers,
            shape.num_kv_heads,
            run.kv_block_size,
            shape.head_dim,
            self._dtype.itemsize,
        )
        num_bytes = layout.row_bytes * self._sizes.num_host_blocks
        mapping = share_mapping("kv", num_bytes, self._state.replica, self._device, layout.row_bytes)
        self._host_pool = HostKVPool(mapping, layout, self._sizes.num_host_blocks, self._dtype)

    def make_prefill(self) -> None:
        self._prefill = PrefillRunner(
            self._stages[Phase.PREFILL],
            self._links[Phase.PREFILL],
            self._rotary,
            self._backends.make_attention(Phase.PREFILL, self._layouts.prefill.tp, self._run.max_num_seqs),
            self._slots,
            self._feedback[Phase.PREFILL],
            self._device,
        )

    def warm_up_prefill(self) -> None:
        """Run the largest micro-batch once: kernels and communicators are made, and its memory becomes known."""
        if devices.is_cuda(self._device):
            self._prefill.attach(self._pools(warm_up_blocks(self._run, self._longest))[Phase.PREFILL])
            warm_up_prefill(self._prefill, self._run, self._shape, self._longest)
            self._feedback[Phase.PREFILL].warm_up()
            self._links[Phase.PREFILL].drain()
            get_accelerator().synchronize()

    def make_decode(self) -> None:
        """Allocate the KV pools, of what memory is left beside the attention's workspaces, and make the runners."""
        attentions = {phase: self._decode_attention(phase) for phase in self._decode_layouts()}
        num_blocks = self._num_kv_blocks()
        self._sizes = dataclasses.replace(self._sizes, num_gpu_blocks=num_blocks)
        self._kv_pools = self._pools(num_blocks + 1)  # one for DecodeRunner's padding
        self._prefill.attach(self._kv_pools[Phase.PREFILL])
        shape, state = self._shape, self._state
        self._kv_exchange = KVExchange(
            self._layouts, self._kv_pools, shape.num_layers, shape.num_kv_heads, self._transport, state.replica_ranks
        )
        graph_pool = GraphPool()
        self._decode = {
            phase: self._decode_runner(phase, attention, graph_pool) for phase, attention in attentions.items()
        }
        if self._layouts.is_static:
            self._decode[Phase.PREFILL] = self._decode[Phase.DECODE]

    def _decode_layouts(self) -> tuple[Phase, ...]:
        """The phases in whose layouts there are decode steps; one stands for both where the layouts are the same."""
        return (Phase.DECODE, Phase.PREFILL) if self._run.may_stay else (Phase.DECODE,)

    def _most_rows(self, phase: Phase) -> int:
        """The most rows of a decode step: a pipeline group's share of all sequences."""
        return -(-self._run.max_num_seqs // self._layouts[phase].pp)

    def _decode_attention(self, phase: Phase) -> tuple[AttentionBackend, ...]:
        num_rows = self._most_rows(phase)
        return self._backends.make_attention(
            Phase.DECODE, self._layouts[phase].tp, num_rows, num_rows * self._max_blocks_per_seq
        )

    def _decode_runner(
        self, phase: Phase, attention: tuple[AttentionBackend, ...], graph_pool: GraphPool
    ) -> DecodeRunner:
        executor: StepExecutor = EagerExecutor()
        if self._backends.has_graphs:
            executor = GraphExecutor(self._most_rows(phase), self._all_reduces[phase].after_capture, graph_pool)
        return DecodeRunner(
            self._stages[phase],
            self._links[phase],
            self._rotary,
            attention,
            executor,
            self._slots,
            self._feedback[phase],
            self._kv_pools[phase],
            self._shape.hidden_size,
            self._device,
        )

    def _num_kv_blocks(self) -> int:
        """What memory leaves on the fullest device of the replica, unless the settings say a number."""
        run = self._run
        if run.num_gpu_kv_blocks is not None or not devices.is_cuda(self._device):
            return self._sizes.num_gpu_blocks
        block_bytes = self._block_numel() * self._dtype.itemsize
        lowest = torch.tensor(measure_kv_blocks(run, self._shape, block_bytes, self._arena), device=self._device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._state.replica)
        check_kv_blocks(run, self._longest, int(lowest))
        return min(int(lowest), run.max_num_seqs * self._max_blocks_per_seq)

    def _shard(self, phase: Phase) -> Shard:
        return self._layouts[phase].shard(self._replica_rank, self._shape.num_layers, self._shape.num_kv_heads)

    def _block_numel(self) -> int:
        """Elements of a KV block on this rank, in the phase that needs more."""
        sizes = (block_numel(self._shard(phase), self._run.kv_block_size, self._shape.head_dim) for phase in Phase)
        return max(sizes)

    def _pools(self, num_blocks: int) -> dict[Phase, DeviceKVPool]:
        """Both phases' views of new KV memory."""
        memory = allocate_kv(num_blocks, self._block_numel(), self._dtype, self._device)
        block_size, head_dim = self._run.kv_block_size, self._shape.head_dim
        return {phase: DeviceKVPool(memory, self._shard(phase), block_size, head_dim) for phase in Phase}

    def warm_up_decode(self) -> None:
        """Re-shard there and back, capture every graph, and make the pipeline's communicators."""
        if not devices.is_cuda(self._device):
            return
        with torch.inference_mode():
            for phase in (Phase.DECODE, Phase.PREFILL):
                self._reshard.run(phase)
                self._kv_exchange.run(phase, [0])
                self._state.activate(phase)
                if phase in self._decode_layouts():
                    self._decode[phase].warm_up()
                if phase is Phase.DECODE:
                    self._slots.warm_up(self._dtype)
        get_accelerator().synchronize()

    def engine(self) -> Engine:
        return Engine(
            state=self._state,
            stages=self._stages,
            arena=self._arena,
            reshard=self._reshard,
            pools=self._kv_pools,
            kv_exchange=self._kv_exchange,
            host_pool=self._host_pool,
            slots=self._slots,
            prefill=self._prefill,
            decode=self._decode,
            feedback=self._feedback,
            links=tuple(self._links.values()),
            pool_sizes=self._sizes,
        )


def _source(run: RunConfig, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> WeightSource:
    if run.load_format == "dummy":
        return DummySource(shape, dtype, device, run.seed)
    if is_cells_folder(run.model):
        return CellsSource(run.model, shape, dtype)
    return SafetensorsSource(shape, check_checkpoint(run.model, shape), dtype)


def _usable_device_bytes(device: torch.device) -> int:
    """The memory of this rank's device; on CPU an equal share of half of what the node has free."""
    accelerator = get_accelerator()
    if devices.is_cuda(device):
        return int(accelerator.total_memory(device.index))
    return (
        int(accelerator.available_memory()) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"])
    )


class _LoadProgress:
    """Says on the log how far loading is, every few seconds, from the first rank."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if dist.get_rank() == 0 and now - self._said > LOAD_PROGRESS_SECONDS:
            self._said = now
            logger.info("weights: %d of %d cells", done, total)

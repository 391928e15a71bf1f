"""Build what a worker runs on: groups, weights, pools. Each step is timed for the start-up report."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from seesaw_ds.config import RunConfig, dtype_name, max_model_len
from seesaw_ds.kv.device_pool import DeviceKVPool, allocate_kv, block_numel
from seesaw_ds.kv.exchange import KV_SCRATCH_BYTES, KVExchange
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.layout import Phase, Shard
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.model.build import build_stages
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.parallel import device as devices
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.shared_memory import begin_mapping
from seesaw_ds.plan.memory import size_pools
from seesaw_ds.reshard.exchange import EXCHANGE_SCRATCH_BYTES
from seesaw_ds.reshard.preload import CellPreload
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import model_shape, read_hf_config
from seesaw_ds.worker import connections
from seesaw_ds.worker.decode import DecodeRunner
from seesaw_ds.worker.engine import Engine, StartUpTimer
from seesaw_ds.worker.graphs import EagerExecutor, GraphExecutor, GraphPool, StepExecutor, graph_sizes
from seesaw_ds.worker.memory import StepBytes, check_kv_blocks, log_memory_in_use, measure_kv_blocks, peak_bytes
from seesaw_ds.worker.prefill import PrefillRunner
from seesaw_ds.worker.segments import MOST_TOKENS, SegmentGraphs
from seesaw_ds.worker.slots import DecodingSlots
from seesaw_ds.worker.warmup import warm_up_blocks, warm_up_prefill
from seesaw_ds.worker.weights import load_weights

logger = logging.getLogger(__name__)

_KERNELS_KEY = "seesaw/kernels"
_MOST_COMPILE_TIME = datetime.timedelta(hours=1)


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
        builder.begin_host_pool()
        builder.load_weights()
    with timer.part("warm-up"):
        builder.make_prefill()
        builder.tune_products()
        builder.warm_up()
    with timer.part("host pool"):
        builder.end_host_pool()
    with timer.part("KV and graphs"):
        builder.make_decode()
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
        self._backends = choose_backends(self._shape, run.kv_block_size, self._dtype, self._device)
        with timer.part("kernels"):
            self._compile_kernels()
        self._all_reduces = connections.make_all_reduces(run, self._state, self._backends.has_graphs, self._device)
        self._transport = connections.make_transport(run, self._state, self._device)
        self._early_transport = connections.make_early_transport(
            run, self._state, self._shape.num_layers, self._transport, self._device
        )
        self._scratch = torch.empty(self._scratch_bytes(), dtype=torch.uint8, device=self._device)
        self._max_blocks_per_seq = blocks_for(self._longest, run.kv_block_size)
        self._attentions = {phase: self._decode_attention(phase) for phase in self._decode_layouts()}
        self._slots = DecodingSlots(
            run.max_num_seqs, self._max_blocks_per_seq, self._shape.vocab_size, self._device, self._backends.draw
        )
        self._links = connections.make_links(run, self._state, self._shape.hidden_size, self._dtype, self._device)
        self._feedback = connections.make_feedback(run, self._state, self._links, self._slots)
        self._rotary = ModelRotation(self._hf_config, self._shape, self._device, self._longest)

    def _compile_kernels(self) -> None:
        """The first rank of a node does. Others wait by the store: a barrier takes memory for its communicator."""
        store = dist.distributed_c10d._get_default_store()
        local_rank = int(os.environ["LOCAL_RANK"])
        key = f"{_KERNELS_KEY}-{dist.get_rank() - local_rank}"
        if local_rank == 0:
            self._backends.compile_kernels()
            store.set(key, "compiled")
        else:
            store.wait([key], _MOST_COMPILE_TIME)

    def _scratch_bytes(self) -> int:
        """Of what attention and the changes of layout use in turn."""
        layouts = self._layouts
        sizes = [self._backends.workspace_bytes(layouts[phase].tp, self._most_rows(phase)) for phase in Phase]
        if not layouts.is_static:
            sizes += [EXCHANGE_SCRATCH_BYTES, KV_SCRATCH_BYTES]
        return max(sizes)

    def load_weights(self) -> None:
        self._weights = load_weights(
            self._run,
            self._shape,
            self._state,
            self._replica_rank,
            self._transport,
            self._scratch,
            self._dtype,
            self._device,
        )
        self._stages = build_stages(
            self._shape,
            self._layouts,
            self._state,
            self._weights.layers,
            self._weights.tables,
            self._replica_rank,
            self._weights.source,
            self._backends.ops,
            self._all_reduces,
            self._dtype,
            self._device,
        )

    def begin_host_pool(self) -> None:
        """Its pages are provided while weights load and kernels warm up: that takes a third of a second a GiB."""
        run, shape = self._run, self._shape
        self._host_layout = HostBlockLayout(
            self._layouts,
            shape.num_layers,
            shape.num_kv_heads,
            run.kv_block_size,
            shape.head_dim,
            self._dtype.itemsize,
        )
        row_bytes = self._host_layout.row_bytes
        num_bytes = row_bytes * self._sizes.num_host_blocks
        self._host_mapping = begin_mapping("kv", num_bytes, self._state.replica, self._device, row_bytes)

    def end_host_pool(self) -> None:
        """Before memory is measured: CUDA's tables of locked pages take some of the device's."""
        mapping = self._host_mapping.end()
        self._host_pool = HostKVPool(mapping, self._host_layout, self._sizes.num_host_blocks, self._dtype)

    def make_prefill(self) -> None:
        self._prefill = PrefillRunner(
            self._stages[Phase.PREFILL],
            self._links[Phase.PREFILL],
            self._rotary,
            self._backends.make_attention(Phase.PREFILL, self._layouts.prefill.tp, self._scratch),
            self._slots,
            self._feedback[Phase.PREFILL],
            self._segment_graphs(),
            self._device,
        )

    def _segment_graphs(self) -> SegmentGraphs | None:
        """For micro-batches that are full, as most are; but not around all-reduces that are NCCL's."""
        hidden_size, num_tokens = self._shape.hidden_size, self._run.max_num_batched_tokens
        most_bytes = self._all_reduces[Phase.PREFILL].most_kernel_bytes
        is_too_large = num_tokens > MOST_TOKENS or num_tokens * hidden_size * self._dtype.itemsize > most_bytes
        if is_too_large or not self._backends.has_graphs:
            return None
        # No two sequences of a micro-batch have a block in common.
        num_blocks = max(self._sizes.num_gpu_blocks, blocks_for(num_tokens, self._run.kv_block_size))
        attention = self._backends.make_fixed_attention(
            self._layouts.prefill.tp, self._scratch, num_tokens, self._most_rows(Phase.PREFILL), num_blocks
        )
        stage = self._stages[Phase.PREFILL]
        return SegmentGraphs(stage, self._rotary, hidden_size, num_tokens, attention, self._dtype, self._device)

    def tune_products(self) -> None:
        """For the decode steps that will be captured. Before memory is measured, for this takes a workspace."""
        if not self._backends.has_graphs:
            return
        for phase in self._attentions:
            sizes = graph_sizes(self._most_rows(phase))
            times = self._backends.ops.tune_linear(sizes, self._stages[phase].linear_weights())
            if dist.get_rank() == 0 and times.usual > 0:
                gain = 1 - times.tuned / times.usual
                logger.info("products of decode steps in %s: tuned, %.1f%% less time", phase.value, 100 * gain)

    def warm_up(self) -> None:
        """Run the largest steps and a change of layout there and back, on a few KV blocks.

        Kernels and communicators are made, and what memory all that takes becomes known.
        """
        if not devices.is_cuda(self._device):
            return
        pools = self._pools(self._allocate_kv(warm_up_blocks(self._run, self._longest)))
        self._prefill.attach(pools[Phase.PREFILL])
        micro_batch = peak_bytes(self._warm_up_prefill)
        has_segments = self._prefill.has_graphs
        self._step_bytes = StepBytes(
            micro_batch=micro_batch,
            segments=micro_batch if has_segments else 0,
            decode_step=peak_bytes(lambda: self._warm_up_decode(pools)),
            # The segments of a micro-batch are a step together.
            num_graphs=has_segments + sum(len(graph_sizes(self._most_rows(phase))) for phase in self._attentions),
        )
        self._prefill.detach()

    def _warm_up_prefill(self) -> None:
        warm_up_prefill(self._prefill, self._run, self._shape, self._longest)
        self._feedback[Phase.PREFILL].warm_up()
        self._links[Phase.PREFILL].drain()

    def _warm_up_decode(self, pools: dict[Phase, DeviceKVPool]) -> None:
        kv_exchange = self._make_kv_exchange(pools)
        with torch.inference_mode():
            for phase in (Phase.DECODE, Phase.PREFILL):
                self._weights.reshard.run(phase)
                kv_exchange.run(phase, [0])
                self._state.activate(phase)
                if phase in self._attentions:
                    self._decode_runner(phase, EagerExecutor([self._most_rows(phase)]), pools).warm_up()
                if phase is Phase.DECODE:
                    self._slots.warm_up(self._dtype)

    def make_decode(self) -> None:
        """Allocate the KV pools, of what memory is left, and make the runners; capture the graphs of decode steps."""
        num_blocks = self._num_kv_blocks()
        self._sizes = dataclasses.replace(self._sizes, num_gpu_blocks=num_blocks)
        memory = self._allocate_kv(num_blocks + 1)  # one for DecodeRunner's padding
        self._kv_pools = self._pools(memory)
        self._preload = self._make_preload(memory)
        self._prefill.attach(self._kv_pools[Phase.PREFILL])
        self._kv_exchange = self._make_kv_exchange(self._kv_pools)
        graph_pool = GraphPool()
        self._decode = {
            phase: self._decode_runner(phase, self._executor(phase, graph_pool), self._kv_pools)
            for phase in self._attentions
        }
        if devices.is_cuda(self._device):
            self._capture(graph_pool)
        if self._layouts.is_static:
            self._decode[Phase.PREFILL] = self._decode[Phase.DECODE]

    def _capture(self, graph_pool: GraphPool) -> None:
        """Capture every graph. The weights stay as they are in prefill: what these steps compute nobody reads."""
        free, _ = torch.cuda.mem_get_info()
        with torch.inference_mode():
            # Those that need more memory first: the others find room in it.
            self._prefill.capture(graph_pool, self._all_reduces[Phase.PREFILL].after_capture)
            for phase in self._attentions:
                self._state.activate(phase)
                self._decode[phase].warm_up()
        self._state.activate(Phase.PREFILL)
        get_accelerator().synchronize()
        log_memory_in_use(self._run, free)

    def _make_kv_exchange(self, pools: dict[Phase, DeviceKVPool]) -> KVExchange:
        shape, ranks = self._shape, self._state.replica_ranks
        return KVExchange(
            self._layouts, pools, shape.num_layers, shape.num_kv_heads, self._transport, ranks, self._scratch
        )

    def _make_preload(self, memory: torch.Tensor) -> CellPreload | None:
        if self._early_transport is None:
            return None
        exchange, (plan, arena) = self._weights.exchange, self._weights.layers
        assert exchange is not None
        ranks = self._state.replica_ranks
        # Layouts with stages of unequal depth have blocks of unequal size.
        chunk_numel = min(map(self._block_numel, range(len(ranks))))
        preload = CellPreload(plan, arena, self._early_transport, self._replica_rank, ranks, memory, chunk_numel)
        exchange.preload = preload
        return preload

    def _decode_layouts(self) -> tuple[Phase, ...]:
        """The phases in whose layouts there are decode steps; one stands for both where the layouts are the same."""
        return (Phase.DECODE, Phase.PREFILL) if self._run.may_stay else (Phase.DECODE,)

    def _most_rows(self, phase: Phase) -> int:
        """The most rows of a decode step: a pipeline group's share of all sequences."""
        return -(-self._run.max_num_seqs // self._layouts[phase].pp)

    def _decode_attention(self, phase: Phase) -> tuple[AttentionBackend, ...]:
        num_rows = self._most_rows(phase)
        return self._backends.make_attention(
            Phase.DECODE, self._layouts[phase].tp, self._scratch, num_rows, num_rows * self._max_blocks_per_seq
        )

    def _executor(self, phase: Phase, graph_pool: GraphPool) -> StepExecutor:
        if not self._backends.has_graphs:
            return EagerExecutor()
        return GraphExecutor(self._most_rows(phase), self._all_reduces[phase].after_capture, graph_pool)

    def _decode_runner(self, phase: Phase, executor: StepExecutor, pools: dict[Phase, DeviceKVPool]) -> DecodeRunner:
        return DecodeRunner(
            self._stages[phase],
            self._links[phase],
            self._rotary,
            self._attentions[phase],
            executor,
            self._slots,
            self._feedback[phase],
            pools[phase],
            self._shape.hidden_size,
            self._device,
        )

    def _num_kv_blocks(self) -> int:
        """What memory leaves on the fullest device of the replica, unless the settings say a number."""
        run = self._run
        if run.num_gpu_kv_blocks is not None or not devices.is_cuda(self._device):
            return self._sizes.num_gpu_blocks
        block_bytes = self._block_numel(self._replica_rank) * self._dtype.itemsize
        weight_bytes = self._weights.layers.arena.nbytes + self._weights.tables.arena.nbytes
        most_rows = max(map(self._most_rows, Phase))
        num_blocks = measure_kv_blocks(run, self._shape, block_bytes, weight_bytes, most_rows, self._step_bytes)
        lowest = torch.tensor(num_blocks, device=self._device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._state.replica)
        check_kv_blocks(run, self._longest, int(lowest))
        return min(int(lowest), run.max_num_seqs * self._max_blocks_per_seq)

    def _shard(self, phase: Phase, rank: int) -> Shard:
        return self._layouts[phase].shard(rank, self._shape.num_layers, self._shape.num_kv_heads)

    def _block_numel(self, rank: int) -> int:
        """Elements of a KV block on `rank` of the replica, in the phase that needs more."""
        block_size, head_dim = self._run.kv_block_size, self._shape.head_dim
        return max(block_numel(self._shard(phase, rank), block_size, head_dim) for phase in Phase)

    def _allocate_kv(self, num_blocks: int) -> torch.Tensor:
        return allocate_kv(num_blocks, self._block_numel(self._replica_rank), self._dtype, self._device)

    def _pools(self, memory: torch.Tensor) -> dict[Phase, DeviceKVPool]:
        """Both phases' views of KV memory."""
        rank, block_size, head_dim = self._replica_rank, self._run.kv_block_size, self._shape.head_dim
        return {phase: DeviceKVPool(memory, self._shard(phase, rank), block_size, head_dim) for phase in Phase}

    def engine(self) -> Engine:
        return Engine(
            state=self._state,
            stages=self._stages,
            layers=self._weights.layers,
            tables=self._weights.tables,
            reshard=self._weights.reshard,
            preload=self._preload,
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


def _usable_device_bytes(device: torch.device) -> int:
    """The memory of this rank's device; on CPU an equal share of half of what the node has free."""
    accelerator = get_accelerator()
    if devices.is_cuda(device):
        return int(accelerator.total_memory(device.index))
    return (
        int(accelerator.available_memory()) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"])
    )

"""What tools/calibrate.py measures on each rank's own device, all ranks at the same time: products, copies, layers."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from profile_layers import BLOCK_SIZE, Layers, captured
from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.attention.torch_backend import TorchAttention
from seesaw_ds.model.ops.products import Product
from seesaw_ds.model.ops.row_kernels import make_row_kernels
from seesaw_ds.parallel import device as devices
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.shapes import ModelShape

MIB = 1 << 20
_NUM_SPANS = 5
_SPAN_SECONDS = 0.1
_FEW_ROWS = (1, 20, 36, 64, 96)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is computed and moved: products as large as the layers' that the device is for, done in seconds.

    Products of the first of `dtypes` are measured at all `token_counts`, those of the others at a few.
    """

    shape: ModelShape
    dtypes: tuple[str, ...]
    matrix: tuple[int, int]
    num_matrices: int
    token_counts: tuple[int, ...]
    few_token_counts: tuple[int, ...]
    copy_bytes: int
    prompt_tokens: int
    decode_rows: int
    context_tokens: int
    reduce_bytes: tuple[int, ...]
    send_bytes: tuple[int, int]


_LAYER = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=28672,
    vocab_size=1024,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    dtype="bfloat16",
)

CUDA_SIZES = Sizes(
    shape=_LAYER,
    dtypes=("bfloat16", "float16", "float32"),
    matrix=(28672, 8192),
    num_matrices=2,
    token_counts=(1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    few_token_counts=(1, 128, 512, 8192),
    copy_bytes=1024 * MIB,
    prompt_tokens=4096,
    decode_rows=64,
    context_tokens=2048,
    reduce_bytes=(16 << 10, 128 << 10, MIB, 4 * MIB, 16 * MIB, 64 * MIB),
    send_bytes=(16 << 10, 64 * MIB),
)
# Layers as small as those of the models that are run on CPU, such as the quickstart's.
CPU_SIZES = Sizes(
    shape=replace(
        _LAYER, num_layers=4, hidden_size=256, num_heads=16, num_kv_heads=8, head_dim=16, intermediate_size=640
    ),
    dtypes=("float32", "bfloat16"),
    matrix=(640, 512),
    num_matrices=8,
    token_counts=(1, 4, 16, 64, 256, 1024),
    few_token_counts=(1, 16, 1024),
    copy_bytes=64 * MIB,
    prompt_tokens=1024,
    decode_rows=16,
    context_tokens=512,
    reduce_bytes=(1 << 10, 16 << 10, 256 << 10, MIB, 4 * MIB),
    send_bytes=(1 << 10, 4 * MIB),
)


def typical_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median, over a few spans of time, of the mean time of `run`; all ranks start each span together.

    Means, since what disturbs a rank within a span will disturb it in a run too; the median, since other programs
    that wake up meanwhile are not of this machine's nature.
    """
    for _ in range(2):
        run()
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    # Every rank repeats as often as the slowest can, since `run` may be collective.
    repeats = torch.tensor(min(100.0, max(2.0, _SPAN_SECONDS / (time.perf_counter() - start))), device=device)
    dist.all_reduce(repeats, dist.ReduceOp.MIN)
    return statistics.median(_mean_seconds(run, device, int(repeats)) for _ in range(_NUM_SPANS))


def _mean_seconds(run: Callable[[], object], device: torch.device, count: int) -> float:
    dist.barrier()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    begin: Any = devices.record_event(device, timing=True)
    for _ in range(count):
        run()
    end: Any = devices.record_event(device, timing=True)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def linear_points(sizes: Sizes, dtype_name: str, device: torch.device) -> list[list[float]]:
    """(tokens, seconds a parameter) of products with several matrices in turn, as layers do; the seconds rise.

    The largest come first: under load a device may slow down to its power limit, and that is how prefill finds it.
    """
    token_counts = sizes.token_counts if dtype_name == sizes.dtypes[0] else sizes.few_token_counts
    return _product_points(_matrices(sizes, dtype_name, device), token_counts, F.linear)


def row_linear_points(sizes: Sizes, dtype_name: str, device: torch.device) -> list[list[float]] | None:
    """The same of the engine's own kernels for few rows; None where the device has none."""
    kernels = make_row_kernels(getattr(torch, dtype_name), device) if device.type == "cuda" else None
    if kernels is None:
        return None
    matrices = _matrices(sizes, dtype_name, device)
    return _product_points(matrices, _FEW_ROWS, kernels.multiply) if kernels.prepare() else None


def _matrices(sizes: Sizes, dtype_name: str, device: torch.device) -> list[torch.Tensor]:
    dtype = getattr(torch, dtype_name)
    return [torch.randn(sizes.matrix, dtype=dtype, device=device) for _ in range(sizes.num_matrices)]


def _product_points(
    matrices: Sequence[torch.Tensor], token_counts: Sequence[int], multiply: Product
) -> list[list[float]]:
    seconds: dict[int, float] = {}
    for num_tokens in reversed(token_counts):
        x = torch.randn((num_tokens, matrices[0].shape[1]), dtype=matrices[0].dtype, device=matrices[0].device)

        def run(x: torch.Tensor = x) -> None:
            for matrix in matrices:
                multiply(x, matrix)

        seconds[num_tokens] = typical_seconds(run, matrices[0].device) / (len(matrices) * matrices[0].numel())
    points: list[list[float]] = []
    for num_tokens in token_counts:
        # Below the ridge all counts take the same time but for noise.
        least = points[-1][1] * 1.0001 if points else 0.0
        points.append([num_tokens, max(seconds[num_tokens], least)])
    return points


def copy_rates(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Bytes/s to the device, to the host, and each way with both at once."""
    is_cuda = device.type == "cuda"
    host_in, host_out = (torch.ones(sizes.copy_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2))
    device_in, device_out = (torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    to_device = partial(device_in.copy_, host_in, non_blocking=True)
    to_host = partial(host_out.copy_, device_out, non_blocking=True)
    both = _on_two_streams(to_device, to_host) if is_cuda else _on_two_threads(to_device, to_host)
    alone = sizes.copy_bytes / typical_seconds(to_device, device), sizes.copy_bytes / typical_seconds(to_host, device)
    duplex = min(sizes.copy_bytes / typical_seconds(both, device), *alone)
    return {"host_to_device": alone[0], "device_to_host": alone[1], "duplex": duplex}


def _on_two_streams(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    device = devices.device()
    stream: Any = devices.new_stream(device)

    def run() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with devices.on_stream(stream):
            second()
        first()
        torch.cuda.current_stream().wait_stream(stream)

    return run


def _on_two_threads(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        first()
        thread.join()

    return run


class ReplicaLayers(Layers):
    """A few decoder layers of the engine on every rank by itself; no all-reduce."""

    def __init__(self, shape: ModelShape, num_blocks: int, device: torch.device) -> None:
        layouts = LayoutPair.parse(f"D{dist.get_world_size()}")
        super().__init__(shape, num_blocks, device, getattr(torch, shape.dtype), layouts)

    def prefill_seconds(self, num_tokens: int) -> tuple[float, float]:
        """One layer's time for one whole prompt, and that of its attention alone."""
        attention = self.make_attention(Phase.PREFILL, 1)
        run = self.step(attention, [num_tokens], [num_tokens])
        whole = typical_seconds(run, self.device) / self.shape.num_layers
        return whole, typical_seconds(self._attend(attention, num_tokens), self.device)

    def decode_seconds(self, num_rows: int, context_tokens: int) -> tuple[float, float]:
        """The same for a decode step of rows of equal length; in a captured graph where the device has graphs."""
        attention = self.make_attention(Phase.DECODE, num_rows, self.num_blocks)
        run = self.step(attention, [1] * num_rows, [context_tokens] * num_rows)
        attend = self._attend(attention, num_rows)
        if self.has_graphs:
            whole = typical_seconds(captured(run), self.device)
            return whole / self.shape.num_layers, typical_seconds(captured(attend), self.device)
        return typical_seconds(run, self.device) / self.shape.num_layers, typical_seconds(attend, self.device)

    def _attend(self, attention: tuple[AttentionBackend, ...], num_tokens: int) -> Callable[[], None]:
        """Attention as last planned."""
        size = (num_tokens, self.shape.num_heads, self.shape.head_dim)
        q = torch.randn(size, dtype=self.dtype, device=self.device)
        out = torch.empty_like(q)
        return lambda: attention[0].forward(q, self.kv_caches[0], out)

    @property
    def pads_decode(self) -> bool:
        """Whether decode attention reads every row to the longest one's length."""
        return isinstance(self.make_attention(Phase.DECODE, 1, 1)[0], TorchAttention)


def layer_figures(sizes: Sizes, profile: HardwareProfile, device: torch.device) -> dict[str, float]:
    """Figures that only the engine's own layers show; `profile` has the rates of products and of memory."""
    dtype = sizes.dtypes[0]
    shape = replace(sizes.shape, dtype=dtype)
    most_tokens = max(sizes.prompt_tokens, sizes.decode_rows * (sizes.context_tokens + BLOCK_SIZE))
    layers = ReplicaLayers(shape, 2 * -(-most_tokens // BLOCK_SIZE), device)
    cost = CostModel(shape, profile, ParallelLayout(), dtype)
    with torch.inference_mode():
        smallest, _ = layers.decode_seconds(1, BLOCK_SIZE)
        _, decode_attention = layers.decode_seconds(sizes.decode_rows, sizes.context_tokens)
        prefill, prefill_attention = layers.prefill_seconds(sizes.prompt_tokens)
    launches = max(1e-6, smallest - cost.linear_seconds(shape.layer_parameters, 1))
    kv_tokens = sizes.decode_rows * sizes.context_tokens
    kv_bytes = kv_tokens * shape.kv_block_bytes(1, shape.num_kv_heads, 1, dtype)
    flops = 2 * shape.num_heads * shape.head_dim * sizes.prompt_tokens**2
    linear = cost.linear_seconds(shape.layer_parameters, sizes.prompt_tokens)
    element = max(prefill - prefill_attention - linear - launches, 0.01 * prefill)
    return {
        "layer_seconds": launches,
        "kv_bandwidth": kv_bytes / decode_attention,
        "attention_efficiency": min(1.0, flops / prefill_attention / profile.flops[dtype]),
        "element_bandwidth": cost.element_bytes(sizes.prompt_tokens) / element,
        "pads_decode": float(layers.pads_decode),
    }

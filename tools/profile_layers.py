"""Time a few decoder layers on one device, kernel by kernel: where prefill and decode spend their time.

    python tools/profile_layers.py --model-shape llama2-70b --tensor-parallel-size 2

Builds one rank's shard of `--layers` layers with random weights in a process group of one, so all-reduces are left
out. Decode is timed as a captured graph where the device has graphs. Times are per layer. A prefill step is timed
alone, and again under a load of seconds: a device that comes to its power limit is slower then, as it is in a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.model.build import build_stages, load_layers, load_tables, table_cell
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.weights import DummySource, cell_tensors
from seesaw_ds.parallel.all_reduce import AllReduce, BackendAllReduce
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.reshard.arena import PlacedCells, WeightArena
from seesaw_ds.reshard.plan import plan_reshard, plan_tables
from seesaw_ds.shapes import ModelShape, model_shape
from seesaw_ds.worker.graphs import GraphPool

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 16
_TIMED_SECONDS = 0.5
_RUNS_AHEAD = 8  # between synchronizations, so that the device waits seldom


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", default="llama2-70b", help="a name in configs/models")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="time one of so many ranks' shard")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prefill-tokens", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--prompt-len", type=int, default=2048, help="of each prompt in a prefill micro-batch")
    parser.add_argument("--decode-rows", type=int, nargs="*", default=[1, 16, 64, 112, 256])
    parser.add_argument("--context-len", type=int, default=3000, help="of each sequence in a decode step")
    parser.add_argument("--load-seconds", type=float, default=1.5, help="of prefill on end before it is timed again")
    parser.add_argument("--kernels", type=int, default=12, help="how many kernels of the profile to print")
    return parser.parse_args()


def shard_shape(name: str, tp: int, num_layers: int) -> ModelShape:
    """The named model cut to `num_layers` layers and to what one of `tp` ranks owns of each."""
    shape = model_shape(json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text()))
    return dataclasses.replace(
        shape,
        num_layers=num_layers,
        num_heads=shape.num_heads // tp,
        num_kv_heads=shape.num_kv_heads // tp,
        intermediate_size=shape.intermediate_size // tp,
    )


class Layers:
    """A stage of a few layers with a KV pool, on this process's device. `layouts` has one rank a replica."""

    def __init__(
        self, shape: ModelShape, num_blocks: int, device: torch.device, dtype: torch.dtype, layouts: LayoutPair
    ) -> None:
        state = ParallelState(layouts)
        backends = choose_backends(shape, BLOCK_SIZE, dtype, device)
        plan, table_plan = plan_reshard(layouts, shape.num_layers), plan_tables(layouts, shape.tie_word_embeddings)
        placed = PlacedCells(plan, WeightArena(cell_tensors(shape, 1), plan.num_slots[0], dtype, device))
        tables = PlacedCells(table_plan, WeightArena((table_cell(shape, 1),), table_plan.num_slots[0], dtype, device))
        source = DummySource(shape, dtype, device, seed=0)
        load_layers(placed, 0, source, None, lambda done, total: None)
        load_tables(tables, 0, source, None, shape.vocab_size)
        reduces: dict[Phase, AllReduce] = {phase: BackendAllReduce(state[phase].tp) for phase in Phase}
        stages = build_stages(shape, layouts, state, placed, tables, 0, source, backends.ops, reduces, dtype, device)
        self.stage: DecoderStage = stages[Phase.PREFILL]
        self.shape, self.device, self.dtype, self.num_blocks = shape, device, dtype, num_blocks
        self.has_graphs = backends.has_graphs
        self._backends = backends
        size = (num_blocks, shape.num_kv_heads, shape.num_layers, 2, BLOCK_SIZE, shape.head_dim)
        pool = torch.randn(size, dtype=dtype, device=device)
        self.kv_caches = [pool[:, :, layer].transpose(1, 2) for layer in range(shape.num_layers)]

    def make_attention(self, phase: Phase, num_rows: int = 0, num_blocks: int = 0) -> tuple[AttentionBackend, ...]:
        """Attention for steps with `num_rows` decode rows at most, in decode with tables of `num_blocks` together."""
        num_bytes = self._backends.workspace_bytes(1, num_rows)
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._backends.make_attention(phase, 1, workspace, num_rows, num_blocks)

    def tune(self, num_rows: int) -> None:
        """Choose the products of decode steps that are captured, as the engine does."""
        if self.has_graphs:
            self._backends.ops.tune_linear([num_rows], self.stage.linear_weights())

    def step(
        self, attention: tuple[AttentionBackend, ...], query_lens: list[int], kv_lens: list[int]
    ) -> Callable[[], torch.Tensor]:
        """Plan a step and return the function that runs its layers on random hidden states."""
        num_tokens = sum(query_lens)
        width = -(-max(kv_lens) // BLOCK_SIZE)
        tables = np.arange(len(kv_lens) * width, dtype=np.int32).reshape(len(kv_lens), width)
        for backend in attention:
            backend.plan(AttentionBatch(np.array(query_lens, np.int32), np.array(kv_lens, np.int32), tables))
        angles = torch.rand((num_tokens, self.shape.head_dim), device=self.device)
        last = (
            torch.tensor(kv_lens, device=self.device).repeat_interleave(torch.tensor(query_lens, device=self.device))
            - 1
        )
        row = torch.arange(len(kv_lens), device=self.device).repeat_interleave(
            torch.tensor(query_lens, device=self.device)
        )
        places = TokenPlaces(angles.cos(), angles.sin(), row * width + last // BLOCK_SIZE, last % BLOCK_SIZE)
        hidden = torch.randn((num_tokens, self.shape.hidden_size), dtype=self.dtype, device=self.device)
        return lambda: self.stage(hidden, [places] * len(attention), attention, self.kv_caches)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median time of `run` after two warm-ups: device events on CUDA, else the host's clock."""
    for _ in range(2):
        run()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            clock = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - clock))
    return statistics.median(times)


def loaded_milliseconds(run: Callable[[], object], device: torch.device, load_seconds: float) -> float:
    """The mean time of `run` over half a second, after `load_seconds` of it on end."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    repeats, begin, start = 0, 0.0, time.perf_counter()
    while begin == 0.0 or time.perf_counter() - begin < _TIMED_SECONDS:
        if begin == 0.0 and time.perf_counter() - start >= load_seconds:
            repeats, begin = 0, time.perf_counter()
        for _ in range(_RUNS_AHEAD):
            run()
        synchronize()
        repeats += _RUNS_AHEAD
    return 1000 * (time.perf_counter() - begin) / repeats


def captured(run: Callable[[], object], after_capture: Callable[[], None] | None = None) -> Callable[[], None]:
    """`run` as a CUDA graph, as the engine captures its steps."""
    run()
    graph = GraphPool().capture(run)
    if after_capture is not None:
        after_capture()
    return graph.replay


def print_profile(run: Callable[[], object], num_layers: int, num_kernels: int) -> None:
    """The kernels of one run by time, microseconds a layer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)[:num_kernels]
    for row in rows:
        print(f"      {row.device_time_total / num_layers:9.1f} us {row.count / num_layers:5.1f} x  {row.key[:100]}")


def main() -> int:
    arguments = parse_arguments()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    tp, num_layers = arguments.tensor_parallel_size, arguments.layers
    shape = shard_shape(arguments.model_shape, tp, num_layers)
    most = max([*arguments.decode_rows, 1]) * (arguments.context_len + BLOCK_SIZE)
    most = max(most, *arguments.prefill_tokens, 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = Layers(shape, 2 * -(-most // BLOCK_SIZE), device, dtype, LayoutPair.parse("T1"))
    weights_ms = shape.layer_parameters * layers.dtype.itemsize / 4.3e12 * 1e3
    print(f"{arguments.model_shape}, one of {tp} tensor-parallel ranks, {num_layers} layers, times a layer")
    with torch.inference_mode():
        for num_tokens in arguments.prefill_tokens:
            lens = [arguments.prompt_len] * (num_tokens // arguments.prompt_len) or [num_tokens]
            run = layers.step(layers.make_attention(Phase.PREFILL), lens, lens)
            ms = milliseconds(run, device) / num_layers
            rate = 2 * shape.layer_parameters * sum(lens) / ms / 1e9
            loaded = loaded_milliseconds(run, device, arguments.load_seconds) / num_layers
            print(
                f"  prefill {sum(lens):6} tokens: {ms:8.3f} ms, {loaded:8.3f} ms under load; "
                f"at that, matrices alone at {rate * ms / loaded:6.1f} TFLOP/s"
            )
            if layers.has_graphs:
                print_profile(run, num_layers, arguments.kernels)
        for num_rows in arguments.decode_rows:
            attention = layers.make_attention(Phase.DECODE, num_rows, 2 * -(-most // BLOCK_SIZE))
            layers.tune(num_rows)
            run = layers.step(attention, [1] * num_rows, [arguments.context_len] * num_rows)
            ms = milliseconds(captured(run) if layers.has_graphs else run, device) / num_layers
            kv_bytes = (
                num_rows * arguments.context_len * 2 * shape.num_kv_heads * shape.head_dim * layers.dtype.itemsize
            )
            floor = weights_ms + kv_bytes / 4.3e12 * 1e3
            print(f"  decode {num_rows:4} rows: {ms:8.4f} ms, reading weights and KV at 4.3 TB/s takes {floor:.4f}")
            if layers.has_graphs:
                print_profile(run, num_layers, arguments.kernels)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

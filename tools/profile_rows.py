"""Time the attention of decode rows on a CUDA device: our kernel beside FlashInfer's.

    python tools/profile_rows.py --shapes 36x3070x4 100x415x8

A shape is ROWSxCONTEXTxKVHEADS; a KV head has `--group-size` query heads of 128 dims. Both kernels read the layers of
one KV pool, whose blocks are dealt at random, in a CUDA graph. Microseconds a layer in the median, and the rate at
which that reads KV; first alone, then each time after some milliseconds of matrix products that follow on seconds of
them, for a device at its power limit is slower.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from profile_layers import captured
from seesaw_ds.errors import UserError, exit_with
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch, AttentionRule

BLOCK_SIZE, HEAD_DIM = 16, 128
_SHAPES = ["36x3070x4", "112x2630x4", "100x415x8", "120x500x8", "40x3000x8", "250x400x4", "800x400x4"]
_ROUNDS = 5
_PRODUCT_SIZE, _PRODUCTS_BETWEEN = 8192, 6
_MOST_ERROR = 5e-3  # between the two kernels, in the norm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=_SHAPES, metavar="ROWSxCONTEXTxKVHEADS")
    parser.add_argument("--group-size", type=int, default=8, help="query heads of a KV head")
    parser.add_argument("--layers", type=int, default=40, help="of the pool, all of which are read")
    parser.add_argument("--load-seconds", type=float, default=1.0, help="of products before the timing under load")
    return parser.parse_args()


def parse_shape(text: str) -> tuple[int, int, int]:
    """Rows, context and KV heads. Raises UserError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"shapes={text!r}: must be ROWSxCONTEXTxKVHEADS, such as 36x3070x4")
    return int(parts[0]), int(parts[1]), int(parts[2])


def make_batch(num_rows: int, context: int, num_blocks: int) -> AttentionBatch:
    """Rows of equal length; `num_blocks` is the pool's size."""
    width = -(-context // BLOCK_SIZE)
    blocks = np.random.default_rng(0).permutation(num_blocks)[: num_rows * width]
    lens = np.full(num_rows, context, np.int32)
    return AttentionBatch(np.ones_like(lens), lens, blocks.reshape(num_rows, width).astype(np.int32), num_rows)


def backends(num_rows: int, num_heads: int, group: int, num_blocks: int) -> dict[str, AttentionBackend]:
    """By name; ours only where it is made for the device."""
    from seesaw_ds.model.attention.flashinfer_backend import FlashInferDecode, workspace_bytes
    from seesaw_ds.model.attention.row_attention import make_row_attention

    device, rule = torch.device("cuda", 0), AttentionRule(HEAD_DIM**-0.5)
    num_bytes = workspace_bytes(num_rows, group * num_heads, HEAD_DIM)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    shape, room = (group * num_heads, num_heads, HEAD_DIM, BLOCK_SIZE), (num_rows, num_blocks)
    found: dict[str, AttentionBackend] = {
        "FlashInfer": FlashInferDecode(rule, *shape, *room, workspace, torch.bfloat16, device)
    }
    if (own := make_row_attention(rule, *shape, device, room)) is not None:
        found["own"] = own
    return found


def microseconds(run: Callable[[], object], before: Callable[[], object]) -> float:
    """Of `run` by the device's events, in the median of some rounds, each after `before`."""
    times: list[float] = []
    for _ in range(_ROUNDS):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Keep the device busy for some milliseconds."""
    for _ in range(_PRODUCTS_BETWEEN):
        torch.mm(left, right, out=out)


def time_shape(shape: tuple[int, int, int], group: int, num_layers: int, load_seconds: float) -> None:
    """Print a line for each kernel. Raises AssertionError when their results differ."""
    num_rows, context, num_heads = shape
    device = torch.device("cuda", 0)
    num_blocks = 2 * num_rows * -(-context // BLOCK_SIZE)
    size = (num_blocks, num_heads, num_layers, 2, BLOCK_SIZE, HEAD_DIM)
    pool = torch.randn(size, dtype=torch.bfloat16, device=device)
    caches = [pool[:, :, layer].transpose(1, 2) for layer in range(num_layers)]
    queries = torch.randn((num_rows, group * num_heads, HEAD_DIM), dtype=torch.bfloat16, device=device)
    factors = [torch.randn((_PRODUCT_SIZE, _PRODUCT_SIZE), dtype=torch.bfloat16, device=device) for _ in range(3)]
    num_bytes = num_rows * context * num_heads * 2 * HEAD_DIM * 2
    outputs = []
    for name, backend in backends(num_rows, num_heads, group, num_blocks).items():
        backend.plan(make_batch(num_rows, context, num_blocks))
        out = torch.empty_like(queries)
        backend.forward(queries, caches[0], out)
        outputs.append(out.float())

        def run(backend: AttentionBackend = backend, out: torch.Tensor = out) -> None:
            for cache in caches:
                backend.forward(queries, cache, out)

        replay = captured(run)
        alone = microseconds(replay, torch.cuda.synchronize) / num_layers
        stop = time.monotonic() + load_seconds
        while time.monotonic() < stop:
            multiply(*factors)
            torch.cuda.synchronize()
        loaded = microseconds(replay, lambda: multiply(*factors)) / num_layers
        text = "  ".join(f"{us:7.1f} ({num_bytes / us / 1e6:.2f})" for us in (alone, loaded))
        print(f"  {num_rows}x{context}x{num_heads} {name}: {text}", flush=True)
    for output in outputs[1:]:
        error = float((output - outputs[0]).norm() / outputs[0].norm())
        assert error < _MOST_ERROR, f"the kernels differ by {error:.1e} of the norm"


def main() -> int:
    arguments = parse_arguments()
    shapes = [parse_shape(text) for text in arguments.shapes]
    if not torch.cuda.is_available():
        raise UserError("profile_rows: there is no CUDA device, and both kernels are for NVIDIA devices")
    print(f"{torch.cuda.get_device_name()}, {arguments.layers} layers, us a layer: alone (TB/s), under load (TB/s)")
    with torch.inference_mode():
        for shape in shapes:
            time_shape(shape, arguments.group_size, arguments.layers, arguments.load_seconds)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    exit_with(main)

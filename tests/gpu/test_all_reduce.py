"""All-reduce through host memory on two devices that must not use peer access: bit for bit, late ranks included."""

from __future__ import annotations

import faulthandler
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seesaw_ds.parallel.all_reduce import choose_all_reduce
from seesaw_ds.parallel.host_all_reduce import HostStagedAllReduce, max_tensor_bytes

NUM_RANKS = 2
HANG_SECONDS = 120
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (16, 48, 4096, 4112, 64 << 10, (256 << 10) + 16, 1 << 20, (2 << 20) - 32)


@pytest.mark.gpu(NUM_RANKS)
def test_sum_through_host_memory_is_exact_in_graphs_and_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    mp.spawn(run_rank, (f"file://{tmp_path}/rendezvous",), nprocs=NUM_RANKS)


def run_rank(rank: int, rendezvous: str) -> None:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=NUM_RANKS)
    reducer = choose_all_reduce(dist.group.WORLD, device, has_graphs=True)
    assert isinstance(reducer, HostStagedAllReduce)
    limit = max_tensor_bytes(NUM_RANKS)
    for dtype in DTYPES:
        check_replays(reducer, dtype, SIZES, num_replays=300)
        check_replays(reducer, dtype, [limit, limit + 16, 2 * dtype.itemsize], num_replays=20)  # two go to NCCL
    dist.barrier()
    dist.destroy_process_group()


def check_replays(reducer: HostStagedAllReduce, dtype: torch.dtype, sizes: Sequence[int], num_replays: int) -> None:
    """Sum tensors of `sizes` bytes, once eagerly and then in a replayed graph, with new values every time.

    Every rank knows all ranks' values, and counts on its device the elements that differ from their sum.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator("cuda").manual_seed(len(sizes))
    longest = max(sizes) // dtype.itemsize
    base = torch.randn(num_ranks, longest, generator=generator, device="cuda").to(dtype)
    factor = torch.ones((), dtype=dtype, device="cuda")
    num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> None:
        for size in sizes:
            parts = base[:, : size // dtype.itemsize] * factor
            expected = parts[0].float()
            for part in parts[1:]:
                expected = expected + part.float()
            total = reducer(parts[rank].clone())
            num_wrong.add_((total.view(torch.uint8) != expected.to(dtype).view(torch.uint8)).sum())

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    reducer.after_capture()
    shared, own = random.Random(0), random.Random(rank)
    for _ in range(num_replays):
        factor.fill_(shared.uniform(-2, 2))
        delay_sometimes(own)
        graph.replay()
    torch.cuda.synchronize()
    assert num_wrong.item() == 0, f"{num_wrong.item()} wrong bytes in {dtype}, sizes {sizes}"


def delay_sometimes(rng: random.Random) -> None:
    """Let this rank's device fall behind, or this process."""
    if rng.random() < 0.1:
        torch.cuda._sleep(rng.randrange(2_000_000))  # clock cycles: up to a millisecond or so
    if rng.random() < 0.01:
        torch.cuda.synchronize()
        time.sleep(0.02)

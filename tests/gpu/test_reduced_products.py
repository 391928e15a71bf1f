"""Products that are summed over ranks through host memory while they go on: right, and the same bits on every rank."""

from __future__ import annotations

import faulthandler
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from seesaw_ds.model.ops.row_kernels import make_row_kernels
from seesaw_ds.parallel.all_reduce import choose_all_reduce

NUM_RANKS = 2
HANG_SECONDS = 60
WEIGHTS = [(8192, 4096), (8192, 14336), (4096, 1024), (512, 128)]  # (out, in); the last with fewer units than CTAs
ROWS = [1, 2, 7, 20, 36, 61, 64, 66, 96]
NUM_REPLAYS = 20


@pytest.mark.gpu(NUM_RANKS, capability=(9, 0))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sums_in_graphs_and_outside(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    mp.spawn(run_rank, (f"file://{tmp_path}/rendezvous", dtype), nprocs=NUM_RANKS)


def run_rank(rank: int, rendezvous: str, dtype: torch.dtype) -> None:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=NUM_RANKS)
    slots = choose_all_reduce(dist.group.WORLD, device, has_graphs=True).host_slots
    assert slots is not None
    torch.manual_seed(rank)
    weights = [
        (torch.randn(num_in, num_out, dtype=dtype, device=device) * num_in**-0.5).t() for num_out, num_in in WEIGHTS
    ]
    rows = make_row_kernels(dtype, device)
    assert rows is not None
    assert rows.prepare()
    delays = random.Random(rank)
    for num_rows in ROWS:
        inputs = [torch.randn(num_rows, num_in, dtype=dtype, device=device) for _, num_in in WEIGHTS]
        assert all(rows.reduces(num_rows, weight, slots) for weight in weights)

        def step(inputs: list[torch.Tensor] = inputs) -> list[torch.Tensor]:
            """All sums twice, one kernel after the other."""
            return [rows.multiply_and_reduce(*pair, slots) for pair in 2 * list(zip(inputs, weights, strict=True))]

        check(step(), inputs, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for _ in range(NUM_REPLAYS):
            for x in inputs:
                x.normal_()
            torch.cuda._sleep(delays.randrange(200_000))  # a rank that is late
            graph.replay()
            check(results, inputs, weights)
    dist.barrier()
    dist.destroy_process_group()


def check(results: list[torch.Tensor], inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Of both rounds of `step`. What ranks have must be the same bits."""
    first, second = results[: len(weights)], results[len(weights) :]
    for x, weight, total, again in zip(inputs, weights, first, second, strict=True):
        expected = F.linear(x, weight).float()
        dist.all_reduce(expected)
        torch.testing.assert_close(total.float(), expected, rtol=1e-2, atol=4e-2)
        assert torch.equal(total, again), "parts are added up in one order"
        totals = [torch.empty_like(total) for _ in range(NUM_RANKS)]
        dist.all_gather(totals, total)
        assert torch.equal(*totals)

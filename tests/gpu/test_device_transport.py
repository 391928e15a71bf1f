"""Both transports between two devices: bit for bit, late ranks included; and what they reach of the link's rate."""

from __future__ import annotations

import faulthandler
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seesaw_ds.parallel.host_transport import HostStagedTransport, slot_bytes
from seesaw_ds.parallel.transport import BackendTransport, Transport, choose_early_transport, choose_transport

NUM_RANKS = 2
HANG_SECONDS = 60
GIB = 1 << 30
SLOT = slot_bytes(NUM_RANKS)
SIZES = (1, 77, SLOT - 1, SLOT, SLOT + 5, 64 << 20, 9 * SLOT + 3)


@pytest.mark.gpu(NUM_RANKS)
@pytest.mark.parametrize("is_p2p_disabled", [False, True], ids=["P2P on", "P2P off"])
def test_tensors_arrive_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_p2p_disabled: bool) -> None:
    """With ``-s`` it also prints rates."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", str(int(is_p2p_disabled)))
    mp.spawn(run_rank, (f"file://{tmp_path}/rendezvous", is_p2p_disabled), nprocs=NUM_RANKS)


def run_rank(rank: int, rendezvous: str, is_p2p_disabled: bool) -> None:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=NUM_RANKS)
    group = dist.group.WORLD
    chosen = choose_transport(group, device)
    assert isinstance(chosen, HostStagedTransport) == (
        is_p2p_disabled or not torch.cuda.can_device_access_peer(rank, 1 - rank)
    )
    early = choose_early_transport(chosen, group, device)
    assert isinstance(early, HostStagedTransport)
    assert (early is chosen) == isinstance(chosen, HostStagedTransport)
    check_one_after_the_other(early, chosen)
    report(f"P2P {'off' if is_p2p_disabled else 'on'}: link, both directions at once {link_rate():.1f} GB/s each way")
    for name, transport in {"NCCL": BackendTransport(group, device), "host-staged": early}.items():
        check_bits(transport)
        rate = exchange_rate(transport)
        report(f"  {name}: {rate:.1f} GB/s each way, matrix products beside it {slow_down(transport):.3f}x the time")
    dist.barrier()
    dist.destroy_process_group()


def check_bits(transport: Transport) -> None:
    """Several exchanges in flight, made and checked on the current stream, with devices and processes that fall behind.

    Both ranks know what the other one sends.
    """
    peer = 1 - dist.get_rank()
    own = random.Random(dist.get_rank())
    num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    under_way = []
    for index in range(4 * len(SIZES)):
        sizes = [SIZES[(index + sender) % len(SIZES)] for sender in range(NUM_RANKS)]
        delay_sometimes(own)
        landing = torch.full((sizes[peer],), 255, dtype=torch.uint8, device="cuda")
        handle = transport.exchange([(pattern(1 - peer, index, sizes[1 - peer]), peer)], [(landing, peer)])
        under_way.append((handle, landing, index))
        if len(under_way) == 3:
            num_wrong += count_wrong(*under_way.pop(0))
    for step in under_way:
        num_wrong += count_wrong(*step)
    assert num_wrong.item() == 0, f"{num_wrong.item()} wrong bytes through {type(transport).__name__}"


def check_one_after_the_other(early: Transport, chosen: Transport) -> None:
    """As weights at a change of layout: several transfers on `early`, then others on `chosen` into what they sent."""
    rank = dist.get_rank()
    own = random.Random(rank)
    num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for index in range(4):
        cells = [pattern(rank, index + part, SIZES[-1]) for part in range(3)]
        landings = [torch.full_like(cell, 255) for cell in cells]
        handles = []
        for cell, landing in zip(cells, landings, strict=True):
            delay_sometimes(own)
            handles.append(early.exchange([(cell, 1 - rank)], [(landing, 1 - rank)]))
        for handle in handles:
            handle.wait()
        for part, (cell, landing) in enumerate(zip(cells, landings, strict=True)):
            num_wrong += (landing != pattern(1 - rank, index + part, SIZES[-1])).sum()
            chosen.exchange([(landing + 1, 1 - rank)], [(cell, 1 - rank)]).wait()
            num_wrong += (cell != pattern(rank, index + part, SIZES[-1]) + 1).sum()
    assert num_wrong.item() == 0, f"{num_wrong.item()} wrong bytes of {type(chosen).__name__} after early ones"


def count_wrong(handle, landing: torch.Tensor, index: int) -> torch.Tensor:
    handle.wait()
    return (landing != pattern(1 - dist.get_rank(), index, landing.numel())).sum()


def pattern(sender: int, index: int, numel: int) -> torch.Tensor:
    """Bytes below 251, which divides no slot: a piece in the wrong place is seen."""
    return ((torch.arange(numel, device="cuda") + 97 * sender + 7 * index) % 251).to(torch.uint8)


def delay_sometimes(rng: random.Random) -> None:
    """Let this rank's device fall behind, or this process."""
    if rng.random() < 0.3:
        torch.cuda._sleep(rng.randrange(20_000_000))  # clock cycles: up to ten milliseconds or so
    if rng.random() < 0.1:
        torch.cuda.synchronize()
        time.sleep(0.05)


def exchange_rate(transport: Transport) -> float:
    """GB/s each way, when 1 GiB goes each way in messages of 64 MiB, two of them under way."""
    peer = 1 - dist.get_rank()
    source = torch.ones(GIB, dtype=torch.uint8, device="cuda").split(64 << 20)
    target = torch.empty(GIB, dtype=torch.uint8, device="cuda").split(64 << 20)

    def work() -> None:
        previous = None
        for sent, received in zip(source, target, strict=True):
            handle = transport.exchange([(sent, peer)], [(received, peer)])
            if previous is not None:
                previous.wait()
            previous = handle
        previous.wait()

    return GIB / best_seconds(work) / 1e9


def link_rate() -> float:
    """GB/s each way of plain copies from and to locked memory, on both devices at once."""
    host = [torch.empty(GIB // 4, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(GIB // 4, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def work() -> None:
        for _ in range(4):
            with torch.cuda.stream(streams[0]):
                host[0].copy_(device[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                device[1].copy_(host[1], non_blocking=True)

    return GIB / best_seconds(work) / 1e9


def slow_down(transport: Transport) -> float:
    """Time of matrix products beside 2 GiB of transfer each way over that of the same products alone."""
    peer = 1 - dist.get_rank()
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    source = torch.ones(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def seconds(is_beside: bool) -> float:
        torch.cuda.synchronize()
        dist.barrier()
        handle = transport.exchange([(source, peer)], [(target, peer)]) if is_beside else None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            matrix @ matrix
        end.record()
        if handle is not None:
            handle.wait()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    alone, beside = (min(seconds(is_beside) for _ in range(3)) for is_beside in (False, True))
    return beside / alone


def best_seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def report(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)

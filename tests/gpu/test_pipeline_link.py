"""A pipeline's link through host memory between two devices: bit for bit, whoever is late."""

from __future__ import annotations

import faulthandler
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.host_link import HostStagedLink
from seesaw_ds.parallel.links import choose_link

HANG_SECONDS = 60
HIDDEN, MOST_TOKENS = 8192, 1500  # 24 MB: more than a slot
NUM_STEPS = 40


@pytest.mark.gpu(2)
@pytest.mark.parametrize("is_p2p_disabled", [False, True], ids=["P2P on", "P2P off"])
def test_hidden_states_and_tokens_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_p2p_disabled: bool
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", str(int(is_p2p_disabled)))
    mp.spawn(run_stage, (f"file://{tmp_path}/rendezvous",), nprocs=2)


def run_stage(rank: int, rendezvous: str) -> None:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=2)
    state = ParallelState(LayoutPair.parse("P2->T2"))
    link = choose_link(state[Phase.PREFILL], state.replica, HIDDEN, MOST_TOKENS, torch.bfloat16, device)
    assert isinstance(link, HostStagedLink)
    own = random.Random(rank)
    num_wrong = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(NUM_STEPS + 2):
        if own.random() < 0.3:
            torch.cuda._sleep(own.randrange(20_000_000))  # clock cycles: up to ten milliseconds or so
        if own.random() < 0.1:
            torch.cuda.synchronize()
            time.sleep(0.05)
        if rank == 0 and step >= 2:  # as with two groups: tokens come when the group's next step begins
            num_wrong += (link.recv_tokens(1 + step % 9) != tokens_of(step - 2)).sum()
        if step < NUM_STEPS:
            if rank == 0:
                link.send_hidden(hidden_of(step))
            else:
                expected = hidden_of(step)
                num_wrong += (link.recv_hidden(len(expected)) != expected).sum()
                link.send_tokens(tokens_of(step))
    link.drain()
    assert num_wrong.item() == 0, f"{num_wrong.item()} wrong values on stage {rank}"
    dist.barrier()
    dist.destroy_process_group()


def hidden_of(step: int) -> torch.Tensor:
    num_tokens = 1 + 397 * step % MOST_TOKENS
    values = torch.arange(num_tokens * HIDDEN, device="cuda") % 251 + step
    return values.to(torch.bfloat16).view(num_tokens, HIDDEN)


def tokens_of(step: int) -> torch.Tensor:
    return torch.arange(1 + (step + 2) % 9, device="cuda") + 1000 * step

"""A pipeline's link over host memory on gloo ranks: a thread does what a CUDA stream does on a device."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.parallel import host_link
from seesaw_ds.parallel.host_link import HostStagedLink, PipelineRings
from seesaw_ds.parallel.links import most_unread_steps
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from staged import ThreadLane

HIDDEN = 24
MOST_TOKENS = 40
SLOT_BYTES = 512


def make_link(layout: ParallelLayout, num_lanes: int) -> HostStagedLink:
    store = dist.distributed_c10d._get_default_store()
    rings = PipelineRings(layout, MOST_TOKENS * HIDDEN * 4)
    if dist.get_rank() == 0:
        mapping = NodeSharedMapping.create("pipeline", rings.num_bytes, store)
    else:
        mapping = NodeSharedMapping.attach("pipeline", store)
    lanes = [ThreadLane() for _ in range(num_lanes)]
    coords = layout.coords(dist.get_rank())
    return HostStagedLink(rings, mapping, coords, HIDDEN, torch.float32, torch.device("cpu"), lanes[0], lanes[-1])


def hidden_of(step: int, stage: int, tp: int) -> torch.Tensor:
    num_tokens = 1 + 17 * step % MOST_TOKENS
    return torch.arange(num_tokens * HIDDEN, dtype=torch.float32).view(num_tokens, HIDDEN) + 1e4 * step + stage + tp / 2


def tokens_of(step: int, tp: int) -> torch.Tensor:
    return torch.arange(3 + step % 5) + 100 * step + tp


def run_pipeline(layout: ParallelLayout, num_lanes: int, late_stage: int | None, reads_after: int) -> None:
    """Steps through a pipeline; the first stage reads a step's tokens when `reads_after` later ones have begun."""
    link = make_link(layout, num_lanes)
    _, stage, tp = layout.coords(dist.get_rank())
    num_steps, last = 30, layout.pp - 1
    for step in range(num_steps):
        if stage == late_stage and step % 7 == 3:
            time.sleep(0.05)
        if stage == 0:
            if step >= reads_after:
                check_tokens(link, step - reads_after, tp)
        else:
            expected = hidden_of(step, stage - 1, tp)
            assert torch.equal(link.recv_hidden(len(expected)), expected)
        if stage < last:
            link.send_hidden(hidden_of(step, stage, tp))
        else:
            link.send_tokens(tokens_of(step, tp))
    if stage == 0:
        for step in range(num_steps - reads_after, num_steps):
            check_tokens(link, step, tp)
    link.drain()


def check_tokens(link: HostStagedLink, step: int, tp: int) -> None:
    expected = tokens_of(step, tp)
    assert torch.equal(link.recv_tokens(len(expected)), expected)


@pytest.mark.parametrize("late_stage", [None, 0, 1])
@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("layout", ["P2", "P3", "T2P2"])
def test_steps_arrive_in_order_whoever_is_late(monkeypatch, layout, num_lanes, late_stage):
    """Hidden states of more than a slot, and with one lane both directions on one queue."""
    monkeypatch.setattr(host_link, "MAX_SLOT_BYTES", SLOT_BYTES)
    parsed = ParallelLayout.parse(layout)
    run_ranks(parsed.world_size, run_pipeline, parsed, num_lanes, late_stage, parsed.pp)


def test_tokens_that_nobody_has_read_hold_up_no_stage():
    layout = ParallelLayout.parse("P2")
    run_ranks(2, run_pipeline, layout, 2, None, most_unread_steps(2))

"""KV re-sharding through the mapping that ranks share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import RankFailure, run_ranks

from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.kv.swap import CopyEngine
from seesaw_ds.kv.transfer import copy_to_device, copy_to_host
from seesaw_ds.layout import LayoutPair, Phase, Shard
from seesaw_ds.parallel.shared_memory import NodeSharedMapping

NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 5, 4, 4, 8
NUM_BLOCKS, NUM_HOST_BLOCKS = 6, 11
HOST_BLOCKS = [9, 0, 4, 7, 2, 10]


def part_of_global_kv(shard: Shard) -> torch.Tensor:
    shape = torch.Size((NUM_BLOCKS, NUM_LAYERS, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM))
    kv = torch.arange(shape.numel(), dtype=torch.float32).view(shape)
    return kv[:, shard.layers.start : shard.layers.stop, :, shard.kv_heads.start : shard.kv_heads.stop]


def reshard_rank(text: str) -> None:
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    layout = HostBlockLayout(LayoutPair.parse(text), NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, itemsize=4)
    nbytes = NUM_HOST_BLOCKS * layout.row_bytes
    mapping = NodeSharedMapping.create("kv", nbytes, store) if rank == 0 else NodeSharedMapping.attach("kv", store)
    host_pool = HostKVPool(mapping, layout, NUM_HOST_BLOCKS, torch.float32)
    prefill_pool, decode_pool = (
        DeviceKVPool(layout.shard(phase, rank), NUM_BLOCKS, BLOCK_SIZE, HEAD_DIM, torch.float32, torch.device("cpu"))
        for phase in (Phase.PREFILL, Phase.DECODE)
    )
    prefill_pool.tensor.copy_(part_of_global_kv(prefill_pool.shard))

    engine = CopyEngine("swap-out", torch.device("cpu"), on_error=lambda error: pytest.fail(str(error)))
    done = []
    for block, host_block in enumerate(HOST_BLOCKS):
        engine.submit(
            lambda block=block, host_block=host_block: copy_to_host(prefill_pool, [block], host_pool, [host_block]),
            None,
            lambda block=block: done.append(block),
        )
    engine.close()
    assert done == list(range(NUM_BLOCKS))
    dist.barrier()

    copy_to_device(host_pool, HOST_BLOCKS, decode_pool, list(reversed(range(NUM_BLOCKS))))
    assert torch.equal(decode_pool.tensor.flip(0), part_of_global_kv(decode_pool.shard))
    host_pool.close()


@pytest.mark.parametrize("text", ["P2->T2", "T2->P2", "P4->T4", "T2P2->T4", "P4->T2P2"])
def test_ranks_hand_their_kv_over_through_shared_memory(text):
    run_ranks(LayoutPair.parse(text).world_size, reshard_rank, text)


def die_with_a_pool(name: str) -> None:
    NodeSharedMapping.create(name, 1 << 20, dist.HashStore()).populate()
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_process_leaves_no_shared_memory_behind():
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(RankFailure, match="rank 0 of 1: died without a word, exit code -9"):
        run_ranks(1, die_with_a_pool, "killed")
    assert set(os.listdir("/dev/shm")) == before
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            assert "memfd:seesaw-killed" not in maps.read_text()
        except OSError:
            continue  # another process, gone or not ours to read

"""KV re-sharding through the mapping that ranks share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness import RankFailure, run_ranks
from seesaw_ds.kv.device_pool import DeviceKVPool, allocate_kv, block_numel, part_of
from seesaw_ds.kv.exchange import KVExchange
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.kv.swap import CopyEngine
from seesaw_ds.kv.transfer import copy_to_device, copy_to_host
from seesaw_ds.layout import LayoutPair, Phase, Shard
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.parallel.transport import BackendTransport
from staged import staged_transport

NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 5, 4, 4, 8
NUM_BLOCKS, NUM_HOST_BLOCKS = 6, 11
HOST_BLOCKS = [9, 0, 4, 7, 2, 10]


def part_of_global_kv(shard: Shard, num_layers: int = NUM_LAYERS) -> torch.Tensor:
    shape = torch.Size((NUM_BLOCKS, NUM_KV_HEADS, num_layers, 2, BLOCK_SIZE, HEAD_DIM))
    return part_of(torch.arange(shape.numel(), dtype=torch.float32).view(shape), shard)


def make_pool(layout: HostBlockLayout, phase: Phase, rank: int) -> DeviceKVPool:
    shard = layout.shard(phase, rank)
    numel = block_numel(shard, BLOCK_SIZE, HEAD_DIM)
    memory = allocate_kv(NUM_BLOCKS, numel, torch.float32, torch.device("cpu"))
    return DeviceKVPool(memory, shard, BLOCK_SIZE, HEAD_DIM)


def exchange_rank(text: str, num_layers: int, is_staged: bool) -> None:
    layouts, rank = LayoutPair.parse(text), dist.get_rank()
    shards = {phase: layouts[phase].shard(rank, num_layers, NUM_KV_HEADS) for phase in Phase}
    numel = max(block_numel(shard, BLOCK_SIZE, HEAD_DIM) for shard in shards.values())
    memory = allocate_kv(NUM_BLOCKS, numel, torch.float32, torch.device("cpu"))
    pools = {phase: DeviceKVPool(memory, shards[phase], BLOCK_SIZE, HEAD_DIM) for phase in Phase}
    ranks = range(layouts.world_size)
    transport = staged_transport(ranks) if is_staged else BackendTransport(dist.group.WORLD, torch.device("cpu"))
    exchange = KVExchange(layouts, pools, num_layers, NUM_KV_HEADS, transport, ranks)
    blocks = [5, 0, 3, 4, 1]
    whole = {phase: part_of_global_kv(shards[phase], num_layers) for phase in Phase}
    pools[Phase.PREFILL].tensor.copy_(whole[Phase.PREFILL])
    kept = shards[Phase.PREFILL].intersect(shards[Phase.DECODE])
    for phase in (Phase.DECODE, Phase.PREFILL, Phase.DECODE):
        untouched = memory[2].clone()
        received_bytes = exchange.run(phase, blocks)
        assert torch.equal(pools[phase].tensor[blocks], whole[phase][blocks])
        assert torch.equal(memory[2], untouched), "a block that was not named has changed"
        foreign = pools[phase].tensor[0].numel() - (0 if kept.is_empty else block_numel(kept, BLOCK_SIZE, HEAD_DIM))
        assert received_bytes == len(blocks) * foreign * 4
    assert exchange.run(Phase.PREFILL, []) == 0


@pytest.mark.parametrize("batch_bytes", [1, 1 << 20], ids=["block by block", "all at once"])
@pytest.mark.parametrize("num_layers", [4, 5])
@pytest.mark.parametrize("text", ["P2->T2", "T2->P2", "P4->T4", "T2P2->T4", "P4->T2P2"])
def test_blocks_on_the_devices_change_layout_in_place(monkeypatch, text, num_layers, batch_bytes):
    monkeypatch.setattr("seesaw_ds.kv.exchange._BATCH_BYTES", batch_bytes)
    run_ranks(LayoutPair.parse(text).world_size, exchange_rank, text, num_layers, False)


@pytest.mark.parametrize("text", ["P2[1,4]->T2", "P2[4,1]->P2[2,3]", "P4[1,2,1,1]->T2P2[4,1]"])
def test_blocks_change_between_stages_of_other_depths(text):
    run_ranks(LayoutPair.parse(text).world_size, exchange_rank, text, 5, False)


@pytest.mark.parametrize("text", ["P2->T2", "P4->T4", "T2P2->T4"])
def test_blocks_change_layout_through_host_memory(monkeypatch, text):
    monkeypatch.setattr("seesaw_ds.kv.exchange._BATCH_BYTES", 1)
    monkeypatch.setattr("seesaw_ds.parallel.host_transport.MAX_SLOT_BYTES", 192)
    run_ranks(LayoutPair.parse(text).world_size, exchange_rank, text, 5, True)


def reshard_rank(text: str) -> None:
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    layout = HostBlockLayout(LayoutPair.parse(text), NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, itemsize=4)
    nbytes = NUM_HOST_BLOCKS * layout.row_bytes
    mapping = NodeSharedMapping.create("kv", nbytes, store) if rank == 0 else NodeSharedMapping.attach("kv", store)
    host_pool = HostKVPool(mapping, layout, NUM_HOST_BLOCKS, torch.float32)
    prefill_pool, decode_pool = (make_pool(layout, phase, rank) for phase in Phase)
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


@pytest.mark.parametrize(
    "text", ["P2->T2", "T2->P2", "P4->T4", "T2P2->T4", "P4->T2P2", "P2[1,4]->P2[4,1]", "P4[1,2,1,1]->T2P2[4,1]"]
)
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

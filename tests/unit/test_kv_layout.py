"""KV re-sharding without a model: coordinate-coded values, every rank of a replica in one process."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
import torch.distributed as dist

from seesaw_ds.kv.device_pool import DeviceKVPool, allocate_kv, block_numel, part_of
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.kv.swap import CopyEngine
from seesaw_ds.kv.transfer import RunList, copy_to_device, copy_to_host, runs_of
from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.parallel.shared_memory import NodeSharedMapping

NUM_BLOCKS, BLOCK_SIZE, HEAD_DIM = 5, 4, 3
LAYOUTS = [
    "P2->T2", "T2->P2", "P4->T4", "T4->P4", "T2P2->T4", "P4->T2P2", "T2P2->P4", "T2P3->T3P2", "P2->P2", "T1",
]  # fmt: skip


def global_kv(num_layers: int, num_kv_heads: int) -> torch.Tensor:
    """(blocks, heads, layers, 2, tokens, head_dim); every value tells its coordinates apart."""
    shape = (NUM_BLOCKS, num_kv_heads, num_layers, 2, BLOCK_SIZE, HEAD_DIM)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def make_layout(text: str, num_layers: int, num_kv_heads: int = 12) -> HostBlockLayout:
    return HostBlockLayout(LayoutPair.parse(text), num_layers, num_kv_heads, BLOCK_SIZE, HEAD_DIM, itemsize=8)


def make_host_pool(layout: HostBlockLayout, num_blocks: int) -> HostKVPool:
    mapping = NodeSharedMapping.create("kv", num_blocks * layout.row_bytes, dist.HashStore())
    return HostKVPool(mapping, layout, num_blocks, torch.float64)


def make_device_pool(layout: HostBlockLayout, phase: Phase, rank: int, num_blocks: int) -> DeviceKVPool:
    shard = layout.shard(phase, rank)
    numel = block_numel(shard, BLOCK_SIZE, HEAD_DIM)
    memory = allocate_kv(num_blocks, numel, torch.float64, torch.device("cpu"))
    return DeviceKVPool(memory, shard, BLOCK_SIZE, HEAD_DIM)


UNEQUAL_STAGES = ["P2[1,4]->T2", "T2->P2[4,1]", "P4[2,1,1,1]->T2P2[1,4]", "P2[1,4]->P2[3,2]", "T2P3[1,3,1]->T3P2[4,1]"]


@pytest.mark.parametrize(
    ("text", "num_layers"),
    [(text, num_layers) for num_layers in (1, 4, 5, 6) for text in LAYOUTS] + [(text, 5) for text in UNEQUAL_STAGES],
)
def test_prefill_shards_arrive_in_decode_shards(text, num_layers):
    layout = make_layout(text, num_layers)
    ranks = range(layout.layouts.replica_size)
    kv = global_kv(num_layers, layout.num_kv_heads)
    host_pool = make_host_pool(layout, 2 * NUM_BLOCKS)
    shuffle = random.Random(num_layers)
    host_blocks = shuffle.sample(range(2 * NUM_BLOCKS), NUM_BLOCKS)

    written_bytes = 0
    for rank in ranks:
        pool = make_device_pool(layout, Phase.PREFILL, rank, 9)
        device_blocks = shuffle.sample(range(9), NUM_BLOCKS)
        pool.tensor[device_blocks] = part_of(kv, pool.shard)
        written_bytes += copy_to_host(pool, device_blocks, host_pool, host_blocks)
    assert written_bytes == NUM_BLOCKS * layout.row_bytes == kv.nbytes

    read_bytes = 0
    for rank in ranks:
        pool = make_device_pool(layout, Phase.DECODE, rank, 7)
        device_blocks = shuffle.sample(range(7), NUM_BLOCKS)
        read_bytes += copy_to_device(host_pool, host_blocks, pool, device_blocks)
        assert torch.equal(pool.tensor[device_blocks], part_of(kv, pool.shard))
        untouched = sorted(set(range(7)) - set(device_blocks))
        assert not pool.tensor[untouched].any()
    assert read_bytes == written_bytes
    host_pool.close()


@pytest.mark.parametrize("text", ["P2->T2", "P4->T2P2", "T2P3->T3P2"])
def test_evicted_blocks_come_back_in_other_blocks(text):
    layout = make_layout(text, num_layers=5)
    host_pool = make_host_pool(layout, 8)
    kv = global_kv(5, layout.num_kv_heads)
    pools = [make_device_pool(layout, Phase.DECODE, rank, 6) for rank in range(layout.layouts.replica_size)]
    for pool in pools:
        pool.tensor[:NUM_BLOCKS] = part_of(kv, pool.shard)
        copy_to_host(pool, [1, 3], host_pool, [6, 2])
        pool.tensor[[1, 3]] = -1
    for pool in pools:
        copy_to_device(host_pool, [6, 2], pool, [5, 1])
        assert torch.equal(pool.tensor[[5, 1]], part_of(kv, pool.shard)[[1, 3]])
        assert torch.equal(pool.tensor[[0, 2, 4]], part_of(kv, pool.shard)[[0, 2, 4]])
    host_pool.close()


@pytest.mark.parametrize(
    ("text", "runs_written", "runs_read"),
    [
        ("P2->T2", 12, 1),  # a run for each of 12 heads
        ("P4->T2P2", 12, 1),
        ("T2P2->T4", 6, 1),
        ("P2->P2", 1, 1),
        ("T4->P4", 12, 1),
        ("T2P3->T3P2", 12, 1),  # of 6 heads, whose layers lie in the pieces of two stages
    ],
)
def test_every_copy_is_a_run_on_both_sides(text, runs_written, runs_read):
    layout = make_layout(text, num_layers=12)
    host_pool = make_host_pool(layout, 3)
    assert layout.row_bytes == 12 * 2 * 12 * BLOCK_SIZE * HEAD_DIM * 8
    for phase, most_runs in ((Phase.PREFILL, runs_written), (Phase.DECODE, runs_read)):
        num_runs = []
        for rank in range(layout.layouts.replica_size):
            pool = make_device_pool(layout, phase, rank, 2)
            runs = [
                run
                for piece, in_shard, in_piece in layout.overlaps(pool.shard)
                for run in runs_of(pool.part(in_shard), part_of(host_pool.piece(piece), in_piece))
            ]
            assert all(side[1].is_contiguous() for run in runs for side in run)
            assert sum(on_device[0].numel() for on_device, _ in runs) == pool.tensor[0].numel()
            num_runs.append(len(runs))
        assert max(num_runs) == most_runs
    host_pool.close()


@pytest.mark.parametrize("text", ["P2->T2", "P2->P2"])
def test_runs_are_where_their_addresses_say(text):
    layout = make_layout(text, num_layers=4)
    host_pool, pool = make_host_pool(layout, 6), make_device_pool(layout, Phase.PREFILL, 1, NUM_BLOCKS)
    kv = part_of(global_kv(4, layout.num_kv_heads), pool.shard)
    pool.tensor.copy_(kv)
    blocks, host_blocks = [4, 0, 3], [1, 5, 2]
    for piece, in_shard, in_piece in layout.overlaps(pool.shard):
        on_device, on_host = pool.part(in_shard), part_of(host_pool.piece(piece), in_piece)
        sides = zip(*runs_of(on_device, on_host), strict=True)
        source, target = map(RunList, sides, (blocks, host_blocks))
        assert source.num_bytes == target.num_bytes
        for to, come_from in zip(target.addresses().tolist(), source.addresses().tolist(), strict=True):
            ctypes.memmove(to, come_from, source.num_bytes)
        assert torch.equal(on_host[host_blocks], part_of(kv, in_shard)[blocks])
        assert not on_host[[0, 3, 4]].any()
    host_pool.close()


def test_layer_view_is_what_attention_reads():
    layout = make_layout("P2->T2", num_layers=4)
    pool = make_device_pool(layout, Phase.PREFILL, 1, 2)
    pool.layer(1)[1, 0, 11, 3] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert pool.tensor[1, 11, 1, 0, 3].tolist() == [1, 2, 3]
    assert pool.tensor.count_nonzero() == 3


def test_tp_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match=r"decode TP size 4 must divide the model's 6 KV heads"):
        make_layout("P4->T4", num_layers=4, num_kv_heads=6)


def test_copy_engine_keeps_the_order_and_reports_each_copy():
    done, spans = [], []
    engine = CopyEngine("swap-in", torch.device("cpu"), pytest.fail, lambda *span: spans.append(span))
    source, target = torch.arange(50.0), torch.zeros(50)

    def copy_item(i: int) -> int:
        target[i] = source[i] + target[i - 1] if i else source[i]
        return 4

    for i in range(50):
        engine.submit(lambda i=i: copy_item(i), None, lambda i=i: done.append((i, target[i].item())))
    engine.close()
    assert done == [(i, float(i * (i + 1) // 2)) for i in range(50)]
    assert [span[0] for span in spans] == ["swap-in"] * 50
    assert all(start <= end and nbytes == 4 for _, start, end, nbytes in spans)
    assert [span[1] for span in spans] == sorted(span[1] for span in spans)


def test_copy_engine_stops_at_an_error_and_tells():
    errors, done = [], []
    engine = CopyEngine("swap-out", torch.device("cpu"), errors.append)

    def fail() -> int:
        raise RuntimeError("host block 9 is gone")

    engine.submit(lambda: 0, None, lambda: done.append("first"))
    engine.submit(fail, None, lambda: done.append("failed"))
    engine.submit(lambda: 0, None, lambda: done.append("after"))
    engine.close()
    assert done == ["first"]
    assert [str(error) for error in errors] == ["host block 9 is gone"]

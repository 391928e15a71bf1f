"""Sizes of the KV pools: what memory leaves, what is set by hand, and what is too small."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seesaw_ds.config import RunConfig
from seesaw_ds.errors import UserError
from seesaw_ds.plan.memory import GIB, kv_block_bytes, most_step_tokens, size_pools
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import ModelShape

SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=8,
    hidden_size=512,
    num_heads=16,
    num_kv_heads=8,
    head_dim=32,
    intermediate_size=1024,
    vocab_size=1000,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
RUN = RunConfig(model="", input="", output="", layouts="P4->T4", max_num_batched_tokens=512)
LONGEST = 1024 // 16
ROW_BYTES = 8 * 2 * 8 * 16 * 32 * 2  # layers, keys and values, KV heads, tokens, head_dim, bfloat16


def spent_bytes(run: RunConfig, device_bytes: int) -> int:
    device = size_pools(run, SHAPE, device_bytes).device
    return device.weights + device.embeddings + device.activations + device.kv


def test_blocks_are_rounded_up():
    assert [blocks_for(num_tokens, 16) for num_tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize("layouts", ["P4->T4", "T4->P4", "T2P2->T4", "P4", "D2P2->D2T2"])
def test_gpu_pool_takes_the_memory_that_is_left_and_no_more(layouts):
    run = replace(RUN, layouts=layouts, gpu_memory_utilization=0.5)
    device_bytes = GIB
    sizes = size_pools(run, SHAPE, device_bytes)
    assert sizes.num_gpu_blocks < run.max_num_seqs * LONGEST
    block_bytes, rest = divmod(sizes.device.kv, sizes.num_gpu_blocks)
    assert rest == 0
    assert block_bytes == ROW_BYTES // run.layout_pair.replica_size
    budget = device_bytes // 2
    assert budget - block_bytes < spent_bytes(run, device_bytes) <= budget


def test_gpu_pool_is_no_larger_than_its_sequences_can_fill():
    sizes = size_pools(replace(RUN, max_num_seqs=7), SHAPE, 64 * GIB)
    assert sizes.num_gpu_blocks == 7 * LONGEST


def test_weights_are_those_of_the_larger_phase():
    for layouts, quarters in (("P4->T4", 1), ("D2P2->D2T2", 2), ("P3->T3", None), ("T1", 4)):
        weights = size_pools(replace(RUN, layouts=layouts), SHAPE, 64 * GIB).device.weights
        expected = SHAPE.layer_parameters * 2 * (3 if quarters is None else 2 * quarters)
        assert weights == expected, layouts


def test_a_block_takes_what_the_rank_and_phase_with_most_of_it_need():
    seven_layers = replace(SHAPE, num_layers=7)
    for layouts, layer_heads in (("P4->T4", 16), ("P2->T2", 32), ("T4", 14), ("P7->T7", 8)):
        shape = replace(seven_layers, num_kv_heads=7) if layouts == "P7->T7" else seven_layers
        one_part = 2 * 16 * 32 * 2  # keys and values of a layer and head: tokens, head_dim, bfloat16
        run = replace(RUN, layouts=layouts)
        of_ranks = [kv_block_bytes(run, shape, "bfloat16", rank) for rank in range(run.layout_pair.replica_size)]
        assert max(of_ranks) == one_part * (7 if layouts == "P7->T7" else layer_heads), layouts


def test_the_fullest_rank_bounds_the_pool():
    shape = replace(SHAPE, vocab_size=8000)  # 8 MB a table, where a layer is 4.7 MB
    sizes = {
        layouts: size_pools(replace(RUN, layouts=layouts, gpu_memory_utilization=0.2), shape, GIB)
        for layouts in ("P4", "P4[2,3,2,1]", "P4[3,2,2,1]", "P4[1,1,1,5]")
    }
    for layouts, num_layers, num_tables in (("P4[2,3,2,1]", 3, 0), ("P4[3,2,2,1]", 3, 1), ("P4[1,1,1,5]", 5, 1)):
        device = sizes[layouts].device
        assert device.weights == num_layers * SHAPE.layer_parameters * 2, layouts
        assert device.kv == sizes[layouts].num_gpu_blocks * num_layers * ROW_BYTES // 8
        assert device.embeddings == num_tables * 8000 * 512 * 2 + 17 * 512 * 2
    blocks = [size.num_gpu_blocks for size in sizes.values()]
    assert blocks == sorted(blocks, reverse=True)
    assert len(set(blocks)) == 4


def test_activations_have_room_for_the_rows_that_ride_in_a_micro_batch():
    many = replace(RUN, max_num_seqs=4096)
    assert most_step_tokens(RUN) == 512  # 64 rows of one of four groups, and prompts
    assert most_step_tokens(many) == 1024 + 512 // 8
    assert most_step_tokens(replace(many, mixed_steps=False)) == 512


def test_host_pool_is_shared_out_to_the_replicas():
    for layouts, replicas in (("P4->T4", 1), ("D2P2->D2T2", 2)):
        sizes = size_pools(replace(RUN, layouts=layouts, kv_offloading_size=0.5), SHAPE, 64 * GIB)
        assert sizes.host_bytes == sizes.num_host_blocks * ROW_BYTES
        assert 0 <= GIB // 2 // replicas - sizes.host_bytes < ROW_BYTES


def test_blocks_set_by_hand_are_taken():
    sizes = size_pools(replace(RUN, num_gpu_kv_blocks=100, num_host_kv_blocks=70), SHAPE, 1 << 50)
    assert (sizes.num_gpu_blocks, sizes.num_host_blocks, sizes.host_bytes) == (100, 70, 70 * ROW_BYTES)


@pytest.mark.parametrize(
    ("changes", "device_bytes", "message"),
    [
        ({"num_gpu_kv_blocks": LONGEST - 1}, GIB, r"num_gpu_kv_blocks=63: .* needs 64 blocks of kv_block_size=16"),
        ({"num_host_kv_blocks": LONGEST - 1}, GIB, r"num_host_kv_blocks=63: .* needs 64 blocks.*kv_offloading_size"),
        ({"kv_offloading_size": 0.001}, GIB, r"num_host_kv_blocks=8: .* needs 64 blocks"),
        ({}, 16 << 20, r"gpu_memory_utilization=0.9: of 0.01 GiB .* leaves 0 KV blocks .* needs 64"),
        ({"gpu_memory_utilization": 0.01}, GIB, r"gpu_memory_utilization=0.01: of 0.01 GiB a device"),
    ],
)
def test_pool_too_small_for_one_request_is_refused(changes, device_bytes, message):
    with pytest.raises(UserError, match=message):
        size_pools(replace(RUN, **changes), SHAPE, device_bytes)


def test_shorter_requests_need_smaller_pools():
    run = replace(RUN, max_model_len=32, num_gpu_kv_blocks=2, num_host_kv_blocks=2)
    assert size_pools(run, SHAPE, GIB).num_gpu_blocks == 2
    with pytest.raises(UserError, match="num_gpu_kv_blocks=2"):
        size_pools(replace(run, max_model_len=33), SHAPE, GIB)


@pytest.mark.parametrize(
    ("layouts", "is_tied", "num_tables"),
    [
        ("P4->T4", False, 1),
        ("T4", False, 0.5),
        ("T4", True, 0.25),
        ("P4", True, 1),
        ("T2P2->T4", False, 0.5),
        ("T1", True, 1),
    ],
)
def test_tables_take_the_larger_phases_share_on_the_fullest_rank(layouts, is_tied, num_tables):
    shape = replace(SHAPE, vocab_size=8000, tie_word_embeddings=is_tied)
    sizes = size_pools(replace(RUN, layouts=layouts), shape, 64 * GIB)
    assert sizes.device.embeddings - 17 * 512 * 2 == num_tables * 8000 * 512 * 2

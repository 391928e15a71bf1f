"""The CUDA kernels against the plain torch path in float32, on random data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from seesaw_ds.kv.device_pool import DeviceKVPool, block_numel
from seesaw_ds.layout import Range, Shard
from seesaw_ds.model.attention.interface import AttentionBatch, AttentionRule
from seesaw_ds.model.attention.torch_backend import TorchAttention
from seesaw_ds.model.families.family import Activation
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.ops.torch_ops import TorchOps
from stages import attended

if TYPE_CHECKING:
    from seesaw_ds.model.attention.row_attention import RowAttention

pytestmark = pytest.mark.gpu(1)
HOPPER = pytest.mark.gpu(1, capability=(9, 0))  # what the kernel for decode rows is for

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 16, 2, 128, 16
PLAIN = AttentionRule(scale=HEAD_DIM**-0.5)
RULES = [PLAIN, AttentionRule(0.05, window=100), AttentionRule(0.1, soft_cap=5.0, window=30)]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


def random(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("adds_one", [False, True])
def test_rms_norm(adds_one: bool) -> None:
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    x, weight = random(77, 1024), random(1024)
    expected = TorchOps(norm_adds_one=adds_one).rms_norm(x.float(), weight.float(), 1e-5)
    assert relative_error(CudaOps(norm_adds_one=adds_one).rms_norm(x, weight, 1e-5), expected) < 5e-3


@pytest.mark.parametrize("adds_one", [False, True])
def test_add_rms_norm(adds_one: bool) -> None:
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    x, residual, weight = random(77, 1024), random(77, 1024), random(1024)
    reference = TorchOps(norm_adds_one=adds_one)
    expected, expected_residual = reference.add_rms_norm(x.float(), residual.float(), weight.float(), 1e-5)
    norm, new_residual = CudaOps(norm_adds_one=adds_one).add_rms_norm(x, residual, weight, 1e-5)
    assert relative_error(norm, expected) < 5e-3
    assert relative_error(new_residual, expected_residual) < 5e-3


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("num_cells", [1, 2, 4])
def test_act_and_mul(num_cells: int, activation: Activation) -> None:
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    gate_up = random(33, num_cells, 2, 256)
    expected = TorchOps(activation).act_and_mul(gate_up.float())
    assert relative_error(CudaOps(activation).act_and_mul(gate_up), expected) < 5e-3


@pytest.mark.parametrize("adds_one", [False, True])
@pytest.mark.parametrize("group_size", [1, 5, 8])
def test_norm_heads(group_size: int, adds_one: bool) -> None:
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    qkv = random(33, KV_HEADS, group_size + 2, HEAD_DIM)
    weights = random(HEAD_DIM), random(HEAD_DIM)
    reference = TorchOps(norm_adds_one=adds_one)
    expected = reference.norm_heads(qkv.float(), *(weight.float() for weight in weights), 1e-6)
    normed = CudaOps(norm_adds_one=adds_one).norm_heads(qkv.clone(), *weights, 1e-6)
    assert relative_error(normed, expected) < 5e-3
    assert torch.equal(normed[:, :, -1], qkv[:, :, -1])


def random_places(num_tokens: int, blocks: torch.Tensor) -> TokenPlaces:
    angles = torch.rand(num_tokens, HEAD_DIM // 2, device="cuda") * 6
    angles = torch.cat((angles, angles), dim=-1)
    return TokenPlaces(angles.cos(), angles.sin(), blocks, torch.randint(0, BLOCK, (num_tokens,), device="cuda"))


def test_rotate_and_store_in_a_strided_cache() -> None:
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    num_tokens, num_blocks = 50, 64
    qkv = random(num_tokens, KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM)
    places = random_places(num_tokens, torch.randperm(num_blocks, device="cuda")[:num_tokens])
    pool = random(num_blocks, KV_HEADS, 3, 2, BLOCK, HEAD_DIM)
    expected_pool = pool.float()
    kv_cache, expected_cache = (layers[:, :, 1].transpose(1, 2) for layers in (pool, expected_pool))
    queries, expected = random(num_tokens, HEADS, HEAD_DIM), torch.empty(num_tokens, HEADS, HEAD_DIM, device="cuda")
    TorchOps().rotate_and_store(qkv.float(), places, expected_cache, expected)
    CudaOps().rotate_and_store(qkv, places, kv_cache, queries)
    assert relative_error(queries, expected) < 5e-3
    assert relative_error(pool, expected_pool) < 5e-3
    for other in (0, 2):
        assert torch.equal(pool[:, :, other].float(), expected_pool[:, :, other])


def make_batch(query_lens: list[int], kv_lens: list[int], num_blocks: int, num_rows: int = 0) -> AttentionBatch:
    width = max(-(-kv_len // BLOCK) for kv_len in kv_lens)
    ids = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    tables = ids[: len(kv_lens) * width].reshape(len(kv_lens), width)
    return AttentionBatch(np.array(query_lens, np.int32), np.array(kv_lens, np.int32), tables, num_rows)


def workspace() -> torch.Tensor:
    from seesaw_ds.model.attention.flashinfer_backend import workspace_bytes

    return torch.empty(workspace_bytes(8, HEADS, HEAD_DIM), dtype=torch.uint8, device="cuda")


def attention_error(
    backend, query_lens: list[int], kv_lens: list[int], rule: AttentionRule = PLAIN, num_rows: int = 0
) -> float:
    num_blocks = 600
    batch = make_batch(query_lens, kv_lens, num_blocks, num_rows)
    kv_cache = layer_of_a_pool(num_blocks)
    queries = random(sum(query_lens), HEADS, HEAD_DIM)
    reference = TorchAttention(rule, BLOCK, torch.device("cuda"))
    reference.plan(batch)
    backend.plan(batch)
    return relative_error(attended(backend, queries, kv_cache), attended(reference, queries.float(), kv_cache.float()))


def layer_of_a_pool(num_blocks: int) -> torch.Tensor:
    """The second of three layers, strided as in the engine's pool."""
    shard = Shard(Range(0, 3), Range(0, KV_HEADS))
    memory = random(num_blocks, block_numel(shard, BLOCK, HEAD_DIM))
    return DeviceKVPool(memory, shard, BLOCK, HEAD_DIM).layer(1)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_prefill_attention_with_whole_prompts_and_later_chunks(rule: AttentionRule) -> None:
    from seesaw_ds.model.attention.flashinfer_backend import FlashInferPrefill

    backend = FlashInferPrefill(
        rule, HEADS, KV_HEADS, HEAD_DIM, BLOCK, workspace(), torch.bfloat16, torch.device("cuda")
    )
    assert attention_error(backend, [5, 300, 17, 64], [5, 300, 900, 65], rule) < 1e-2
    assert attention_error(backend, [1, 130], [1, 1000], rule) < 1e-2
    assert attention_error(backend, [1, 1, 1, 300, 17], [700, 1, 33, 300, 900], rule, num_rows=3) < 1e-2
    assert attention_error(backend, [1, 1], [1000, 16], rule, num_rows=2) < 1e-2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_decode_attention_at_several_sizes(rule: AttentionRule) -> None:
    from seesaw_ds.model.attention.flashinfer_backend import FlashInferDecode

    backend = FlashInferDecode(
        rule, HEADS, KV_HEADS, HEAD_DIM, BLOCK, 8, 600, workspace(), torch.bfloat16, torch.device("cuda")
    )
    for kv_lens in ([1], [16, 17], [900, 3, 250, 31], [1000, 2], [5, 6, 7, 8]):
        assert attention_error(backend, [1] * len(kv_lens), kv_lens, rule) < 1e-2


def own_rows(num_kv_heads: int, room: tuple[int, int] | None = None) -> RowAttention:
    """On the devices that the kernel is for it has to be used."""
    from seesaw_ds.model.attention.row_attention import RowAttention, can_attend_rows

    device = torch.device("cuda")
    assert can_attend_rows(PLAIN, 1, HEAD_DIM, BLOCK, device), "no nvcc, or the kernel is refused where it belongs"
    return RowAttention(PLAIN, num_kv_heads, device, room)


def some_lengths(num_rows: int, most: int) -> list[int]:
    return np.random.default_rng(num_rows).integers(1, most + 1, num_rows).tolist()


ROWS = {
    "one_token": [1],
    "short": [5, 6, 7, 8],
    "a_block_and_one_more": [16, 17],
    "long": [8192],
    "long_and_short": [8192, 1, 4000, 2, 3],
    "equal": [415] * 100,
    "whole_blocks": [512] * 7,
    "ragged": some_lengths(70, 4000),
    "many": some_lengths(1024, 60),
}


@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_lens", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(1, 8), (8, 1), (2, 5), (3, 8)])
def test_rows_of_any_number_and_length(
    num_kv_heads: int, group_size: int, kv_lens: list[int], dtype: torch.dtype
) -> None:
    lens = np.array(kv_lens, np.int32)
    num_pages = -(-lens // BLOCK)
    num_blocks = int(num_pages.sum()) + 8
    pool = torch.randn((num_blocks, num_kv_heads, 3, 2, BLOCK, HEAD_DIM), device="cuda").to(dtype)
    kv_cache = pool[:, :, 1].transpose(1, 2)
    tables = np.zeros((len(lens), num_pages.max()), np.int32)
    ids = np.random.default_rng(0).permutation(num_blocks)
    tables[np.arange(num_pages.max()) < num_pages[:, None]] = ids[: num_pages.sum()]
    queries = torch.randn((len(lens), num_kv_heads * group_size, HEAD_DIM), device="cuda").to(dtype)
    backend = own_rows(num_kv_heads)
    backend.plan(AttentionBatch(np.ones_like(lens), lens, tables, len(lens)))
    out = attended(backend, queries, kv_cache)
    assert torch.equal(out, attended(backend, queries, kv_cache))

    for row in range(0, len(lens), max(1, len(lens) // 16)):
        blocks = torch.from_numpy(tables[row, : num_pages[row]]).to("cuda").long()
        keys, values = kv_cache[blocks].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : kv_lens[row]]
        query = queries[row].float().unflatten(0, (num_kv_heads, group_size))
        expected = torch.softmax(query @ keys.mT * PLAIN.scale, dim=-1) @ values
        assert relative_error(out[row], expected.flatten(0, 1)) < 1e-2


@pytest.mark.parametrize("is_own", [False, pytest.param(True, marks=HOPPER)])
def test_a_captured_step_replays_with_a_new_plan(is_own: bool) -> None:
    from seesaw_ds.model.attention.flashinfer_backend import FlashInferDecode
    from seesaw_ds.worker.graphs import GraphExecutor, GraphPool

    device = torch.device("cuda")
    if is_own:
        backend = own_rows(KV_HEADS, (4, 600))
    else:
        sizes = (HEADS, KV_HEADS, HEAD_DIM, BLOCK, 4, 600)
        backend = FlashInferDecode(PLAIN, *sizes, workspace(), torch.bfloat16, device)
    reference = TorchAttention(PLAIN, BLOCK, device)
    executor = GraphExecutor(4, lambda: None, GraphPool())
    kv_cache = layer_of_a_pool(600)
    queries = random(4, HEADS, HEAD_DIM)
    for kv_lens in ([900, 3, 250, 31], [17, 1000, 1, 500]):
        batch = make_batch([1] * 4, kv_lens, 600)
        backend.plan(batch)
        out = executor.run(4, lambda size: attended(backend, queries[:size], kv_cache))
        reference.plan(batch)
        assert relative_error(out, attended(reference, queries.float(), kv_cache.float())) < 1e-2


@HOPPER
def test_captured_prefill_replays_with_a_new_plan() -> None:
    from seesaw_ds.model.attention.flashinfer_backend import make_fixed_prefill
    from seesaw_ds.worker.graphs import GraphPool

    device, num_tokens, num_blocks = torch.device("cuda"), 320, 1000
    sizes = (HEADS, KV_HEADS, HEAD_DIM, BLOCK, num_tokens, 30, num_blocks)
    fixed = make_fixed_prefill(PLAIN, *sizes, workspace(), torch.bfloat16, device)
    assert fixed is not None
    reference = TorchAttention(PLAIN, BLOCK, device)
    kv_cache = layer_of_a_pool(num_blocks)
    queries, out = random(num_tokens, HEADS, HEAD_DIM), random(num_tokens, HEADS, HEAD_DIM)
    fixed.plan(make_batch([num_tokens], [num_tokens], num_blocks))
    fixed.forward(queries, kv_cache, out)
    graph = GraphPool().capture(lambda: fixed.forward(queries, kv_cache, out))
    batches = [
        make_batch([1, 1, 1, 300, 17], [700, 1, 33, 300, 900], num_blocks, num_rows=3),
        make_batch([320], [2000], num_blocks),
        make_batch([1] * 30 + [100, 8, 1, 181], [*range(1, 301, 10), 170, 8, 5, 181], num_blocks, num_rows=30),
        make_batch([8] * 40, [8] * 40, num_blocks),
        make_batch([1, 319], [2000, 319], num_blocks, num_rows=1),
    ]
    for batch in batches * 2:
        assert fixed.fits(batch)
        fixed.plan(batch)
        out.fill_(torch.nan)
        queries.copy_(random(num_tokens, HEADS, HEAD_DIM))
        graph.replay()
        reference.plan(batch)
        assert relative_error(out, attended(reference, queries.float(), kv_cache.float())) < 1e-2

    assert not fixed.fits(make_batch([319], [319], num_blocks))
    assert not fixed.fits(make_batch([8] * 39 + [4] * 2, [8] * 41, num_blocks)), "too many chunks"
    assert not fixed.fits(make_batch([1] * 31 + [289], [1] * 31 + [289], num_blocks, num_rows=31)), "too many rows"
    assert not fixed.fits(make_batch([1] * 320, [1] * 320, num_blocks, num_rows=320)), "no chunk"


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_kernels_that_attention_loads_are_those_compiled_beforehand(rule: AttentionRule) -> None:
    from flashinfer.jit.core import jit_spec_registry

    from seesaw_ds.model.attention.flashinfer_backend import FlashInferPrefill, make_decode
    from seesaw_ds.model.attention.row_attention import ROW_ATTENTION, can_attend_rows
    from seesaw_ds.model.kernel_library import needed_kernels

    device = torch.device("cuda")
    group = HEADS // KV_HEADS
    names = {spec.name for spec in needed_kernels([rule], group, HEAD_DIM, BLOCK, torch.bfloat16, "silu", device)}
    sizes = (HEADS, KV_HEADS, HEAD_DIM, BLOCK)
    prefill = FlashInferPrefill(rule, *sizes, workspace(), torch.bfloat16, device)
    decode = make_decode(rule, *sizes, 8, 600, workspace(), torch.bfloat16, device)
    assert attention_error(prefill, [1, 300], [700, 300], rule, num_rows=1) < 1e-2
    assert attention_error(decode, [1, 1], [900, 3], rule) < 1e-2
    kind = f"use_swa_{rule.window is not None}_use_logits_cap_{rule.soft_cap is not None}"
    loaded = {status.name for status in jit_spec_registry.get_all_statuses() if kind in status.name}
    if can_attend_rows(rule, group, HEAD_DIM, BLOCK, device):
        assert ROW_ATTENTION.spec.name in names
        loaded = {ROW_ATTENTION.spec.name} | {name for name in loaded if name.endswith("_sm90")}  # other tests load fa2
    assert loaded <= names
    assert all(status.is_compiled for status in jit_spec_registry.get_all_statuses() if status.name in loaded)

"""The layer operations as CUDA kernels: FlashInfer's where it has them, cuBLASLt's, and our own.

FlashInfer's rotary kernels want heads at one stride and write the cache in a second pass. Our QKV product is grouped by
KV head, so that any re-sharding cell is contiguous; the Triton kernel reads that form and rotates, and stores
keys and values, in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from flashinfer.activation import gelu_tanh_and_mul, silu_and_mul
from flashinfer.norm import fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seesaw_ds.model.families.family import Activation
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.ops.products import TunedProducts, TuningTimes
from seesaw_ds.model.ops.row_kernels import RowKernels
from seesaw_ds.parallel.all_reduce import AllReduce
from seesaw_ds.parallel.device import can_start_early


class CudaOps:
    """For bfloat16 and float16 on NVIDIA devices, and head dims that are powers of two."""

    def __init__(
        self, activation: Activation = "silu", norm_adds_one: bool = False, rows: RowKernels | None = None
    ) -> None:
        self._is_silu = activation == "silu"
        self._act_and_mul = silu_and_mul if activation == "silu" else gelu_tanh_and_mul
        self._rms_norm = gemma_rmsnorm if norm_adds_one else rmsnorm
        self._add_rms_norm = gemma_fused_add_rmsnorm if norm_adds_one else fused_add_rmsnorm
        self._weight_offset = 1.0 if norm_adds_one else 0.0
        self._products = TunedProducts()
        self._own = rows
        self._rows: RowKernels | None = None  # the same, once `tune_linear` has loaded them
        self._is_early = can_start_early(torch.device("cuda"))

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        own = self._own_kernels(x, weight) if bias is None else None
        return self._products(x, weight, bias) if own is None else own.multiply(x, weight)

    def linear_all_reduce(self, x: torch.Tensor, weight: torch.Tensor, all_reduce: AllReduce) -> torch.Tensor:
        slots, rows = all_reduce.host_slots, self._rows
        if slots is not None and rows is not None and x.is_contiguous() and rows.reduces(x.shape[0], weight, slots):
            return rows.multiply_and_reduce(x, weight, slots)
        return all_reduce(self.linear(x, weight))

    def tune_linear(self, num_rows: Iterable[int], weights: Iterable[torch.Tensor]) -> TuningTimes:
        weights = list(weights)
        self._rows = self._own if self._own is not None and self._own.prepare() else None
        return self._products.tune(
            (rows, weight)
            for rows in num_rows
            for weight in weights
            if self._rows is None or not self._rows.multiplies(rows, weight)
        )

    def rms_norm(self, x_NM: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._rms_norm(x_NM, weight, eps)

    def add_rms_norm(
        self, x_NM: torch.Tensor, residual_NM: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rows is not None and self._rows.norms(x_NM):
            self._rows.add_rms_norm(x_NM, residual_NM, weight, eps, self._weight_offset)
        else:
            self._add_rms_norm(x_NM, residual_NM, weight, eps)
        return x_NM, residual_NM

    def act_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_tokens = gate_up.shape[0]
        return self._act_and_mul(gate_up.flatten(2).flatten(0, 1)).view(num_tokens, -1)

    def linear_act_and_mul(self, x_NM: torch.Tensor, weight: torch.Tensor, num_cells: int) -> torch.Tensor:
        own = self._own_kernels(x_NM, weight)
        if own is not None and self._is_silu and own.gates(weight, num_cells):
            return own.multiply_gated(x_NM, weight, num_cells)
        return self.act_and_mul(self.linear(x_NM, weight).view(x_NM.shape[0], num_cells, 2, -1))

    def _own_kernels(self, x: torch.Tensor, weight: torch.Tensor) -> RowKernels | None:
        """Our own kernels, if such a product is theirs: whatever they take.

        By timings of a product alone others may be as fast, but what comes after those cannot start early. And in sums
        over ranks all have to do the same.
        """
        rows = self._rows
        return rows if rows is not None and x.is_contiguous() and rows.multiplies(x.shape[0], weight) else None

    def norm_heads(
        self, qkv: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        num_tokens, num_kv_heads, group_size, head_dim = qkv.shape
        _norm_heads[(num_tokens * num_kv_heads,)](
            qkv,
            query_weight,
            key_weight,
            eps,
            self._weight_offset,
            QUERIES=group_size - 2,
            ROWS_PADDED=triton.next_power_of_2(group_size - 1),
            HEAD_DIM=head_dim,
            num_warps=4,
        )
        return qkv

    def rotate_and_store(
        self, qkv: torch.Tensor, places: TokenPlaces, kv_cache: torch.Tensor, q_NHD: torch.Tensor
    ) -> None:
        num_tokens, num_kv_heads, group_size, head_dim = qkv.shape
        queries_per_kv_head = group_size - 2
        _rotate_and_store[(num_tokens, num_kv_heads)](
            qkv,
            q_NHD,
            kv_cache,
            places.cos,
            places.sin,
            places.write_blocks,
            places.write_offsets,
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            kv_cache.stride(3),
            places.cos.stride(0),
            num_kv_heads,
            QUERIES=queries_per_kv_head,
            QUERIES_PADDED=triton.next_power_of_2(queries_per_kv_head),
            HALF=head_dim // 2,
            IS_EARLY=self._is_early,
            num_warps=4,
            launch_pdl=self._is_early,
        )


@triton.jit(do_not_specialize=["num_kv_heads"])
def _rotate_and_store(
    qkv,
    queries,
    cache,
    cos,
    sin,
    write_blocks,
    write_offsets,
    block_stride,
    kv_stride,
    head_stride,
    slot_stride,
    angle_stride,
    num_kv_heads,
    QUERIES: tl.constexpr,
    QUERIES_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """One program for a token's KV head: its QUERIES queries, its key and its value, each of 2 * HALF elements.

    IS_EARLY: this kernel may start before its queries, keys and values are there.
    """
    if IS_EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.arange(0, QUERIES_PADDED)[:, None]
    low = tl.arange(0, HALF)
    cosine = tl.load(cos + token * angle_stride + low)
    sine = tl.load(sin + token * angle_stride + low)
    block = tl.load(write_blocks + token)
    offset = tl.load(write_offsets + token)
    if IS_EARLY:
        gdc_wait()

    group = qkv + (token * num_kv_heads + head) * ((QUERIES + 2) * 2 * HALF)
    is_query = row < QUERIES
    first = tl.load(group + row * 2 * HALF + low[None, :], mask=is_query).to(tl.float32)
    second = tl.load(group + row * 2 * HALF + HALF + low[None, :], mask=is_query).to(tl.float32)
    target = queries + (token * num_kv_heads + head) * (QUERIES * 2 * HALF) + row * 2 * HALF + low[None, :]
    tl.store(target, (first * cosine - second * sine).to(queries.dtype.element_ty), mask=is_query)
    tl.store(target + HALF, (second * cosine + first * sine).to(queries.dtype.element_ty), mask=is_query)

    key = group + QUERIES * 2 * HALF
    first_k = tl.load(key + low).to(tl.float32)
    second_k = tl.load(key + HALF + low).to(tl.float32)
    place = cache + block * block_stride + head * head_stride + offset * slot_stride
    tl.store(place + low, (first_k * cosine - second_k * sine).to(cache.dtype.element_ty))
    tl.store(place + HALF + low, (second_k * cosine + first_k * sine).to(cache.dtype.element_ty))

    value = key + 2 * HALF
    tl.store(place + kv_stride + low, tl.load(value + low))
    tl.store(place + kv_stride + HALF + low, tl.load(value + HALF + low))


@triton.jit
def _norm_heads(
    qkv,
    query_weight,
    key_weight,
    eps,
    weight_offset,
    QUERIES: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program for a token's KV head: its QUERIES queries and its key are normed where they are."""
    group = qkv + tl.program_id(0).to(tl.int64) * ((QUERIES + 2) * HEAD_DIM)
    row = tl.arange(0, ROWS_PADDED)[:, None]
    column = tl.arange(0, HEAD_DIM)
    place = group + row * HEAD_DIM + column[None, :]
    is_normed = row <= QUERIES
    x = tl.load(place, mask=is_normed, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
    query_factor = tl.load(query_weight + column).to(tl.float32) + weight_offset
    key_factor = tl.load(key_weight + column).to(tl.float32) + weight_offset
    factor = tl.where(row < QUERIES, query_factor[None, :], key_factor[None, :])
    tl.store(place, (x * scale[:, None] * factor).to(qkv.dtype.element_ty), mask=is_normed)

"""Paged attention with FlashInfer kernels, for bfloat16 and float16 on NVIDIA devices.

FlashInfer plans a step on the host, from index arrays, and copies the plan to the device from a pinned buffer of
the wrapper. That buffer must not be written again before the copy is done: `_PlanFence`.
"""

from __future__ import annotations

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch, AttentionRule, FixedAttention
from seesaw_ds.model.attention.row_attention import RowAttention, make_row_attention
from seesaw_ds.parallel.device import to_device

_CHUNK_BYTES = 256 << 20
_PLAN_BYTES = 8 << 20
_ROW_BYTES = 128 << 20
# Tokens of a prompt's part in a micro-batch, in the mean over all parts; shorter ones still run, but not as a graph.
_LEAST_CHUNK = 8
# Partial results of sequences whose KV is split over several blocks of threads: FlashInfer 0.6.14 was seen to ask for
# 24 float32 copies of a step's output.
_SPLIT_COPIES = 24


class _PlanFence:
    """Keeps the host from planning the next step before the device has read the plan of the last."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._is_recorded = False

    def wait(self) -> None:
        if self._is_recorded:
            self._event.synchronize()

    def record(self) -> None:
        self._event.record()
        self._is_recorded = True


def _settings(rule: AttentionRule, dtype: torch.dtype) -> dict[str, object]:
    """A rule and the dtype as arguments of FlashInfer's `plan`; its windows do not count the token itself."""
    return {
        "q_data_type": dtype,
        "kv_data_type": dtype,
        "sm_scale": rule.scale,
        "logits_soft_cap": rule.soft_cap,
        "window_left": -1 if rule.window is None else rule.window - 1,
    }


def _pages(kv_lens: np.ndarray, block_tables: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FlashInfer's form of the block tables: (offsets of each sequence, blocks of all, tokens in each last block)."""
    num_blocks = -(-kv_lens // block_size)
    used = np.arange(block_tables.shape[1], dtype=np.int32) < num_blocks[:, None]
    offsets = np.zeros(len(num_blocks) + 1, dtype=np.int32)
    np.cumsum(num_blocks, out=offsets[1:])
    return offsets, block_tables[used], (kv_lens - (num_blocks - 1) * block_size).astype(np.int32)


def _plan_rows(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    fence: _PlanFence,
    batch: AttentionBatch,
    heads: tuple[int, int, int],
    block_size: int,
    device: torch.device,
    settings: dict[str, object],
) -> None:
    offsets, blocks, last_lens = _pages(batch.kv_lens, batch.block_tables, block_size)
    fence.wait()
    wrapper.plan(
        torch.from_numpy(offsets),
        to_device(blocks, device),
        torch.from_numpy(last_lens),
        *heads,
        block_size,
        **settings,
    )
    fence.record()


def workspace_bytes(max_num_rows: int, num_heads: int, head_dim: int) -> int:
    """What a backend of either phase needs for at most `max_num_rows` decode rows in a step."""
    return max(_CHUNK_BYTES, _ROW_BYTES + _SPLIT_COPIES * max_num_rows * num_heads * head_dim * 4)


class _FlashInferRows:
    """Decode rows of a prefill batch, by FlashInfer's kernel for them."""

    def __init__(
        self,
        rule: AttentionRule,
        heads: tuple[int, int, int],
        block_size: int,
        workspace: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._settings = _settings(rule, dtype)
        self._heads = heads
        self._block_size = block_size
        self._device = device
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True, backend="fa2")
        self._fence = _PlanFence()

    def plan(self, batch: AttentionBatch) -> None:
        _plan_rows(self._wrapper, self._fence, batch, self._heads, self._block_size, self._device, self._settings)

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        self._wrapper.run(q_NHD, kv_cache, out=out_NHD)


class _FlashInferChunks:
    """Chunks of prompts, of any lengths.

    With `room`, (chunks, blocks of all together) at most, the plan stays in place, as that of `RowAttention` does.
    """

    def __init__(
        self,
        rule: AttentionRule,
        heads: tuple[int, int, int],
        block_size: int,
        workspace: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        room: tuple[int, int] | None = None,
    ) -> None:
        self._settings = _settings(rule, dtype)
        self._heads = heads
        self._block_size = block_size
        self._device = device
        self._room_for_chunks = 0
        buffers = {}
        if room is not None:
            self._room_for_chunks = room[0]
            sizes = {"qo_indptr": room[0] + 1, "paged_kv_indptr": room[0] + 1}
            sizes |= {"paged_kv_indices": room[1], "paged_kv_last_page_len": room[0]}
            buffers = {f"{name}_buf": torch.zeros(n, dtype=torch.int32, device=device) for name, n in sizes.items()}
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspace, "HND", use_cuda_graph=room is not None, **buffers
        )
        self._fence = _PlanFence()

    def plan(self, batch: AttentionBatch, first_token: int = 0) -> None:
        """Plan for chunks alone; `forward` gets `first_token` tokens before theirs."""
        offsets, blocks, last_lens = _pages(batch.kv_lens, batch.block_tables, self._block_size)
        query_offsets = np.full(len(batch.query_lens) + 1, first_token, dtype=np.int32)
        query_offsets[1:] += np.cumsum(batch.query_lens, dtype=np.int32)
        # The other chunks that there is room for have no tokens, and begin and end where the last one ends.
        others = (0, max(0, self._room_for_chunks - len(last_lens)))
        self._fence.wait()
        self._wrapper.plan(
            torch.from_numpy(np.pad(query_offsets, others, mode="edge")),
            torch.from_numpy(np.pad(offsets, others, mode="edge")),
            to_device(blocks, self._device),
            torch.from_numpy(np.pad(last_lens, others)),
            *self._heads,
            self._block_size,
            causal=True,
            seq_lens=torch.from_numpy(np.pad(batch.kv_lens, others)),
            **self._settings,
        )
        self._fence.record()

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        self._wrapper.run(q_NHD, kv_cache, out=out_NHD)


def _split(batch: AttentionBatch) -> tuple[AttentionBatch, AttentionBatch]:
    """The decode rows of a prefill batch, and the chunks that follow them."""
    num_rows = batch.num_decode_rows
    query_lens, kv_lens, tables = batch.query_lens, batch.kv_lens, batch.block_tables
    rows = AttentionBatch(query_lens[:num_rows], kv_lens[:num_rows], tables[:num_rows], num_rows)
    return rows, AttentionBatch(query_lens[num_rows:], kv_lens[num_rows:], tables[num_rows:])


class FlashInferPrefill:
    """Chunks of prompts, of any lengths, after decode rows; causal, each attends to what its sequence has in the cache.

    Decode rows have a kernel of their own, which splits long KV among thread blocks: `RowAttention` or FlashInfer's.
    `workspace`, of `workspace_bytes`, may be used by others on the same stream between the calls.
    """

    def __init__(
        self,
        rule: AttentionRule,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        workspace: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = (num_heads, num_kv_heads, head_dim)
        self._num_rows = 0
        self._has_chunks = False
        self._chunks = _FlashInferChunks(rule, heads, block_size, workspace, dtype, device)
        self._rows: RowAttention | _FlashInferRows = make_row_attention(
            rule, *heads, block_size, device
        ) or _FlashInferRows(rule, heads, block_size, workspace, dtype, device)

    def plan(self, batch: AttentionBatch) -> None:
        rows, chunks = _split(batch)
        self._num_rows = batch.num_decode_rows
        self._has_chunks = len(chunks.query_lens) > 0
        if self._num_rows:
            self._rows.plan(rows)
        if self._has_chunks:
            self._chunks.plan(chunks)

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        if self._num_rows:
            self._rows.forward(q_NHD[: self._num_rows], kv_cache, out_NHD[: self._num_rows])
        if self._has_chunks:
            self._chunks.forward(q_NHD[self._num_rows :], kv_cache, out_NHD[self._num_rows :])


class FlashInferFixedPrefill:
    """As `FlashInferPrefill`, for batches of `num_tokens` tokens; a `FixedAttention`.

    Both kernels get all tokens, and from their plans know which are theirs. `rows` and `chunks` have room for so many
    decode rows, or chunks, and blocks of all sequences.
    """

    def __init__(
        self,
        rows: RowAttention,
        chunks: _FlashInferChunks,
        block_size: int,
        num_tokens: int,
        max_num_rows: int,
        max_num_chunks: int,
        max_num_blocks: int,
    ) -> None:
        self._rows = rows
        self._chunks = chunks
        self._block_size = block_size
        self._num_tokens = num_tokens
        self._max_num_rows = max_num_rows
        self._max_num_chunks = max_num_chunks
        self._max_num_blocks = max_num_blocks

    def fits(self, batch: AttentionBatch) -> bool:
        num_rows = batch.num_decode_rows
        return (
            int(batch.query_lens.sum()) == self._num_tokens
            and 0 < len(batch.query_lens) - num_rows <= self._max_num_chunks
            and num_rows <= self._max_num_rows
            and int((-(-batch.kv_lens // self._block_size)).sum()) <= self._max_num_blocks
        )

    def plan(self, batch: AttentionBatch) -> None:
        rows, chunks = _split(batch)
        self._rows.plan(rows)
        self._chunks.plan(chunks, first_token=batch.num_decode_rows)

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        self._rows.forward(q_NHD, kv_cache, out_NHD)
        self._chunks.forward(q_NHD, kv_cache, out_NHD)


class FlashInferDecode:
    """One token a sequence. For each batch size one wrapper, over buffers that stay in place, so that CUDA graphs
    captured at that size can be replayed after another `plan`. `workspace` as above."""

    def __init__(
        self,
        rule: AttentionRule,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_num_seqs: int,
        max_num_blocks: int,
        workspace: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._settings = _settings(rule, dtype)
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._block_size = block_size
        self._device = device
        self._workspace = workspace
        self._plan = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device)  # of the step that runs, of any size
        self._blocks = torch.zeros(max_num_blocks, dtype=torch.int32, device=device)
        self._offsets = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._last_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._wrappers: dict[int, tuple[BatchDecodeWithPagedKVCacheWrapper, _PlanFence]] = {}
        self._wrapper: BatchDecodeWithPagedKVCacheWrapper | None = None

    def plan(self, batch: AttentionBatch) -> None:
        self._wrapper, fence = self._of_size(len(batch.kv_lens))
        _plan_rows(self._wrapper, fence, batch, self._heads, self._block_size, self._device, self._settings)

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        assert self._wrapper is not None, "plan() comes before forward()"
        self._wrapper.run(q_NHD, kv_cache, out=out_NHD)

    def _of_size(self, num_seqs: int) -> tuple[BatchDecodeWithPagedKVCacheWrapper, _PlanFence]:
        if num_seqs not in self._wrappers:
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self._offsets[: num_seqs + 1],
                paged_kv_indices_buffer=self._blocks,
                paged_kv_last_page_len_buffer=self._last_lens[:num_seqs],
                backend="fa2",
            )
            wrapper.reset_workspace_buffer(self._workspace, self._plan)
            self._wrappers[num_seqs] = (wrapper, _PlanFence())
        return self._wrappers[num_seqs]


def make_fixed_prefill(
    rule: AttentionRule,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_tokens: int,
    max_num_rows: int,
    max_num_blocks: int,
    workspace: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> FixedAttention | None:
    """A `FlashInferFixedPrefill` where decode rows have `RowAttention`, else None."""
    heads = (num_heads, num_kv_heads, head_dim)
    rows = make_row_attention(rule, *heads, block_size, device, (max_num_rows, max_num_blocks))
    if rows is None:
        return None
    max_num_chunks = -(-num_tokens // _LEAST_CHUNK)
    chunks = _FlashInferChunks(rule, heads, block_size, workspace, dtype, device, (max_num_chunks, max_num_blocks))
    return FlashInferFixedPrefill(rows, chunks, block_size, num_tokens, max_num_rows, max_num_chunks, max_num_blocks)


def make_decode(
    rule: AttentionRule,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_num_seqs: int,
    max_num_blocks: int,
    workspace: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionBackend:
    """For decode steps: `RowAttention` where it can, else `FlashInferDecode`, whose arguments these are."""
    shape, room = (num_heads, num_kv_heads, head_dim, block_size), (max_num_seqs, max_num_blocks)
    rows = make_row_attention(rule, *shape, device, room)
    return rows or FlashInferDecode(rule, *shape, *room, workspace, dtype, device)

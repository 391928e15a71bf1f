"""Attention of decode rows by a kernel of our own, row_attention.cu, where a rule and shape are what it was made for.

It reads the cache faster than FlashInfer's kernel does: all multiprocessors read as much as each other, as row_plan.py
has it, however many rows there are and however long.
"""

from __future__ import annotations

from pathlib import Path

import torch

from seesaw_ds.model.attention.interface import AttentionBatch, AttentionRule
from seesaw_ds.model.attention.row_plan import PAGE, WARPS, packed_size, plan_rows
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.own_kernel import OwnKernel

HEAD_DIM = 128
MAX_GROUP = 8
ROW_ATTENTION = OwnKernel(
    Path(__file__).with_suffix(".cu"), "decode rows have FlashInfer's attention", [f"-DWARPS={WARPS}"]
)
_PARTIAL = HEAD_DIM * MAX_GROUP + 2 * MAX_GROUP  # float32 values of a partial result, as in the source


def can_attend_rows(rule: AttentionRule, group_size: int, head_dim: int, block_size: int, device: torch.device) -> bool:
    """Whether `RowAttention` takes these."""
    return (
        rule.soft_cap is None
        and rule.window is None
        and rule.scale > 0
        and group_size <= MAX_GROUP
        and (head_dim, block_size) == (HEAD_DIM, PAGE)
        and ROW_ATTENTION.can_run(device)
    )


def make_row_attention(
    rule: AttentionRule,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
    room: tuple[int, int] | None = None,
) -> RowAttention | None:
    """A `RowAttention` where there can be one, else None."""
    if can_attend_rows(rule, num_heads // num_kv_heads, head_dim, block_size, device) and ROW_ATTENTION.loads:
        return RowAttention(rule, num_kv_heads, device, room)
    return None


class RowAttention:
    """One token a sequence.

    With `room`, (rows, blocks of all rows together) at most, the plan stays in place, so that a CUDA graph captured
    after one can be replayed after another.
    """

    def __init__(
        self, rule: AttentionRule, num_kv_heads: int, device: torch.device, room: tuple[int, int] | None = None
    ) -> None:
        self._scale = rule.scale
        self._num_kv_heads = num_kv_heads
        self._device = device
        self._num_ctas = torch.cuda.get_device_properties(device).multi_processor_count
        self._partials = torch.empty(self._num_ctas * 2 * _PARTIAL, dtype=torch.float32, device=device)
        self._counters = torch.zeros(self._num_ctas, dtype=torch.int32, device=device)
        self._room_for_rows = 0
        self._buffer: torch.Tensor | None = None
        if room is not None:
            self._room_for_rows = room[0]
            self._buffer = torch.zeros(packed_size(self._num_ctas, *room), dtype=torch.int32, device=device)
        self._plan: torch.Tensor | None = None

    def plan(self, batch: AttentionBatch) -> None:
        plan = plan_rows(batch.kv_lens, batch.block_tables, self._num_kv_heads, self._num_ctas)
        if self._buffer is None:
            self._room_for_rows = len(batch.kv_lens)
        packed = to_device(plan.packed(self._room_for_rows), self._device)
        if self._buffer is None:
            self._plan = packed
        else:
            self._buffer[: len(packed)].copy_(packed)
            self._plan = self._buffer

    def forward(self, q_NHD: torch.Tensor, kv_cache: torch.Tensor, out_NHD: torch.Tensor) -> None:
        assert self._plan is not None, "plan() comes before forward()"
        ROW_ATTENTION.module.attend_rows(
            q_NHD, kv_cache, out_NHD, self._plan, self._partials, self._counters, self._room_for_rows, self._scale
        )

"""Transposes of blocks in CPU memory, bit by bit, with vector instructions where torch has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def transpose(block: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
    """Write the transpose of `block`, contiguous on CPU, into `targets`, one below the other, and cast it.

    Bit by bit the same where dtypes are. Torch transposes 2-byte elements one by one; a channel shuffle of 4-byte ones
    moves vectors. So that turns pairs of neighbours, which are then taken apart: their low halves (little-endian) are
    one row, the high halves the next.
    """
    heights = [len(target) for target in targets]
    item_bytes = block.dtype.itemsize
    if item_bytes == 2 and all(height % 2 == 0 for height in heights):
        pairs = _shuffle(block).view(torch.int32)
        for target, part in zip(targets, torch.split(pairs, [height // 2 for height in heights]), strict=True):
            _take_apart(part, target, block.dtype)
        return
    turned = _shuffle(block).view(block.dtype) if item_bytes == 4 else block.t()
    for target, part in zip(targets, torch.split(turned, heights), strict=True):
        target.copy_(part)


def _take_apart(pairs: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> None:
    """Write both halves of int32 `pairs` (rows / 2, columns), of `dtype` each, to `target`; changes `pairs`."""
    turned = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
    halves = turned.view(torch.int16)
    halves[0::2].copy_(pairs)
    halves[1::2].copy_(pairs.bitwise_right_shift_(16))
    if turned is not target:
        target.copy_(turned)


def _shuffle(block: torch.Tensor) -> torch.Tensor:
    """The transpose of `block` seen as (rows, columns) of 4 bytes each: what shuffles the channels of one pixel."""
    rows = block.shape[0]
    pixel = (
        block.view(torch.float32).view(1, 1, 1, -1).permute(0, 3, 1, 2)
    )  # channels last, as the fast kernel wants it
    return torch.native_channel_shuffle(pixel, rows).view(-1, rows)

"""Device memory that several users need in turn: attention's workspaces, and buffers of what changes layout.

All of them queue their work on one stream, or have it wait for their own, so each finds the memory unused.
"""

from __future__ import annotations

import torch

_ALIGNMENT = 512  # bytes; what kernels and copies like


class Cutter:
    """Cuts a scratch memory (bytes,) uint8 into tensors, one behind the other."""

    def __init__(self, scratch: torch.Tensor) -> None:
        self._scratch = scratch
        self._end = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, contiguous, with any contents."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        start = self._end
        self._end = start + padded(num_bytes)
        assert start + num_bytes <= len(self._scratch), (start, num_bytes, len(self._scratch))
        return self._scratch[start : start + num_bytes].view(dtype).view(shape)


def padded(num_bytes: int) -> int:
    """What a tensor of `num_bytes` takes of a scratch memory."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

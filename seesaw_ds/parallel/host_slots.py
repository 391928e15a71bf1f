"""Host memory through which ranks add up what a product computes while it goes on computing.

Where ranks reach each other through host memory only, an all-reduce takes as long as the product before it, or half as
long. `row_kernels.cu` computes features band by band, and the sum of a band travels while the next one is computed.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from seesaw_ds.parallel.shared_memory import NodeSharedMapping

# A piece, which is added up at once: so many features of up to so many rows.
_PIECE_FEATURES = 64
_PIECE_ROWS = 64
_MOST_PIECES = 256
FLAG_STRIDE = 8  # int64 from one flag to the next: each has a cache line of its own
_DTYPES = (torch.bfloat16, torch.float16)


def _slots_bytes(num_ranks: int) -> int:
    """Two halves for each rank: `host_all_reduce_kernel` says why."""
    return 2 * num_ranks * _MOST_PIECES * _PIECE_FEATURES * _PIECE_ROWS * torch.bfloat16.itemsize


def required_bytes(num_ranks: int) -> int:
    """All ranks' slots, then all ranks' flags."""
    return _slots_bytes(num_ranks) + num_ranks * _MOST_PIECES * FLAG_STRIDE * torch.int64.itemsize


class HostSlots:
    """What a rank's kernels need for sums over `group`: all ranks make the same in the same order, one at a time.

    rank   this one's
    flags  (ranks, pieces, 8) int64 in host memory, of which the first is used
    calls  (pieces,) int64 on the device

    `offset` is where the memory of `required_bytes` begins in `mapping`.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, mapping: NodeSharedMapping, offset: int) -> None:
        self.rank = group.rank()
        num_ranks = group.size()
        slots_shape = (num_ranks, 2, _MOST_PIECES, _PIECE_FEATURES * _PIECE_ROWS)
        self._slots = {dtype: mapping.tensor(offset, slots_shape, dtype) for dtype in _DTYPES}
        flags_shape = (num_ranks, _MOST_PIECES, FLAG_STRIDE)
        self.flags = mapping.tensor(offset + _slots_bytes(num_ranks), flags_shape, torch.int64)
        self.calls = torch.zeros(_MOST_PIECES, dtype=torch.int64, device=device)

    def slots(self, dtype: torch.dtype) -> torch.Tensor:
        """(ranks, 2, pieces, 64 features of 64 rows), of float16 or bfloat16, in host memory."""
        return self._slots[dtype]

    def holds(self, num_rows: int, num_features: int) -> bool:
        """Whether (rows, features) can be added up."""
        num_pieces = -(-num_rows // _PIECE_ROWS) * num_features // _PIECE_FEATURES
        return num_features % _PIECE_FEATURES == 0 and num_pieces <= _MOST_PIECES

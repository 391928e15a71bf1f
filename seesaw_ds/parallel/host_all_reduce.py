"""All-reduce through host memory in one kernel, for devices that cannot reach each other's memory.

Every rank writes its tensor to a slot of memory that the node shares and reads the others' slots. Only host memory is
used: no CUDA IPC, no peer access, no multicast. `host_all_reduce_kernel` has the protocol and why it is right.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from seesaw_ds.parallel import device as devices
from seesaw_ds.parallel.all_reduce import BackendAllReduce
from seesaw_ds.parallel.host_slots import FLAG_STRIDE, HostSlots
from seesaw_ds.parallel.shared_memory import NodeSharedMapping

VECTOR_BYTES = 16  # what one thread loads or stores at once
NUM_WRITERS = 48  # blocks; as many read. Together they fit on the smallest devices at once
MIN_CHUNK_BYTES = 4 << 10
MAX_CHUNK_BYTES = 16 << 10
_CHUNK_BYTES_OF_LARGE = 8 << 10  # of tensors that are more than a chunk for each writer
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_READ_BYTES = 8 << 20  # what a rank may read from the others in one call; NCCL's pipeline takes over beyond
_MAX_WARPS = 16
_WAVE_BYTES = 64 << 10  # what writers that begin together write; half and twice that are as good
_LEAST_BYTES_IN_WAVES = 256 << 10  # below, a wave waits longer for the one before than it gains


def max_tensor_bytes(num_ranks: int) -> int:
    """The largest tensor worth sending: every rank reads those of all others. A multiple of MIN_CHUNK_BYTES."""
    return _READ_BYTES // (num_ranks - 1) // MIN_CHUNK_BYTES * MIN_CHUNK_BYTES


def chunk_bytes_for(num_bytes: int, num_writers: int) -> int:
    """What one block writes before it raises a flag: a power of two.

    A small tensor gives each writer one chunk at most: a second would come when all others are done. A large one gives
    several, so that reading begins while writing goes on.
    """
    share = -(-num_bytes // num_writers)
    if share > MAX_CHUNK_BYTES:
        return _CHUNK_BYTES_OF_LARGE
    return max(1 << (share - 1).bit_length(), MIN_CHUNK_BYTES)


def wave_size(num_bytes: int, chunk_bytes: int) -> int:
    """How many writers begin together; 0: all."""
    return _WAVE_BYTES // chunk_bytes if num_bytes >= _LEAST_BYTES_IN_WAVES else 0


def _flags_per_rank(num_ranks: int) -> int:
    return max_tensor_bytes(num_ranks) // MIN_CHUNK_BYTES


def _slots_bytes(num_ranks: int) -> int:
    """Two halves for each rank: the kernel's module says why."""
    return 2 * num_ranks * max_tensor_bytes(num_ranks)


def required_bytes(num_ranks: int) -> int:
    """Size of the mapping: all ranks' slots, then all ranks' flags."""
    flag_bytes = FLAG_STRIDE * torch.int64.itemsize
    return _slots_bytes(num_ranks) + num_ranks * _flags_per_rank(num_ranks) * flag_bytes


class HostStagedAllReduce:
    """Sums in float32 in the order of the ranks, so all get the same bits. NCCL for tensors that are large or odd.

    All ranks of the group make the same calls in the same order, each on one stream at a time. In a CUDA graph as well:
    what tells one call from the next is counted on the device.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        mapping: NodeSharedMapping,
        host_slots: HostSlots,
        num_writers: int = NUM_WRITERS,
    ) -> None:
        from seesaw_ds.parallel.host_all_reduce_kernel import reduce_through_host

        self._kernel = reduce_through_host
        self._host_slots = host_slots
        self._is_early = devices.can_start_early(device)
        self._rank = group.rank()
        self._num_ranks = group.size()
        self._num_writers = num_writers
        self._fallback = BackendAllReduce(group)
        self._max_bytes = max_tensor_bytes(self._num_ranks)
        self._num_flags = _flags_per_rank(self._num_ranks)
        # Host tensors that kernels take as they are, for the memory is registered with CUDA.
        slots_bytes = _slots_bytes(self._num_ranks)
        self._slots = {dtype: mapping.tensor(0, (slots_bytes // dtype.itemsize,), dtype) for dtype in _DTYPES}
        flags_shape = (self._num_ranks, self._num_flags, FLAG_STRIDE)
        self._flags = mapping.tensor(slots_bytes, flags_shape, torch.int64)
        self._calls = torch.zeros(2 * num_writers, dtype=torch.int64, device=device)
        self._num_begun = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        num_bytes = tensor.numel() * tensor.element_size()
        if not 0 < num_bytes <= self._max_bytes or num_bytes % VECTOR_BYTES or tensor.dtype not in _DTYPES:
            return self._fallback(tensor)
        return self.reduce(tensor, chunk_bytes_for(num_bytes, self._num_writers))

    def reduce(self, tensor: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        """The sum by the kernel, whatever the tensor: contiguous, a multiple of 16 bytes, `max_tensor_bytes` at most.

        `chunk_bytes` is a power of two, from MIN_CHUNK_BYTES on, and the same on every rank.
        """
        num_bytes = tensor.numel() * tensor.element_size()
        assert tensor.is_contiguous(), tensor.stride()
        assert 0 < num_bytes <= self._max_bytes, num_bytes
        assert num_bytes % VECTOR_BYTES == 0, num_bytes
        result = torch.empty_like(tensor)
        self._kernel[(2 * self._num_writers,)](
            tensor,
            result,
            self._slots[tensor.dtype],
            self._flags,
            self._calls,
            self._num_begun,
            num_bytes // VECTOR_BYTES,
            RANK=self._rank,
            NUM_RANKS=self._num_ranks,
            SLOT_VECTORS=self._max_bytes // VECTOR_BYTES,
            NUM_FLAGS=self._num_flags,
            FLAG_STRIDE=FLAG_STRIDE,
            CHUNK_VECTORS=chunk_bytes // VECTOR_BYTES,
            VECTOR=VECTOR_BYTES // tensor.element_size(),
            WAVE=wave_size(num_bytes, chunk_bytes),
            IS_EARLY=self._is_early,
            launch_pdl=self._is_early,
            num_warps=min(_MAX_WARPS, chunk_bytes // (32 * VECTOR_BYTES)),
            num_stages=1,  # loads must stay behind the flags they wait for
        )
        return result

    @property
    def most_kernel_bytes(self) -> int:
        return self._max_bytes

    @property
    def host_slots(self) -> HostSlots:
        return self._host_slots

    def after_capture(self) -> None:
        pass

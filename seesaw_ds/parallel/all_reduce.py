"""The all-reduce of tensor-parallel layers: NCCL, or one kernel for the small tensors of decode.

Over CUDA IPC, on two H200 with NVLink, the kernel takes 3, 6, 17 us for 128 KiB, 1 MiB, 4 MiB where NCCL takes 7.5, 14,
32; they meet at 32 MiB. It uses no NVLink multicast. It needs peer-to-peer access: where there is none, or
NCCL_P2P_DISABLE=1 says not to use it, the kernel goes through host memory (`host_all_reduce`).
"""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch.distributed import ProcessGroup

from seesaw_ds.parallel import host_slots
from seesaw_ds.parallel.host_slots import HostSlots
from seesaw_ds.parallel.peers import Reach, gather, reach
from seesaw_ds.parallel.shared_memory import share_mapping

ONE_SHOT_MAX_BYTES = 8 << 20
_RANK_DATA_BYTES = 16 << 20


class AllReduce(Protocol):
    """Sums a tensor over the ranks of a tensor-parallel group."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum; `tensor` may be overwritten."""

    @property
    def most_kernel_bytes(self) -> int:
        """Up to this size a tensor is summed by a kernel of ours, or need not be summed; NCCL sums larger ones."""

    @property
    def host_slots(self) -> HostSlots | None:
        """Where it goes through host memory: that of sums which begin while a product goes on."""

    def after_capture(self) -> None:
        """Called by every rank of the group after each CUDA graph capture that used it."""


class BackendAllReduce:
    """The process group's own all-reduce, through Megatron-core."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._is_alone = group.size() == 1

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._is_alone:
            return tensor
        return reduce_from_tensor_model_parallel_region(tensor, group=self._group)

    @property
    def most_kernel_bytes(self) -> int:
        return sys.maxsize if self._is_alone else 0

    @property
    def host_slots(self) -> HostSlots | None:
        return None

    def after_capture(self) -> None:
        pass


class OneShotAllReduce:
    """Every rank reads all ranks' tensors in one kernel; large tensors go through NCCL.

    A graph's inputs keep their addresses, so their IPC handles are exchanged once, after the capture. Outside of
    graphs a tensor is copied first, to a buffer that the other ranks know.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        from flashinfer import comm

        self._comm = comm
        self._group = group
        self._fallback = BackendAllReduce(group)
        self._signals = comm.create_shared_buffer(comm.vllm_meta_size() + ONE_SHOT_MAX_BYTES, group)
        self._rank_data = torch.empty(_RANK_DATA_BYTES, dtype=torch.uint8, device=device)
        self._handle = comm.vllm_init_custom_ar(self._signals, self._rank_data, group.rank(), True)
        buffers = comm.create_shared_buffer(ONE_SHOT_MAX_BYTES, group)
        comm.vllm_register_buffer(self._handle, buffers)
        self._buffer = buffers[group.rank()]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes > ONE_SHOT_MAX_BYTES or num_bytes % 16:
            return self._fallback(tensor)
        result = torch.empty_like(tensor)
        buffer, buffer_bytes = (
            (0, 0) if torch.cuda.is_current_stream_capturing() else (self._buffer, ONE_SHOT_MAX_BYTES)
        )
        self._comm.vllm_all_reduce(self._handle, tensor, result, buffer, buffer_bytes, 36)
        return result

    @property
    def most_kernel_bytes(self) -> int:
        return ONE_SHOT_MAX_BYTES

    @property
    def host_slots(self) -> HostSlots | None:
        return None

    def after_capture(self) -> None:
        handle, offsets = self._comm.vllm_get_graph_buffer_ipc_meta(self._handle)
        gathered = gather((handle, offsets), self._group)
        self._comm.vllm_register_graph_buffers(self._handle, [h for h, _ in gathered], [o for _, o in gathered])


def choose_all_reduce(group: ProcessGroup, device: torch.device, has_graphs: bool) -> AllReduce:
    """The fastest all-reduce that this group's devices allow. Collective: every rank of `group` calls it, once."""
    if not has_graphs or group.size() not in (2, 4, 6, 8):
        return BackendAllReduce(group)
    between = reach(group, device)
    if between is Reach.OTHER:
        return BackendAllReduce(group)
    return OneShotAllReduce(group, device) if between is Reach.PEER else _host_staged(group, device)


def _host_staged(group: ProcessGroup, device: torch.device) -> AllReduce:
    from seesaw_ds.parallel.host_all_reduce import HostStagedAllReduce, required_bytes

    own_bytes = required_bytes(group.size())
    mapping = share_mapping("all-reduce", own_bytes + host_slots.required_bytes(group.size()), group, device)
    return HostStagedAllReduce(group, device, mapping, HostSlots(group, device, mapping, own_bytes))

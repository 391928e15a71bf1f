"""The all-reduce of tensor-parallel layers: NCCL, or one kernel over CUDA IPC for the small tensors of decode.

Sizes on two H200 with NVLink: the kernel takes 3, 6, 17 us for 128 KiB, 1 MiB, 4 MiB where NCCL takes 7.5, 14, 32; they
meet at 32 MiB. It needs peer-to-peer access, so with NCCL_P2P_DISABLE=1 it is not used at all. It uses no NVLink
multicast.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

ONE_SHOT_MAX_BYTES = 8 << 20
_RANK_DATA_BYTES = 16 << 20


class AllReduce(Protocol):
    """Sums a tensor over the ranks of a tensor-parallel group."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum; `tensor` may be overwritten."""

    def after_capture(self) -> None:
        """Called by every rank of the group after each CUDA graph capture that used it."""


class BackendAllReduce:
    """The process group's own all-reduce, through Megatron-core."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return reduce_from_tensor_model_parallel_region(tensor, group=self._group)

    def after_capture(self) -> None:
        pass


class OneShotAllReduce:
    """Every rank reads all ranks' tensors in one kernel. Inside CUDA graphs; elsewhere and for large tensors, NCCL.

    A graph's inputs keep their addresses, so their IPC handles are exchanged once, after the capture.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        from flashinfer import comm

        self._comm = comm
        self._group = group
        self._fallback = BackendAllReduce(group)
        self._signals = comm.create_shared_buffer(comm.vllm_meta_size() + ONE_SHOT_MAX_BYTES, group)
        self._rank_data = torch.empty(_RANK_DATA_BYTES, dtype=torch.uint8, device=device)
        self._handle = comm.vllm_init_custom_ar(self._signals, self._rank_data, group.rank(), True)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        num_bytes = tensor.numel() * tensor.element_size()
        if not torch.cuda.is_current_stream_capturing() or num_bytes > ONE_SHOT_MAX_BYTES or num_bytes % 16:
            return self._fallback(tensor)
        result = torch.empty_like(tensor)
        self._comm.vllm_all_reduce(self._handle, tensor, result, 0, 0, 36)
        return result

    def after_capture(self) -> None:
        handle, offsets = self._comm.vllm_get_graph_buffer_ipc_meta(self._handle)
        gathered: list[tuple[list[int], list[int]]] = [([], [])] * self._group.size()
        dist.all_gather_object(gathered, (handle, offsets), group=self._group)
        self._comm.vllm_register_graph_buffers(self._handle, [h for h, _ in gathered], [o for _, o in gathered])


def choose_all_reduce(group: ProcessGroup, device: torch.device, has_graphs: bool) -> AllReduce:
    """The fastest all-reduce that this group's devices allow. Collective: every rank of `group` calls it."""
    if not has_graphs or group.size() not in (2, 4, 6, 8) or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return BackendAllReduce(group)
    peers: list[int] = [0] * group.size()
    dist.all_gather_object(peers, device.index, group=group)
    others = [peer for peer in peers if peer != device.index]
    if len(others) < group.size() - 1 or not all(torch.cuda.can_device_access_peer(device.index, p) for p in others):
        return BackendAllReduce(group)
    return OneShotAllReduce(group, device)

"""How tensors travel between the ranks of a replica when the layout changes: the process group, or host memory.

NCCL is right where devices reach each other's memory. Where they do not, or NCCL_P2P_DISABLE=1 says not to, its own way
through host memory has two H200 swap weights at 23 GB/s each way; `host_transport` leaves it to the copy engines.
So it does everywhere with what travels while steps run: NCCL's kernels would take multiprocessors from theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from seesaw_ds.parallel.device import is_cuda
from seesaw_ds.parallel.peers import Reach, reach
from seesaw_ds.parallel.shared_memory import share_mapping

Message = tuple[torch.Tensor, int]


class Waitable(Protocol):
    """The end of something under way: a Work, a CUDA event, an event of a thread."""

    def wait(self) -> object:
        """Make the current stream, on CPU the caller, wait for it."""


class Handle:
    """A transfer under way. Keeps its tensors alive until `wait`."""

    def __init__(self, ends: Sequence[Waitable], tensors: Sequence[torch.Tensor]) -> None:
        self._ends = tuple(ends)
        self._tensors = tuple(tensors)

    def wait(self) -> None:
        """Make the current stream (on CPU the caller) wait until data has come in and has been read on its way out."""
        for end in self._ends:
            end.wait()
        self._ends = ()
        self._tensors = ()


class Transport(Protocol):
    """Carries tensors between the ranks of one group. `runs_beside_steps`: it takes no multiprocessor from kernels."""

    runs_beside_steps: bool

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Handle:
        """Start to send and receive contiguous tensors, each with its peer's global rank; several may be under way.

        The transfer starts when the current stream has come this far. Between two ranks, what one sends and what the
        other receives agree in order and size. All ranks start their exchanges in one order that they agree on, in
        which a rank may leave out those that it has no part in.
        """


class BackendTransport:
    """The process group's own sends and receives. Constructing it is collective over `group`."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self.runs_beside_steps = not is_cuda(device)  # NCCL's transfers are kernels
        # NCCL connects a group in its first collective, which all must join; an exchange may have idle ranks.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Handle:
        """See `Transport`."""
        ops = [dist.P2POp(dist.isend, tensor, peer, self._group) for tensor, peer in sends]
        ops += [dist.P2POp(dist.irecv, tensor, peer, self._group) for tensor, peer in receives]
        return Handle(dist.batch_isend_irecv(ops) if ops else [], [op.tensor for op in ops])


def choose_transport(group: ProcessGroup, device: torch.device) -> Transport:
    """The fastest transport that this group's devices allow. Collective: every rank of `group` calls it, once."""
    if not is_cuda(device) or group.size() == 1 or reach(group, device) is not Reach.HOST:
        return BackendTransport(group, device)
    return _host_staged("transport", group, device)


def choose_early_transport(chosen: Transport, group: ProcessGroup, device: torch.device) -> Transport | None:
    """A transport that runs beside steps: `chosen`, which `choose_transport` gave, if it does, else a second one.

    None where there can be none: for a rank alone, ranks of several nodes, or ranks that share a device. Collective:
    every rank of `group` calls it, once.
    """
    if chosen.runs_beside_steps:
        return chosen
    if group.size() == 1 or reach(group, device) is Reach.OTHER:
        return None
    return _host_staged("early-transport", group, device)


def _host_staged(name: str, group: ProcessGroup, device: torch.device) -> Transport:
    """Collective. `name` is of its shared memory, and of no other transport's."""
    from seesaw_ds.parallel.host_transport import HostStagedTransport, required_bytes, stream_lanes

    ranks = dist.get_process_group_ranks(group)
    mapping = share_mapping(name, required_bytes(len(ranks)), group, device)
    return HostStagedTransport(ranks, dist.get_rank(), mapping, *stream_lanes(device))

"""What travels between ranks on the hot path: hidden states down a pipeline, tokens back up, logits across.

Between the devices of a node a pipeline's transfers go through host memory by the copy engines (`host_link`), whether
the devices reach each other's memory or not. NCCL's send is a kernel that spins until the next stage receives, and that
is when this has ended its step: for most of one the sender has fewer multiprocessors, and a matrix product whose tiles
just fill them takes another round.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from seesaw_ds.parallel.device import is_cuda
from seesaw_ds.parallel.groups import PhaseGroups
from seesaw_ds.parallel.peers import Reach, reach
from seesaw_ds.parallel.shared_memory import share_mapping

# torch 2.13 renamed it and warns of the old name, which is all that 2.10 to 2.12 have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class PipelineLink(Protocol):
    """Point-to-point transfers of one phase's pipeline. Sends are asynchronous; their tensors are kept until done."""

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Send (tokens, hidden) activations to the next stage."""

    def recv_hidden(self, num_tokens: int) -> torch.Tensor:
        """Receive (tokens, hidden) activations from the previous stage."""

    def send_tokens(self, token_ids: torch.Tensor) -> None:
        """Send (rows,) int64 sampled tokens from the last stage to the first."""

    def recv_tokens(self, num_rows: int) -> torch.Tensor:
        """Receive (rows,) int64 sampled tokens on the first stage."""

    def drain(self) -> None:
        """Make the current stream, on CPU the caller, wait until every send has completed."""


def most_unread_steps(num_stages: int) -> int:
    """How many steps' tokens may be on their way, sent or not: more than the steps that a pipeline has under way."""
    return 2 * num_stages + 6


class BackendLink:
    """A `PipelineLink` by the process groups' own sends and receives."""

    def __init__(self, groups: PhaseGroups, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._groups = groups
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._sends: list[tuple[Work, torch.Tensor]] = []

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """See `PipelineLink`."""
        self._send(hidden, self._groups.pp_ranks[self._groups.coords.pp + 1], self._groups.pp)

    def recv_hidden(self, num_tokens: int) -> torch.Tensor:
        """See `PipelineLink`."""
        hidden = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._device)
        dist.recv(hidden, src=self._groups.pp_ranks[self._groups.coords.pp - 1], group=self._groups.pp)
        return hidden

    def send_tokens(self, token_ids: torch.Tensor) -> None:
        """See `PipelineLink`."""
        self._send(token_ids, self._groups.pp_ranks[0], self._groups.feedback)

    def recv_tokens(self, num_rows: int) -> torch.Tensor:
        """See `PipelineLink`."""
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        dist.recv(token_ids, src=self._groups.pp_ranks[-1], group=self._groups.feedback)
        return token_ids

    def _send(self, tensor: torch.Tensor, rank: int, group: ProcessGroup) -> None:
        self._sends = [(work, kept) for work, kept in self._sends if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=rank, group=group)
        if work is not None:
            self._sends.append((work, tensor))

    def drain(self) -> None:
        """See `PipelineLink`."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()


def choose_link(
    groups: PhaseGroups,
    replica: ProcessGroup,
    hidden_size: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PipelineLink:
    """The fastest link that the devices of `replica` allow. Collective over it, once a phase.

    `max_tokens` is the most that a step has; more than that are sent in parts.
    """
    if groups.layout.pp == 1 or not is_cuda(device) or reach(replica, device) is Reach.OTHER:
        return BackendLink(groups, hidden_size, dtype, device)
    from seesaw_ds.parallel.host_link import HostStagedLink, PipelineRings
    from seesaw_ds.parallel.host_transport import stream_lanes

    rings = PipelineRings(groups.layout, max_tokens * hidden_size * dtype.itemsize)
    mapping = share_mapping(f"pipeline-{groups.phase.value}", rings.num_bytes, replica, device)
    return HostStagedLink(rings, mapping, groups.coords, hidden_size, dtype, device, *stream_lanes(device))


def gather_last_dim(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Join the ranks' (rows, part) tensors along the last dim: (rows, part * group size), the same on every rank."""
    size = group.size()
    if size == 1:
        return tensor
    rows, part = tensor.shape
    parts = torch.empty((size * rows, part), dtype=tensor.dtype, device=tensor.device)
    _all_gather(parts, tensor.contiguous(), group=group)
    return parts.view(size, rows, part).permute(1, 0, 2).reshape(rows, size * part)

"""What travels between ranks on the hot path: hidden states down a pipeline, tokens back up, logits across."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from seesaw_ds.parallel.groups import PhaseGroups

# torch 2.13 renamed it and warns of the old name, which is all that 2.10 to 2.12 have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class PipelineLink:
    """Point-to-point transfers of one phase's pipeline. Sends are asynchronous; their tensors are kept until done."""

    def __init__(self, groups: PhaseGroups, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._groups = groups
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._sends: list[tuple[Work, torch.Tensor]] = []

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Send (tokens, hidden) activations to the next stage."""
        self._send(hidden, self._groups.pp_ranks[self._groups.coords.pp + 1], self._groups.pp)

    def recv_hidden(self, num_tokens: int) -> torch.Tensor:
        """Receive (tokens, hidden) activations from the previous stage."""
        hidden = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._device)
        dist.recv(hidden, src=self._groups.pp_ranks[self._groups.coords.pp - 1], group=self._groups.pp)
        return hidden

    def send_tokens(self, token_ids: torch.Tensor) -> None:
        """Send (rows,) int64 sampled tokens from the last stage to the first."""
        self._send(token_ids, self._groups.pp_ranks[0], self._groups.feedback)

    def recv_tokens(self, num_rows: int) -> torch.Tensor:
        """Receive (rows,) int64 sampled tokens on the first stage."""
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
        """Wait until every send has completed."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()


def gather_last_dim(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Join the ranks' (rows, part) tensors along the last dim: (rows, part * group size), the same on every rank."""
    size = group.size()
    if size == 1:
        return tensor
    rows, part = tensor.shape
    parts = torch.empty((size * rows, part), dtype=tensor.dtype, device=tensor.device)
    _all_gather(parts, tensor.contiguous(), group=group)
    return parts.view(size, rows, part).permute(1, 0, 2).reshape(rows, size * part)

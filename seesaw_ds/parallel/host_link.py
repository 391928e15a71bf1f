"""A pipeline's transfers through host memory by the copy engines.

The stages of a pipeline share rings of slots, as `host_transport` describes them: one from each stage to the next for
hidden states, and one from the last stage to the first for tokens, so that these do not queue behind the others::

    stage 0  --hidden-->  stage 1  --hidden-->  stage 2
       ^----------------tokens---------------------'

A send is copied out beside the next step's kernels; no multiprocessor waits for the receiver. What a stream waits for
comes earlier in the order of the steps, which all stages keep, so stages cannot lock up where streams share a queue.
Tokens may lie unread until their sequences step again, so their ring has room for as many as are ever unread.
"""

from __future__ import annotations

import torch

from seesaw_ds.layout import ParallelLayout, RankCoords
from seesaw_ds.parallel.host_transport import LINE_BYTES, MAX_SLOT_BYTES, Lane, Ring, ring_bytes
from seesaw_ds.parallel.links import most_unread_steps
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.parallel.transport import Handle

_TOKEN_SLOT_BYTES = 64 << 10  # 8,192 rows


class PipelineRings:
    """Where in the shared memory of a replica the rings of its pipelines are: one pipeline for each TP rank.

    `hidden_bytes` are the most that a step sends from stage to stage.
    """

    def __init__(self, layout: ParallelLayout, hidden_bytes: int) -> None:
        self.layout = layout
        self.slot_bytes = -(-min(hidden_bytes, MAX_SLOT_BYTES) // LINE_BYTES) * LINE_BYTES
        self._num_token_slots = most_unread_steps(layout.pp) + 2
        self._tokens_offset = (layout.pp - 1) * ring_bytes(self.slot_bytes)
        self._pipeline_bytes = self._tokens_offset + ring_bytes(_TOKEN_SLOT_BYTES, self._num_token_slots)

    @property
    def num_bytes(self) -> int:
        """Of the shared memory."""
        return self.layout.tp * self._pipeline_bytes

    def hidden(self, mapping: NodeSharedMapping, pipeline: int, stage: int) -> Ring:
        """The ring from `stage` to the next one, for hidden states."""
        return Ring(mapping, pipeline * self._pipeline_bytes + stage * ring_bytes(self.slot_bytes), self.slot_bytes)

    def tokens(self, mapping: NodeSharedMapping, pipeline: int) -> Ring:
        """The ring from the last stage to the first."""
        offset = pipeline * self._pipeline_bytes + self._tokens_offset
        return Ring(mapping, offset, _TOKEN_SLOT_BYTES, self._num_token_slots)


class HostStagedLink:
    """A `PipelineLink` of the rank at `coords` in a replica; `mapping` has the zeroed bytes that `rings` asks for."""

    def __init__(
        self,
        rings: PipelineRings,
        mapping: NodeSharedMapping,
        coords: RankCoords,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        outgoing: Lane,
        incoming: Lane,
    ) -> None:
        self._to_next = rings.hidden(mapping, coords.tp, coords.pp) if coords.pp < rings.layout.pp - 1 else None
        self._from_previous = rings.hidden(mapping, coords.tp, coords.pp - 1) if coords.pp else None
        self._tokens = rings.tokens(mapping, coords.tp)
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._outgoing = outgoing
        self._incoming = incoming
        self._last_send = Handle([], [])

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """See `PipelineLink`."""
        assert self._to_next is not None, "the last stage has none to send to"
        self._send(self._to_next, hidden)

    def recv_hidden(self, num_tokens: int) -> torch.Tensor:
        """See `PipelineLink`."""
        assert self._from_previous is not None, "the first stage has none to receive from"
        hidden = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._device)
        return self._recv(self._from_previous, hidden)

    def send_tokens(self, token_ids: torch.Tensor) -> None:
        """See `PipelineLink`."""
        self._send(self._tokens, token_ids)

    def recv_tokens(self, num_rows: int) -> torch.Tensor:
        """See `PipelineLink`."""
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        return self._recv(self._tokens, token_ids)

    def _send(self, ring: Ring, tensor: torch.Tensor) -> None:
        # The last one has had a step's time to be copied; from here on its memory may be used again.
        self._last_send.wait()
        tensor = tensor.contiguous()
        self._outgoing.follow()
        for piece in ring.pieces([tensor]):
            ring.write(self._outgoing, piece)
        self._last_send = Handle([self._outgoing.end()], [tensor])

    def _recv(self, ring: Ring, tensor: torch.Tensor) -> torch.Tensor:
        self._incoming.follow()
        for piece in ring.pieces([tensor]):
            ring.read(self._incoming, piece)
        self._incoming.end().wait()
        return tensor

    def drain(self) -> None:
        """See `PipelineLink`."""
        self._last_send.wait()

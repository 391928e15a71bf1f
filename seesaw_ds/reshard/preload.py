"""Weights that come before the change to the decode layout, while steps still run in the old one.

They travel in the exchange's own rounds, but wait in KV blocks that the scheduler lends, since the slots that they are
for hold what the old layout computes with. At the change they are copied to their slots, within the device::

    P2->T2, rank 0      slots    0a 0b 1a 1b             KV pool   | in use ... | 2a 3a |
    at the change       slots    0a 2a 1a 3a  <- copied ------------------------'

A block takes a chunk of a cell tensor, of the same size on all ranks, so that each message has one place to land.

The rest of the exchange may go by another transport. All ranks queue their work on both in one order: first what comes
early, then the wait of the current stream for its end, then the rest. So no early transfer waits for one of the rest,
not even where the device puts both on one hardware queue, and the rest overwrites no cell that is still being sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from seesaw_ds.layout import Phase
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.transport import Handle, Message, Transport
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.plan import ReshardPlan, Round, Transfer, own_transfers
from seesaw_ds.sched.output import PreloadSize
from seesaw_ds.sched.preload import MICRO_BATCHES_BEFORE

# The whole exchange is started over so many steps, round by round; the scheduler leaves it as many. Rounds come faster
# than that, so that a change finds few that are under way: it waits for these, while the exchange may have a faster
# transport for the rest. And the host, which takes some milliseconds to queue a round, keeps its lead.
_NUM_STEPS = MICRO_BATCHES_BEFORE


class _Arrival(NamedTuple):
    """A round under way: the cell that this rank receives in it, if any, and the blocks that it lands in."""

    handle: Handle
    incoming: Transfer | None
    blocks: Sequence[int]


class CellPreload:
    """Brings the first rounds of an exchange into KV blocks, and later to their slots.

    `transport` and `ranks` as for `ExchangeReshard`; all ranks of the replica make the same calls in the same order.
    `blocks` (num_blocks, at least chunk_numel) is the KV pool, in the arena's dtype; `chunk_numel` is the same on all
    ranks. The arena must be in the prefill layout. `num_bytes` are those that have been put into slots so far.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        arena: WeightArena,
        transport: Transport,
        replica_rank: int,
        ranks: Sequence[int],
        blocks: torch.Tensor,
        chunk_numel: int,
    ) -> None:
        self._rounds = plan.rounds(Phase.DECODE)
        self._arena = arena
        self._transport = transport
        self._rank = replica_rank
        self._global_ranks = tuple(ranks)
        self._blocks = blocks[:, :chunk_numel]
        self._chunk_numel = chunk_numel
        self._to_start: deque[tuple[Round, Sequence[int]]] = deque()
        self._num_begun = 0
        self._num_steps = 0  # those that had rounds to start
        self._arrivals: list[_Arrival] = []
        self.num_bytes = 0

    @property
    def size(self) -> PreloadSize:
        """For the scheduler."""
        return PreloadSize(len(self._rounds), sum(self._num_chunks(spec.numel) for spec in self._arena.cell_tensors))

    def begin(self, num_rounds: int, block_ids: Sequence[int]) -> None:
        """Have the next `num_rounds` rounds come into `block_ids`, step by step."""
        round_blocks = self.size.round_blocks
        starts = range(0, num_rounds * round_blocks, round_blocks)
        rounds = self._rounds[self._num_begun : self._num_begun + num_rounds]
        self._to_start.extend(
            (round_, block_ids[start : start + round_blocks]) for round_, start in zip(rounds, starts, strict=True)
        )
        self._num_begun += num_rounds

    def advance(self) -> None:
        """Queue the next rounds, if any are left. Called once after each step."""
        if not self._to_start:
            return
        self._num_steps += 1
        num_due = -(-len(self._rounds) * self._num_steps // _NUM_STEPS)
        while self._to_start and len(self._arrivals) < num_due:
            self._start(*self._to_start.popleft())

    def land(self) -> tuple[int, int]:
        """Put what has been brought into its slots; returns how many rounds that were, and the bytes received.

        Rounds that no step has started are not brought. On CUDA the work is queued on the current stream.
        """
        self._to_start.clear()
        num_bytes = 0
        for arrival in self._arrivals:
            arrival.handle.wait()
        for arrival in self._arrivals:
            if arrival.incoming is not None:
                num_bytes += self._copy_to_slot(arrival.incoming.dst_slot, arrival.blocks)
        num_rounds = len(self._arrivals)
        self._arrivals.clear()
        self._num_begun = self._num_steps = 0
        self.num_bytes += num_bytes
        return num_rounds, num_bytes

    def _num_chunks(self, numel: int) -> int:
        return -(-numel // self._chunk_numel)

    def _start(self, round_: Round, block_ids: Sequence[int]) -> None:
        outgoing, incoming = own_transfers(round_, self._rank)
        sends: list[Message] = []
        receives: list[Message] = []
        block = iter(block_ids)
        for spec in self._arena.cell_tensors:
            if outgoing is not None:
                cell = self._arena.cell(spec.name, outgoing.src_slot).flatten()
                sends += [(chunk, self._global_ranks[outgoing.dst_rank]) for chunk in cell.split(self._chunk_numel)]
            if incoming is not None:
                landing = [self._blocks[next(block)] for _ in range(self._num_chunks(spec.numel))]
                landing[-1] = landing[-1][: (spec.numel - 1) % self._chunk_numel + 1]
                receives += [(chunk, self._global_ranks[incoming.src_rank]) for chunk in landing]
        self._arrivals.append(_Arrival(self._transport.exchange(sends, receives), incoming, block_ids))

    def _copy_to_slot(self, slot: int, block_ids: Sequence[int]) -> int:
        index = to_device(block_ids, self._arena.device)
        start = num_bytes = 0
        for spec in self._arena.cell_tensors:
            cell = self._arena.cell(spec.name, slot).flatten()
            num_whole, rest = divmod(spec.numel, self._chunk_numel)
            if num_whole:
                whole = cell[: num_whole * self._chunk_numel].view(num_whole, self._chunk_numel)
                torch.index_select(self._blocks, 0, index[start : start + num_whole], out=whole)
            if rest:
                cell[-rest:].copy_(self._blocks[block_ids[start + num_whole], :rest])
            start += self._num_chunks(spec.numel)
            num_bytes += cell.nbytes
        return num_bytes

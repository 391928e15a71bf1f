"""Weight re-sharding from device to device, in place: the plan's rounds, piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from seesaw_ds.layout import Phase
from seesaw_ds.parallel.scratch import Cutter, padded
from seesaw_ds.parallel.transport import Handle, Transport
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.plan import CellTensor, ReshardPlan, Transfer, own_transfers
from seesaw_ds.reshard.preload import CellPreload

# On two H200 a swap in pieces of 16, 64, 256 MiB and whole cells of 1 GiB runs at 160, 234, 259 and 269 GB/s each way
# over NVLink.
_PIECE_BYTES = 64 << 20
# One crosses the link, one waits for it, one is copied to its place. So many pieces are all the extra memory.
_NUM_UNDER_WAY = 3
EXCHANGE_SCRATCH_BYTES = _NUM_UNDER_WAY * _PIECE_BYTES


class _Piece(NamedTuple):
    """Rows of one cell tensor that travel in one message."""

    name: str
    start: int
    stop: int
    numel: int


class _Job(NamedTuple):
    """A piece's part in a round: what goes out, what comes in, at least one of both."""

    piece: _Piece
    outgoing: Transfer | None
    incoming: Transfer | None


class _Step(NamedTuple):
    """A job under way, and what to copy where when it has arrived."""

    job: _Job
    handle: Handle
    buffer: torch.Tensor
    target: torch.Tensor | None


class ExchangeReshard:
    """Exchanges cells among the ranks of one replica without a second copy of the weights.

    `transport` connects (at least) the replica's ranks, and `ranks` are their global numbers in replica order. All of
    them must call every `run` together. `scratch`, of EXCHANGE_SCRATCH_BYTES at least, is used while `run`'s work goes
    on; without one the exchange has memory of its own. `phase` is whose placement the arena has at the start. What
    `preload`, if there is one, has brought already is not sent again.

    Raises ValueError when the plan's layouts are not nested.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        arena: WeightArena,
        transport: Transport,
        replica_rank: int,
        ranks: Sequence[int],
        scratch: torch.Tensor | None = None,
        phase: Phase = Phase.PREFILL,
    ) -> None:
        self._rounds = {to_phase: plan.rounds(to_phase) for to_phase in Phase}
        self._arena = arena
        self._transport = transport
        self._rank = replica_rank
        self._global_ranks = tuple(ranks)
        self._phase = phase
        self.preload: CellPreload | None = None
        assert arena.num_slots == plan.num_slots[replica_rank], (arena.num_slots, plan.num_slots, replica_rank)
        # the same pieces in the same order on every rank
        self._pieces = [piece for spec in arena.cell_tensors for piece in _cut(spec, arena.dtype.itemsize)]
        self._buffers: list[torch.Tensor] = []
        if self._rounds[Phase.DECODE]:
            numel = max(piece.numel for piece in self._pieces)
            if scratch is None:
                num_bytes = _NUM_UNDER_WAY * padded(numel * arena.dtype.itemsize)
                scratch = torch.empty(num_bytes, dtype=torch.uint8, device=arena.device)
            cutter = Cutter(scratch)
            self._buffers = [cutter.take((numel,), arena.dtype) for _ in range(_NUM_UNDER_WAY)]

    def run(self, to_phase: Phase) -> int:
        """Exchange cells until the arena has the placement of `to_phase`; returns the bytes received.

        On CUDA the work is queued: it waits for the current stream, and the current stream waits for it.
        """
        assert to_phase is not self._phase, f"the weights are in phase {to_phase.value} already"
        num_rounds, received_bytes = 0, 0
        if self.preload is not None and to_phase is Phase.DECODE:
            # Before anything starts on this transport: the preload's may be another (see there).
            num_rounds, received_bytes = self.preload.land()
        under_way: deque[_Step] = deque()
        for index, job in enumerate(self._jobs(to_phase, num_rounds)):
            while len(under_way) == _NUM_UNDER_WAY or any(_is_read_by(step, job) for step in under_way):
                _finish(under_way.popleft())
            under_way.append(self._start(job, self._buffers[index % _NUM_UNDER_WAY]))
            if job.incoming is not None:
                received_bytes += job.piece.numel * self._arena.dtype.itemsize
        for step in under_way:
            _finish(step)
        self._phase = to_phase
        return received_bytes

    def close(self) -> None:
        """Release the buffers; the arena and the transport are the caller's."""
        self._buffers.clear()

    def _jobs(self, to_phase: Phase, first_round: int) -> Iterator[_Job]:
        """This rank's parts, round by round. No cell is passed on, so what a job sends no earlier one brought."""
        for transfers in self._rounds[to_phase][first_round:]:
            outgoing, incoming = own_transfers(transfers, self._rank)
            if outgoing is not None or incoming is not None:
                yield from (_Job(piece, outgoing, incoming) for piece in self._pieces)

    def _start(self, job: _Job, buffer: torch.Tensor) -> _Step:
        piece, outgoing, incoming = job
        sends, receives = [], []
        target = None
        if outgoing is not None:
            sends.append((self._view(piece, outgoing.src_slot), self._global_ranks[outgoing.dst_rank]))
        if incoming is not None:
            landing = self._view(piece, incoming.dst_slot)
            if outgoing is not None and incoming.dst_slot == outgoing.src_slot:
                target, landing = landing, buffer[: piece.numel]
            receives.append((landing, self._global_ranks[incoming.src_rank]))
        return _Step(job, self._transport.exchange(sends, receives), buffer, target)

    def _view(self, piece: _Piece, slot: int) -> torch.Tensor:
        return self._arena.cell(piece.name, slot)[piece.start : piece.stop].flatten()


def _is_read_by(step: _Step, job: _Job) -> bool:
    """Whether `step` sends what lies where `job` lets its piece land."""
    if step.job.outgoing is None or job.incoming is None:
        return False
    return step.job.piece == job.piece and step.job.outgoing.src_slot == job.incoming.dst_slot


def _finish(step: _Step) -> None:
    step.handle.wait()
    if step.target is not None:
        step.target.copy_(step.buffer[: step.target.numel()])


def _cut(spec: CellTensor, itemsize: int) -> list[_Piece]:
    rows = max(1, _PIECE_BYTES // (spec.cols * itemsize))
    bounds = [(start, min(start + rows, spec.rows)) for start in range(0, spec.rows, rows)]
    return [_Piece(spec.name, start, stop, (stop - start) * spec.cols) for start, stop in bounds]

"""Which weight cells a rank keeps, sends and receives when the phase changes, and in which slots they lie.

Every layer's weights are cut along the tensor-parallel dim into T equal cells, T the least common multiple of the
phases' TP sizes; a rank owns a rectangle of (layer, cell) in each phase, and its arena has one slot per cell::

    P2->T2, 4 layers, cells a and b             slot   0  1  2  3
    prefill (a layer's 2 cells side by side)    r0     0a 0b 1a 1b      r1  2a 2b 3a 3b
    decode  (received cells in the holes)       r0     0a 2a 1a 3a      r1  0b 2b 1b 3b

When one TP size divides the other the pair is nested: cells owned in both phases keep their slot, and the others are
exchanged in place, in rounds. Otherwise each phase has a placement of its own and weights come from the host.

The vocabulary's tables are cut along the vocabulary and travel by a plan of their own, in which they stand for layers:
table 0, the embedding, belongs to a phase's first stage, table 1, the LM head, to its last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase, Range, split_evenly


class CellId(NamedTuple):
    """One of the T equal parts of a layer's weights."""

    layer: int
    cell: int


class Transfer(NamedTuple):
    """One cell's way from a slot of one rank to a slot of another (ranks within the replica)."""

    src_rank: int
    dst_rank: int
    layer: int
    cell: int
    src_slot: int
    dst_slot: int

    @property
    def reverse(self) -> Transfer:
        """The same cell's way back."""
        return Transfer(self.dst_rank, self.src_rank, self.layer, self.cell, self.dst_slot, self.src_slot)


Round = tuple[Transfer, ...]
Placement = Mapping[CellId, int]


def own_transfers(round_: Round, rank: int) -> tuple[Transfer | None, Transfer | None]:
    """What `rank` sends in a round and what it receives, at most one each."""
    outgoing = next((transfer for transfer in round_ if transfer.src_rank == rank), None)
    incoming = next((transfer for transfer in round_ if transfer.dst_rank == rank), None)
    return outgoing, incoming


@dataclass(frozen=True, slots=True)
class CellTensor:
    """One weight of a layer as seen in a cell: a contiguous (rows, cols) matrix; the cell holds one of each."""

    name: str
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Elements in one cell."""
        return self.rows * self.cols


class WeightReshard(Protocol):
    """A way to change the phase of a weight arena."""

    def run(self, to_phase: Phase) -> int:
        """Put the arena into the placement of `to_phase`; it must be in the other phase's now.

        Returns the bytes that this rank received. On CUDA the work is queued on the current stream.
        """
        ...

    def close(self) -> None:
        """Release buffers and host memory."""
        ...


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """Placements and exchange rounds of one replica; the same on every rank. Ranks count within the replica.

    `num_slots` is per rank the most cells it owns in a phase. `placement[phase][rank]` gives the slot of each cell
    that the rank owns. `rounds_to_decode` is empty when nothing moves, and None when the pair is not nested.
    """

    layouts: LayoutPair
    num_layers: int
    num_slots: tuple[int, ...]
    placement: Mapping[Phase, tuple[Placement, ...]]
    rounds_to_decode: tuple[Round, ...] | None

    @property
    def is_nested(self) -> bool:
        """Whether cells can be exchanged in place."""
        return self.rounds_to_decode is not None

    def rounds(self, to_phase: Phase) -> tuple[Round, ...]:
        """The exchange into `to_phase`, in order. The way back is the way there in reverse.

        In a round a rank sends at most one cell and receives at most one. The slot of a received cell is free at
        the end of the round: never used, or vacated by a cell sent in this round or before. Only when it is the
        slot sent in this very round must the received cell wait in a buffer.

        Raises ValueError when the pair is not nested.
        """
        if self.rounds_to_decode is None:
            raise ValueError(
                f"layouts={str(self.layouts)!r}: cells are exchanged in place only when one phase's TP size divides "
                f"the other's (prefill {self.layouts.prefill.tp}, decode {self.layouts.decode.tp}); "
                f"set weight_reshard=host"
            )
        return self.rounds_to_decode if to_phase is Phase.DECODE else _way_back(self.rounds_to_decode)

    def cells_per_rank(self, phase: Phase) -> int:
        """How many consecutive cells of each of its layers a rank owns; they form one contiguous matrix."""
        return self.layouts.cells_per_layer // self.layouts[phase].tp

    def first_slot(self, phase: Phase, rank: int, layer: int) -> int:
        """The slot of the first cell that `rank` owns of `layer`; its other cells follow in order."""
        first_cell = self.layouts[phase].coords(rank).tp * self.cells_per_rank(phase)
        return self.placement[phase][rank][CellId(layer, first_cell)]

    def incoming(self, to_phase: Phase, rank: int) -> dict[CellId, int]:
        """The cells, with their slots, that `rank` owns in `to_phase` and has not in that slot before."""
        before = self.placement[to_phase.other][rank]
        return {cell: slot for cell, slot in self.placement[to_phase][rank].items() if before.get(cell) != slot}

    def num_cells_sent(self, to_phase: Phase, rank: int) -> int:
        """Cells that `rank` sends in the exchange into `to_phase`."""
        return sum(transfer.src_rank == rank for round_ in self.rounds(to_phase) for transfer in round_)

    def num_cells_received(self, to_phase: Phase, rank: int) -> int:
        """Cells that `rank` receives in the exchange into `to_phase`."""
        return sum(transfer.dst_rank == rank for round_ in self.rounds(to_phase) for transfer in round_)


def plan_reshard(layouts: LayoutPair, num_layers: int) -> ReshardPlan:
    """Plan both directions for one replica of `layouts` and a model of `num_layers` layers."""
    return _plan(layouts, num_layers, {phase: layouts[phase].stage_layers(num_layers) for phase in Phase})


def plan_tables(layouts: LayoutPair, is_tied: bool) -> ReshardPlan:
    """The same for the embedding and the LM head, as layers 0 and 1.

    `is_tied`: they have the same weights. That is one table, number 0, where no phase has them on different stages.
    """
    num_tables = 1 if is_tied and all(layouts[phase].pp == 1 for phase in Phase) else 2
    return _plan(layouts, num_tables, {phase: _stage_tables(layouts[phase].pp, num_tables) for phase in Phase})


def _stage_tables(pp: int, num_tables: int) -> tuple[Range, ...]:
    """The tables of each stage: all on the only one, or the first on the first and the last on the last."""
    if pp == 1:
        return (Range(0, num_tables),)
    return (Range(0, 1), *(Range(1, 1) for _ in range(pp - 2)), Range(1, 2))


def _plan(layouts: LayoutPair, num_layers: int, stage_layers: Mapping[Phase, tuple[Range, ...]]) -> ReshardPlan:
    num_cells = layouts.cells_per_layer
    placement = {phase: _side_by_side(layouts[phase], stage_layers[phase], num_cells) for phase in Phase}
    num_slots = tuple(
        max(len(prefill), len(decode))
        for prefill, decode in zip(placement[Phase.PREFILL], placement[Phase.DECODE], strict=True)
    )
    if not layouts.is_nested:
        return ReshardPlan(layouts, num_layers, num_slots, placement, None)
    # The phase of the smaller TP needs a layer's cells side by side; in the other a cell may lie anywhere.
    coarse = Phase.PREFILL if layouts.prefill.tp <= layouts.decode.tp else Phase.DECODE
    exchange = _Exchange(placement[coarse], placement[coarse.other], num_slots)
    rounds = exchange.run()
    placement[coarse.other] = tuple(exchange.slots)
    rounds_to_decode = rounds if coarse is Phase.PREFILL else _way_back(rounds)
    return ReshardPlan(layouts, num_layers, num_slots, placement, rounds_to_decode)


def _way_back(rounds: tuple[Round, ...]) -> tuple[Round, ...]:
    return tuple(tuple(transfer.reverse for transfer in round_) for round_ in reversed(rounds))


def _side_by_side(layout: ParallelLayout, stage_layers: tuple[Range, ...], num_cells: int) -> tuple[Placement, ...]:
    """Per rank: its cells in order of layer and cell, in the first slots."""
    placements = []
    for rank in range(layout.replica_size):
        coords = layout.coords(rank)
        layers = stage_layers[coords.pp].indices()
        cells = split_evenly(num_cells, layout.tp)[coords.tp].indices()
        owned = [CellId(layer, cell) for layer in layers for cell in cells]
        placements.append({cell: slot for slot, cell in enumerate(owned)})
    return tuple(placements)


class _Exchange:
    """Builds the rounds from the coarse phase into the fine one, round by round, on a model of the slots.

    A round is a set of chains and cycles of ranks, each sending to the next: a cycle needs no free slot, since
    every member vacates one; a chain ends at a rank that has a free slot or already sends in this round.

    There is a next round as long as a transfer is left. Walk from any rank that has a cell to send to a rank that
    needs it, and on from there. A rank v that is reached has R >= 1 cells to receive and, holding h cells in h
    slots, no free one. After the exchange it owns h + R - S cells of S sent, and never more than its slots, so
    S >= R >= 1: the walk goes on until it meets a free slot (a chain) or a rank for the second time (a cycle).
    """

    def __init__(self, before: tuple[Placement, ...], after: tuple[Placement, ...], num_slots: tuple[int, ...]) -> None:
        ranks = range(len(num_slots))
        self.slots: list[dict[CellId, int]] = [dict(placement) for placement in before]
        self._free = [deque(range(len(before[rank]), num_slots[rank])) for rank in ranks]
        # _queues[src][dst]: the cells to send, in the order of their layers
        self._queues: list[dict[int, deque[CellId]]] = [{} for _ in ranks]
        self._num_to_receive = [0 for _ in ranks]
        holder = {cell: rank for rank in ranks for cell in before[rank]}
        for dst in ranks:
            for cell in after[dst]:
                if cell not in before[dst]:
                    self._queues[holder[cell]].setdefault(dst, deque()).append(cell)
                    self._num_to_receive[dst] += 1

    def run(self) -> tuple[Round, ...]:
        rounds = []
        while any(self._num_to_receive):
            rounds.append(self._next_round())
        return tuple(rounds)

    def _next_round(self) -> Round:
        edges: dict[int, int] = {}
        by_load = sorted(range(len(self._queues)), key=lambda rank: -sum(map(len, self._queues[rank].values())))
        for start in by_load:
            while start not in edges:
                found = self._walk(start, edges)
                if not found:
                    break
                edges.update(found)
        assert edges, "an exchange with cells left to send must have a next round"
        return self._commit(edges)

    def _walk(self, start: int, edges: dict[int, int]) -> dict[int, int]:
        """A chain or cycle met when walking from `start` beside the `edges` of this round; empty if none is left."""
        receiving = set(edges.values())
        path, dead_ends = [start], set()
        while path:
            choices = [dst for dst in self._queues[path[-1]] if dst not in receiving and dst not in dead_ends]
            if not choices:
                dead_ends.add(path.pop())
                continue
            dst = self._choose(path[-1], choices)
            if dst in path:
                cycle = path[path.index(dst) :]
                return dict(zip(cycle, [*cycle[1:], dst], strict=True))
            if self._free[dst] or dst in edges:
                return dict(zip(path, [*path[1:], dst], strict=True))
            path.append(dst)
        return {}

    def _choose(self, src: int, choices: list[int]) -> int:
        """The rank that lacks most, for it needs the most rounds; then the next one around the ring.

        Going round the ring makes equal loads into whole rings, in which every rank sends and receives.
        """
        num_ranks = len(self._queues)
        return max(
            choices,
            key=lambda dst: (self._num_to_receive[dst], len(self._queues[src][dst]), (src - dst) % num_ranks),
        )

    def _commit(self, edges: dict[int, int]) -> Round:
        """Take one cell per edge out of the queues and move it in the model."""
        moves = []
        for src, dst in sorted(edges.items()):
            cell = self._queues[src][dst].popleft()
            if not self._queues[src][dst]:
                del self._queues[src][dst]
            src_slot = self.slots[src].pop(cell)
            self._free[src].append(src_slot)
            moves.append((src, dst, cell, src_slot))
        transfers = []
        for src, dst, cell, src_slot in moves:
            dst_slot = self._free[dst].popleft()  # the longest free: seldom the one vacated in this round
            self.slots[dst][cell] = dst_slot
            self._num_to_receive[dst] -= 1
            transfers.append(Transfer(src, dst, cell.layer, cell.cell, src_slot, dst_slot))
        return tuple(transfers)

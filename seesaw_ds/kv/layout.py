"""Where the KV of a block lies in the host pool, and which part of it a rank owns in each phase.

A block's KV is (KV heads, layers, K/V, tokens, head_dim), on devices and in the host pool: heads come first because
tensor parallelism divides them, and layers next because pipeline parallelism does, so any layers of one head are one
run. A rank owns a rectangle of (heads x layers), and what two shards have in common is a rectangle too. The host pool
keeps a block as one row: the piece of decode rank 0, then of rank 1 and so on. A decode rank's copies are one run a
block, a prefill rank's one run a head::

    P2->T2, 4 layers, 4 heads      row = | decode rank 0                     | decode rank 1                     |
                                         | head 0: 0 1 2 3 | head 1: 0 1 2 3 | head 2: 0 1 2 3 | head 3: 0 1 2 3 |
    prefill rank 0 (layers 0 1) writes             ^^^               ^^^               ^^^               ^^^
    prefill rank 1 (layers 2 3) writes                 ^^^               ^^^               ^^^               ^^^
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from seesaw_ds.layout import LayoutPair, Phase, Shard


class Overlap(NamedTuple):
    """What a rank's shard has in common with piece `piece` of the row, counted from the start of the shard and of the
    piece."""

    piece: int
    in_shard: Shard
    in_piece: Shard


@dataclass(frozen=True, slots=True)
class HostBlockLayout:
    """One row of the host pool, for one replica (ranks count within it). `itemsize` is bytes per element.

    `pieces[i]` is the rectangle of a piece, `piece_offsets[i]` where it starts in the row, in elements, and
    `row_numel` the elements of a row.

    Raises ValueError when a TP size does not divide the KV heads.
    """

    layouts: LayoutPair
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    itemsize: int
    pieces: tuple[Shard, ...] = field(init=False)
    piece_offsets: tuple[int, ...] = field(init=False)
    row_numel: int = field(init=False)

    def __post_init__(self) -> None:
        for phase in Phase:
            tp = self.layouts[phase].tp
            if self.num_kv_heads % tp:
                raise ValueError(
                    f"layouts={str(self.layouts)!r}: the {phase.value} TP size {tp} must divide the model's "
                    f"{self.num_kv_heads} KV heads; take a smaller T"
                )
        pieces = [self.shard(Phase.DECODE, rank) for rank in range(self.layouts.replica_size)]
        offsets = [0]
        for piece in pieces:
            offsets.append(offsets[-1] + self.shard_numel(piece))
        object.__setattr__(self, "pieces", tuple(pieces))
        object.__setattr__(self, "piece_offsets", tuple(offsets[:-1]))
        object.__setattr__(self, "row_numel", offsets[-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a block in the host pool: all layers and heads."""
        return self.row_numel * self.itemsize

    def shard(self, phase: Phase, rank: int) -> Shard:
        """What `rank` owns of every block in `phase`."""
        return self.layouts[phase].shard(rank, self.num_layers, self.num_kv_heads)

    def shard_numel(self, shard: Shard) -> int:
        """Elements of one block in `shard`."""
        return shard.layers.size * 2 * shard.kv_heads.size * self.block_size * self.head_dim

    def overlaps(self, shard: Shard) -> tuple[Overlap, ...]:
        """How a rank's `shard`, of either phase, is spread over the pieces; the overlaps cover it once."""
        overlaps = []
        for index, piece in enumerate(self.pieces):
            common = shard.intersect(piece)
            if not common.is_empty:
                overlaps.append(Overlap(index, common.within(shard), common.within(piece)))
        return tuple(overlaps)

"""Parallel layouts: how the ranks of a run share layers and heads, in each phase.

A layout is written as letters and sizes: ``D2T4P1`` is two data-parallel replicas, each four-way tensor
parallel with one pipeline stage. Sizes of one may be left out: ``T4``, ``P2``, ``D2P2``. Stages have equal numbers of
layers, or those in brackets: ``P4[9,9,8,6]``. A pair of layouts, ``P4->T4``, is the one used for prefill and the one
used for decode.

Ranks are numbered with the tensor axis fastest and the data axis slowest, so a replica (the unit inside
which weights and KV are re-sharded) is a run of consecutive ranks in both phases::

    D2P2 -> D2T2      replica 0        replica 1
    rank              0       1        2       3
    prefill           stage 0 stage 1  stage 0 stage 1
    decode            tp 0    tp 1     tp 0    tp 1
"""

from __future__ import annotations

import enum
import itertools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple


class Phase(str, enum.Enum):
    """What the engine is doing; each phase has a layout of its own."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Phase:
        return Phase.DECODE if self is Phase.PREFILL else Phase.PREFILL


class Range(NamedTuple):
    """A half-open range of indices, ``start <= i < stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return max(0, self.stop - self.start)

    def intersect(self, other: Range) -> Range:
        """The indices in both ranges; a range of size 0 when there are none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def indices(self) -> range:
        return range(self.start, self.stop)

    def within(self, outer: Range) -> Range:
        """The same indices counted from the start of `outer`."""
        return Range(self.start - outer.start, self.stop - outer.start)


def split_evenly(total: int, parts: int) -> tuple[Range, ...]:
    """Cut ``0..total`` into `parts` consecutive ranges; the first ``total % parts`` are one longer."""
    size, longer = divmod(total, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return tuple(Range(starts[i], starts[i + 1]) for i in range(parts))


class RankCoords(NamedTuple):
    """Where a rank stands on each parallel axis."""

    dp: int
    pp: int
    tp: int


class Shard(NamedTuple):
    """The rectangle of (layer, KV head) that one rank owns: of the weights' cells and of the KV cache."""

    layers: Range
    kv_heads: Range

    def intersect(self, other: Shard) -> Shard:
        return Shard(self.layers.intersect(other.layers), self.kv_heads.intersect(other.kv_heads))

    def within(self, outer: Shard) -> Shard:
        """This one, counted from the start of `outer`, which holds it."""
        return Shard(self.layers.within(outer.layers), self.kv_heads.within(outer.kv_heads))

    @property
    def is_empty(self) -> bool:
        return self.layers.size == 0 or self.kv_heads.size == 0


_LAYOUT = re.compile(r"(?P<axis>[DTP])(?P<size>[1-9]\d*)(?:\[(?P<layers>[1-9]\d*(?:,[1-9]\d*)*)\])?", re.ASCII)
_RULE = (
    'a layout is letters D, T, P with sizes, each at most once, for example "T4", "P2" or "D2T2P2"; '
    'the P size may be followed by the layers of each stage, at least 1, as in "P4[9,9,8,6]"'
)


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The sizes of the data, tensor and pipeline axes.

    `layer_counts` are the layers of each pipeline stage; () is equal numbers, whatever the model.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    layer_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert not self.layer_counts or len(self.layer_counts) == self.pp, self

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """Read ``D2T4P1`` or ``P2[3,1]``. Raises ValueError with the rule when `text` is not a layout."""
        sizes: dict[str, int] = {}
        layer_counts: tuple[int, ...] = ()
        position = 0
        for match in _LAYOUT.finditer(text):
            if match.start() != position or match["axis"] in sizes or (match["layers"] and match["axis"] != "P"):
                break
            sizes[match["axis"]] = int(match["size"])
            if match["layers"]:
                layer_counts = tuple(int(count) for count in match["layers"].split(","))
            position = match.end()
        if not sizes or position != len(text):
            raise ValueError(f"layout={text!r}: {_RULE}")
        pp = sizes.get("P", 1)
        if layer_counts and len(layer_counts) != pp:
            raise ValueError(
                f"layout={text!r}: {pp} stages need {pp} numbers of layers, not {len(layer_counts)}; "
                "give one for each stage, or leave the brackets out for equal stages"
            )
        return cls(sizes.get("D", 1), sizes.get("T", 1), pp, layer_counts)

    def __str__(self) -> str:
        axes = (("D", self.dp), ("T", self.tp))
        text = "".join(f"{letter}{size}" for letter, size in axes if size > 1)
        if self.layer_counts:
            return f"{text}P{self.pp}[{','.join(map(str, self.layer_counts))}]"
        return text + f"P{self.pp}" * (self.pp > 1) or "T1"

    @property
    def with_equal_stages(self) -> ParallelLayout:
        """The same axes, with equal numbers of layers a stage."""
        return ParallelLayout(self.dp, self.tp, self.pp)

    @property
    def replica_size(self) -> int:
        """Ranks in one data-parallel replica."""
        return self.tp * self.pp

    @property
    def world_size(self) -> int:
        return self.dp * self.replica_size

    def coords(self, rank: int) -> RankCoords:
        dp, local_rank = divmod(rank, self.replica_size)
        pp, tp = divmod(local_rank, self.tp)
        return RankCoords(dp=dp, pp=pp, tp=tp)

    def rank(self, coords: RankCoords) -> int:
        return coords.dp * self.replica_size + coords.pp * self.tp + coords.tp

    def stage_layers(self, num_layers: int) -> tuple[Range, ...]:
        """The layers of each pipeline stage; early stages take the remainder, for the last has the LM head.

        Raises ValueError when the layout's own numbers do not add up to `num_layers`.
        """
        if not self.layer_counts:
            return split_evenly(num_layers, self.pp)
        ends = tuple(itertools.accumulate(self.layer_counts))
        if ends[-1] != num_layers:
            raise ValueError(
                f"layout={str(self)!r}: the stages have {ends[-1]} layers, but num_hidden_layers={num_layers}; change "
                "the numbers in brackets, or leave the brackets out for equal stages"
            )
        return tuple(map(Range, (0, *ends), ends))

    def shard(self, rank: int, num_layers: int, num_kv_heads: int) -> Shard:
        """What `rank` owns of `num_layers` layers and `num_kv_heads` KV heads (which `tp` divides)."""
        coords = self.coords(rank)
        return Shard(
            layers=self.stage_layers(num_layers)[coords.pp],
            kv_heads=split_evenly(num_kv_heads, self.tp)[coords.tp],
        )


@dataclass(frozen=True, slots=True)
class LayoutPair:
    """The layouts of the two phases, over the same ranks."""

    prefill: ParallelLayout
    decode: ParallelLayout

    @classmethod
    def parse(cls, text: str) -> LayoutPair:
        """Read ``P2->T2`` or ``P2[3,1]->T2``, or ``T2`` for the same layout in both phases.

        Raises ValueError when a side is not a layout, or when the two sides use different ranks.
        """
        sides = [side.strip() for side in text.split("->")]
        if len(sides) > 2:
            raise ValueError(f'layouts={text!r}: give one layout ("T2") or two ("P2->T2")')
        prefill = ParallelLayout.parse(sides[0])
        decode = ParallelLayout.parse(sides[-1])
        if prefill.dp != decode.dp:
            raise ValueError(
                f"layouts={text!r}: the data-parallel size must be the same in both phases "
                f"(prefill D{prefill.dp}, decode D{decode.dp}); only T and P change"
            )
        if prefill.world_size != decode.world_size:
            raise ValueError(
                f"layouts={text!r}: both phases must use the same ranks "
                f"(prefill {prefill.world_size}, decode {decode.world_size})"
            )
        return cls(prefill=prefill, decode=decode)

    def __str__(self) -> str:
        return str(self.prefill) if self.is_static else f"{self.prefill}->{self.decode}"

    def __getitem__(self, phase: Phase) -> ParallelLayout:
        return self.prefill if phase is Phase.PREFILL else self.decode

    @property
    def is_static(self) -> bool:
        """Whether nothing moves between the phases; stages of different depth are different layouts."""
        return self.prefill == self.decode

    @property
    def has_equal_stages(self) -> bool:
        """Whether both phases' layouts leave the layers of their stages open."""
        return self == self.with_equal_stages

    @property
    def with_equal_stages(self) -> LayoutPair:
        """The same axes in both phases, with equal numbers of layers a stage."""
        return LayoutPair(self.prefill.with_equal_stages, self.decode.with_equal_stages)

    @property
    def dp(self) -> int:
        return self.prefill.dp

    @property
    def replica_size(self) -> int:
        return self.prefill.replica_size

    @property
    def world_size(self) -> int:
        return self.prefill.world_size

    @property
    def cells_per_layer(self) -> int:
        """T: the fewest equal cells of a layer such that every rank owns whole cells in both phases."""
        return math.lcm(self.prefill.tp, self.decode.tp)

    @property
    def is_nested(self) -> bool:
        """Whether one phase's TP size divides the other's, so that cells can be exchanged in place."""
        return self.cells_per_layer == max(self.prefill.tp, self.decode.tp)

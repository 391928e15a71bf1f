"""What a checkpoint consists of: every weight once, in one form that all three file formats are made from.

The form is the fused one: q, k and v are one matrix (their biases one vector), KV head by KV head as [its query heads,
k, v]; everything else is as Hugging Face has it, (out, in). Where a weight is in each format::

    kind                Hugging Face             Megatron-core             cells (one of T)
    qkv                 q_proj, k_proj, v_proj   linear_qkv                rows of qkv
    o                   o_proj                   linear_proj               rows of the transpose
    gate.<expert>       gate_proj                first half of linear_fc1  rows of gate_up, each expert's gate, then up
    up.<expert>         up_proj                  second half               rows of gate_up
    down.<expert>       down_proj                linear_fc2                rows of the transpose, expert by expert

A plain FFN is expert 0. What is not cut keeps its name in `replicated_tensors`. Nothing here imports torch.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from seesaw_ds.model.tensors import EMBEDDING, HEAD, Projection, projections, replicated_tensors
from seesaw_ds.shapes import ModelShape


class Cut(enum.Enum):
    """How tensor parallelism cuts a weight."""

    NONE = "none"  # every rank has it whole, or cuts it by vocabulary rows
    ROWS = "rows"
    COLUMNS = "columns"  # a cell holds rows of the transpose


@dataclass(frozen=True, slots=True)
class Share:
    """The `nth` (from 0) of `of` equal parts of a tensor's rows."""

    nth: int
    of: int


WHOLE = Share(0, 1)


class HFPlace(NamedTuple):
    """Rows of a tensor of a Hugging Face folder: `size` of them and its other dims, from `first_row` on."""

    tensor: str
    first_row: int
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of a layer, or of the model when `layer` is None.

    `key` is its name in the manifest, `size` its shape in the fused form. `hf` has one place, or q's, k's and v's.
    `cell` is the matrix of a cell that it is in, with `cell_share` of that matrix's rows, when it is cut.
    """

    key: str
    kind: str
    layer: int | None
    size: tuple[int, ...]
    hf: tuple[HFPlace, ...]
    cut: Cut = Cut.NONE
    cell: str = ""
    cell_share: Share = WHOLE


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that are converted one after the other by one thread, and are done together: a layer, say."""

    index: int
    name: str
    weights: tuple[Weight, ...]


def units_of(shape: ModelShape) -> tuple[Unit, ...]:
    """All weights of a model, in the order of its files; no head when it is tied to the embedding."""
    replicated: dict[int | None, list[Weight]] = defaultdict(list)
    for name, item in replicated_tensors(shape).items():
        kind, _, number = name.partition(".")
        layer = int(number) if number else None
        places = tuple(HFPlace(tensor, 0, size) for tensor, size in item.tensors.items())
        replicated[layer].append(Weight(name, kind, layer, item.shape, places))
    groups = [("embedding", [_vocabulary("embedding", EMBEDDING, shape)])]
    groups += [(f"layers.{i}", _projections(shape, i) + replicated[i]) for i in range(shape.num_layers)]
    head = [] if shape.tie_word_embeddings else [_vocabulary("head", HEAD, shape)]
    groups.append(("head", replicated[None] + head))
    return tuple(Unit(index, name, tuple(weights)) for index, (name, weights) in enumerate(groups))


def _vocabulary(kind: str, tensor: str, shape: ModelShape) -> Weight:
    size = (shape.vocab_size, shape.hidden_size)
    return Weight(kind, kind, None, size, (HFPlace(tensor, 0, size),))


def _projections(shape: ModelShape, layer: int) -> list[Weight]:
    found = projections(shape, layer)
    num_experts = max(1, shape.num_experts)

    def weight(kind: str, names: tuple[str, ...], cut: Cut, cell: str, share: Share = WHOLE) -> Weight:
        places = tuple(_place(found[name]) for name in names)
        size = (sum(place.size[0] for place in places), places[0].size[1])
        return Weight(f"layers.{layer}.{kind}", kind, layer, size, places, cut, cell, share)

    weights = [weight("qkv", ("q", "k", "v"), Cut.ROWS, "qkv"), weight("o", ("o",), Cut.COLUMNS, "o")]
    for expert in range(num_experts):
        for index, name in enumerate((f"gate.{expert}", f"up.{expert}")):
            weights.append(weight(name, (name,), Cut.ROWS, "gate_up", Share(2 * expert + index, 2 * num_experts)))
    for expert in range(num_experts):
        name = f"down.{expert}"
        weights.append(weight(name, (name,), Cut.COLUMNS, "down", Share(expert, num_experts)))
    return weights


def _place(projection: Projection) -> HFPlace:
    return HFPlace(projection.tensor, projection.first_row, (projection.rows, projection.columns))

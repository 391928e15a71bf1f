"""Where weights come from, cut into the cells that re-sharding moves.

A layer has four matrices, each cut into C equal cells along its tensor-parallel dim; every cell is (rows, hidden):

    qkv      rows of KV heads, each as [its query heads, k, v]
    o        rows of the transposed output projection, (in, out): the query heads of the cell
    gate_up  the cell's rows of gate, then its rows of up
    down     rows of the transposed down projection, (in, out)

With a mixture of experts, gate_up and down hold this for one expert after another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.model.tensors import replicated_tensors
from seesaw_ds.reshard.plan import CellId, CellTensor
from seesaw_ds.shapes import ModelShape

CellMatrices = Mapping[CellId, Mapping[str, torch.Tensor]]
"""The matrices of cells by `CellTensor` name, each (rows, hidden) and contiguous."""

TRANSPOSED = ("o", "down")
"""The projections that a cell holds as (in, out)."""


def cell_tensors(shape: ModelShape, num_cells: int) -> tuple[CellTensor, ...]:
    """The matrices of one cell, when every layer is cut into `num_cells`."""
    hidden = shape.hidden_size
    ffn_rows = max(1, shape.num_experts) * shape.intermediate_size // num_cells
    return (
        CellTensor("qkv", shape.num_kv_heads * (shape.queries_per_kv_head + 2) * shape.head_dim // num_cells, hidden),
        CellTensor("o", shape.num_heads * shape.head_dim // num_cells, hidden),
        CellTensor("gate_up", 2 * ffn_rows, hidden),
        CellTensor("down", ffn_rows, hidden),
    )


class WeightSource(Protocol):
    """Reads parts of a model in the run's dtype."""

    def load(self, cells: CellMatrices, num_cells: int, on_progress: Callable[[int, int], None]) -> None:
        """Fill the matrices of cells of `num_cells` per layer; all are on one device.

        `on_progress` gets (cells done, cells in all).
        """

    def embedding(self, rows: Range) -> torch.Tensor:
        """Rows of the token embedding, (rows, hidden), as a new CPU or device tensor."""

    def head(self, rows: Range) -> torch.Tensor:
        """Rows of the LM head, (rows, hidden), as a new tensor; the embedding's when they are tied."""

    def replicated(self, name: str) -> torch.Tensor:
        """A new tensor of what every rank keeps whole, by its name in `replicated_tensors`."""


def projection_targets(shape: ModelShape, matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where a cell's share of each of `projections` goes: views (groups, rows, hidden) of the cell's matrices.

    The share's rows fill one group after the other. Of TRANSPOSED projections the rows are columns in a checkpoint.
    """
    head_dim, hidden = shape.head_dim, shape.hidden_size
    parts = (shape.queries_per_kv_head * head_dim, head_dim, head_dim)
    by_kv_head = matrices["qkv"].view(-1, sum(parts), hidden)
    targets = dict(zip(("q", "k", "v"), by_kv_head.split(parts, dim=1), strict=True))
    targets["o"] = matrices["o"].unsqueeze(0)
    num_experts = max(1, shape.num_experts)
    gate_up = matrices["gate_up"].view(num_experts, 2, 1, -1, hidden)
    down = matrices["down"].view(num_experts, 1, -1, hidden)
    for expert in range(num_experts):
        targets[f"gate.{expert}"], targets[f"up.{expert}"] = gate_up[expert]
        targets[f"down.{expert}"] = down[expert]
    return targets


class DummySource:
    """Random weights of the model's shape, the same whatever the layout: every smallest part has a seed of its own.

    Matrices are normal with the deviation that keeps activations of unit size; norms multiply by one, biases are 0.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._seed = seed
        self._replicated = replicated_tensors(shape)

    def load(self, cells: CellMatrices, num_cells: int, on_progress: Callable[[int, int], None]) -> None:
        """Fill the matrices of cells of `num_cells` per layer."""
        # The finest cut that any layout can ask for, so that its parts make up every coarser one.
        num_units = math.gcd(self._shape.num_kv_heads, self._shape.intermediate_size)
        for done, ((layer, cell), matrices) in enumerate(cells.items(), start=1):
            units = split_evenly(num_units, num_cells)[cell]
            for name, target in projection_targets(self._shape, matrices).items():
                unit_rows = target.shape[0] * target.shape[1] // units.size
                rows = torch.cat([self._normal(f"{layer}.{name}.{unit}", unit_rows) for unit in units.indices()])
                target.copy_(rows.view(target.shape))
            on_progress(done, len(cells))

    def embedding(self, rows: Range) -> torch.Tensor:
        return self._table("embedding", rows)

    def head(self, rows: Range) -> torch.Tensor:
        return self._table("embedding" if self._shape.tie_word_embeddings else "head", rows)

    def replicated(self, name: str) -> torch.Tensor:
        kind = name.partition(".")[0]
        if kind == "router":
            return self._normal(name, self._shape.num_experts)
        value = 0.0 if kind == "qkv_bias" or self._shape.family.norm_adds_one else 1.0
        return torch.full(self._replicated[name].shape, value, dtype=self._dtype, device=self._device)

    def _table(self, name: str, rows: Range) -> torch.Tensor:
        """Rows of a (vocabulary, hidden) table, generated in fixed pages so that any range sees the same values."""
        page = 1024
        pages = range(rows.start // page, -(-rows.stop // page))
        table = torch.cat([self._normal(f"{name}.{i}", page) for i in pages])
        return table[rows.start - pages.start * page : rows.stop - pages.start * page].clone()

    def _normal(self, name: str, rows: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._seed}.{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8], "little"))
        values = torch.empty((rows, self._shape.hidden_size), dtype=self._dtype, device=self._device)
        return values.normal_(std=self._shape.hidden_size**-0.5, generator=generator)


def read_table_cell(read: Callable[[Range], torch.Tensor], vocab_size: int, cell: int, target: torch.Tensor) -> None:
    """Fill `target` (rows, hidden) with a cell of a vocabulary table, and with zeros past the vocabulary's end."""
    rows = Range(cell * target.shape[0], (cell + 1) * target.shape[0]).intersect(Range(0, vocab_size))
    if rows.size:
        target[: rows.size].copy_(read(rows))
    target[rows.size :].zero_()

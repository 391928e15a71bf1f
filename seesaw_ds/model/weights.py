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
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.model.checkpoint import TensorEntry
from seesaw_ds.model.tensors import EMBEDDING, HEAD, projections, replicated_tensors
from seesaw_ds.reshard.plan import CellTensor
from seesaw_ds.shapes import ModelShape


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
    """Reads parts of a model; every result is a new CPU or device tensor in the run's dtype."""

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        """The matrices of one cell by `CellTensor` name, each (rows, hidden)."""

    def embedding(self, rows: Range) -> torch.Tensor:
        """Rows of the token embedding, (rows, hidden)."""

    def head(self, rows: Range) -> torch.Tensor:
        """Rows of the LM head, (rows, hidden); the embedding's when they are tied."""

    def replicated(self, name: str) -> torch.Tensor:
        """A tensor that every rank keeps whole, by its name in `replicated_tensors`."""


def _assemble_cell(
    shape: ModelShape,
    cell: int,
    num_cells: int,
    read_rows: Callable[[str, Range], torch.Tensor],
    read_columns: Callable[[str, Range], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """One cell from what reads ranges of a layer's `projections` by name: rows, or columns as rows (in, out)."""
    kv_heads = split_evenly(shape.num_kv_heads, num_cells)[cell]
    ffn = split_evenly(shape.intermediate_size, num_cells)[cell]
    kv_rows = Range(kv_heads.start * shape.head_dim, kv_heads.stop * shape.head_dim)
    q_rows = Range(kv_rows.start * shape.queries_per_kv_head, kv_rows.stop * shape.queries_per_kv_head)
    q, k, v = (
        read_rows(name, rows).view(kv_heads.size, -1, shape.hidden_size)
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
    )
    experts = range(max(1, shape.num_experts))
    return {
        "qkv": torch.cat((q, k, v), dim=1).flatten(0, 1),
        "o": read_columns("o", q_rows),
        "gate_up": torch.cat([read_rows(f"{name}.{expert}", ffn) for expert in experts for name in ("gate", "up")]),
        "down": torch.cat([read_columns(f"down.{expert}", ffn) for expert in experts]),
    }


class SafetensorsSource:
    """Slices of a Hugging Face checkpoint, read from memory-mapped files; no large tensor is read whole."""

    def __init__(self, shape: ModelShape, entries: dict[str, TensorEntry], dtype: torch.dtype) -> None:
        self._shape = shape
        self._entries = entries
        self._dtype = dtype
        self._replicated = replicated_tensors(shape)
        self._files: dict[Path, safe_open] = {}

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        places = projections(self._shape, layer)

        def rows(name: str, wanted: Range) -> torch.Tensor:
            place = places[name]
            return self._rows(place.tensor, Range(place.first_row + wanted.start, place.first_row + wanted.stop))

        def columns(name: str, wanted: Range) -> torch.Tensor:
            part = self._slice(places[name].tensor)[:, wanted.start : wanted.stop]
            return part.to(self._dtype).t().contiguous()

        return _assemble_cell(self._shape, cell, num_cells, rows, columns)

    def embedding(self, rows: Range) -> torch.Tensor:
        return self._rows(EMBEDDING, rows)

    def head(self, rows: Range) -> torch.Tensor:
        return self.embedding(rows) if self._shape.tie_word_embeddings else self._rows(HEAD, rows)

    def replicated(self, name: str) -> torch.Tensor:
        parts = [self._rows(tensor, Range(0, size[0])) for tensor, size in self._replicated[name].tensors.items()]
        if len(parts) == 1:
            return parts[0]
        by_kv_head = [part.view(self._shape.num_kv_heads, -1) for part in parts]
        return torch.cat(by_kv_head, dim=1).flatten()

    def _rows(self, name: str, rows: Range) -> torch.Tensor:
        return self._slice(name)[rows.start : rows.stop].to(self._dtype)

    def _slice(self, name: str) -> torch.Tensor:
        path = self._entries[name].path
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path].get_slice(name)

    def close(self) -> None:
        """Unmap the files."""
        self._files.clear()


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

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        # The finest cut that any layout can ask for, so that its parts make up every coarser one.
        num_units = math.gcd(self._shape.num_kv_heads, self._shape.intermediate_size)
        units = split_evenly(num_units, num_cells)[cell]

        def read(name: str, wanted: Range) -> torch.Tensor:
            unit_rows = wanted.size // units.size
            return torch.cat([self._normal(f"{layer}.{name}.{unit}", unit_rows) for unit in units.indices()])

        return _assemble_cell(self._shape, cell, num_cells, read, read)

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


def vocab_shard(
    read: Callable[[Range], torch.Tensor], vocab_size: int, padded_size: int, rank: int, tp: int
) -> torch.Tensor:
    """This rank's rows of a vocabulary table, padded with zeros past the vocabulary's end: (padded / tp, hidden)."""
    rows = split_evenly(padded_size, tp)[rank]
    real = read(rows.intersect(Range(0, vocab_size)))
    if real.shape[0] == rows.size:
        return real
    padding = torch.zeros((rows.size - real.shape[0], real.shape[1]), dtype=real.dtype, device=real.device)
    return torch.cat((real, padding))

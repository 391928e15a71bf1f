"""Where weights come from, cut into the cells that re-sharding moves.

A layer has four matrices, each cut into C equal cells along its tensor-parallel dim; every cell is (rows, hidden):

    qkv      rows of KV heads, each as [its query heads, k, v]
    o        rows of the transposed output projection, (in, out): the query heads of the cell
    gate_up  the cell's rows of gate, then its rows of up
    down     rows of the transposed down projection, (in, out)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.model.checkpoint import TensorEntry
from seesaw_ds.reshard.plan import CellTensor
from seesaw_ds.shapes import ModelShape


def cell_tensors(shape: ModelShape, num_cells: int) -> tuple[CellTensor, ...]:
    """The matrices of one cell, when every layer is cut into `num_cells`."""
    hidden = shape.hidden_size
    return (
        CellTensor("qkv", shape.num_kv_heads * (shape.queries_per_kv_head + 2) * shape.head_dim // num_cells, hidden),
        CellTensor("o", shape.num_heads * shape.head_dim // num_cells, hidden),
        CellTensor("gate_up", 2 * shape.intermediate_size // num_cells, hidden),
        CellTensor("down", shape.intermediate_size // num_cells, hidden),
    )


class WeightSource(Protocol):
    """Reads parts of a model; every result is a new CPU or device tensor in the run's dtype."""

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        """The matrices of one cell by `CellTensor` name, each (rows, hidden)."""

    def embedding(self, rows: Range) -> torch.Tensor:
        """Rows of the token embedding, (rows, hidden)."""

    def head(self, rows: Range) -> torch.Tensor:
        """Rows of the LM head, (rows, hidden); the embedding's when they are tied."""

    def norm(self, name: str) -> torch.Tensor:
        """A norm's (hidden,) weight: "input.<layer>", "post_attention.<layer>" or "final"."""


def norm_names(shape: ModelShape) -> Iterator[str]:
    for layer in range(shape.num_layers):
        yield f"input.{layer}"
        yield f"post_attention.{layer}"
    yield "final"


class SafetensorsSource:
    """Slices of a Hugging Face checkpoint, read from memory-mapped files; no tensor is read whole."""

    def __init__(self, shape: ModelShape, entries: dict[str, TensorEntry], dtype: torch.dtype) -> None:
        self._shape = shape
        self._entries = entries
        self._dtype = dtype
        self._files: dict[Path, safe_open] = {}

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        shape = self._shape
        kv_heads = split_evenly(shape.num_kv_heads, num_cells)[cell]
        ffn = split_evenly(shape.intermediate_size, num_cells)[cell]
        kv_rows = Range(kv_heads.start * shape.head_dim, kv_heads.stop * shape.head_dim)
        per_kv_head = shape.queries_per_kv_head
        q_rows = Range(kv_rows.start * per_kv_head, kv_rows.stop * per_kv_head)
        prefix = f"model.layers.{layer}."
        q, k, v = (
            self._rows(f"{prefix}self_attn.{name}_proj.weight", rows).view(kv_heads.size, -1, shape.hidden_size)
            for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        )
        return {
            "qkv": torch.cat((q, k, v), dim=1).flatten(0, 1),
            "o": self._columns(f"{prefix}self_attn.o_proj.weight", q_rows).t().contiguous(),
            "gate_up": torch.cat([self._rows(f"{prefix}mlp.{name}_proj.weight", ffn) for name in ("gate", "up")]),
            "down": self._columns(f"{prefix}mlp.down_proj.weight", ffn).t().contiguous(),
        }

    def embedding(self, rows: Range) -> torch.Tensor:
        return self._rows("model.embed_tokens.weight", rows)

    def head(self, rows: Range) -> torch.Tensor:
        return self.embedding(rows) if self._shape.tie_word_embeddings else self._rows("lm_head.weight", rows)

    def norm(self, name: str) -> torch.Tensor:
        kind, _, layer = name.partition(".")
        full = "model.norm.weight" if kind == "final" else f"model.layers.{layer}.{kind}_layernorm.weight"
        return self._rows(full, Range(0, self._shape.hidden_size))

    def _rows(self, name: str, rows: Range) -> torch.Tensor:
        return self._slice(name)[rows.start : rows.stop].to(self._dtype)

    def _columns(self, name: str, columns: Range) -> torch.Tensor:
        return self._slice(name)[:, columns.start : columns.stop].to(self._dtype)

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

    Matrices are normal with the deviation that keeps activations of unit size; norms are one.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._seed = seed

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        # The finest cut that any layout can ask for, so that its parts make up every coarser one.
        num_units = math.gcd(self._shape.num_kv_heads, self._shape.intermediate_size)
        units = split_evenly(num_units, num_cells)[cell]
        rows = {piece.name: piece.rows // units.size for piece in cell_tensors(self._shape, num_cells)}
        rows["gate"] = rows["up"] = rows.pop("gate_up") // 2
        parts = {
            name: torch.cat([self._normal(f"{layer}.{name}.{unit}", size) for unit in units.indices()])
            for name, size in rows.items()
        }
        parts["gate_up"] = torch.cat((parts.pop("gate"), parts.pop("up")))
        return parts

    def embedding(self, rows: Range) -> torch.Tensor:
        return self._table("embedding", rows)

    def head(self, rows: Range) -> torch.Tensor:
        return self._table("embedding" if self._shape.tie_word_embeddings else "head", rows)

    def norm(self, name: str) -> torch.Tensor:
        return torch.ones(self._shape.hidden_size, dtype=self._dtype, device=self._device)

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

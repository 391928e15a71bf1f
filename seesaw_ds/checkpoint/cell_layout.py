"""How the cells format lays weights out: names, shapes and order. Nothing here imports torch.

Each layer is cut into T cells. A file holds whole layers, one after the other::

    layer 0: cell 0 [qkv o gate_up down]  cell 1 [...]  ...  cell T-1   norms, biases
    layer 1: ...

so the cells that a rank owns of a layer, which are neighbours, are one range of bytes. Tensor names are
``layers.<layer>.cells.<cell>.<matrix>``; weights that are not cut are under their `Weight.key`.
"""

from __future__ import annotations

import math
from pathlib import Path

from seesaw_ds.checkpoint.manifest import MANIFEST, read_manifest
from seesaw_ds.checkpoint.parts import Cut, Unit, Weight, units_of
from seesaw_ds.errors import UserError
from seesaw_ds.model.checkpoint import index_checkpoint
from seesaw_ds.shapes import ModelShape

DEFAULT_CELLS = 8


def choose_num_cells(shape: ModelShape, max_tp: int | None) -> int:
    """T for `--max-tp`; when that is None, the largest one up to `DEFAULT_CELLS` that fits the model.

    Raises UserError when T does not divide the KV heads and the FFN.
    """
    finest = math.gcd(shape.num_kv_heads, shape.intermediate_size)
    if max_tp is None:
        return math.gcd(finest, DEFAULT_CELLS)
    if max_tp < 1 or finest % max_tp:
        raise UserError(
            f"--max-tp {max_tp}: must divide num_key_value_heads={shape.num_kv_heads} and "
            f"intermediate_size={shape.intermediate_size}; the largest that does is {finest}"
        )
    return max_tp


def cell_name(layer: int, cell: int, matrix: str) -> str:
    """The name of a cell's matrix in the files."""
    return f"layers.{layer}.cells.{cell}.{matrix}"


def cell_sizes(unit: Unit, num_cells: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a unit by name, in the order of the file."""
    matrices: dict[str, tuple[int, ...]] = {}
    for weight in unit.weights:
        if weight.cut is not Cut.NONE:
            rows, cols = weight.size if weight.cut is Cut.ROWS else weight.size[::-1]
            matrices[weight.cell] = (rows * weight.cell_share.of // num_cells, cols)
    layer = unit.weights[0].layer
    sizes = {
        cell_name(layer, cell, matrix): size
        for cell in range(num_cells)
        for matrix, size in matrices.items()
        if layer is not None
    }
    return sizes | {weight.key: weight.size for weight in unit.weights if weight.cut is Cut.NONE}


def cell_place(weight: Weight, cell: int, num_cells: int) -> tuple[str, tuple[int, int], int]:
    """Where one cell's part of `weight` is: the tensor's name, the part's (rows, cols), its first element."""
    assert weight.layer is not None
    rows, cols = weight.size if weight.cut is Cut.ROWS else weight.size[::-1]
    size = (rows // num_cells, cols)
    return cell_name(weight.layer, cell, weight.cell), size, weight.cell_share.nth * math.prod(size)


def is_cells_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a checkpoint in the cells format. Raises UserError when its manifest is damaged."""
    return (Path(folder) / MANIFEST).is_file() and read_manifest(Path(folder)).format == "cells"


def check_cells(folder: str | Path, shape: ModelShape, num_cells: int = 1) -> int:
    """Check that a cells folder is complete and that its cells make up `num_cells` per layer; reads headers alone.

    Returns T, the cells of a layer in the folder. Raises UserError that names what is missing, or the rule.
    """
    found = read_manifest(Path(folder)).num_cells
    if not found or math.gcd(shape.num_kv_heads, shape.intermediate_size) % found:
        raise UserError(f"{folder}: its manifest gives num_cells={found}, into which config.json's sizes cannot be cut")
    if found % num_cells:
        raise UserError(
            f"{folder}: its layers are cut into {found} cells, of which these layouts cannot make {num_cells}; "
            f"convert it with --max-tp of a multiple of {num_cells}"
        )
    entries = index_checkpoint(folder)
    for unit in units_of(shape):
        for name, size in cell_sizes(unit, found).items():
            if name not in entries:
                raise UserError(f"{folder}: weights missing: {name}; convert the checkpoint again")
            if entries[name].shape != size:
                raise UserError(f"{folder}: {name} has shape {entries[name].shape}, config.json asks for {size}")
    return found

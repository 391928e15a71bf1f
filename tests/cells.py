"""Cells of a weight source, loaded for a look at them."""

from __future__ import annotations

import torch

from seesaw_ds.model.weights import WeightSource, cell_tensors
from seesaw_ds.reshard.plan import CellId
from seesaw_ds.shapes import ModelShape


def load_cells(
    source: WeightSource, shape: ModelShape, layer: int, num_cells: int, dtype: torch.dtype = torch.float32
) -> list[dict[str, torch.Tensor]]:
    """All cells of a layer, in memory that was NaN before."""
    pieces = cell_tensors(shape, num_cells)
    cells = {
        CellId(layer, cell): {
            piece.name: torch.full((piece.rows, piece.cols), torch.nan, dtype=dtype) for piece in pieces
        }
        for cell in range(num_cells)
    }
    source.load(cells, num_cells, lambda done, total: None)
    return list(cells.values())

"""Weights for the engine out of a cells folder: a rank reads its own cells and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from seesaw_ds.checkpoint.cell_layout import cell_name
from seesaw_ds.checkpoint.cells import stored_cells
from seesaw_ds.checkpoint.parts import Cut, units_of
from seesaw_ds.checkpoint.reading import Piece, read_groups, read_rows, read_whole, row_pieces
from seesaw_ds.layout import Range
from seesaw_ds.model.weights import CellMatrices
from seesaw_ds.reshard.plan import CellId
from seesaw_ds.shapes import ModelShape


class CellsSource:
    """A `WeightSource` over a cells folder, for any number of cells per layer that divides the folder's."""

    def __init__(self, folder: str | Path, shape: ModelShape, dtype: torch.dtype) -> None:
        self._num_stored, self._stored = stored_cells(Path(folder), shape)
        self._dtype = dtype
        self._tied = shape.tie_word_embeddings
        layer = units_of(shape)[1]
        # Of each matrix of a cell: how many weights lie in it, one below the other.
        self._num_parts = {w.cell: w.cell_share.of for w in layer.weights if w.cut is not Cut.NONE}

    def load(self, cells: CellMatrices, num_cells: int, on_progress: Callable[[int, int], None]) -> None:
        """Fill the matrices of cells of `num_cells` per layer; all are on one device."""
        read_groups((self.pieces(cell, num_cells, matrices) for cell, matrices in cells.items()), on_progress)

    def pieces(self, cell: CellId, num_cells: int, matrices: Mapping[str, torch.Tensor]) -> Iterator[Piece]:
        """What to read for one cell of `num_cells` per layer."""
        if self._num_stored % num_cells:
            raise ValueError(f"num_cells={num_cells}: must divide the {self._num_stored} cells of a layer in the files")
        per_cell = self._num_stored // num_cells
        for name, matrix in matrices.items():
            # Every weight of the wider cell is the narrower ones' rows, one below the other.
            targets = matrix.view(self._num_parts[name], per_cell, -1, matrix.shape[1])
            for index in range(per_cell):
                stored = self._stored[cell_name(cell.layer, cell.cell * per_cell + index, name)]
                yield from row_pieces(stored, 0, targets[:, index])

    def embedding(self, rows: Range) -> torch.Tensor:
        """Rows of the token embedding, (rows, hidden)."""
        return read_rows(self._stored["embedding"], rows, self._dtype)

    def head(self, rows: Range) -> torch.Tensor:
        """Rows of the LM head, (rows, hidden); the embedding's when they are tied."""
        return read_rows(self._stored["embedding" if self._tied else "head"], rows, self._dtype)

    def replicated(self, name: str) -> torch.Tensor:
        """A tensor that every rank keeps whole, by its name in `replicated_tensors`."""
        return read_whole(self._stored[name], self._dtype)

"""Weights for the engine out of files: a rank loads its own cells, or its own rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path

import torch

from seesaw_ds.checkpoint.cell_layout import cell_name
from seesaw_ds.checkpoint.cells import stored_cells
from seesaw_ds.checkpoint.parts import Cut, units_of
from seesaw_ds.checkpoint.reading import Piece, read_groups, read_rows, read_whole, row_pieces, transposed_pieces
from seesaw_ds.checkpoint.tensor_files import read_index
from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.model.checkpoint import TensorEntry
from seesaw_ds.model.tensors import EMBEDDING, HEAD, projections, replicated_tensors
from seesaw_ds.model.weights import TRANSPOSED, CellMatrices, projection_targets
from seesaw_ds.reshard.plan import CellId
from seesaw_ds.shapes import ModelShape


class SafetensorsSource:
    """A `WeightSource` over a Hugging Face checkpoint, of which a rank loads its own rows and columns."""

    def __init__(self, shape: ModelShape, entries: dict[str, TensorEntry], dtype: torch.dtype) -> None:
        self._shape = shape
        self._stored = read_index(sorted({entry.path for entry in entries.values()}))
        self._dtype = dtype
        self._replicated = replicated_tensors(shape)

    def load(self, cells: CellMatrices, num_cells: int, on_progress: Callable[[int, int], None]) -> None:
        """Fill the matrices of cells of `num_cells` per layer; all are on one device."""
        by_layer = groupby(sorted(cells), lambda cell: cell.layer)
        layers = [{cell: cells[cell] for cell in layer} for _, layer in by_layer]
        ends = list(accumulate(map(len, layers)))
        read_groups(
            (self.pieces(layer, num_cells) for layer in layers),
            lambda done, _: on_progress(ends[done - 1], len(cells)),
        )

    def pieces(self, cells: CellMatrices, num_cells: int) -> Iterator[Piece]:
        """What to read for some cells of `num_cells` of one layer; neighbours are read together where they can be."""
        (layer,) = {cell.layer for cell in cells}
        targets = {cell.cell: projection_targets(self._shape, matrices) for cell, matrices in cells.items()}
        for name, place in projections(self._shape, layer).items():
            stored = self._stored[place.tensor]
            if name.partition(".")[0] in TRANSPOSED:
                shares = split_evenly(place.columns, num_cells)
                for run in _runs(sorted(targets)):
                    columns = [targets[cell][name].squeeze(0) for cell in run]
                    yield from transposed_pieces(stored, shares[run[0]].start, columns)
                continue
            for cell, share in enumerate(split_evenly(place.rows, num_cells)):
                if cell in targets:
                    yield from row_pieces(stored, place.first_row + share.start, targets[cell][name])

    def embedding(self, rows: Range) -> torch.Tensor:
        """Rows of the token embedding, (rows, hidden)."""
        return read_rows(self._stored[EMBEDDING], rows, self._dtype)

    def head(self, rows: Range) -> torch.Tensor:
        """Rows of the LM head, (rows, hidden); the embedding's when they are tied."""
        return read_rows(self._stored[EMBEDDING if self._shape.tie_word_embeddings else HEAD], rows, self._dtype)

    def replicated(self, name: str) -> torch.Tensor:
        """A tensor that every rank keeps whole, by its name in `replicated_tensors`."""
        parts = [read_whole(self._stored[tensor], self._dtype) for tensor in self._replicated[name].tensors]
        if len(parts) == 1:
            return parts[0]
        by_kv_head = [part.view(self._shape.num_kv_heads, -1) for part in parts]
        return torch.cat(by_kv_head, dim=1).flatten()


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


def _runs(cells: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs of neighbours."""
    runs: list[list[int]] = []
    for cell in cells:
        if runs and runs[-1][-1] == cell - 1:
            runs[-1].append(cell)
        else:
            runs.append([cell])
    return runs

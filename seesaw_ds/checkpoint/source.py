"""Weights for the engine out of a cells folder: memory-mapped, so that a rank reads its own cells and nothing else."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import torch

from seesaw_ds.checkpoint.cell_layout import cell_name
from seesaw_ds.checkpoint.cells import stored_cells
from seesaw_ds.checkpoint.parts import Cut, units_of
from seesaw_ds.checkpoint.tensor_files import StoredTensor
from seesaw_ds.layout import Range
from seesaw_ds.shapes import ModelShape

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: map a whole range at once instead of page by page


class CellsSource:
    """A `WeightSource` over a cells folder, for any number of cells per layer that divides the folder's.

    In the folder's dtype results are views of the mapped files, not to be changed. What `cell` joins of several cells
    of the folder is in buffers that its next call uses again.
    """

    def __init__(self, folder: str | Path, shape: ModelShape, dtype: torch.dtype) -> None:
        self._num_stored, self._stored = stored_cells(Path(folder), shape)
        self._dtype = dtype
        self._tied = shape.tie_word_embeddings
        layer = units_of(shape)[1]
        # Of each matrix of a cell: how many weights lie in it, one below the other.
        self._matrices = {w.cell: w.cell_share.of for w in layer.weights if w.cut is not Cut.NONE}
        self._maps: dict[Path, mmap.mmap] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def cell(self, layer: int, cell: int, num_cells: int) -> dict[str, torch.Tensor]:
        """The matrices of one cell of `num_cells`, each (rows, hidden)."""
        if self._num_stored % num_cells:
            raise ValueError(f"num_cells={num_cells}: must divide the {self._num_stored} cells of a layer in the files")
        size = self._num_stored // num_cells
        stored = range(cell * size, (cell + 1) * size)
        matrices = {}
        for name, num_parts in self._matrices.items():
            cells = [self._view(cell_name(layer, index, name)) for index in stored]
            if size == 1:
                matrices[name] = cells[0].to(self._dtype)
                continue
            # Every weight of the wider cell is the narrower ones' rows, one below the other.
            by_part = zip(*(matrix.chunk(num_parts) for matrix in cells), strict=True)
            wider = self._wider_cell(name, cells)
            matrices[name] = torch.cat([rows for part in by_part for rows in part], out=wider).to(self._dtype)
        return matrices

    def _wider_cell(self, name: str, cells: list[torch.Tensor]) -> torch.Tensor:
        """A buffer for `cells` put together, used again for every layer: fresh memory would cost a fault per page."""
        size = (len(cells) * cells[0].shape[0], cells[0].shape[1])
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != size or buffer.dtype != cells[0].dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=cells[0].dtype)
        return buffer

    def embedding(self, rows: Range) -> torch.Tensor:
        """Rows of the token embedding, (rows, hidden)."""
        return self._view("embedding", rows).to(self._dtype)

    def head(self, rows: Range) -> torch.Tensor:
        """Rows of the LM head, (rows, hidden); the embedding's when they are tied."""
        return self._view("embedding" if self._tied else "head", rows).to(self._dtype)

    def replicated(self, name: str) -> torch.Tensor:
        """A tensor that every rank keeps whole, by its name in `replicated_tensors`."""
        return self._view(name).to(self._dtype)

    def _view(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows of a stored tensor, or all of it."""
        stored = self._stored[name]
        rows = rows or Range(0, stored.size[0])
        size = (rows.size, *stored.size[1:])
        if rows.size == 0:
            return torch.empty(size, dtype=stored.dtype)
        row_bytes = stored.dtype.itemsize * math.prod(stored.size[1:])
        start, num_bytes = stored.offset + rows.start * row_bytes, rows.size * row_bytes
        mapped = self._map(stored)
        _populate(mapped, start, num_bytes)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=start).view(stored.dtype).view(size)

    def _map(self, stored: StoredTensor) -> mmap.mmap:
        if stored.path not in self._maps:
            with stored.path.open("rb") as file:
                # Private and writable only because torch warns of memory that it may not write.
                self._maps[stored.path] = mmap.mmap(
                    file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        return self._maps[stored.path]

    def close(self) -> None:
        """Let go of the files; they are unmapped when the last view of them is gone."""
        self._buffers.clear()
        self._maps.clear()


def _populate(mapped: mmap.mmap, offset: int, num_bytes: int) -> None:
    """Map the pages of a range; where the system cannot do that at once, the first read of each page does."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        mapped.madvise(_POPULATE_READ, start, offset + num_bytes - start)
    except OSError:
        mapped.madvise(mmap.MADV_WILLNEED, start, offset + num_bytes - start)

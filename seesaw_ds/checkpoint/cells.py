"""The cells format: safetensors files in which every (layer, cell) is one contiguous range of bytes.

`cell_layout` draws where everything lies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from seesaw_ds.checkpoint.cell_layout import cell_place, cell_sizes, check_cells
from seesaw_ds.checkpoint.parts import Cut, Unit, Weight, units_of
from seesaw_ds.checkpoint.tensor_files import (
    OpenFiles,
    SafetensorsFolder,
    StoredTensor,
    TensorSpec,
    read_index,
    read_tensor,
)
from seesaw_ds.errors import UserError
from seesaw_ds.model.checkpoint import index_checkpoint
from seesaw_ds.shapes import ModelShape

LARGEST_FILE = 4 << 30
ALIGN = 4096
"""Bytes at whose multiple a file's data starts: a page."""


def stored_cells(folder: Path, shape: ModelShape) -> tuple[int, dict[str, StoredTensor]]:
    """T, and every tensor of a cells folder. Raises UserError for what is missing or of the wrong shape."""
    num_cells = check_cells(folder, shape)
    return num_cells, read_index(sorted({entry.path for entry in index_checkpoint(folder).values()}))


class CellsReader:
    """Reads whole weights from a cells folder. Raises UserError when it is not complete."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._num_cells, self._stored = stored_cells(folder, shape)
        self.files = tuple(sorted({stored.path for stored in self._stored.values()}))
        self._files = OpenFiles(self.files, os.O_RDONLY)

    def dtype(self, weight: Weight) -> torch.dtype:
        """Its dtype in the files."""
        if weight.cut is Cut.NONE:
            return self._stored[weight.key].dtype
        return self._stored[cell_place(weight, 0, self._num_cells)[0]].dtype

    def read(self, weight: Weight) -> torch.Tensor:
        """A new tensor in the fused form, in the files' dtype."""
        if weight.cut is Cut.NONE:
            return self._read(weight.key, weight.size, 0)
        is_transposed = weight.cut is Cut.COLUMNS
        by_rows = torch.empty(weight.size[::-1] if is_transposed else weight.size, dtype=self.dtype(weight))
        for cell, target in enumerate(by_rows.chunk(self._num_cells)):
            target.copy_(self._read(*cell_place(weight, cell, self._num_cells)))
        return by_rows.t().contiguous() if is_transposed else by_rows

    def _read(self, name: str, size: tuple[int, ...], start: int) -> torch.Tensor:
        stored = self._stored[name]
        offset = stored.offset + start * stored.dtype.itemsize
        return read_tensor(self._files[stored.path], stored.dtype, size, offset)

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class CellsWriter:
    """Writes weights as a cells folder."""

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        dtype_of: Callable[[Weight], torch.dtype],
        num_cells: int,
        largest_file: int = LARGEST_FILE,
    ) -> None:
        self._num_cells = num_cells
        groups = [
            [TensorSpec(name, dtypes[name], size) for name, size in cell_sizes(unit, num_cells).items()]
            for unit in units_of(shape)
            for dtypes in (self._dtypes(unit, dtype_of),)
        ]
        self._files = SafetensorsFolder(folder, groups, _file_name, largest_file, ALIGN)
        self.total_bytes = self._files.total_bytes

    def _dtypes(self, unit: Unit, dtype_of: Callable[[Weight], torch.dtype]) -> dict[str, torch.dtype]:
        dtypes: dict[str, torch.dtype] = {}
        for weight in unit.weights:
            for name in self._names(weight):
                if dtypes.setdefault(name, dtype_of(weight)) != dtype_of(weight):
                    raise UserError(f"{weight.key}: differs in dtype from what shares its cells; give one with --dtype")
        return dtypes

    def _names(self, weight: Weight) -> list[str]:
        if weight.cut is Cut.NONE:
            return [weight.key]
        return [cell_place(weight, cell, self._num_cells)[0] for cell in range(self._num_cells)]

    def write(self, unit: Unit, tensors: Iterable[tuple[Weight, torch.Tensor]]) -> None:
        """Write the weights of `unit`; they are on the disk when this returns."""
        names: list[str] = []
        for weight, tensor in tensors:
            names += self._names(weight)
            if weight.cut is Cut.NONE:
                self._files.write(weight.key, tensor)
                continue
            # Transposed as a whole: torch is several times slower at parts of a transpose.
            by_rows = tensor if weight.cut is Cut.ROWS else tensor.t().contiguous()
            for cell, part in enumerate(by_rows.chunk(self._num_cells)):
                name, _, start = cell_place(weight, cell, self._num_cells)
                self._files.write(name, part, start)
        self._files.sync(names)

    def finish(self, records: dict[str, object]) -> None:
        """Nothing is left to write: the manifest says the rest."""

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _file_name(index: int, count: int) -> str:
    return f"cells-{index + 1:05d}-of-{count:05d}.safetensors"

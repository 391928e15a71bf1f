"""The weight memory of one rank: slots that each hold one cell of some layer, at addresses that never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from seesaw_ds.reshard.plan import CellTensor, ReshardPlan


class WeightArena:
    """One allocation per cell tensor, each (num_slots, rows, cols). Views stay valid as long as the arena.

    Contents are undefined until cells are loaded.
    """

    def __init__(
        self, cell_tensors: Sequence[CellTensor], num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cell_tensors = tuple(cell_tensors)
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = device
        self._tensors = {
            spec.name: torch.empty(num_slots, spec.rows, spec.cols, dtype=dtype, device=device)
            for spec in self.cell_tensors
        }

    def cell(self, name: str, slot: int) -> torch.Tensor:
        """The view (rows, cols) of one cell tensor in a slot."""
        return self._tensors[name][slot]

    def matrix(self, name: str, first_slot: int, num_cells: int) -> torch.Tensor:
        """The view (num_cells * rows, cols) of adjacent slots, contiguous."""
        assert 0 <= first_slot <= self.num_slots - num_cells, (first_slot, num_cells, self.num_slots)
        return self._tensors[name][first_slot : first_slot + num_cells].flatten(0, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


class PlacedCells(NamedTuple):
    """One rank's arena, and the plan that says which cells lie where in it."""

    plan: ReshardPlan
    arena: WeightArena

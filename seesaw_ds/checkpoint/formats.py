"""The three formats behind one interface each for reading and writing, and how a folder's format is recognised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from seesaw_ds.checkpoint.cells import CellsReader, CellsWriter
from seesaw_ds.checkpoint.hf import HFReader, HFWriter
from seesaw_ds.checkpoint.manifest import MANIFEST, read_manifest
from seesaw_ds.checkpoint.megatron import CONFIG, MegatronReader, MegatronWriter
from seesaw_ds.checkpoint.parts import Unit, Weight
from seesaw_ds.errors import UserError
from seesaw_ds.shapes import ModelShape

FORMATS = ("hf", "megatron", "cells")


class Reader(Protocol):
    """Reads a checkpoint weight by weight; safe to use from several threads. `files` hold the weights."""

    files: tuple[Path, ...]

    def dtype(self, weight: Weight) -> torch.dtype:
        """The dtype in which `read` returns it."""

    def read(self, weight: Weight) -> torch.Tensor:
        """The whole weight in the fused form: a new contiguous CPU tensor."""

    def close(self) -> None:
        """Close the files."""


class Writer(Protocol):
    """Writes a checkpoint unit by unit, in any order and from several threads; units written before may be left out."""

    total_bytes: int

    def write(self, unit: Unit, tensors: Iterable[tuple[Weight, torch.Tensor]]) -> Any:
        """Write the unit's weights as they come, durably; returns a JSON value that `finish` wants back."""

    def finish(self, records: dict[str, Any]) -> None:
        """Write what comes last; `records` are what `write` returned, by unit name, those of earlier runs included."""

    def close(self) -> None:
        """Close the files."""


def detect_format(folder: Path) -> str:
    """The format of the checkpoint in `folder`. Raises UserError when there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; a checkpoint is one")
    if (folder / MANIFEST).is_file():
        made = read_manifest(folder).format
        if made in FORMATS:
            return made
    if (folder / CONFIG).is_file():
        return _megatron_backend(folder)
    if any(folder.glob("*.safetensors")):
        return "hf"
    raise UserError(
        f"{folder}: no checkpoint that can be read: neither *.safetensors (Hugging Face, cells) nor {CONFIG} "
        "(a Megatron-core torch_dist checkpoint; give the folder of one iteration, iter_...)"
    )


def _megatron_backend(folder: Path) -> str:
    try:
        backend = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / CONFIG}: does not name the backend of a Megatron-core checkpoint") from None
    if backend != "torch_dist":
        raise UserError(f"{folder}: sharded_backend={backend!r}: only torch_dist is read; save it again in that format")
    return "megatron"


def open_reader(folder: Path, format: str, shape: ModelShape) -> Reader:
    """A reader of the weights in `folder`. Raises UserError for what is missing, unknown or of the wrong shape."""
    readers: dict[str, Callable[[Path, ModelShape], Reader]] = {
        "hf": HFReader,
        "megatron": MegatronReader,
        "cells": CellsReader,
    }
    return readers[format](folder, shape)


def make_writer(
    folder: Path,
    format: str,
    shape: ModelShape,
    dtype_of: Callable[[Weight], torch.dtype],
    num_cells: int | None,
) -> Writer:
    """A writer into `folder`, which exists; `num_cells` is for the cells format."""
    if format == "hf":
        return HFWriter(folder, shape, dtype_of)
    if format == "megatron":
        return MegatronWriter(folder, shape, dtype_of)
    assert num_cells is not None
    return CellsWriter(folder, shape, dtype_of, num_cells)

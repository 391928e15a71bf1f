"""Hugging Face folders: safetensors under the names of `transformers`, with an index when there are several."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from seesaw_ds.checkpoint.fusing import fuse_qkv, split_qkv
from seesaw_ds.checkpoint.parts import HFPlace, Unit, Weight, units_of
from seesaw_ds.checkpoint.tensor_files import OpenFiles, SafetensorsFolder, TensorSpec, read_index, read_tensor
from seesaw_ds.errors import UserError
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.tensors import expected_tensors
from seesaw_ds.shapes import ModelShape

LARGEST_FILE = 5 * 10**9
INDEX = "model.safetensors.index.json"


class HFReader:
    """Reads weights from a Hugging Face folder.

    Raises UserError for a tensor that is missing, of the wrong shape or dtype, or not known for the architecture.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._num_kv_heads = shape.num_kv_heads
        self.files = tuple(sorted({entry.path for entry in check_checkpoint(folder, shape).values()}))
        self._stored = read_index(self.files)
        self._files = OpenFiles(self.files, os.O_RDONLY)

    def dtype(self, weight: Weight) -> torch.dtype:
        """Its dtype in the file. Raises UserError when parts that are fused differ."""
        dtypes = {place.tensor: self._stored[place.tensor].dtype for place in weight.hf}
        if len(set(dtypes.values())) > 1:
            raise UserError(f"{', '.join(dtypes)}: have different dtypes; give one with --dtype")
        return next(iter(dtypes.values()))

    def read(self, weight: Weight) -> torch.Tensor:
        """A new tensor in the fused form, in the file's dtype."""
        parts = [self._read(place) for place in weight.hf]
        return parts[0] if len(parts) == 1 else fuse_qkv(parts, self._num_kv_heads)

    def _read(self, place: HFPlace) -> torch.Tensor:
        stored = self._stored[place.tensor]
        offset = stored.offset + _first_element(place) * stored.dtype.itemsize
        return read_tensor(self._files[stored.path], stored.dtype, place.size, offset)

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _first_element(place: HFPlace) -> int:
    return place.first_row * math.prod(place.size[1:])


class HFWriter:
    """Writes weights as a Hugging Face folder."""

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        dtype_of: Callable[[Weight], torch.dtype],
        largest_file: int = LARGEST_FILE,
    ) -> None:
        self._folder = folder
        self._num_kv_heads = shape.num_kv_heads
        sizes = expected_tensors(shape)
        groups = []
        for unit in units_of(shape):
            dtypes: dict[str, torch.dtype] = {}
            for weight in unit.weights:
                for place in weight.hf:
                    if dtypes.setdefault(place.tensor, dtype_of(weight)) != dtype_of(weight):
                        raise UserError(f"{place.tensor}: its parts have different dtypes; give one with --dtype")
            groups.append([TensorSpec(name, dtype, sizes[name]) for name, dtype in dtypes.items()])
        self._files = SafetensorsFolder(folder, groups, _file_name, largest_file)
        self.total_bytes = self._files.total_bytes

    def write(self, unit: Unit, tensors: Iterable[tuple[Weight, torch.Tensor]]) -> None:
        """Write the weights of `unit`; they are on the disk when this returns."""
        for weight, tensor in tensors:
            parts: tuple[torch.Tensor, ...] = (tensor,)
            if len(weight.hf) > 1:
                parts = split_qkv(tensor, [place.size[0] for place in weight.hf], self._num_kv_heads)
            for place, part in zip(weight.hf, parts, strict=True):
                self._files.write(place.tensor, part, _first_element(place))
        self._files.sync(place.tensor for weight in unit.weights for place in weight.hf)

    def finish(self, records: dict[str, object]) -> None:
        """Write the index, when there is more than one file."""
        places = self._files.tensors
        if len({place.path for place in places.values()}) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: place.path.name for name, place in places.items()},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

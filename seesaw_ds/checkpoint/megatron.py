"""Megatron-core distributed checkpoints (``torch_dist``), with the names of its GPTModel.

Such a folder is a torch.distributed.checkpoint: ``*.distcp`` files hold chunks of global tensors, each as `torch.save`
writes it, and ``.metadata`` says which chunk is where. The layers' weights are stacked: all layers' linear_qkv are one
tensor of (layers, out, in). A chunk is written as soon as its weight is read, so no more than that is in memory.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from seesaw_ds.checkpoint.megatron_names import LAYERS, NAMES, STATES, Region, check_names, region_of
from seesaw_ds.checkpoint.parts import Unit, Weight, units_of
from seesaw_ds.checkpoint.tensor_files import DTYPES
from seesaw_ds.errors import UserError
from seesaw_ds.layout import Range
from seesaw_ds.shapes import ModelShape

METADATA = ".metadata"
CONFIG = "metadata.json"
COMMON = "common.pt"
CHECKPOINT_VERSION = 3.0
"""Megatron-LM's number for checkpoints whose q, k and v lie KV head by KV head."""


class MegatronReader:
    """Reads weights from a ``torch_dist`` folder, whatever the layout that wrote it.

    ``.metadata`` is a pickle, which can run code: read only checkpoints that are trusted. Vocabularies may be padded;
    the padding is left out. Raises UserError for a weight that is missing, of the wrong shape, or not known.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        check_names(shape)
        self._folder = folder
        self._shape = shape
        self._tensors, self._places = _read_metadata(folder)
        self._stacked = not any(name.startswith(f"{LAYERS}0.") for name in self._tensors)
        self._check()
        expected = {self._region(weight).key for unit in units_of(shape) for weight in unit.weights}
        self.files = tuple(
            sorted({folder / place.relative_path for index, place in self._places.items() if index.fqn in expected})
        )

    def _region(self, weight: Weight) -> Region:
        return region_of(weight, self._shape.num_layers, self._stacked)[0]

    def _check(self) -> None:
        known = set()
        for unit in units_of(self._shape):
            for weight in unit.weights:
                region, size = region_of(weight, self._shape.num_layers, self._stacked)
                known.add(region.key)
                if region.key not in self._tensors:
                    raise UserError(f"{self._folder}: weights missing: {region.key}")
                found = tuple(self._tensors[region.key].size)
                is_vocabulary = weight.size[0] == self._shape.vocab_size and weight.layer is None
                padded = is_vocabulary and found[0] >= size[0] and found[1:] == size[1:]
                if found != size and not padded:
                    raise UserError(f"{self._folder}: {region.key} has shape {found}, config.json asks for {size}")
                if self._tensors[region.key].properties.dtype not in DTYPES.values():
                    raise UserError(f"{self._folder}: {region.key} is not of a dtype that can be converted")
        model = (LAYERS, NAMES["embedding"][0], NAMES["head"][0])
        extra = [name for name in self._tensors if name.startswith(model) and name not in known]
        if extra:
            names = ", ".join(sorted(extra)[:3])
            raise UserError(f"{self._folder}: tensors that {self._shape.architecture} does not have: {names}")

    def dtype(self, weight: Weight) -> torch.dtype:
        """Its dtype in the files."""
        dtype: torch.dtype = self._tensors[self._region(weight).key].properties.dtype
        return dtype

    def read(self, weight: Weight) -> torch.Tensor:
        """A new tensor in the fused form, put together from its chunks; one chunk at a time is in memory."""
        region = self._region(weight)
        whole = torch.empty([part.size for part in region.ranges], dtype=self.dtype(weight))
        missing = whole.numel()
        for chunk in self._tensors[region.key].chunks:
            there = tuple(Range(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            common = tuple(a.intersect(b) for a, b in zip(region.ranges, there, strict=True))
            if all(part.size for part in common):
                stored = self._load(MetadataIndex(region.key, chunk.offsets))
                target = whole[_slices(common, region.ranges)]
                target.copy_(stored[_slices(common, there)])
                missing -= target.numel()
        if missing:
            raise UserError(f"{self._folder}: {region.key} is not whole: {missing} elements are in no chunk")
        return whole.view(weight.size)

    def _load(self, index: MetadataIndex) -> torch.Tensor:
        place = self._places[index]
        if getattr(place, "transform_descriptors", None):
            raise UserError(f"{self._folder}: {index.fqn} is stored compressed, which is not read")
        path = self._folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                tensor: torch.Tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError):
            raise UserError(f"{path}: {index.fqn} is truncated or damaged; fetch it again") from None
        return tensor

    def close(self) -> None:
        """Nothing is held open."""


def _slices(part: Sequence[Range], outer: Sequence[Range]) -> tuple[slice, ...]:
    within = (a.within(b) for a, b in zip(part, outer, strict=True))
    return tuple(slice(*indices) for indices in within)


def _read_metadata(
    folder: Path,
) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, _StorageInfo]]:
    path = folder / METADATA
    try:
        metadata = pickle.loads(path.read_bytes())
        tensors = {
            name: item for name, item in metadata.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)
        }
        return tensors, dict(metadata.storage_data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path}: not the metadata of a torch_dist checkpoint ({error!r})") from None


class MegatronWriter:
    """Writes weights as a ``torch_dist`` folder: one file for each unit, one chunk for each weight."""

    def __init__(self, folder: Path, shape: ModelShape, dtype_of: Callable[[Weight], torch.dtype]) -> None:
        check_names(shape)
        self._folder = folder
        self._shape = shape
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self.total_bytes = 0
        for unit in units_of(shape):
            for weight in unit.weights:
                self._add(weight, dtype_of(weight))

    def _add(self, weight: Weight, dtype: torch.dtype) -> None:
        region, size = region_of(weight, self._shape.num_layers, stacked=True)
        tensor = self._tensors.setdefault(
            region.key, TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), [])
        )
        if tensor.properties.dtype != dtype:
            raise UserError(f"{weight.key}: layers that are stacked differ in dtype; give one with --dtype")
        chunk = ChunkStorageMetadata(_offsets(region), torch.Size(part.size for part in region.ranges))
        tensor.chunks.append(chunk)
        self.total_bytes += chunk.sizes.numel() * dtype.itemsize

    def write(self, unit: Unit, tensors: Iterable[tuple[Weight, torch.Tensor]]) -> list[Any]:
        """Write the weights of `unit`; they are on the disk when this returns.

        Returns per item of the file its name, its offsets in the global tensor (None for an extra state), its first
        byte and its length.
        """
        name = f"__0_{unit.index}.distcp"
        items = []
        with (self._folder / name).open("wb") as file:
            for key, offsets, value in self._items(unit, tensors):
                start = file.tell()
                _save(value, file)
                items.append([key, offsets, start, file.tell() - start])
            file.flush()
            os.fdatasync(file.fileno())
        return [name, items]

    def _items(
        self, unit: Unit, tensors: Iterable[tuple[Weight, torch.Tensor]]
    ) -> Iterator[tuple[str, list[int] | None, object]]:
        for weight, tensor in tensors:
            region, _ = region_of(weight, self._shape.num_layers, stacked=True)
            yield region.key, list(_offsets(region)), tensor.view([part.size for part in region.ranges])
        layer = unit.weights[0].layer
        if layer is not None:
            for module in STATES:
                key = f"{LAYERS}{module}._extra_state/shard_{layer}_{self._shape.num_layers}"
                yield key, None, [None]

    def finish(self, records: dict[str, Any]) -> None:
        """Write what says where everything is; `records` are what `write` returned, by unit name."""
        storage = {}
        items: dict[str, Any] = dict(self._tensors)
        for file_name, written in records.values():
            for key, offsets, start, length in written:
                storage[MetadataIndex(key, offsets)] = _StorageInfo(file_name, start, length)
                items.setdefault(key, BytesStorageMetadata())
        metadata = Metadata(items, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")
        with (self._folder / METADATA).open("wb") as file:
            pickle.dump(metadata, file)
        torch.save({"checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}, self._folder / COMMON)
        config = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self._folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")

    def close(self) -> None:
        """Nothing is held open."""


def _offsets(region: Region) -> torch.Size:
    return torch.Size(part.start for part in region.ranges)


def _save(value: object, file: io.BufferedWriter) -> None:
    """`torch.save` into an open file; an error of the file (a full disk) is raised as itself."""
    guarded = _Guarded(file)
    try:
        torch.save(value, guarded)  # type: ignore[arg-type]  # it needs write and flush alone
    except Exception:
        if guarded.error is not None:
            raise guarded.error from None
        raise
    if guarded.error is not None:
        raise guarded.error


class _Guarded:
    """Keeps the error of a write, which `torch.save` turns into one of its own."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

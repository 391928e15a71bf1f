"""Safetensors files read and written piece by piece with plain reads and writes, so that no file is held in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from seesaw_ds.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The weights that can be converted, by the names that safetensors gives their dtypes."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_CALL = 1 << 30  # Linux moves at most 2 GiB in one call


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    size: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.size) * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """Where a tensor lies; `offset` is in bytes from the start of the file."""

    path: Path
    dtype: torch.dtype
    size: tuple[int, ...]
    offset: int


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous()
    return tensor.flatten().view(torch.uint8).numpy().data


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`."""
    while data:
        written = os.pwrite(fd, data[:_LARGEST_CALL], offset)
        data, offset = data[written:], offset + written


def read_at(fd: int, data: memoryview, offset: int) -> None:
    """Fill `data` from byte `offset` on. Raises UserError when the file ends too early."""
    while data:
        count = os.preadv(fd, [data[:_LARGEST_CALL]], offset)
        if count == 0:
            raise UserError(f"{os.readlink(f'/proc/self/fd/{fd}')}: ended before its last tensor; fetch it again")
        data, offset = data[count:], offset + count


def read_tensor(fd: int, dtype: torch.dtype, size: Sequence[int], offset: int) -> torch.Tensor:
    """A new tensor from the bytes at `offset`. Raises UserError when the file ends before them."""
    tensor = torch.empty(tuple(size), dtype=dtype)
    read_at(fd, tensor_bytes(tensor), offset)
    return tensor


def read_index(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files whose headers are known to be sound.

    Raises UserError for a tensor that is not of a floating dtype of `DTYPES`.
    """
    tensors = {}
    for path in paths:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, item in header.items():
            if item["dtype"] not in DTYPES:
                raise UserError(f"{path}: {name} is {item['dtype']}; only {', '.join(DTYPES)} can be converted")
            start = 8 + header_bytes + item["data_offsets"][0]
            tensors[name] = StoredTensor(path, DTYPES[item["dtype"]], tuple(item["shape"]), start)
    return tensors


class OpenFiles:
    """Descriptors of the files of one folder, each opened once; safe to use from several threads."""

    def __init__(self, paths: Iterable[Path], flags: int) -> None:
        self._fds: dict[Path, int] = {}
        try:
            for path in sorted(set(paths)):
                self._fds[path] = os.open(path, flags, 0o666)
        except OSError as error:
            self.close()
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from None

    def __getitem__(self, path: Path) -> int:
        return self._fds[path]

    def close(self) -> None:
        """Close every file."""
        while self._fds:
            os.close(self._fds.popitem()[1])


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A safetensors file whose header, and so the place of every tensor, is known before any tensor."""

    path: Path
    header: bytes
    tensors: tuple[StoredTensor, ...]
    names: tuple[str, ...]

    @classmethod
    def plan(cls, path: Path, specs: Sequence[TensorSpec], align: int) -> PlannedFile:
        """Lay `specs` out in order; the data starts at a multiple of `align` bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            entries[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.size),
                "data_offsets": [end, end + spec.nbytes],
            }
            end += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text = text.ljust(-(-(8 + len(text)) // align) * align - 8)
        offset = 8 + len(text)
        tensors = []
        for spec in specs:
            tensors.append(StoredTensor(path, spec.dtype, spec.size, offset))
            offset += spec.nbytes
        names = tuple(spec.name for spec in specs)
        return cls(path, len(text).to_bytes(8, "little") + text, tuple(tensors), names)


class SafetensorsFolder:
    """Writes tensors, in any order and from several threads, to their planned places in safetensors files."""

    def __init__(
        self,
        folder: Path,
        groups: Sequence[Sequence[TensorSpec]],
        file_name: Callable[[int, int], str],
        largest_file: int,
        align: int = 8,
    ) -> None:
        """Plan files in `folder`: whole `groups` in order, together at most `largest_file` bytes where they can be.

        `file_name` gives the name of file i of n. Files that exist keep their contents.
        """
        shards = _into_shards(groups, largest_file)
        files = [PlannedFile.plan(folder / file_name(i, len(shards)), specs, align) for i, specs in enumerate(shards)]
        self._files = OpenFiles((file.path for file in files), os.O_RDWR | os.O_CREAT)
        self._tensors = {name: tensor for file in files for name, tensor in zip(file.names, file.tensors, strict=True)}
        self.total_bytes = sum(spec.nbytes for group in groups for spec in group)
        for file in files:
            write_at(self._files[file.path], memoryview(file.header), 0)

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name, in the order of the files."""
        return dict(self._tensors)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write `tensor`, contiguous, into tensor `name` from element `start` on."""
        place = self._tensors[name]
        assert tensor.dtype == place.dtype and start + tensor.numel() <= math.prod(place.size), name
        write_at(self._files[place.path], tensor_bytes(tensor), place.offset + start * place.dtype.itemsize)

    def sync(self, names: Iterable[str]) -> None:
        """Make the files of these tensors survive power loss as they are now."""
        for path in {self._tensors[name].path for name in names}:
            os.fdatasync(self._files[path])

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _into_shards(groups: Sequence[Sequence[TensorSpec]], largest_file: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = []
    filled = largest_file
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if filled + size > largest_file or not shards:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    return shards

"""A Hugging Face folder's safetensors: which file holds which tensor, checked before anything is read."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seesaw_ds.errors import UserError
from seesaw_ds.model.tensors import HEAD, expected_tensors
from seesaw_ds.shapes import ModelShape

_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
}
_FLOATING = ("F64", "F32", "F16", "BF16")
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is: its file, its shape and the dtype name that safetensors gives it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def index_checkpoint(folder: str | Path) -> dict[str, TensorEntry]:
    """Read the headers of every safetensors file of `folder`, and check them against the files' sizes.

    Raises UserError that names the file when one is missing, unreadable or truncated. Tensor data is not read.
    """
    folder = Path(folder)
    paths = _files(folder)
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        for name, entry in _read_header(path).items():
            if name in entries:
                raise UserError(
                    f"model={str(folder)!r}: tensor {name!r} is in both {entries[name].path.name} and {path.name}"
                )
            entries[name] = entry
    return entries


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise UserError(f"model={str(folder)!r}: {index.name} cannot be read ({error!r})") from None
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"model={str(folder)!r}: no *.safetensors file there; load_format=auto reads safetensors only "
                "(load_format=dummy runs with random weights)"
            )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"model={str(folder)!r}: missing {', '.join(missing)}, which {index.name} names")
    return paths


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise UserError(f"{path}: truncated: {size} bytes is too short for a safetensors file; fetch it again")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{path}: not a safetensors file, or truncated within its header; fetch it again")
            header: Any = json.loads(file.read(header_bytes))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {}
    end = 0
    for name, item in header.items():
        entries[name], stop = _read_entry(path, name, item)
        end = max(end, stop)
    if 8 + header_bytes + end > size:
        raise UserError(
            f"{path}: truncated: {size} bytes where its header needs {8 + header_bytes + end}; fetch it again"
        )
    return entries


def _read_entry(path: Path, name: str, item: Any) -> tuple[TensorEntry, int]:
    """One tensor of a header, and where its bytes end, counted from the header's end."""
    try:
        entry = TensorEntry(path, tuple(map(int, item["shape"])), str(item["dtype"]))
        start, stop = map(int, item["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a safetensors file: its header describes no tensor at {name!r}") from None
    expected = math.prod(entry.shape) * _DTYPE_BYTES.get(entry.dtype, 0)
    if entry.dtype in _DTYPE_BYTES and stop - start != expected:
        raise UserError(f"{path}: tensor {name!r} has {stop - start} bytes where its shape needs {expected}")
    return entry, stop


def check_checkpoint(folder: str | Path, shape: ModelShape) -> dict[str, TensorEntry]:
    """Index `folder`; its tensors must be those of `shape`, in their sizes. Raises UserError naming what is not."""
    entries = index_checkpoint(folder)
    expected = expected_tensors(shape)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise UserError(f"model={str(folder)!r}: weights missing: {_first_names(missing)}")
    extra = [name for name in entries if name not in expected and not _is_derived(name, shape)]
    if extra:
        raise UserError(
            f"model={str(folder)!r}: weights that config.json has no place for: {_first_names(extra)}; "
            f"they may be of another architecture than {shape.architecture}"
        )
    for name, size in expected.items():
        if entries[name].shape != size:
            raise UserError(
                f"model={str(folder)!r}: {name} has shape {entries[name].shape}, config.json asks for {size}"
            )
        if entries[name].dtype not in _FLOATING:
            raise UserError(
                f"model={str(folder)!r}: {name} is {entries[name].dtype}; only {', '.join(_FLOATING)} are read"
            )
    return entries


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_derived(name: str, shape: ModelShape) -> bool:
    """Whether other tensors and the config already say what this one holds."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and shape.tie_word_embeddings)

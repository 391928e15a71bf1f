"""Conversion of a checkpoint from one format into another, in one pass that holds a few weights at a time.

Weights are read, cast, hashed and written by a few threads, each a unit (a layer) at a time; what is done stands in
the journal of the unfinished folder, so that the same conversion, begun again, goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from seesaw_ds.checkpoint.cell_layout import choose_num_cells
from seesaw_ds.checkpoint.companions import copy_companions
from seesaw_ds.checkpoint.formats import Reader, Writer, detect_format, make_writer, open_reader
from seesaw_ds.checkpoint.journal import ConversionJournal, partial_folder
from seesaw_ds.checkpoint.manifest import ConversionManifest, SourceFile
from seesaw_ds.checkpoint.parts import Unit, Weight, units_of
from seesaw_ds.checkpoint.tensor_files import tensor_bytes
from seesaw_ds.errors import UserError
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape, model_shape, read_hf_config

_HASH_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert. `dtype` (a name, or None to keep) is what weights become; `jobs` are threads.

    `max_tp` is T of the cells format, None for the usual one; it is for that format alone.
    """

    src: Path
    dst: Path
    to: str
    max_tp: int | None = None
    dtype: str | None = None
    verify: bool = False
    overwrite: bool = False
    jobs: int = 1
    quiet: bool = False


def convert(conversion: Conversion) -> ConversionManifest:
    """Convert, and return the manifest that stands in the finished folder.

    Raises UserError for a source that cannot be converted, for a destination that exists (unless `overwrite`), for a
    full disk, and for weights that do not read back as written (with `verify`). Except in the first two cases the
    unfinished folder stays, for the same call to go on with.
    """
    source_format = detect_format(conversion.src)
    _check_destination(conversion)
    shape = _read_shape(conversion.src)
    if conversion.dtype is not None and conversion.dtype not in DTYPE_BYTES:
        raise UserError(f"--dtype {conversion.dtype}: must be one of {', '.join(DTYPE_BYTES)}")
    if conversion.max_tp is not None and conversion.to != "cells":
        raise UserError(f"--max-tp {conversion.max_tp}: only the cells format is cut; leave it out for {conversion.to}")
    num_cells = choose_num_cells(shape, conversion.max_tp) if conversion.to == "cells" else None
    manifest = ConversionManifest(
        conversion.to, str(conversion.src), source_format, num_cells=num_cells, dtype=conversion.dtype
    )
    with (
        _explain_os_errors(partial_folder(conversion.dst)),
        contextlib.closing(open_reader(conversion.src, source_format, shape)) as reader,
    ):
        settings = _settings(manifest, reader)
        conversion.dst.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(ConversionJournal(conversion.dst, settings, restart=conversion.overwrite)) as journal:
            return _Converter(conversion, shape, reader, journal, manifest).run()


def _check_destination(conversion: Conversion) -> None:
    src, dst = conversion.src.resolve(), conversion.dst.resolve()
    if src == dst or src == partial_folder(dst):
        raise UserError(f"{conversion.dst}: source and destination are the same; give another destination")
    if not os.path.lexists(dst):
        return
    if not conversion.overwrite:
        raise UserError(f"{conversion.dst}: exists already; give another destination, or --overwrite to replace it")
    if not dst.is_dir():
        raise UserError(f"{conversion.dst}: is not a folder; remove it, or give another destination")
    if any(dst.iterdir()):
        try:
            detect_format(dst)
        except UserError:
            raise UserError(
                f"{conversion.dst}: --overwrite replaces checkpoints only, and this holds none; remove it yourself"
            ) from None


def _read_shape(folder: Path) -> ModelShape:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json there; copy config.json and the tokenizer's files of the model's Hugging Face "
            "folder into it"
        )
    return model_shape(read_hf_config(folder))


def _settings(manifest: ConversionManifest, reader: Reader) -> dict[str, Any]:
    """What must be the same for a conversion to be gone on with."""
    files = [(path, path.stat()) for path in reader.files]
    return {
        "to": manifest.format,
        "from": manifest.source_format,
        "max_tp": manifest.num_cells,
        "dtype": manifest.dtype,
        "version": manifest.version,
        "source files": [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in files],
    }


@contextlib.contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
        raise UserError(
            f"{folder}: the disk is full; what is done stays there: make room and run the same command again, "
            "it goes on where it stopped (or delete the folder)"
        ) from None


class _Converter:
    """One conversion into the journal's folder, step by step."""

    def __init__(
        self,
        conversion: Conversion,
        shape: ModelShape,
        reader: Reader,
        journal: ConversionJournal,
        manifest: ConversionManifest,
    ) -> None:
        self._conversion = conversion
        self._shape = shape
        self._units = units_of(shape)
        self._reader = reader
        self._journal = journal
        self._manifest = manifest
        self._dtype: torch.dtype | None = getattr(torch, conversion.dtype) if conversion.dtype else None

    def run(self) -> ConversionManifest:
        writer = make_writer(
            self._journal.folder, self._conversion.to, self._shape, self._dtype_of, self._manifest.num_cells
        )
        with contextlib.closing(writer):
            self._write_units(writer)
            self._hash_source()
            units = self._journal.done("unit")
            writer.finish({name: record["written"] for name, record in units.items()})
        for unit in self._units:
            self._manifest.weights.update(units[unit.name]["crc32"])
        files = self._journal.done("file")
        for path in self._reader.files:
            self._manifest.source_files[path.name] = SourceFile(files[path.name]["bytes"], files[path.name]["sha256"])
        copy_companions(self._conversion.src, self._journal.folder, self._conversion.dtype)
        self._manifest.write(self._journal.folder)
        if self._conversion.verify:
            self._verify()
        self._journal.publish(self._conversion.dst)
        return self._manifest

    def _dtype_of(self, weight: Weight) -> torch.dtype:
        return self._dtype or self._reader.dtype(weight)

    def _bytes(self, unit: Unit) -> int:
        return sum(math.prod(weight.size) * self._dtype_of(weight).itemsize for weight in unit.weights)

    def _write_units(self, writer: Writer) -> None:
        done = self._journal.done("unit")
        left = [unit for unit in self._units if unit.name not in done]
        needed, free = sum(map(self._bytes, left)), shutil.disk_usage(self._journal.folder).free
        if needed > free:
            raise UserError(
                f"{self._journal.folder}: {needed / 1e9:.2f} GB are still to be written, and the disk has "
                f"{free / 1e9:.2f} GB free; make room and run the same command again"
            )
        with _Progress("convert", writer.total_bytes, self._conversion) as progress:
            progress.advance(sum(self._bytes(unit) for unit in self._units if unit.name in done))
            progress.run(lambda unit: self._write_unit(writer, unit, progress.advance), left)

    def _write_unit(self, writer: Writer, unit: Unit, advance: Callable[[int], None]) -> None:
        checksums: dict[str, str] = {}

        def tensors() -> Iterator[tuple[Weight, torch.Tensor]]:
            for weight in unit.weights:
                tensor = self._reader.read(weight).to(self._dtype_of(weight))
                checksums[weight.key] = _checksum(tensor)
                yield weight, tensor
                advance(tensor.nbytes)

        written = writer.write(unit, tensors())
        self._journal.append({"kind": "unit", "name": unit.name, "crc32": checksums, "written": written})

    def _hash_source(self) -> None:
        done = self._journal.done("file")
        left = [path for path in self._reader.files if path.name not in done]
        with _Progress("hash source", sum(path.stat().st_size for path in left), self._conversion) as progress:

            def hash_file(path: Path) -> None:
                record = {"bytes": path.stat().st_size, "sha256": _file_checksum(path, progress.advance)}
                self._journal.append({"kind": "file", "name": path.name} | record)

            progress.run(hash_file, left)

    def _verify(self) -> None:
        """Read back everything from the folder with the format's own reader."""
        folder = self._journal.folder
        wrong: list[str] = []
        with contextlib.closing(open_reader(folder, self._conversion.to, self._shape)) as reader:

            def check(unit: Unit) -> None:
                for weight in unit.weights:
                    tensor = reader.read(weight)
                    if _checksum(tensor) != self._manifest.weights[weight.key]:
                        wrong.append(weight.key)
                    progress.advance(tensor.nbytes)

            with _Progress("verify", sum(map(self._bytes, self._units)), self._conversion) as progress:
                progress.run(check, self._units)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"{folder}: does not read back as it was written: {', '.join(sorted(wrong)[:3])}{more}; the disk or "
                "the memory is faulty: delete the folder and convert again"
            )


class _Progress:
    """A bar of bytes and GB/s, and the threads whose work it shows."""

    def __init__(self, name: str, total_bytes: int, conversion: Conversion) -> None:
        self._jobs = conversion.jobs
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total_bytes, desc=name, unit="B", unit_scale=True, disable=conversion.quiet, dynamic_ncols=True
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._bar.update(num_bytes)

    def run(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call `work` with every item; after an error or an interrupt nothing more is begun."""
        with ThreadPoolExecutor(self._jobs, thread_name_prefix="convert") as pool:
            try:
                for future in as_completed([pool.submit(work, item) for item in items]):
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _checksum(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


def _file_checksum(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()

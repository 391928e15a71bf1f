"""Matrices of weight files read straight into the memory that the engine keeps them in, on several threads.

On CPU rows go from the page cache into their place in one copy. Matrices that are kept transposed are read in blocks
that stay in the cache and are turned from there::

    file (rows, columns)  ->  block  ->  block, transposed  ->  targets (columns, rows), one for each cell

To a GPU everything goes through two page-locked buffers a thread, filled in turn, and is turned and cast there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch
from deepspeed.accelerator import get_accelerator

from seesaw_ds.checkpoint.tensor_files import OpenFiles, StoredTensor, read_at, read_tensor, tensor_bytes
from seesaw_ds.checkpoint.transpose import transpose
from seesaw_ds.layout import Range
from seesaw_ds.parallel import device as devices

PIECE_BYTES = 8 << 20
"""The largest piece: small enough that threads end together, large enough that a call's cost does not count."""
BLOCK_BYTES = 3 << 20
"""The largest block that is turned at once: it and its transpose stay in the cache, beside those of other threads."""
BLOCK_ROWS = Range(96, 480)
"""The fewest rows of such a block, if the matrix has them, and the most: long runs to write, and few parts to read."""
LARGEST_GAP = 16 << 10
"""Bytes between the wanted parts of two rows up to which reading them too costs less than a call for each part."""
MAX_THREADS = 8


class Piece(NamedTuple):
    """A block of a stored matrix, at most `PIECE_BYTES`, and where it goes, in the run's dtype and on its device.

    Whole rows go to one target (rows, columns), contiguous. When `is_transposed`, the targets are views
    (some of the columns, rows) that get the transpose, one below the other.
    """

    stored: StoredTensor
    rows: Range
    columns: Range
    targets: Sequence[torch.Tensor]
    is_transposed: bool

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the block."""
        return self.rows.size, self.columns.size

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.rows.size * self.columns.size * self.stored.dtype.itemsize


def row_pieces(stored: StoredTensor, first_row: int, target: torch.Tensor) -> Iterator[Piece]:
    """Rows of `stored` from `first_row` on into `target` (groups, rows, columns), one group after the other."""
    if target.is_contiguous():
        target = target.flatten(0, 1).unsqueeze(0)
    columns = Range(0, stored.size[1])
    rows_per_piece = max(1, PIECE_BYTES // (columns.size * stored.dtype.itemsize))
    for group in target:
        for part in torch.split(group, rows_per_piece):
            yield Piece(stored, Range(first_row, first_row + part.shape[0]), columns, [part], False)
            first_row += part.shape[0]


def transposed_pieces(stored: StoredTensor, first_column: int, targets: Iterable[torch.Tensor]) -> Iterator[Piece]:
    """Columns of `stored` from `first_column` on into the rows of `targets` (columns, rows), one after the other."""
    columns_per_piece = BLOCK_BYTES // (BLOCK_ROWS.start * stored.dtype.itemsize)
    band: list[torch.Tensor] = []
    bands = [band]
    for part in (part for target in targets for part in torch.split(target, columns_per_piece)):
        if band and sum(map(len, band)) + len(part) > columns_per_piece:
            band = []
            bands.append(band)
        band.append(part)
    for band in bands:
        columns = Range(first_column, first_column + sum(map(len, band)))
        first_column = columns.stop
        num_rows = _rows_of_a_block(columns.size * stored.dtype.itemsize)
        for start in range(0, stored.size[0], num_rows):
            rows = Range(start, min(start + num_rows, stored.size[0]))
            yield Piece(stored, rows, columns, [part[:, rows.start : rows.stop] for part in band], True)


def _rows_of_a_block(row_bytes: int) -> int:
    """Whole cache lines to write (32 elements of 2 bytes); an odd number, or columns would share few cache sets."""
    lines = min(max(BLOCK_BYTES // row_bytes, BLOCK_ROWS.start), BLOCK_ROWS.stop) // 32
    return 32 * (lines - 1 + lines % 2)


def read_rows(stored: StoredTensor, rows: Range, dtype: torch.dtype) -> torch.Tensor:
    """A new CPU tensor (rows, columns) in `dtype`."""
    target = torch.empty((rows.size, stored.size[1]), dtype=dtype)
    read_groups([row_pieces(stored, rows.start, target.unsqueeze(0))], lambda done, total: None)
    return target


def read_whole(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """A new CPU tensor of the stored shape in `dtype`, read by the calling thread."""
    with contextlib.closing(OpenFiles([stored.path], os.O_RDONLY)) as files:
        return read_tensor(files[stored.path], stored.dtype, stored.size, stored.offset).to(dtype)


def read_groups(groups: Iterable[Iterable[Piece]], on_progress: Callable[[int, int], None]) -> None:
    """Read every piece; all targets are on one device, and complete when this returns.

    `on_progress` gets (groups done, groups in all) after each group. Raises UserError when a file ends too early.
    """
    found = [list(group) for group in groups]
    pieces = [piece for group in found for piece in group]
    if not pieces:
        return
    num_threads = min(MAX_THREADS, len(pieces), len(os.sched_getaffinity(0)))
    with _Files(pieces) as files, ThreadPoolExecutor(num_threads) as threads:
        readers = _Readers([_reader(files, pieces[0].targets[0].device) for _ in range(num_threads)])
        futures = [[threads.submit(readers.read, batch) for batch in _batches(group)] for group in found]
        try:
            for done, group in enumerate(futures, start=1):
                for future in group:
                    future.result()
                on_progress(done, len(found))
            readers.finish()
        finally:
            threads.shutdown(cancel_futures=True)


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbouring pieces that are together about as large as one can be: experts have many small ones."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        batch.append(piece)
        num_bytes += piece.nbytes
        if num_bytes >= PIECE_BYTES // 2:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _Files:
    """The files of `pieces`, opened."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._fds = OpenFiles({piece.stored.path for piece in pieces}, os.O_RDONLY)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._fds.close()

    def read(self, piece: Piece, block: torch.Tensor) -> None:
        """Read `piece` into `block`, contiguous on CPU in the stored dtype."""
        stored = piece.stored
        fd = self._fds[stored.path]
        item_bytes = stored.dtype.itemsize
        row_bytes, part_bytes = stored.size[1] * item_bytes, piece.columns.size * item_bytes
        offset = stored.offset + piece.rows.start * row_bytes + piece.columns.start * item_bytes
        data = tensor_bytes(block)
        if part_bytes == row_bytes:
            read_at(fd, data, offset)
            return
        parts = [data[start : start + part_bytes] for start in range(0, len(data), part_bytes)]
        if row_bytes - part_bytes <= LARGEST_GAP and _read_parts(fd, parts, row_bytes - part_bytes, offset):
            return
        for index, part in enumerate(parts):
            read_at(fd, part, offset + index * row_bytes)


def _read_parts(fd: int, parts: Sequence[memoryview], gap_bytes: int, offset: int) -> bool:
    """Fill `parts`, which lie in the file `gap_bytes` apart, by one call; False when it came back early."""
    gap = memoryview(bytearray(gap_bytes))
    buffers = [buffer for part in parts for buffer in (part, gap)][:-1]
    return os.preadv(fd, buffers, offset) == sum(map(len, buffers))


class _Reader(Protocol):
    """Reads one piece at a time, with buffers of its own."""

    def read(self, piece: Piece) -> None:
        """Read `piece` into its target, or queue the end of it on a stream."""

    def finish(self) -> None:
        """Wait for what is queued, and give back memory."""


def _reader(files: _Files, device: torch.device) -> _Reader:
    return StagedReader(files, device) if devices.is_cuda(device) else DirectReader(files)


class _Readers:
    """Lends a reader to each thread for one batch."""

    def __init__(self, readers: list[_Reader]) -> None:
        self._all = readers
        self._idle: SimpleQueue[_Reader] = SimpleQueue()
        for reader in readers:
            self._idle.put(reader)

    def read(self, batch: Iterable[Piece]) -> None:
        reader = self._idle.get()
        try:
            for piece in batch:
                reader.read(piece)
        finally:
            self._idle.put(reader)

    def finish(self) -> None:
        for reader in self._all:
            reader.finish()


class DirectReader:
    """Reads into CPU memory."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, piece: Piece) -> None:
        """Read, turn and cast; complete when it returns."""
        if not piece.is_transposed and piece.targets[0].dtype == piece.stored.dtype:
            self._files.read(piece, piece.targets[0])
            return
        if not self._scratch.numel():
            _keep_freed_memory(2 * PIECE_BYTES)
            self._scratch = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        block = self._scratch[: piece.nbytes].view(piece.stored.dtype).view(piece.size)
        self._files.read(piece, block)
        if piece.is_transposed:
            transpose(block, piece.targets)
        else:
            piece.targets[0].copy_(block)

    def finish(self) -> None:
        """Nothing is queued on CPU."""


def _keep_freed_memory(num_bytes: int) -> None:
    """Have the C library reuse freed blocks of up to `num_bytes`, at most 32 MiB, in place of unmapping each.

    glibc takes the largest mapped block freed so far for its threshold. Else every pass over a new block would be
    charged with the kernel's first touch of its pages.
    """
    torch.empty(num_bytes, dtype=torch.uint8)  # freed at once


class StagedReader:
    """Reads into device memory, on a stream of its own: one buffer is filled while the other is copied."""

    def __init__(self, files: _Files, device: torch.device) -> None:
        self._files = files
        self._device = device
        self._stream = devices.new_stream(device)
        is_pinned = devices.is_cuda(device)
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(2)]
        self._copied: list[devices.Event | None] = [None, None]

    def read(self, piece: Piece) -> None:
        """Fill a buffer, and queue its copy to the device, where it is turned and cast."""
        self._buffers.reverse()
        self._copied.reverse()
        if self._copied[0] is not None:
            self._copied[0].synchronize()
        block = self._buffers[0][: piece.nbytes].view(piece.stored.dtype).view(piece.size)
        self._files.read(piece, block)
        with devices.on_stream(self._stream):
            arrived = block.to(self._device, non_blocking=True)
            parts: Sequence[torch.Tensor] = [arrived]
            if piece.is_transposed:
                parts = torch.split(arrived.t(), [len(target) for target in piece.targets])
            for target, part in zip(piece.targets, parts, strict=True):
                target.copy_(part)
            self._copied[0] = devices.record_event(self._device)

    def finish(self) -> None:
        """Wait for the copies, and give back the device memory that they passed through."""
        if self._stream is not None:
            self._stream.synchronize()
            get_accelerator().empty_cache()

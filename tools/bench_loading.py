"""How fast weights load, against a plain read of the same files.

    python tools/bench_loading.py models/tiny --layouts "P2->T2" --runs 5

Every rank is a process that fills its arena through `load_layers`, all at once, from the page cache. A plain read is
`os.preadv` of every weight file into memory, from as many threads as all ranks together use, in one process. Both
write to memory that was written to before, so that neither is charged for the kernel's first touch of a page. Each
run has one of each, in turn; GB/s are medians, and the share is the median of the runs' shares. Without `--layouts`
there is one rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from seesaw_ds.checkpoint.cell_layout import is_cells_folder
from seesaw_ds.checkpoint.reading import MAX_THREADS, PIECE_BYTES
from seesaw_ds.checkpoint.source import CellsSource, SafetensorsSource
from seesaw_ds.checkpoint.tensor_files import tensor_bytes
from seesaw_ds.layout import LayoutPair
from seesaw_ds.model.build import load_layers
from seesaw_ds.model.checkpoint import check_checkpoint, index_checkpoint
from seesaw_ds.model.weights import WeightSource, cell_tensors
from seesaw_ds.parallel import device as devices
from seesaw_ds.reshard.arena import PlacedCells, WeightArena
from seesaw_ds.reshard.plan import plan_reshard
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

TIMEOUT_SECONDS = 600


def open_source(folder: Path, shape: ModelShape, dtype: torch.dtype) -> WeightSource:
    """The source that the engine would choose."""
    if is_cells_folder(folder):
        return CellsSource(folder, shape, dtype)
    return SafetensorsSource(shape, check_checkpoint(folder, shape), dtype)


def run_rank(folder: Path, layouts: str, rank: int, runs: int, barrier: Barrier) -> None:
    """Load this rank's cells `runs` times, each time between two barriers."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    devices.set_device(device)
    shape = model_shape(read_hf_config(folder))
    pair = LayoutPair.parse(layouts)
    plan = plan_reshard(pair, shape.num_layers)
    dtype = getattr(torch, shape.dtype)
    arena = WeightArena(cell_tensors(shape, pair.cells_per_layer), plan.num_slots[rank], dtype, device)
    for spec in arena.cell_tensors:
        arena.matrix(spec.name, 0, arena.num_slots).zero_()
    devices.synchronize_stream(device)
    source = open_source(folder, shape, dtype)
    for _ in range(runs):
        barrier.wait(TIMEOUT_SECONDS)
        load_layers(PlacedCells(plan, arena), rank, source, None, lambda done, total: None)
        barrier.wait(TIMEOUT_SECONDS)


def plain_read(paths: Sequence[Path], buffer: torch.Tensor, num_threads: int) -> float:
    """Seconds to read `paths` one after the other into `buffer`, (bytes,) uint8 on CPU, on `num_threads` threads."""
    data = tensor_bytes(buffer)
    parts = []
    end = 0
    for path in paths:
        size = path.stat().st_size
        parts += [(path, end + start, start, min(PIECE_BYTES, size - start)) for start in range(0, size, PIECE_BYTES)]
        end += size
    fds = {path: os.open(path, os.O_RDONLY) for path in paths}

    def read(part: tuple[Path, int, int, int]) -> None:
        path, place, offset, num_bytes = part
        count = os.preadv(fds[path], [data[place : place + num_bytes]], offset)
        assert count == num_bytes, (path, offset, count)

    started = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(read, parts))
    seconds = time.perf_counter() - started
    for fd in fds.values():
        os.close(fd)
    return seconds


def measure(folder: Path, layouts: str, runs: int) -> dict[str, float]:
    """GB/s of a plain read and of loading `folder` with a rank for each place of `layouts`, and their ratio."""
    pair = LayoutPair.parse(layouts)
    num_ranks = pair.replica_size
    paths = sorted({entry.path for entry in index_checkpoint(folder).values()})
    num_bytes = sum(path.stat().st_size for path in paths)
    shape = model_shape(read_hf_config(folder))
    itemsize = getattr(torch, shape.dtype).itemsize
    cell_bytes = shape.num_layers * sum(spec.numel for spec in cell_tensors(shape, 1)) * itemsize
    num_threads = num_ranks * min(MAX_THREADS, len(os.sched_getaffinity(0)))
    buffer = torch.zeros(num_bytes, dtype=torch.uint8)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(num_ranks + 1)
    arguments = [(folder, layouts, rank, runs + 1, barrier) for rank in range(num_ranks)]
    ranks = [spawn.Process(target=run_rank, args=each, daemon=True) for each in arguments]
    for process in ranks:
        process.start()
    plain, load = [], []
    for _ in range(runs + 1):
        plain.append(num_bytes / plain_read(paths, buffer, num_threads) / 1e9)
        barrier.wait(TIMEOUT_SECONDS)
        started = time.perf_counter()
        barrier.wait(TIMEOUT_SECONDS)
        load.append(cell_bytes / (time.perf_counter() - started) / 1e9)
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    plain, load = plain[1:], load[1:]  # the first run fills the page cache
    shares = [loaded / read for loaded, read in zip(load, plain, strict=True)]
    medians = [statistics.median(values) for values in (plain, load, shares)]
    return dict(zip(("plain", "load", "share"), medians, strict=True))


def main() -> None:
    """Print a line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Hugging Face or cells folders")
    parser.add_argument("--layouts", default="P1", help='one replica, such as "P2->T2"')
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(f"{'folder':40} {'layouts':>10} {'plain GB/s':>11} {'load GB/s':>10} {'share':>6}")
    for folder in options.folders:
        found = measure(folder, options.layouts, options.runs)
        print(f"{folder!s:40} {options.layouts:>10} {found['plain']:11.2f} {found['load']:10.2f} {found['share']:6.0%}")


if __name__ == "__main__":
    main()

"""What tools/calibrate.py measures between ranks: all-reduces by size and number of ranks, sends, exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from calibration_device import Sizes, typical_seconds
from profile_layers import BLOCK_SIZE, captured
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.parallel.all_reduce import ONE_SHOT_MAX_BYTES, choose_all_reduce
from seesaw_ds.parallel.transport import choose_transport

_CALLS = 10


def link_figures(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """All-reduces, sends and exchanges, as a hardware profile names them; collective over at least two ranks."""
    return {
        "all_reduce": all_reduce_points(sizes, dtype, device),
        **send_rates(sizes, dtype, device),
        **exchange_figures(sizes, device),
    }


def all_reduce_points(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[int, list[list[float]]]:
    """By number of ranks, every divisor of all: (bytes, seconds) of the engine's all-reduce in decode."""
    world_size = dist.get_world_size()
    table: dict[int, list[list[float]]] = {}
    for degree in (size for size in range(2, world_size + 1) if world_size % size == 0):
        groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, world_size, degree)]
        table[degree] = _points(groups[dist.get_rank() // degree], sizes, dtype, device)
    return table


def _points(group: dist.ProcessGroup, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[list[float]]:
    has_graphs = choose_backends(sizes.shape, BLOCK_SIZE, dtype, device).has_graphs
    reduce = choose_all_reduce(group, device, has_graphs)
    points: list[list[float]] = []
    for num_bytes in sizes.reduce_bytes:
        tensor = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)

        def run(tensor: torch.Tensor = tensor) -> None:
            for _ in range(_CALLS):
                reduce(tensor)

        timed: Callable[[], None] = run
        if has_graphs:
            # Larger ones go to NCCL, which has nothing to do after a capture.
            is_one_shot = num_bytes <= ONE_SHOT_MAX_BYTES
            timed = captured(run, reduce.after_capture if is_one_shot else None)
        seconds = typical_seconds(timed, device) / _CALLS
        points.append([num_bytes, max(seconds, points[-1][1] * 1.0001 if points else 0.0)])
    return points


def send_rates(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Latency and bytes/s of one send: ranks next to each other send forth and back, all pairs at once."""
    small, large = (_one_way_seconds(num_bytes, dtype, device) for num_bytes in sizes.send_bytes)
    num_bytes = sizes.send_bytes[1] - sizes.send_bytes[0]
    return {"send_seconds": small, "send_bandwidth": num_bytes / max(large - small, 0.01 * large)}


def _one_way_seconds(num_bytes: int, dtype: torch.dtype, device: torch.device) -> float:
    rank = dist.get_rank()
    peer = rank ^ 1
    tensor = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)

    def run() -> None:
        if peer >= dist.get_world_size():
            return  # the last of an odd number has nobody
        if rank < peer:
            dist.send(tensor, peer)
            dist.recv(tensor, peer)
        else:
            dist.recv(tensor, peer)
            dist.send(tensor, peer)

    return typical_seconds(run, device) / 2


def exchange_figures(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Bytes/s each way when ranks next to each other swap tensors as a change of layout does, all pairs at once."""
    rank, num_bytes = dist.get_rank(), sizes.send_bytes[1]
    peer = rank ^ 1
    transport = choose_transport(dist.new_group(), device)
    sent, received = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    has_peer = peer < dist.get_world_size()  # the last of an odd number has nobody
    sends, receives = ([(sent, peer)], [(received, peer)]) if has_peer else ([], [])

    def run() -> None:
        transport.exchange(sends, receives).wait()

    return {"exchange_bandwidth": num_bytes / typical_seconds(run, device)}

"""`HostStagedTransport` on CPU: a thread does what a CUDA stream does on a device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from seesaw_ds.parallel.host_transport import HostStagedTransport, required_bytes
from seesaw_ds.parallel.shared_memory import NodeSharedMapping


class ThreadLane:
    """A `Lane`: one thread that does its jobs in order. Its copies are complete when they return."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def follow(self) -> None:
        pass

    def wait(self, flag: torch.Tensor, count: int) -> None:
        self._jobs.put(lambda: _poll(flag, count))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._jobs.put(lambda: target.copy_(source))

    def raise_flag(self, flag: torch.Tensor, count: int) -> None:
        self._jobs.put(lambda: flag.fill_(count))

    def end(self) -> threading.Event:
        is_done = threading.Event()
        self._jobs.put(is_done.set)
        return is_done

    def _run(self) -> None:
        while True:
            self._jobs.get()()


def _poll(flag: torch.Tensor, count: int) -> None:
    while flag.item() < count:
        time.sleep(0.0001)


def staged_transport(ranks: Sequence[int], num_lanes: int = 2) -> HostStagedTransport:
    """The transport of `ranks`, which all call this. With one lane both directions share a queue, in order of issue."""
    store = dist.distributed_c10d._get_default_store()
    name = f"transport-{ranks[0]}"
    if dist.get_rank() == ranks[0]:
        mapping = NodeSharedMapping.create(name, required_bytes(len(ranks)), store)
    else:
        mapping = NodeSharedMapping.attach(name, store)
    lanes = [ThreadLane() for _ in range(num_lanes)]
    return HostStagedTransport(ranks, dist.get_rank(), mapping, lanes[0], lanes[-1])

"""Decode steps as CUDA graphs: captured the first time a batch size comes, replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Body = Callable[[int], torch.Tensor]


class StepExecutor(Protocol):
    """Runs the device part of a decode step. `sizes` are the batch sizes to warm up."""

    sizes: Sequence[int]

    def padded_size(self, num_rows: int) -> int:
        """The batch size at which a step of `num_rows` rows runs; the rest are rows that nobody reads."""

    def run(self, size: int, body: Body) -> torch.Tensor:
        """What ``body(size)`` computes. It must read and write only tensors that stay in place between calls."""


class EagerExecutor:
    """Runs the body as it is. `sizes` are those at which a warm-up runs it."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self.sizes = sizes

    def padded_size(self, num_rows: int) -> int:
        return num_rows

    def run(self, size: int, body: Body) -> torch.Tensor:
        return body(size)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: few rows are padded, and few graphs are captured as a batch shrinks.

    Up to 8 by doubling, then steps of 4 to 64, 8 to 128, 16 to 256 and 64 beyond. A row that is padded costs as much
    as one that is not, most of it in all-reduces: over PCIe 0.18 ms of a step of 30 ms (70B shape, two H200, P2P off).
    128 is left out, unless it is the largest: cuBLAS 13 on an H200 multiplies 128 rows by (8192, 57344) in 0.40 ms, 112
    or 160 rows in 0.24.
    """
    sizes = [1, 2, 4, *range(8, 64, 4), *range(64, 128, 8), *range(144, 256, 16), *range(256, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class GraphPool:
    """The memory of graphs that never run at once, whatever they are of. The first captured makes it."""

    def __init__(self) -> None:
        self._handle: Any = None

    def capture(self, body: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The kernels of ``body()``, which has run before: they are compiled and loaded on first use, which a capture
        does not allow.

        What the body makes is overwritten by graphs that are captured later, unless somebody keeps it meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        # The copy engines' threads go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
            body()
        self._handle = graph.pool()
        return graph


class GraphExecutor:
    """One graph for each size in `graph_sizes`; all share the memory of `pool`, for one runs at a time.

    The result of `run` is a tensor that the next run overwrites. Graphs hold addresses: of weights in the arena, of KV
    pools, of the body's buffers. None of them moves at a transition, so graphs survive it. `after_capture` is called on
    every rank after each capture.
    """

    def __init__(self, max_num_seqs: int, after_capture: Callable[[], None], pool: GraphPool) -> None:
        self._after_capture = after_capture
        self.sizes: Sequence[int] = graph_sizes(max_num_seqs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = pool
        # All graphs copy theirs here: a result of its own would keep its memory from the others.
        self._result: torch.Tensor | None = None

    def padded_size(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def run(self, size: int, body: Body) -> torch.Tensor:
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, body)
        self._graphs[size].replay()
        assert self._result is not None
        return self._result[:size]

    def _capture(self, size: int, body: Body) -> torch.cuda.CUDAGraph:
        # Once without capturing, as `GraphPool.capture` wants it. The step's results are written twice, the same values
        # to the same places.
        result = body(size)
        if self._result is None:
            self._result = result.new_empty((self.sizes[-1], *result.shape[1:]))
        target = self._result[:size]
        graph = self._pool.capture(lambda: target.copy_(body(size)))
        self._after_capture()
        return graph

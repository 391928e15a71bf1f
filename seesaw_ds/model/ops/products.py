"""Linear products of few rows by the fastest way there is for them, as timed on this device.

torch takes the first algorithm that cuBLAS proposes. For the few rows of a decode step another one is often faster, up
to a fifth (`docs/performance.md`): cuBLAS likes to split the inner dimension there, and adds the parts up in a second
kernel. With more rows, as in prefill, cuBLAS's first choice is the best.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from seesaw_ds.model.ops.cublaslt import DTYPES, proposed_products

MOST_ROWS = 256
_LEAST_GAIN = 0.02  # what timings differ by; and where nothing is to be gained, results stay torch's
_WORTH_A_LOOK = 1.15  # times the fastest at first sight
_NUM_TIMINGS = 5

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (N, in) and (out, in) to (N, out)


class TuningTimes(NamedTuple):
    """Milliseconds of one product of each size that was tuned: torch's, and the chosen one."""

    usual: float
    tuned: float


class TunedProducts:
    """``x @ weight.T`` for the sizes that `tune` has seen; other sizes, and those with a bias, are torch's."""

    def __init__(self) -> None:
        # By rows first: prefill, which is not tuned, asks no further.
        self._products: defaultdict[int, dict[Hashable, Product]] = defaultdict(dict)

    def get(self, num_rows: int, weight: torch.Tensor) -> Product | None:
        """What `tune` has found for such a product, if it is not torch's."""
        by_weight = self._products.get(num_rows)
        return None if by_weight is None else by_weight.get(_kind(weight))

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(N, in) times (out, in) transposed, (N, out)."""
        fastest = self.get(x.shape[0], weight)
        if fastest is not None and bias is None and x.is_contiguous():
            return fastest(x, weight)
        return F.linear(x, weight, bias)

    def tune(self, sizes: Iterable[tuple[int, torch.Tensor]]) -> TuningTimes:
        """Time what there is for each number of rows up to `MOST_ROWS` with its weight.

        Takes some 5 ms each. The weights' values do not matter, and of weights alike only the first is timed.
        """
        usual = tuned = 0.0
        kinds: dict[tuple[int, Hashable], torch.Tensor] = {}
        for rows, weight in sizes:
            if rows <= MOST_ROWS and weight.dtype in DTYPES:
                kinds.setdefault((rows, _kind(weight)), weight)
        if kinds:
            flush = _Flush(next(iter(kinds.values())).device)
            for (rows, kind), weight in kinds.items():
                choice = _choose(rows, weight, flush)
                if choice.fastest is not None:
                    self._products[rows][kind] = choice.fastest
                usual += choice.usual
                tuned += choice.tuned
        return TuningTimes(usual, tuned)


def _kind(weight: torch.Tensor) -> Hashable:
    return weight.shape, weight.stride(), weight.dtype


def faster(times: Mapping[int, float], usual: float) -> int | None:
    """Which of `times` is the least, if it is enough less than the `usual` one; else None."""
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] < (1 - _LEAST_GAIN) * usual else None


class _Choice(NamedTuple):
    """`fastest` is None where torch's is; milliseconds of torch's product and of the chosen one."""

    fastest: Product | None
    usual: float
    tuned: float


def _choose(num_rows: int, weight: torch.Tensor, flush: _Flush) -> _Choice:
    x = torch.randn(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    products = [proposed for proposed in proposed_products(num_rows, weight) if proposed.runs(x, weight)]
    at_first = [flush.time(partial(proposed, x, weight), 1) for proposed in products]
    tried = [i for i, time in enumerate(at_first) if time <= _WORTH_A_LOOK * min(at_first)]
    times = {i: flush.time(partial(products[i], x, weight), _NUM_TIMINGS) for i in tried}
    usual = flush.time(partial(F.linear, x, weight), _NUM_TIMINGS)
    best = faster(times, usual)
    return _Choice(None, usual, usual) if best is None else _Choice(products[best], usual, times[best])


class _Flush:
    """Times work whose weights are not in the L2 cache, as in a step, where other layers come between."""

    def __init__(self, device: torch.device) -> None:
        num_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def time(self, work: Callable[[], object], count: int) -> float:
        """The least of `count` times, in milliseconds: a host that is disturbed adds to some. A first call, which may
        load kernels, is not counted.
        """
        work()
        timings = []
        for _ in range(count):
            self._memory.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            timings.append((start, end))
        torch.cuda.synchronize()
        return min(start.elapsed_time(end) for start, end in timings)

"""Named workloads: request lengths of the benchmarks, the same for every engine and machine."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from seesaw_ds.errors import UserError


class RequestLength(NamedTuple):
    """Tokens in and tokens out of one request."""

    input_tokens: int
    output_tokens: int


class _LogNormal(NamedTuple):
    mu: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return int(min(max(rng.lognormvariate(self.mu, self.sigma), self.low), self.high))


_DISTRIBUTIONS = {
    "arxiv": (_LogNormal(7.95, 0.35, 256, 4000), _LogNormal(5.3, 0.35, 32, 512)),
    "sharegpt": (_LogNormal(5.1, 1.1, 8, 2000), _LogNormal(5.2, 0.8, 8, 1000)),
}
_CONSTANT = re.compile(r"(\d+)x(\d+)")


def workload_lengths(name: str, num_requests: int, seed: int = 0) -> list[RequestLength]:
    """Lengths of `num_requests` requests of workload `name`: "arxiv", "sharegpt", or constants as "3000x1000".

    Each request's input is drawn before its output, from one generator. Raises UserError for an unknown name.
    """
    if match := _CONSTANT.fullmatch(name):
        return [RequestLength(int(match[1]), int(match[2]))] * num_requests
    if name not in _DISTRIBUTIONS:
        known = ", ".join(_DISTRIBUTIONS)
        raise UserError(
            f"workload={name!r}: must be one of {known}, or constant lengths as INxOUT, for example 3000x1000"
        )
    inputs, outputs = _DISTRIBUTIONS[name]
    rng = random.Random(seed)
    return [RequestLength(inputs.draw(rng), outputs.draw(rng)) for _ in range(num_requests)]


def parse_workload(text: str) -> tuple[str, int]:
    """Read ``name:requests``, for example ``arxiv:160``."""
    name, separator, count = text.partition(":")
    if not name or not separator or not count.isdigit() or int(count) < 1:
        raise UserError(f"workload={text!r}: must be NAME:REQUESTS, for example arxiv:160")
    return name, int(count)

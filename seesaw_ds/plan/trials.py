"""Simulated runs of candidates, some coarse, for putting many in order, others in detail.

Coarse simulations count in bundles of several sequences and in units of several tokens (`seesaw_ds.plan.simulator`).
A very large input is thinned as well, and the seconds are scaled by the ratio of the closed forms of the whole and the
thinned input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from seesaw_ds.config import dtype_name
from seesaw_ds.plan.bounds import InputTotals, bound_seconds
from seesaw_ds.plan.candidates import Candidate
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import ModelShape

# The coarsest simulations. Those of one effort differ little in it, so that what it does to them is much the same.
_MOST_BUNDLED = 4
_LARGEST_UNIT = 8
# Counted in bundles, a replica has so many, a pipeline group has slots for so many, and a pool holds so many of the
# longest. With 2 of the longest where there were 19 (70B, arxiv, A10) a run took 10 to 16% too long.
_LEAST_BUNDLES = 32
_LEAST_GROUP = 4
_LEAST_LONGEST_IN_POOL = 4
# A simulation takes about as long for so many prompt tokens as for one decode row.
_PROMPT_TOKENS_A_ROW = 16


class Effort(NamedTuple):
    """How detailed a simulation is: decode rows to aim at by bundles and then units, and the most requests."""

    num_rows: int
    most_requests: int


RANKING = Effort(33_000, 3000)
"""About an eighth of a second on one core."""
FINAL = Effort(400_000, 3000)
"""Of the finalists: about a second."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A candidate with its simulated run, of the thinned input, and the seconds of the whole input."""

    candidate: Candidate
    simulated: SimulatedRun
    seconds: float
    num_requests: int

    @property
    def requests_per_second(self) -> float:
        """Requests over the seconds of the whole input."""
        return self.num_requests / self.seconds

    @property
    def prefill_seconds(self) -> float:
        """Of the whole input."""
        return self._scaled(self.simulated.prefill_seconds)

    @property
    def decode_seconds(self) -> float:
        """Of the whole input."""
        return self._scaled(self.simulated.decode_seconds)

    @property
    def transition_seconds(self) -> float:
        """Of the whole input."""
        return self._scaled(self.simulated.transition_seconds)

    def _scaled(self, seconds: float) -> float:
        return seconds * self.seconds / self.simulated.seconds


class Simulate(Protocol):
    """Simulates a candidate at some effort; TookTooLong as for `simulate`."""

    def __call__(self, candidate: Candidate, stop_after: float = math.inf) -> Simulated: ...


@dataclass(frozen=True)
class Trials:
    """Simulates candidates for one model, machine and input."""

    shape: ModelShape
    hardware: HardwareProfile
    totals: InputTotals
    lengths: Sequence[RequestLength]

    def rank(self, candidate: Candidate, stop_after: float = math.inf) -> Simulated:
        """Coarsely."""
        return simulate(candidate, self.shape, self.hardware, self.totals, self.lengths, RANKING, stop_after)

    def judge(self, candidate: Candidate, stop_after: float = math.inf) -> Simulated:
        """In detail."""
        return simulate(candidate, self.shape, self.hardware, self.totals, self.lengths, FINAL, stop_after)


def thinned(lengths: Sequence[RequestLength], num_output_tokens: int) -> list[RequestLength]:
    """Evenly spaced requests of an input, as many as have about `num_output_tokens`; at least one."""
    total = sum(length.output_tokens for length in lengths)
    count = max(1, min(len(lengths), len(lengths) * num_output_tokens // total))
    return [lengths[i * len(lengths) // count] for i in range(count)]


def simulate(
    candidate: Candidate,
    shape: ModelShape,
    hardware: HardwareProfile,
    totals: InputTotals,
    lengths: Sequence[RequestLength],
    effort: Effort,
    stop_after: float = math.inf,
) -> Simulated:
    """Simulate in bundles and units, and if need be a part of the input. `totals` are those of `lengths`.

    Raises TookTooLong when the run takes `stop_after` simulated seconds or more.
    """
    run, dtype = candidate.run, dtype_name(candidate.run, shape)
    sample = thinned(lengths, totals.output_tokens * effort.most_requests // totals.num_requests)
    num_rows = sum(length.output_tokens + length.input_tokens / _PROMPT_TOKENS_A_ROW for length in sample)
    bundle = _factor(num_rows / effort.num_rows, _most_bundled(candidate, sample))
    unit = _factor(num_rows / effort.num_rows / bundle, math.gcd(run.kv_block_size, _LARGEST_UNIT))
    most_rows = 2 * effort.num_rows * bundle * unit
    if num_rows > most_rows:
        sample = sample[:: -(-int(num_rows) // most_rows)]
    simulator = Simulator(shape, hardware, candidate.pair, candidate.limits, dtype, run.weight_reshard, unit, bundle)
    scale = 1.0
    if len(sample) < totals.num_requests:
        sample_bound = bound_seconds(
            shape, hardware, candidate.pair, candidate.limits, InputTotals.of(sample), dtype, run.weight_reshard
        )
        scale = candidate.bound.total / sample_bound.total
    simulated = simulator.run(sample, stop_after / scale)
    return Simulated(candidate, simulated, simulated.seconds * scale, totals.num_requests)


def _most_bundled(candidate: Candidate, lengths: Sequence[RequestLength]) -> int:
    """The most sequences in a bundle that keep a simulation faithful: enough bundles are to be everywhere."""
    limits, pair = candidate.limits, candidate.pair
    longest = blocks_for(max(sum(length) for length in lengths), limits.block_size)
    return min(
        _MOST_BUNDLED,
        len(lengths) // pair.dp // _LEAST_BUNDLES,
        limits.max_num_seqs // max(pair.prefill.pp, pair.decode.pp) // _LEAST_GROUP,
        min(limits.num_gpu_blocks, limits.num_host_blocks) // longest // _LEAST_LONGEST_IN_POOL,
    )


def _factor(wanted: float, most: int) -> int:
    """The smallest power of two from `wanted` on, or the largest one up to `most`; at least 1."""
    factor = 1
    while factor < wanted and 2 * factor <= most:
        factor *= 2
    return factor

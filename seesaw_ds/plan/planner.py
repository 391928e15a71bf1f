"""Chooses the layouts of a run and its micro-batch size: closed form first, then the simulator on what could win.

Pairs are simulated with one micro-batch size each, in the order of their closed form, which is optimistic. Once the
next one's is above the best simulated time, no later one can win, and the search ends (branch and bound); it also ends
after a fixed number of simulations, so that equal inputs always give equal plans. The fastest few pairs then try
smaller and larger micro-batches, as long as that helps, and are simulated once more in detail. Stages are equal,
or split to balance them where the closed form gains by it; the fastest few pairs are simulated both ways.

For a large input the simulations count in units of several tokens; a still larger one is thinned as well, and the
seconds are scaled by the ratio of the closed forms of the whole and the thinned input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from seesaw_ds.config import RunConfig, dtype_name
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair
from seesaw_ds.plan.bounds import InputTotals, bound_seconds
from seesaw_ds.plan.candidates import LEAST_GAIN, Candidate, Constraints, Rejected, find_candidates, what_would_fit
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun, TookTooLong
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.static_search import CURRENT_ENGINE, StaticEngineKind, StaticPlan, best_static_plan, static_layouts
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape

MAX_SIMULATIONS = 6
"""Pairs that are simulated."""
NUM_FINALISTS = 2
"""Pairs that try other micro-batch sizes, and are simulated again in more detail."""
FIRST_TOKENS = {True: 512, False: 2048}
"""The micro-batch size that is simulated first, with mixed steps and without."""
_MOST_MERGED_TOKENS = 2048  # in the micro-batches that one simulated one stands for
STATIC_TOKENS = 500_000
"""Output tokens of the yardstick's simulations, which take a time by steps, not by rows."""


class Effort(NamedTuple):
    """How detailed a simulation is: decode rows to aim at by larger units, and the most requests and rows of all."""

    num_rows: int
    most_requests: int
    most_rows: int


RANKING = Effort(40_000, 1200, 160_000)
"""About half a second on one core."""
FINAL = Effort(150_000, 3000, 600_000)
"""Of the finalists: up to two seconds."""


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


class Rank(Protocol):
    """Simulates a candidate at the effort of the ranking; TookTooLong as for `simulate`."""

    def __call__(self, candidate: Candidate, stop_after: float = math.inf) -> Simulated: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: the best candidate, the best static layout of an ordinary engine, and what became of the rest.

    `ranking` holds what was simulated to rank it, best first; `best` is one of its first, simulated in more detail.
    `pruned` what could not win by its closed form, or was left out after the last simulation; `rejected` what cannot
    run.
    """

    best: Simulated
    best_static: StaticPlan | None
    ranking: list[Simulated]
    pruned: list[Candidate]
    rejected: list[Rejected]

    @property
    def speedup(self) -> float | None:
        """Of `best` over `best_static`, in requests per second; None when no static layout fits."""
        if self.best_static is None:
            return None
        return self.best.requests_per_second / self.best_static.simulated.requests_per_second


def thinned(lengths: Sequence[RequestLength], num_output_tokens: int) -> list[RequestLength]:
    """Evenly spaced requests of an input, as many as have about `num_output_tokens`; at least one."""
    total = sum(length.output_tokens for length in lengths)
    count = max(1, min(len(lengths), len(lengths) * num_output_tokens // total))
    return [lengths[i * len(lengths) // count] for i in range(count)]


def make_plan(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    num_devices: int,
    lengths: Sequence[RequestLength],
    devices_per_node: int = 8,
    with_static: bool = True,
    constraints: Constraints | None = None,
    static_kind: StaticEngineKind = CURRENT_ENGINE,
) -> Plan:
    """Plan a run of `lengths` on `num_devices`; `run` gives everything but layouts and micro-batch tokens.

    `with_static` also looks for the yardstick, an engine of `static_kind`; `constraints` are those of a machine at
    hand. Raises UserError, with what would be needed, when nothing fits.
    """
    if not lengths:
        raise UserError("the input has no requests: give at least one to plan for")
    totals = InputTotals.of(lengths)
    limits = constraints or Constraints()
    candidates, rejected = find_candidates(run, shape, hardware, num_devices, devices_per_node, totals, limits)
    if not candidates:
        needed = what_would_fit(run, shape, hardware, num_devices, rejected, limits)
        raise UserError(f"no layout of {num_devices} x {hardware.name} fits: {needed}")

    def rank(candidate: Candidate, stop_after: float = math.inf) -> Simulated:
        return simulate(candidate, shape, hardware, totals, lengths, RANKING, stop_after)

    ranking, pruned = _search(candidates, rank)
    best = simulate(ranking[0].candidate, shape, hardware, totals, lengths, FINAL)
    for done in ranking[1:NUM_FINALISTS]:
        with contextlib.suppress(TookTooLong):
            best = simulate(done.candidate, shape, hardware, totals, lengths, FINAL, best.seconds)
    static = None
    if with_static:
        layouts = static_layouts(shape, num_devices, devices_per_node)
        static = best_static_plan(run, shape, hardware, layouts, thinned(lengths, STATIC_TOKENS), static_kind)
    return Plan(best, static, ranking, pruned, rejected)


def _search(candidates: list[Candidate], rank: Rank) -> tuple[list[Simulated], list[Candidate]]:
    """Simulate candidates by rising bound until no other pair can win; one micro-batch size of each pair stays."""
    by_pair: dict[LayoutPair, list[Candidate]] = {}
    for candidate in candidates:
        by_pair.setdefault(candidate.pair.with_equal_stages, []).append(candidate)
    ranking: list[Simulated] = []
    pruned: list[Candidate] = []
    for sizes in by_pair.values():
        best = min((done.seconds for done in ranking), default=float("inf"))
        if sizes[0].least_seconds >= best or len(ranking) == MAX_SIMULATIONS:
            pruned.append(sizes[0])
        else:
            first = FIRST_TOKENS[sizes[0].run.mixed_steps]
            ranking.append(rank(min(sizes, key=lambda size: abs(size.run.max_num_batched_tokens - first))))
    ranking.sort(key=lambda done: done.seconds)
    for i, finalist in enumerate(ranking[:NUM_FINALISTS]):
        ranking[i] = _best_split(_tuned(finalist, by_pair[finalist.candidate.pair.with_equal_stages], rank), rank)
    ranking.sort(key=lambda done: done.seconds)
    return ranking, pruned


def _tuned(first: Simulated, sizes: list[Candidate], rank: Rank) -> Simulated:
    """The fastest of `first` and its pair's next smaller and larger micro-batches, and so on while that helps."""
    sizes = sorted(sizes, key=lambda size: size.run.max_num_batched_tokens)
    middle = sizes.index(first.candidate)
    best = first
    for others in (sizes[:middle][::-1], sizes[middle + 1 :]):
        for size in others:
            if size.least_seconds >= best.seconds:
                break
            try:
                best = rank(size, best.seconds)
            except TookTooLong:
                break
        if best is not first:
            break
    return best


def _best_split(first: Simulated, rank: Rank) -> Simulated:
    """Of `first` and the other way to split its layers, the one with equal stages unless the other gains something."""
    if first.candidate.alternative is None:
        return first
    is_equal = first.candidate.pair.has_equal_stages
    worth = 1 - LEAST_GAIN if is_equal else 1 / (1 - LEAST_GAIN)
    try:
        return rank(first.candidate.alternative, worth * first.seconds)
    except TookTooLong:
        return first


def simulate(
    candidate: Candidate,
    shape: ModelShape,
    hardware: HardwareProfile,
    totals: InputTotals,
    lengths: Sequence[RequestLength],
    effort: Effort,
    stop_after: float = math.inf,
) -> Simulated:
    """Simulate in units, and if need be a part of the input. `totals` are those of `lengths`.

    Raises TookTooLong when the run takes `stop_after` simulated seconds or more.
    """
    run, dtype = candidate.run, dtype_name(candidate.run, shape)
    num_tokens = totals.output_tokens * min(1.0, effort.most_requests / totals.num_requests)
    unit = _unit(num_tokens, effort.num_rows, run.kv_block_size, _largest_unit(candidate))
    sample = thinned(lengths, int(min(num_tokens, effort.most_rows * unit)))
    simulator = Simulator(shape, hardware, candidate.pair, candidate.limits, dtype, run.weight_reshard, unit)
    scale = 1.0
    if len(sample) < totals.num_requests:
        sample_bound = bound_seconds(
            shape, hardware, candidate.pair, candidate.limits, InputTotals.of(sample), dtype, run.weight_reshard
        )
        scale = candidate.bound.total / sample_bound.total
    simulated = simulator.run(sample, stop_after / scale)
    return Simulated(candidate, simulated, simulated.seconds * scale, totals.num_requests)


def _largest_unit(candidate: Candidate) -> int:
    """The most tokens in a unit that keep a simulation faithful.

    A simulated micro-batch with rows stands for as many real ones. Where decode steps go between micro-batches, each
    waits for all of them, and the pools have to hold their prompts at once.
    """
    run = candidate.run
    if not run.mixed_steps:
        return run.max_num_batched_tokens
    if candidate.limits.has_one_phase:
        return 1
    return _MOST_MERGED_TOKENS // run.max_num_batched_tokens


def _unit(num_output_tokens: float, num_rows: int, block_size: int, largest: int) -> int:
    """The smallest power of two, a divisor of a block, that brings the tokens to `num_rows`; at most `largest`."""
    unit = 1
    while num_output_tokens > num_rows * unit and block_size % (2 * unit) == 0 and 2 * unit <= largest:
        unit *= 2
    return unit

"""Chooses the layouts of a run: closed form first, then the simulator on the few that could win.

Candidates are simulated in the order of their closed form, which is optimistic. Once the next one's is above the best
simulated time, no later one can win, and the search ends (branch and bound); it also ends after a fixed number of
simulations, so that equal inputs always give equal plans. For a large input the simulations count in units of several
tokens; a still larger one is thinned as well, and the seconds are scaled by the ratio of the closed forms of the whole
and the thinned input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seesaw_ds.config import RunConfig, dtype_name
from seesaw_ds.errors import UserError
from seesaw_ds.plan.bounds import InputTotals, bound_seconds
from seesaw_ds.plan.candidates import Candidate, Rejected, find_candidates, what_would_fit
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.static_search import StaticPlan, best_static_plan, static_layouts
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape

MAX_SIMULATIONS = 6
RANKING_STEPS = 40_000
"""Decode rows of a simulation that only ranks: 0.2 seconds on one core."""
FINAL_STEPS = 150_000
"""Decode rows of the winner's simulation."""
STATIC_TOKENS = 500_000
"""Output tokens of the yardstick's simulations, which take a time by steps, not by rows."""


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


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: the best candidate, the best static layout of an ordinary engine, and what became of the rest.

    `ranking` holds what was simulated to rank it, best first; `best` is its first, simulated again in more detail.
    `pruned` what could not win by its closed form or was left out
    after the last simulation; `rejected` what cannot run.
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
) -> Plan:
    """Plan a run of `lengths` on `num_devices`; `run` gives everything but layouts and micro-batch tokens.

    `with_static` also looks for the yardstick. Raises UserError, with what would be needed, when nothing fits.
    """
    if not lengths:
        raise UserError("the input has no requests: give at least one to plan for")
    totals = InputTotals.of(lengths)
    candidates, rejected = find_candidates(run, shape, hardware, num_devices, devices_per_node, totals)
    if not candidates:
        needed = what_would_fit(run, shape, hardware, num_devices, rejected)
        raise UserError(f"no layout of {num_devices} x {hardware.name} fits: {needed}")
    ranking, pruned = _search(candidates, shape, hardware, totals, lengths)
    best = simulate(ranking[0].candidate, shape, hardware, totals, lengths, FINAL_STEPS)
    static = None
    if with_static:
        layouts = static_layouts(shape, num_devices, devices_per_node)
        static = best_static_plan(run, shape, hardware, layouts, thinned(lengths, STATIC_TOKENS))
    return Plan(best, static, ranking, pruned, rejected)


def _search(
    candidates: list[Candidate],
    shape: ModelShape,
    hardware: HardwareProfile,
    totals: InputTotals,
    lengths: Sequence[RequestLength],
) -> tuple[list[Simulated], list[Candidate]]:
    """Simulate candidates by rising bound, one micro-batch size of each pair, until no other can win."""
    ranking: list[Simulated] = []
    pruned: list[Candidate] = []
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.run.layouts in seen:
            continue
        seen.add(candidate.run.layouts)
        best = min((done.seconds for done in ranking), default=float("inf"))
        if candidate.bound.total >= best or len(ranking) == MAX_SIMULATIONS:
            pruned.append(candidate)
            continue
        ranking.append(simulate(candidate, shape, hardware, totals, lengths, RANKING_STEPS))
    ranking.sort(key=lambda done: done.seconds)
    return ranking, pruned


def simulate(
    candidate: Candidate,
    shape: ModelShape,
    hardware: HardwareProfile,
    totals: InputTotals,
    lengths: Sequence[RequestLength],
    num_steps: int,
) -> Simulated:
    """Simulate in units, and if need be with a part of the input, so that decode has about `num_steps` rows in all.

    `totals` are those of `lengths`.
    """
    run, dtype = candidate.run, dtype_name(candidate.run, shape)
    unit = _unit(totals.output_tokens, num_steps, run.kv_block_size)
    sample = thinned(lengths, num_steps * unit)
    simulator = Simulator(shape, hardware, candidate.pair, candidate.limits, dtype, run.weight_reshard, unit)
    simulated = simulator.run(sample)
    seconds = simulated.seconds
    if len(sample) < totals.num_requests:
        sample_bound = bound_seconds(
            shape, hardware, candidate.pair, candidate.limits, InputTotals.of(sample), dtype, run.weight_reshard
        )
        seconds *= candidate.bound.total / sample_bound.total
    return Simulated(candidate, simulated, seconds, totals.num_requests)


def _unit(num_output_tokens: int, num_steps: int, block_size: int) -> int:
    """The smallest power of two that brings the tokens down to `num_steps`; at most what divides a block."""
    unit = 1
    while num_output_tokens > num_steps * unit and block_size % (2 * unit) == 0:
        unit *= 2
    return unit

"""Chooses the layouts of a run and its micro-batch size: closed form first, then the simulator on what could win.

Pairs are simulated with one micro-batch size each, in the order of their closed form, which is optimistic. Once the
next one's is above the best simulated time, no later one can win, and the search ends (branch and bound); it also ends
after a fixed number of pairs, so that equal inputs always give equal plans. The few fastest pairs then try
smaller and larger micro-batches, as long as that helps; the best pair then fewer sequences at once, as long as that
helps, for so far all had as many as may be. All this is simulated coarsely. The few fastest settings are
simulated in detail, and the best of them with its layers split in another way too, where the closed form knows one.
Where the host pool's size is to be chosen, all that has had as much as there is, and the best is given what it uses of
that, or what pays for the time that providing it takes.

Coarse simulations count in bundles of several sequences and in units of several tokens (`seesaw_ds.plan.simulator`).
A very large input is thinned as well, and the seconds are scaled by the ratio of the closed forms of the whole and the
thinned input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from seesaw_ds.config import RunConfig, dtype_name
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair
from seesaw_ds.plan.bounds import InputTotals, bound_seconds
from seesaw_ds.plan.candidates import (
    LEAST_GAIN,
    Candidate,
    Constraints,
    Rejected,
    find_candidates,
    what_would_fit,
    with_fewer_seqs,
    with_host_pool,
)
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import SimulatedRun, TookTooLong
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.static_search import CURRENT_ENGINE, StaticEngineKind, StaticPlan, best_static_plan, static_layouts
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.shapes import ModelShape

MAX_PAIRS = 8
"""Pairs that are simulated."""
FIRST_TOKENS = {True: 512, False: 1024}
"""The micro-batch size that is simulated first, with mixed steps and without."""
STATIC_TOKENS = 500_000
"""Output tokens of the yardstick's simulations, which take a time by steps, not by rows."""

# The fastest pairs at first try other micro-batch sizes: so many, if they are not this much slower than the best.
_MAX_TUNED = 3
_TUNED_WITHIN = 0.1
# Settings that are simulated in detail: the fastest ones, if they are not this much slower than the first.
_MAX_FINALISTS = 2
_FINALISTS_WITHIN = 0.015
# The coarsest simulations. Those of one effort differ little in it, so that what it does to them is much the same.
_MOST_BUNDLED = 4
_LARGEST_UNIT = 8
# Counted in bundles, a replica has so many, a pipeline group has slots for so many, and a pool holds so many of the
# longest. With 2 of the longest where there were 19 (70B, arxiv, A10) a run took 10 to 16% too long.
_LEAST_BUNDLES = 32
_LEAST_GROUP = 4
_LEAST_LONGEST_IN_POOL = 4
# Where the host pool's size is to be chosen: room beside what was used, what the next smaller size is, and the least.
_POOL_MARGIN = 1.25
_POOL_STEP = 4
_LEAST_POOL_GIB = 4.0
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


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: the best candidate, the best static layout of an ordinary engine, and what became of the rest.

    `ranking` holds the best simulation of each pair, `best` first, which was simulated in more detail than the others.
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

    def judge(candidate: Candidate, stop_after: float = math.inf) -> Simulated:
        return simulate(candidate, shape, hardware, totals, lengths, FINAL, stop_after)

    def fewer_seqs(candidate: Candidate) -> list[Candidate]:
        return with_fewer_seqs(candidate, shape, hardware, totals, limits)

    ranked, pruned = _search(candidates, rank)
    ranked = _with_fewer_seqs(ranked, fewer_seqs, rank)

    def total(done: Simulated) -> float:
        return done.seconds + (limits.host_pool_seconds * _needed_pool(done) if limits.host_pool_seconds else 0.0)

    best = _best_in_detail(ranked, judge, total)
    if limits.host_pool_seconds and run.num_host_kv_blocks is None:

        def resized(candidate: Candidate, gib: float) -> Candidate:
            return with_host_pool(candidate, gib, shape, hardware, totals)

        best = _with_smaller_pool(best, resized, rank, judge, limits.host_pool_seconds)
    ranking = [best, *_one_of_each_pair(ranked, best)]
    static = None
    if with_static:
        layouts = static_layouts(shape, num_devices, devices_per_node)
        static = best_static_plan(run, shape, hardware, layouts, thinned(lengths, STATIC_TOKENS), static_kind)
    return Plan(best, static, ranking, pruned, rejected)


def _search(candidates: list[Candidate], rank: Simulate) -> tuple[list[Simulated], list[Candidate]]:
    """Simulate candidates by rising bound until no other pair can win; what was simulated, fastest first, and the rest.

    Of the rest there is one candidate of each pair.
    """
    by_pair: dict[LayoutPair, list[Candidate]] = {}
    for candidate in candidates:
        by_pair.setdefault(candidate.pair.with_equal_stages, []).append(candidate)
    first: list[Simulated] = []
    pruned: list[Candidate] = []
    for sizes in by_pair.values():
        best = min((done.seconds for done in first), default=math.inf)
        if sizes[0].least_seconds >= best or len(first) == MAX_PAIRS:
            pruned.append(sizes[0])
        else:
            tokens = FIRST_TOKENS[sizes[0].run.mixed_steps]
            first.append(rank(min(sizes, key=lambda size: abs(size.run.max_num_batched_tokens - tokens))))
    first.sort(key=lambda done: done.seconds)
    ranked = list(first)
    for done in first[:_MAX_TUNED]:
        if done.seconds <= (1 + _TUNED_WITHIN) * first[0].seconds:
            best = min(each.seconds for each in ranked)
            ranked += _other_sizes(done, by_pair[done.candidate.pair.with_equal_stages], best, rank)
    return _fastest_first(ranked), pruned


def _fastest_first(ranked: list[Simulated]) -> list[Simulated]:
    """A pair that decodes in its prefill layout to the end runs as that layout alone does, which is then preferred."""
    return sorted(ranked, key=lambda done: (done.seconds, not done.candidate.pair.is_static))


def _with_fewer_seqs(
    ranked: list[Simulated], fewer_seqs: Callable[[Candidate], list[Candidate]], rank: Simulate
) -> list[Simulated]:
    """`ranked`, fastest first, with the pair of the first one at fewer and fewer sequences at once while that helps."""
    best = ranked[0]
    while sizes := fewer_seqs(best.candidate):
        tokens = best.candidate.run.max_num_batched_tokens
        same = min(sizes, key=lambda size: abs(size.run.max_num_batched_tokens - tokens))
        try:
            done = rank(same, (1 + _TUNED_WITHIN) * best.seconds)
        except TookTooLong:
            break
        tried = [done, *_other_sizes(done, sizes, best.seconds, rank)]
        ranked = _fastest_first([*ranked, *tried])
        fastest = min(tried, key=lambda each: each.seconds)
        if fastest.seconds >= best.seconds:
            break
        best = fastest
    return ranked


def _other_sizes(first: Simulated, sizes: list[Candidate], least: float, rank: Simulate) -> list[Simulated]:
    """The pair of `first` with smaller and smaller micro-batches while that helps; if it does not, with larger ones.

    Sizes that cannot get below `least` seconds by their closed form are not tried.
    """
    sizes = sorted(sizes, key=lambda size: size.run.max_num_batched_tokens)
    middle = sizes.index(first.candidate)
    tried: list[Simulated] = []
    for others in (sizes[:middle][::-1], sizes[middle + 1 :]):
        best = first
        for size in others:
            if size.least_seconds >= least:
                break
            try:
                done = rank(size, (1 + _FINALISTS_WITHIN) * best.seconds)
            except TookTooLong:
                break
            tried.append(done)
            if done.seconds >= best.seconds:
                break
            best = done
        if best is not first:
            break
    return tried


def _best_in_detail(ranked: list[Simulated], judge: Simulate, total: Callable[[Simulated], float]) -> Simulated:
    """Of the first few of `ranked` the one with the least `total` seconds, once they are simulated in detail."""
    first, *others = _finalists(ranked, total)
    best = judge(first)
    for candidate in others:
        with contextlib.suppress(TookTooLong):
            best = min(best, judge(candidate, (1 + _FINALISTS_WITHIN) * best.seconds), key=total)
    return _best_split(best, judge)


def _needed_pool(done: Simulated) -> float:
    """GiB of host pool: what was used at once, with some room beside."""
    gib = done.candidate.run.kv_offloading_size
    return min(gib, max(_LEAST_POOL_GIB, _POOL_MARGIN * done.simulated.host_pool_share * gib))


def _with_smaller_pool(
    best: Simulated,
    resized: Callable[[Candidate, float], Candidate],
    rank: Simulate,
    judge: Simulate,
    seconds_per_gib: float,
) -> Simulated:
    """`best` with as large a host pool as is used, or as pays for the seconds that providing it takes."""
    gib, needed = best.candidate.run.kv_offloading_size, _needed_pool(best)
    if needed < gib:
        return replace(best, candidate=resized(best.candidate, needed))
    if gib / _POOL_STEP < _LEAST_POOL_GIB:
        return best
    chosen, seconds = best.candidate, rank(best.candidate).seconds
    while gib / _POOL_STEP >= _LEAST_POOL_GIB:
        smaller = resized(chosen, gib / _POOL_STEP)
        saved = seconds_per_gib * (gib - smaller.run.kv_offloading_size)
        try:
            seconds = rank(smaller, seconds + saved).seconds
        except TookTooLong:
            break
        chosen, gib = smaller, smaller.run.kv_offloading_size
    return best if chosen is best.candidate else judge(chosen)


def _finalists(ranked: list[Simulated], total: Callable[[Simulated], float]) -> list[Candidate]:
    """The fastest, and of those not far behind the few with the least `total`; of those that ran alike the first."""
    by_seconds: dict[float, Simulated] = {}
    for done in ranked:
        if done.seconds <= (1 + _FINALISTS_WITHIN) * ranked[0].seconds:
            by_seconds.setdefault(done.seconds, done)
    fastest, *others = by_seconds.values()
    return [done.candidate for done in (fastest, *sorted(others, key=total)[: _MAX_FINALISTS - 1])]


def _one_of_each_pair(ranked: list[Simulated], best: Simulated) -> list[Simulated]:
    """The first simulation of each pair but that of `best`."""
    seen = {best.candidate.pair.with_equal_stages}
    others = []
    for done in ranked:
        if (layouts := done.candidate.pair.with_equal_stages) not in seen:
            seen.add(layouts)
            others.append(done)
    return others


def _best_split(first: Simulated, judge: Simulate) -> Simulated:
    """Of `first` and the other way to split its layers, the one with equal stages unless the other gains something."""
    if first.candidate.alternative is None:
        return first
    is_equal = first.candidate.pair.has_equal_stages
    worth = 1 - LEAST_GAIN if is_equal else 1 / (1 - LEAST_GAIN)
    try:
        return judge(first.candidate.alternative, worth * first.seconds)
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

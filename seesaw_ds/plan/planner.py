"""Chooses the layouts of a run and what belongs to them: closed form first, then the simulator on what could win.

Pairs are simulated with one micro-batch size each, in the order of their closed form, which is optimistic. Once the
next one's is above the best simulated time, no later one can win, and the search ends (branch and bound); it also ends
after a fixed number of pairs, so that equal inputs always give equal plans. The few fastest pairs then try smaller and
larger micro-batches, as long as that helps; the best pair then fewer sequences at once, as long as that helps, for so
far all had as many as may be. All this is simulated coarsely. The few fastest settings are simulated in detail, and the
best of them with its layers split in another way too, where the closed form knows one. Where the host pool's size is to
be chosen, all that has had as much as there is, and the best is given what it uses of that, or what pays for the time
that providing it takes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from seesaw_ds.config import RunConfig
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair
from seesaw_ds.plan.bounds import InputTotals
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
from seesaw_ds.plan.outcome import TookTooLong
from seesaw_ds.plan.static_search import CURRENT_ENGINE, StaticEngineKind, StaticPlan, best_static_plan, static_layouts
from seesaw_ds.plan.trials import Simulate, Simulated, Trials, thinned
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape

MAX_PAIRS = 8
"""Pairs that are simulated."""
FIRST_TOKENS = {True: 512, False: 1024}
"""The micro-batch size that is simulated first, with mixed steps and without."""
STATIC_TOKENS = 500_000
"""Output tokens of the yardstick's simulations, which take a time by steps, not by rows."""

# The fastest pairs at first try other micro-batch sizes: so many, if they are not this much slower than the best.
_MAX_TUNED = 3
_TUNED_WITHIN = 0.05
# Settings that are simulated in detail: the fastest ones, if they are not this much slower than the first.
_MAX_FINALISTS = 2
_FINALISTS_WITHIN = 0.015
# Where the host pool's size is to be chosen: room beside what was used, what the next smaller size is, and the least.
_POOL_MARGIN = 1.25
_POOL_STEP = 4
_LEAST_POOL_GIB = 4.0


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
    """Plan a run of `lengths` on `num_devices`; `run` gives everything else, and the most of what comes with layouts.

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

    trials = Trials(shape, hardware, totals, lengths)
    fewer_seqs = partial(with_fewer_seqs, shape=shape, hardware=hardware, totals=totals, constraints=limits)
    resized = partial(with_host_pool, shape=shape, hardware=hardware, totals=totals)
    pool_seconds = limits.host_pool_seconds if run.num_host_kv_blocks is None else 0.0

    ranked, pruned = _search(candidates, trials.rank)
    ranked = _with_fewer_seqs(ranked, fewer_seqs, trials.rank)
    best = _best_in_detail(ranked, trials.judge, pool_seconds)
    if pool_seconds:
        best = _with_smaller_pool(best, resized, trials, pool_seconds)
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


def _best_in_detail(ranked: list[Simulated], judge: Simulate, pool_seconds: float) -> Simulated:
    """Of the first few of `ranked` the best, once they are simulated in detail.

    A GiB of the host pool that a run needs counts as `pool_seconds`.
    """

    def total(done: Simulated) -> float:
        return done.seconds + pool_seconds * _needed_pool(done)

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
    best: Simulated, resized: Callable[[Candidate, float], Candidate], trials: Trials, pool_seconds: float
) -> Simulated:
    """`best` with as large a host pool as is used, or as pays for the `pool_seconds` that providing a GiB takes."""
    gib, needed = best.candidate.run.kv_offloading_size, _needed_pool(best)
    if needed < gib:
        return replace(best, candidate=resized(best.candidate, needed))
    if gib / _POOL_STEP < _LEAST_POOL_GIB:
        return best
    chosen, seconds = best.candidate, trials.rank(best.candidate).seconds
    while gib / _POOL_STEP >= _LEAST_POOL_GIB:
        smaller = resized(chosen, gib / _POOL_STEP)
        saved = pool_seconds * (gib - smaller.run.kv_offloading_size)
        try:
            seconds = trials.rank(smaller, seconds + saved).seconds
        except TookTooLong:
            break
        chosen, gib = smaller, smaller.run.kv_offloading_size
    return best if chosen is best.candidate else trials.judge(chosen)


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

"""Throughput of given layouts against one changing figure: output length, or all-reduce bandwidth.

As in the paper's figures, static layouts are those of an ordinary engine at its best setting, the planner's yardstick.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from seesaw_ds.config import RunConfig
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair, ParallelLayout
from seesaw_ds.plan.bounds import InputTotals
from seesaw_ds.plan.candidates import make_candidate, num_seqs_to_try
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.outcome import TookTooLong
from seesaw_ds.plan.planner import FIRST_TOKENS
from seesaw_ds.plan.static_search import CURRENT_ENGINE, StaticEngineKind, best_static_plan
from seesaw_ds.plan.trials import Trials
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape

OUTPUT_RATIOS = (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
BANDWIDTH_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 50.0)
_INPUT_TOKENS = 3000  # as in the paper's figure
_NUM_REQUESTS = 200


@dataclass(frozen=True, slots=True)
class Curves:
    """Requests per second by layouts, one value for each of `x`; None where the layouts do not fit.

    Of a layout of the yardstick the name says so.
    """

    x_label: str
    x: tuple[float, ...]
    is_log: bool
    requests_per_second: dict[str, list[float | None]]


def _nothing() -> None:
    pass


def output_ratio_curves(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    pairs: Sequence[LayoutPair],
    static_layouts: Sequence[ParallelLayout],
    static_kind: StaticEngineKind = CURRENT_ENGINE,
    on_point: Callable[[], object] = _nothing,
) -> Curves:
    """Against the ratio of output to input tokens, with 3000 tokens in; ratio 0 is one token out.

    `on_point` is called as each point of each curve is known, after about a second.
    """
    values: dict[str, list[float | None]] = {}
    for ratio in OUTPUT_RATIOS:
        lengths = [RequestLength(_INPUT_TOKENS, max(1, round(_INPUT_TOKENS * ratio)))] * _NUM_REQUESTS
        _add_points(values, run, shape, hardware, pairs, static_layouts, lengths, static_kind, on_point)
    return Curves("output tokens / input tokens", OUTPUT_RATIOS, False, values)


def bandwidth_curves(
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    pairs: Sequence[LayoutPair],
    static_layouts: Sequence[ParallelLayout],
    lengths: Sequence[RequestLength],
    static_kind: StaticEngineKind = CURRENT_ENGINE,
    on_point: Callable[[], object] = _nothing,
) -> Curves:
    """Against the all-reduce bandwidth, as a factor of the machine's; latencies stay. `on_point` as above."""
    values: dict[str, list[float | None]] = {}
    for factor in BANDWIDTH_FACTORS:
        machine = hardware.with_all_reduce_scaled(factor)
        _add_points(values, run, shape, machine, pairs, static_layouts, lengths, static_kind, on_point)
    return Curves("all-reduce bandwidth, factor", BANDWIDTH_FACTORS, True, values)


def _add_points(
    values: dict[str, list[float | None]],
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    pairs: Sequence[LayoutPair],
    static_layouts: Sequence[ParallelLayout],
    lengths: Sequence[RequestLength],
    static_kind: StaticEngineKind,
    on_point: Callable[[], object],
) -> None:
    """The next point of each curve."""
    settings = replace(run, max_model_len=max(sum(length) for length in lengths))
    for pair in pairs:
        values.setdefault(str(pair), []).append(_best_size(settings, shape, hardware, pair, lengths))
        on_point()
    for layout in static_layouts:
        plan = best_static_plan(settings, shape, hardware, [layout], lengths, static_kind)
        value = None if plan is None else plan.simulated.requests_per_second
        values.setdefault(f"{layout}, static engine", []).append(value)
        on_point()


def _best_size(
    run: RunConfig, shape: ModelShape, hardware: HardwareProfile, pair: LayoutPair, lengths: Sequence[RequestLength]
) -> float | None:
    """With the fastest of the micro-batch size that the planner tries first, half of it and twice as much.

    With as many sequences at once as may be, and then with fewer while that helps.
    """
    first = FIRST_TOKENS[run.mixed_steps]
    weight_reshard = run.weight_reshard if pair.is_nested else "host"
    totals = InputTotals.of(lengths)
    trials = Trials(shape, hardware, totals, lengths)
    best, seconds = None, math.inf
    for num_seqs in num_seqs_to_try(run, totals.num_requests, pair.dp):
        settings = replace(run, layouts=str(pair), weight_reshard=weight_reshard, max_num_seqs=num_seqs)
        least = seconds
        for tokens in (first, first // 2, 2 * first):
            with contextlib.suppress(UserError, TookTooLong):
                candidate = make_candidate(replace(settings, max_num_batched_tokens=tokens), shape, hardware, totals)
                seconds = trials.rank(candidate, seconds).seconds
                best = candidate
        if best is not None and seconds == least:
            break
    return None if best is None else trials.judge(best).requests_per_second

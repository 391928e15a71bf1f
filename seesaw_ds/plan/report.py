"""A plan in words and numbers: the table that a person reads, and the JSON that a script does."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from seesaw_ds.plan.candidates import Candidate
from seesaw_ds.plan.hardware import GIB
from seesaw_ds.plan.layout_choice import choice_text
from seesaw_ds.plan.planner import Plan
from seesaw_ds.plan.static_search import StaticPlan
from seesaw_ds.plan.trials import Simulated

_REASON_WIDTH = 130  # in the table; the JSON has the whole reason


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: `best`, `best_static`, `speedup`, `ranking`, `pruned`, `rejected`."""
    return {
        "best": _simulated_json(plan.best),
        "best_static": None if plan.best_static is None else _static_json(plan.best_static),
        "speedup": plan.speedup,
        "ranking": [_simulated_json(simulated) for simulated in plan.ranking],
        "pruned": [
            {"layouts": candidate.run.layouts, "at_least_seconds": candidate.least_seconds} for candidate in plan.pruned
        ],
        "rejected": [{"layouts": rejected.layouts, "reason": rejected.reason} for rejected in plan.rejected],
    }


def _simulated_json(simulated: Simulated) -> dict[str, Any]:
    run = simulated.candidate.run
    return {
        "layouts": run.layouts,
        "requests_per_second": simulated.requests_per_second,
        "seconds": simulated.seconds,
        "prefill_seconds": simulated.prefill_seconds,
        "decode_seconds": simulated.decode_seconds,
        "transition_seconds": simulated.transition_seconds,
        "transitions": simulated.simulated.num_transitions,
        "evictions": simulated.simulated.num_evictions,
        "num_left_after_stay": simulated.simulated.num_left_after_stay,
        "mean_decode_batch": simulated.simulated.mean_decode_batch,
        "riding_share": simulated.simulated.riding_share,
        "max_num_batched_tokens": run.max_num_batched_tokens,
        "max_num_seqs": run.max_num_seqs,
        "mixed_steps": run.mixed_steps,
        "weight_reshard": run.weight_reshard,
        "memory_gib": _memory_gib(simulated.candidate),
        "stages": {
            phase.value: {"layers": list(stages.num_layers), "seconds": list(stages.seconds)}
            for phase, stages in simulated.candidate.stages.items()
        },
    }


def _static_json(static: StaticPlan) -> dict[str, Any]:
    return {
        "layouts": str(static.layout),
        "requests_per_second": static.simulated.requests_per_second,
        "policy": static.policy.value,
        "max_num_batched_tokens": static.max_num_batched_tokens,
        "max_num_seqs": static.max_num_seqs,
        "mean_decode_batch": static.simulated.mean_decode_batch,
        "preemptions": static.simulated.num_evictions,
        "virtual_engines": static.kind.has_virtual_engines,
        "host": None if static.kind.host is None else asdict(static.kind.host),
    }


def _memory_gib(candidate: Candidate) -> dict[str, float]:
    """One device's memory by part, and the host pool of one replica."""
    device = candidate.pools.device
    parts = {
        "weights": device.weights,
        "embeddings": device.embeddings,
        "activations": device.activations,
        "kv": device.kv,
        "host_kv": candidate.pools.host_bytes,
    }
    return {name: round(num_bytes / GIB, 3) for name, num_bytes in parts.items()}


def plan_table(plan: Plan) -> str:
    """The plan as text: seconds by part, memory by part, and why each loser loses."""
    width = max(16, 2 + max(len(layouts) for layouts in _all_layouts(plan)))
    columns = f"{'prefill s':>11}{'decode s':>10}{'switch s':>10}{'batch':>7}{'riding':>8}"
    lines = [f"{'layouts':<{width}}{'req/s':>8}{columns}  why"]
    for simulated in plan.ranking:
        shown = plan.best if simulated.candidate is plan.best.candidate else simulated
        lines.append(
            f"{shown.candidate.run.layouts:<{width}}{shown.requests_per_second:>8.3f}{shown.prefill_seconds:>11.1f}"
            f"{shown.decode_seconds:>10.1f}{shown.transition_seconds:>10.2f}{shown.simulated.mean_decode_batch:>7.0f}"
            f"{shown.simulated.riding_share:>8.0%}  {_why(shown, plan.best)}"
        )
    for candidate in plan.pruned:
        layouts, bound = candidate.run.layouts, candidate.bound
        lines.append(
            f"{layouts:<{width}}{'':>8}{bound.prefill:>11.1f}{bound.decode:>10.1f}{bound.transition:>10.2f}{'':>15}"
            f"  at least {candidate.least_seconds:.1f} s by the closed form"
        )
    for rejected in plan.rejected:
        lines.append(f"{rejected.layouts:<{width}}  cannot run: {textwrap.shorten(rejected.reason, _REASON_WIDTH)}")
    lines += ["", *_stay_lines(plan.best), *_stage_lines(plan.best.candidate)]
    lines += [_memory_line(plan.best.candidate), _static_line(plan)]
    return "\n".join(lines)


def _all_layouts(plan: Plan) -> list[str]:
    ran = [simulated.candidate.run.layouts for simulated in plan.ranking]
    ran += [candidate.run.layouts for candidate in plan.pruned]
    return ran + [rejected.layouts for rejected in plan.rejected]


def _why(simulated: Simulated, best: Simulated) -> str:
    if simulated is best:
        run = simulated.candidate.run
        return f"best; max_num_batched_tokens={run.max_num_batched_tokens}, max_num_seqs={run.max_num_seqs}"
    losses = {
        "prefill": simulated.prefill_seconds - best.prefill_seconds,
        "decode": simulated.decode_seconds - best.decode_seconds,
        "transitions": simulated.transition_seconds - best.transition_seconds,
    }
    part = max(losses, key=lambda name: losses[name])
    return f"{part} +{losses[part]:.1f} s"


def _stage_lines(candidate: Candidate) -> list[str]:
    """A line for each phase that has pipeline stages."""
    return [
        f"stages of {candidate.pair[phase]} in {phase.value}, layers and ms of a typical step: "
        + ", ".join(f"{layers} {1e3 * seconds:.2f}" for layers, seconds in zip(*stages, strict=True))
        for phase, stages in candidate.stages.items()
        if len(stages.seconds) > 1
    ]


def _stay_lines(best: Simulated) -> list[str]:
    """How the best candidate decodes where it is not in its decode layout from the end of prefill on."""
    num_left = best.simulated.num_left_after_stay
    return [] if num_left is None else [f"{best.candidate.run.layouts}: {choice_text(best.candidate.pair, num_left)}"]


def _memory_line(candidate: Candidate) -> str:
    parts = _memory_gib(candidate)
    host = parts.pop("host_kv")
    device = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    return f"memory of {candidate.run.layouts}, GiB a device: {device}; host KV of a replica {host:.1f}"


def _static_line(plan: Plan) -> str:
    static = plan.best_static
    if static is None:
        return "no single layout fits an engine without a host pool"
    engine = "static engine with virtual engines" if static.kind.has_virtual_engines else "static engine"
    return (
        f"best {engine}: {static.layout}, {static.policy.value}, {static.max_num_batched_tokens} tokens a step, "
        f"{static.max_num_seqs} sequences at most, "
        f"{static.simulated.requests_per_second:.3f} requests/s; speed-up over it {plan.speedup:.2f}"
    )

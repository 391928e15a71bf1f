"""The end of a run in figures: `summary.json` for programs, a table for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from seesaw_ds.observe.metrics import Activity, RunMetrics

_GIB = 2**30


def summary(metrics: RunMetrics) -> dict[str, Any]:
    """The figures of a finished run, as written to `summary.json`.

    The first five keys are those of `vllm bench throughput`. `elapsed_time` runs from the end of the start-up to the
    end of the run; `num_requests` are the requests that this run answered with a result, and rates count only these.
    `num_failed` are those answered with an error, `resumed` those that an earlier run had finished. `phase_seconds`
    are means over replicas. `step_seconds` are of the micro-batches and of the decode steps, on the rank that has
    most: with one layout for both phases both kinds are in phase "prefill". `reshard.seconds` is the least of any
    rank's, for the others wait in the exchange for the last to come; bytes are sums over ranks. `layout_changes` are
    choices of a layout to decode in that differ from the plan's, by what the run had measured. Raises RuntimeError
    before `RunMetrics.finish`.
    """
    if metrics.finished is None:
        raise RuntimeError("the run has not finished: call RunMetrics.finish first")
    elapsed = metrics.elapsed_seconds(metrics.finished)
    ranks = [metrics.ranks[rank] for rank in sorted(metrics.ranks)]

    def per_second(count: int) -> float:
        return round(count / elapsed, 6) if elapsed > 0 else 0.0

    return {
        "elapsed_time": round(elapsed, 6),
        "num_requests": metrics.num_done,
        "total_num_tokens": metrics.prompt_tokens + metrics.output_tokens,
        "requests_per_second": per_second(metrics.num_done),
        "tokens_per_second": per_second(metrics.prompt_tokens + metrics.output_tokens),
        "num_failed": metrics.num_failed,
        "resumed": metrics.num_resumed,
        "prompt_tokens": metrics.prompt_tokens,
        "output_tokens": metrics.output_tokens,
        "prompt_tokens_per_second": per_second(metrics.prompt_tokens),
        "output_tokens_per_second": per_second(metrics.output_tokens),
        "phase_seconds": {activity.value: round(metrics.activity_seconds(activity), 6) for activity in Activity},
        "step_seconds": {
            "prefill": round(max((rank.prefill_step_seconds for rank in ranks), default=0.0), 6),
            "decode": round(max((rank.decode_step_seconds for rank in ranks), default=0.0), 6),
        },
        "startup_seconds": {part: round(seconds, 6) for part, seconds in metrics.startup_seconds.items()},
        "transitions": metrics.num_transitions,
        "evictions": metrics.num_evictions,
        "layout_changes": metrics.num_layout_changes,
        "decode_steps": metrics.num_decode_steps,
        "decode_rows": metrics.num_decode_rows,
        "reshard": {
            "seconds": round(min((rank.reshard_seconds for rank in ranks), default=0.0), 6),
            "weight_bytes": sum(rank.weight_bytes for rank in ranks),
            "preloaded_bytes": sum(rank.preloaded_bytes for rank in ranks),
            "kv_exchange_bytes": sum(rank.kv_exchange_bytes for rank in ranks),
            "kv_out_bytes": sum(rank.kv_out_bytes for rank in ranks),
            "kv_in_bytes": sum(rank.kv_in_bytes for rank in ranks),
        },
        "peak_memory_bytes": {
            str(rank): {"device": counters.peak_device_bytes, "host": counters.peak_host_bytes}
            for rank, counters in sorted(metrics.ranks.items())
        },
        "layouts": metrics.layouts,
        "model": metrics.model,
    }


def write_summary(path: Path, figures: dict[str, Any]) -> None:
    """Write `figures` as JSON so that `path` holds either the former file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def format_table(figures: dict[str, Any]) -> str:
    """The figures of `summary` as lines of text: a label, then numbers aligned to the right, each with its unit."""
    rows = [*_throughput_rows(figures), *_phase_rows(figures), *_movement_rows(figures)]
    label_width = max(len(label) for label, *_ in rows)
    widths = [max((len(row[i]) for row in rows if len(row) > i), default=0) for i in (1, 3)]
    lines = [f"{figures['model']}, {figures['layouts']}"]
    for label, *cells in rows:
        columns = [f"{cells[2 * i]:>{widths[i]}} {cells[2 * i + 1]:<5}" for i in range(len(cells) // 2)]
        lines.append("  ".join([f"  {label:<{label_width}}", *columns]).rstrip())
    return "\n".join(lines)


# A row is a label, then a number and its unit, and maybe a second number and its unit.
_Row = tuple[str, ...]


def _throughput_rows(figures: dict[str, Any]) -> list[_Row]:
    def row(label: str, count: int, rate: float, unit: str) -> _Row:
        return (label, f"{count:,}", unit, f"{rate:,.2f}", f"{unit}/s")

    return [
        row("requests done", figures["num_requests"], figures["requests_per_second"], "req"),
        ("requests failed", f"{figures['num_failed']:,}", "req"),
        ("found done before", f"{figures['resumed']:,}", "req"),
        row("prompt tokens", figures["prompt_tokens"], figures["prompt_tokens_per_second"], "tok"),
        row("output tokens", figures["output_tokens"], figures["output_tokens_per_second"], "tok"),
        row("all tokens", figures["total_num_tokens"], figures["tokens_per_second"], "tok"),
        ("elapsed", f"{figures['elapsed_time']:,.2f}", "s"),
    ]


def _phase_rows(figures: dict[str, Any]) -> list[_Row]:
    elapsed = figures["elapsed_time"]
    rows: list[_Row] = []
    for name, seconds in figures["phase_seconds"].items():
        row: _Row = (name, f"{seconds:,.2f}", "s")
        if name == Activity.STARTUP.value:  # not a part of the elapsed time
            rows += [row, *((f"  {part}", f"{time:,.2f}", "s") for part, time in figures["startup_seconds"].items())]
        else:
            rows.append((*row, f"{100 * seconds / elapsed:,.1f}", "%") if elapsed > 0 else row)
    return rows + [(f"{kind} steps", f"{seconds:,.2f}", "s") for kind, seconds in figures["step_seconds"].items()]


def _movement_rows(figures: dict[str, Any]) -> list[_Row]:
    reshard = figures["reshard"]

    def gib(count: int) -> tuple[str, str]:
        return (f"{count / _GIB:,.3f}", "GiB")

    return [
        ("transitions", f"{figures['transitions']:,}", ""),
        ("evictions", f"{figures['evictions']:,}", ""),
        ("re-shard", *gib(reshard["weight_bytes"] + reshard["kv_exchange_bytes"]), f"{reshard['seconds']:,.2f}", "s"),
        ("  weights", *gib(reshard["weight_bytes"])),
        ("    before the change", *gib(reshard["preloaded_bytes"])),
        ("  KV between devices", *gib(reshard["kv_exchange_bytes"])),
        ("KV to host", *gib(reshard["kv_out_bytes"])),
        ("KV from host", *gib(reshard["kv_in_bytes"])),
        *(
            (f"rank {rank} peak: host, device", *gib(peak["host"]), *gib(peak["device"]))
            for rank, peak in figures["peak_memory_bytes"].items()
        ),
    ]

"""The summary: its keys and arithmetic, its file, its table."""

import json

import pytest

from seesaw_ds.observe.metrics import Activity, RankCounters, RunMetrics
from seesaw_ds.observe.report import format_table, summary, write_summary

GIB = 2**30


def finished_metrics():
    metrics = RunMetrics("models/tiny", "P2->T2", num_replicas=1, started=0.0)
    metrics.add_startup("load weights", 1.5)
    metrics.enter(0, Activity.PREFILL, 2.0)
    metrics.enter(0, Activity.TRANSITION, 6.0)
    metrics.enter(0, Activity.DECODE, 7.0)
    metrics.num_resumed = 1
    metrics.request_done(prompt_tokens=1000, output_tokens=60)
    metrics.request_done(prompt_tokens=500, output_tokens=40)
    metrics.request_failed()
    metrics.set_evictions(0, 3)
    metrics.set_layout_changes(0, 1)
    metrics.set_decode_steps(0, 12, 300)
    metrics.set_rank(1, RankCounters(0.5, GIB, 0, GIB // 2, 2 * GIB, GIB, 8 * GIB, GIB, 3.5, 4.25))
    metrics.set_rank(0, RankCounters(0.75, 9, 9, 9, 9, 9, 9, 9))
    metrics.set_rank(0, RankCounters(1.0, GIB, GIB, GIB // 2, 2 * GIB, 3 * GIB, 10 * GIB, GIB // 2, 3.75, 4.0))
    metrics.finish(12.0)
    return metrics


def test_summary():
    assert summary(finished_metrics()) == {
        "elapsed_time": 10.0,
        "num_requests": 2,
        "total_num_tokens": 1600,
        "requests_per_second": 0.2,
        "tokens_per_second": 160.0,
        "num_failed": 1,
        "resumed": 1,
        "prompt_tokens": 1500,
        "output_tokens": 100,
        "prompt_tokens_per_second": 150.0,
        "output_tokens_per_second": 10.0,
        "phase_seconds": {"startup": 2.0, "prefill": 4.0, "decode": 5.0, "transition": 1.0},
        "step_seconds": {"prefill": 3.75, "decode": 4.25},
        "startup_seconds": {"load weights": 1.5},
        "transitions": 1,
        "evictions": 3,
        "layout_changes": 1,
        "decode_steps": 12,
        "decode_rows": 300,
        "reshard": {
            "seconds": 0.5,
            "weight_bytes": 2 * GIB,
            "preloaded_bytes": GIB,
            "kv_exchange_bytes": GIB,
            "kv_out_bytes": 4 * GIB,
            "kv_in_bytes": 4 * GIB,
        },
        "peak_memory_bytes": {
            "0": {"device": 10 * GIB, "host": GIB // 2},
            "1": {"device": 8 * GIB, "host": GIB},
        },
        "layouts": "P2->T2",
        "model": "models/tiny",
    }


def test_summary_of_a_run_with_nothing_to_do():
    metrics = RunMetrics("models/tiny", "T2", num_replicas=2, started=5.0)
    metrics.num_resumed = 10
    metrics.finish(6.0)
    figures = summary(metrics)
    assert (figures["requests_per_second"], figures["tokens_per_second"], figures["resumed"]) == (0.0, 0.0, 10)
    assert figures["phase_seconds"]["startup"] == 1.0
    assert "found done before" in format_table(figures)


def test_summary_needs_the_end():
    with pytest.raises(RuntimeError, match="not finished"):
        summary(RunMetrics("m", "T2", num_replicas=1, started=0.0))


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "out" / "summary.json"
    write_summary(path, {"num_requests": 1})
    write_summary(path, {"num_requests": 2})
    assert json.loads(path.read_text()) == {"num_requests": 2}
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_former_file(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"num_requests": 1})
    with pytest.raises(TypeError):
        write_summary(path, {"num_requests": object()})
    assert json.loads(path.read_text()) == {"num_requests": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_table():
    assert format_table(summary(finished_metrics())).splitlines() == [
        "models/tiny, P2->T2",
        "  requests done                  2 req      0.20 req/s",
        "  requests failed                1 req",
        "  found done before              1 req",
        "  prompt tokens              1,500 tok    150.00 tok/s",
        "  output tokens                100 tok     10.00 tok/s",
        "  all tokens                 1,600 tok    160.00 tok/s",
        "  elapsed                    10.00 s",
        "  startup                     2.00 s",
        "    load weights              1.50 s",
        "  prefill                     4.00 s        40.0 %",
        "  decode                      5.00 s        50.0 %",
        "  transition                  1.00 s        10.0 %",
        "  prefill steps               3.75 s",
        "  decode steps                4.25 s",
        "  transitions                    1",
        "  evictions                      3",
        "  re-shard                   3.000 GiB      0.50 s",
        "    weights                  2.000 GiB",
        "      before the change      1.000 GiB",
        "    KV between devices       1.000 GiB",
        "  KV to host                 4.000 GiB",
        "  KV from host               4.000 GiB",
        "  rank 0 peak: host, device  0.500 GiB    10.000 GiB",
        "  rank 1 peak: host, device  1.000 GiB     8.000 GiB",
    ]

"""The trace file: valid when closed, readable when cut off, and every span where it belongs."""

import json
import logging
import threading

import pytest

from seesaw_ds.observe.timeline import Span, SpanRecorder, TimelineWriter, Track


def read_events(path):
    return json.loads(path.read_text())


def of_kind(events, kind):
    return [event for event in events if event["ph"] == kind]


def thread_names(events):
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}


def test_recorder_measures_the_body_and_drains_once():
    recorder = SpanRecorder()
    with recorder.span(Track.COMPUTE, "prefill", step=3):
        pass
    recorder.add(Track.SWAP_IN, "seq 7", 1.0, 2.5, num_bytes=4096)
    first, second = recorder.drain()
    assert (first.track, first.name, first.args) == ("compute", "prefill", {"step": 3})
    assert 0 <= first.end - first.start < 1
    assert second == Span("swap-in", "seq 7", 1.0, 2.5, {"num_bytes": 4096})
    assert recorder.drain() == []


def test_recorder_keeps_a_span_that_raises():
    recorder = SpanRecorder()
    with pytest.raises(KeyError), recorder.span(Track.WAIT, "peer"):
        raise KeyError
    assert [span.name for span in recorder.drain()] == ["peer"]


def test_disabled_recorder_keeps_nothing():
    recorder = SpanRecorder(enabled=False)
    with recorder.span(Track.COMPUTE, "prefill"):
        recorder.add(Track.WAIT, "peer", 0.0, 1.0)
    assert recorder.drain() == []


def test_recorder_loses_nothing_between_threads():
    recorder = SpanRecorder()

    def record(first):
        for i in range(first, first + 2000):
            recorder.add(Track.COMPUTE, str(i), float(i), float(i + 1))

    threads = [threading.Thread(target=record, args=(2000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    spans = []
    while any(thread.is_alive() for thread in threads):
        spans += recorder.drain()
    spans += recorder.drain()
    assert sorted(int(span.name) for span in spans) == list(range(8000))


def test_spans_become_complete_events_of_their_rank_and_track(tmp_path):
    path = tmp_path / "new folder" / "timeline.json"
    writer = TimelineWriter(path, replica_size=2)
    writer.add_rank_spans(
        3, [Span("compute", "decode", 2.0, 2.25, {"rows": 8}), Span("re-shard", "cells", 3.0, 4.0, {})]
    )
    writer.close()
    writer.close()
    events = read_events(path)
    compute, reshard = of_kind(events, "X")
    assert (compute["pid"], compute["name"], compute["args"]) == (3, "decode", {"rows": 8})
    assert (compute["ts"], compute["dur"]) == (2_000_000, 250_000)
    names = thread_names(events)
    assert names[3, compute["tid"]] == "compute"
    assert names[3, reshard["tid"]] == "re-shard"
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == ["rank 3 (replica 1)"]


def test_processes_are_sorted_by_replica_with_the_scheduler_first(tmp_path):
    path = tmp_path / "timeline.json"
    writer = TimelineWriter(path, replica_size=2)
    span = Span("compute", "x", 0.0, 1.0, {})
    for rank in range(4):
        writer.add_rank_spans(rank, [span])
    for replica in range(2):
        writer.add_phase(replica, "prefill", 0.0, 1.0)
    writer.close()
    events = read_events(path)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    order = {event["pid"]: event["args"]["sort_index"] for event in events if event["name"] == "process_sort_index"}
    assert [names[pid] for pid in sorted(order, key=order.__getitem__)] == [
        "scheduler (replica 0)",
        "rank 0 (replica 0)",
        "rank 1 (replica 0)",
        "scheduler (replica 1)",
        "rank 2 (replica 1)",
        "rank 3 (replica 1)",
    ]


def test_overlapping_spans_get_lanes_of_their_own(tmp_path):
    path = tmp_path / "timeline.json"
    writer = TimelineWriter(path, replica_size=1)
    times = {"a": (0.0, 2.0), "b": (1.0, 3.0), "c": (2.0, 4.0), "d": (3.5, 5.0)}
    writer.add_rank_spans(0, [Span("swap-in", name, *times[name], {}) for name in "ba"])
    writer.add_rank_spans(0, [Span("swap-in", name, *times[name], {}) for name in "cd"])
    writer.close()
    events = read_events(path)
    names = thread_names(events)
    lanes = {event["name"]: names[0, event["tid"]] for event in of_kind(events, "X")}
    assert lanes == {"a": "swap-in", "b": "swap-in 2", "c": "swap-in", "d": "swap-in 2"}


def test_phase_bands_and_counters(tmp_path):
    path = tmp_path / "timeline.json"
    writer = TimelineWriter(path, replica_size=1)
    writer.add_phase(0, "prefill", 0.0, 2.0)
    writer.add_phase(0, "transition", 2.0, 2.5)
    writer.add_phase(0, "decode", 2.5, 4.0)
    writer.add_counters(0, at=1.5, host_pool_fill=0.25, num_running=12)
    writer.close()
    events = read_events(path)
    bands = of_kind(events, "X")
    assert [band["name"] for band in bands] == ["prefill", "transition", "decode"]
    assert len({band["tid"] for band in bands}) == 1
    counters = {event["name"]: (event["ts"], event["args"]) for event in of_kind(events, "C")}
    assert counters == {
        "host pool fill": (1_500_000, {"percent": 25.0}),
        "running sequences": (1_500_000, {"sequences": 12}),
    }


def test_file_of_a_killed_run_lacks_only_the_bracket(tmp_path):
    path = tmp_path / "timeline.json"
    writer = TimelineWriter(path, replica_size=1)
    writer.add_rank_spans(0, [Span("compute", f"step {i}", i, i + 1, {}) for i in range(5)])
    # Not closed, not flushed: what is on disk is all that a kill would leave.
    text = path.read_text()
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    assert len(of_kind(json.loads(text + "]"), "X")) == 5
    writer.close()


def test_empty_timeline_is_valid(tmp_path):
    path = tmp_path / "timeline.json"
    TimelineWriter(path, replica_size=1).close()
    assert read_events(path) == []


def test_unknown_track_is_refused(tmp_path):
    writer = TimelineWriter(tmp_path / "timeline.json", replica_size=1)
    with pytest.raises(ValueError, match="gemm"):
        writer.add_rank_spans(0, [Span("gemm", "x", 0.0, 1.0, {})])
    writer.close()


def test_full_disk_ends_the_timeline_with_one_warning(tmp_path, caplog):
    target = tmp_path / "timeline.json"
    target.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        writer = TimelineWriter(target, replica_size=1)
        for i in range(3):
            writer.add_rank_spans(0, [Span("compute", "x", i, i + 1, {})])
        writer.close()
    assert len(caplog.records) == 1
    assert "the run goes on" in caplog.text

"""Counting: stretches of activity, merging of replicas and ranks."""

import pytest

from seesaw_ds.layout import Phase
from seesaw_ds.observe.metrics import Activity, Interval, RunMetrics


def make_metrics(num_replicas=1, started=100.0):
    return RunMetrics("models/tiny", "P2->T2", num_replicas, started)


def test_activities_are_intervals_that_add_up_to_the_run():
    metrics = make_metrics()
    closed = [
        metrics.enter(0, Activity.PREFILL, 103.0),
        metrics.enter(0, Activity.TRANSITION, 110.0),
        metrics.enter(0, Activity.DECODE, 110.5),
        *metrics.finish(120.0),
    ]
    assert closed == [
        Interval(Activity.STARTUP, 100.0, 103.0),
        Interval(Activity.PREFILL, 103.0, 110.0),
        Interval(Activity.TRANSITION, 110.0, 110.5),
        Interval(Activity.DECODE, 110.5, 120.0),
    ]
    assert {a.value: metrics.activity_seconds(a) for a in Activity} == {
        "startup": 3.0,
        "prefill": 7.0,
        "decode": 9.5,
        "transition": 0.5,
    }
    assert metrics.num_transitions == 1
    assert metrics.elapsed_seconds(now=1e9) == 17.0


def test_going_on_as_before_is_no_new_stretch():
    metrics = make_metrics()
    metrics.enter(0, Activity.PREFILL, 101.0)
    assert metrics.enter(0, Activity.PREFILL, 105.0) is None
    assert metrics.finish(111.0) == [Interval(Activity.PREFILL, 101.0, 111.0)]


def test_phase_names_an_activity():
    assert [Activity.of(phase) for phase in Phase] == [Activity.PREFILL, Activity.DECODE]


def test_replicas_are_averaged_and_the_first_ready_starts_the_clock():
    metrics = make_metrics(num_replicas=2)
    metrics.enter(1, Activity.PREFILL, 102.0)
    metrics.enter(0, Activity.PREFILL, 104.0)
    metrics.enter(0, Activity.TRANSITION, 106.0)
    assert metrics.elapsed_seconds(now=107.0) == 5.0
    metrics.finish(112.0)
    assert metrics.activity_seconds(Activity.PREFILL) == (2.0 + 10.0) / 2
    assert metrics.activity_seconds(Activity.TRANSITION) == 3.0
    assert sum(metrics.activity_seconds(a) for a in Activity) == 12.0
    assert metrics.num_transitions == 1


def test_late_message_does_not_make_time_run_back():
    metrics = make_metrics()
    metrics.enter(0, Activity.PREFILL, 105.0)
    assert metrics.enter(0, Activity.DECODE, 104.0) == Interval(Activity.PREFILL, 105.0, 105.0)
    assert metrics.finish(110.0) == [Interval(Activity.DECODE, 105.0, 110.0)]


def test_nothing_begins_after_the_end():
    metrics = make_metrics()
    metrics.finish(101.0)
    with pytest.raises(RuntimeError, match="replica 0 enters decode"):
        metrics.enter(0, Activity.DECODE, 102.0)


def test_run_that_never_was_ready_has_no_elapsed_time():
    metrics = make_metrics()
    metrics.request_failed()
    metrics.finish(130.0)
    assert metrics.elapsed_seconds(130.0) == 0.0
    assert metrics.activity_seconds(Activity.STARTUP) == 30.0


def test_requests_and_tokens():
    metrics = make_metrics()
    metrics.num_resumed = 4
    metrics.request_done(prompt_tokens=10, output_tokens=3)
    metrics.request_done(prompt_tokens=20, output_tokens=5)
    metrics.request_failed()
    metrics.tokens_computed(prefilled=64)
    metrics.tokens_computed(decoded=9)
    assert (metrics.num_done, metrics.num_failed, metrics.num_answered) == (2, 1, 7)
    assert (metrics.prompt_tokens, metrics.output_tokens) == (30, 8)
    assert (metrics.prefilled_tokens, metrics.decoded_tokens) == (64, 9)


def test_fill_and_evictions_over_replicas():
    metrics = make_metrics(num_replicas=2)
    assert metrics.host_pool_fill == 0.0
    metrics.set_host_blocks(0, used=10, total=40)
    metrics.set_host_blocks(1, used=20, total=40)
    metrics.set_evictions(0, 2)
    metrics.set_evictions(0, 3)
    metrics.set_evictions(1, 1)
    assert metrics.host_pool_fill == 30 / 80
    assert metrics.num_evictions == 4


def test_slowest_process_counts_for_a_part_of_startup():
    metrics = make_metrics()
    for seconds in (2.0, 5.0, 3.0):
        metrics.add_startup("load weights", seconds)
    assert metrics.startup_seconds == {"load weights": 5.0}

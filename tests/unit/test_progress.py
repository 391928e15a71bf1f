"""Progress on a terminal and elsewhere, with a clock that the test moves."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import pytest

from seesaw_ds.observe.metrics import Activity, RunMetrics
from seesaw_ds.observe.progress import ProgressBar, TokenRates, describe, estimate_seconds_left


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


class Terminal:
    """A pseudo-terminal: `stream` is its writing side, `read` gives what was drawn since the last call."""

    def __init__(self, columns):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")

    def read(self):
        # The kernel hands output over in its own time, but in order: read up to a mark.
        self.stream.write("\0")
        self.stream.flush()
        data = b""
        while not data.endswith(b"\0"):
            data += os.read(self._master, 4096)
        return data[:-1].decode()

    def close(self):
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def open_terminal():
    with contextlib.ExitStack() as stack:
        yield lambda columns: stack.enter_context(contextlib.closing(Terminal(columns)))


class BrokenStream(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.fixture
def metrics():
    metrics = RunMetrics("models/tiny", "P2->T2", num_replicas=1, started=0.0)
    metrics.enter(0, Activity.PREFILL, 0.0)
    return metrics


def test_plain_line_every_interval_and_a_last_one(metrics):
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar(metrics, interval_seconds=5.0, stream=stream, clock=clock)
    for _ in range(120):
        clock.now += 0.1
        metrics.tokens_computed(prefilled=100)
        progress.update()
    assert len(stream.getvalue().splitlines()) == 2
    metrics.num_total = 10
    metrics.request_done(1200, 8)
    metrics.set_host_blocks(0, used=3, total=4)
    progress.close()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "0/? requests | prefill | ETA ? | prefill 1,000 decode 0 tok/s | host KV 0% | 0 transitions"
    assert lines[2].startswith("1/10 requests | prefill | ETA 1:48 | prefill 1,0")
    assert lines[2].endswith("| host KV 75% | 0 transitions")


def test_bar_redraws_at_most_ten_times_a_second(metrics, open_terminal):
    terminal, clock = open_terminal(columns=80), Clock()
    progress = ProgressBar(metrics, stream=terminal.stream, clock=clock)
    terminal.read()
    for _ in range(1000):
        clock.now += 0.001
        progress.update()
    assert 8 <= terminal.read().count("\r") <= 10
    metrics.num_total = 4
    metrics.request_done(5, 5)
    progress.close()
    last = terminal.read()
    assert last.startswith("\r1/4 |")
    assert "ETA 0:03" in last
    assert last.endswith("\n")


def test_terminal_without_width_gets_plain_lines(metrics, open_terminal):
    terminal = open_terminal(columns=0)
    ProgressBar(metrics, stream=terminal.stream, clock=Clock()).close()
    assert terminal.read().startswith("0/? requests | prefill")


def test_bar_starts_no_thread(metrics, open_terminal):
    before = threading.active_count()
    ProgressBar(metrics, stream=open_terminal(columns=80).stream, clock=Clock()).close()
    assert threading.active_count() == before


def test_bar_makes_no_semaphore(open_terminal):
    code = (
        "import multiprocessing.synchronize as s, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError\n"
        "s.SemLock.__init__ = refuse\n"
        "from seesaw_ds.observe.progress import ProgressBar\n"
        "from seesaw_ds.observe.metrics import RunMetrics\n"
        "ProgressBar(RunMetrics('m', 'T2', 1, 0.0), stream=sys.stderr).close()\n"
    )
    terminal = open_terminal(columns=80)
    subprocess.run([sys.executable, "-c", code], check=True, stderr=terminal.stream)
    assert "0/? |" in terminal.read()


def test_closed_stderr_does_not_end_the_run(metrics):
    clock = Clock()
    progress = ProgressBar(metrics, stream=BrokenStream(), clock=clock)
    clock.now = 60.0
    progress.update()
    progress.close()


def test_rates_are_of_the_last_ten_seconds():
    rates = TokenRates()
    assert rates.measure(0.0, 0, 0) == (0.0, 0.0)
    for second in range(1, 21):
        measured = rates.measure(second, 100 * second, 0)
    assert measured == (100.0, 0.0)
    for second in range(21, 41):
        measured = rates.measure(second, 2000, 50 * (second - 20))
    assert measured == (0.0, 50.0)


def test_rates_between_two_samples():
    rates = TokenRates()
    rates.measure(0.0, 0, 0)
    assert rates.measure(0.1, 10, 0) == (pytest.approx(100.0), 0.0)


def test_description_names_failures_and_different_activities():
    metrics = RunMetrics("m", "D2P2->D2T2", num_replicas=2, started=0.0)
    metrics.enter(0, Activity.PREFILL, 1.0)
    metrics.enter(0, Activity.TRANSITION, 2.0)
    metrics.enter(0, Activity.DECODE, 3.0)
    metrics.enter(1, Activity.PREFILL, 2.0)
    metrics.request_failed()
    text = describe(metrics, 1234.4, 56.0, now=4.0)
    assert text == ("decode+prefill | 1 failed | ETA ? | prefill 1,234 decode 56 tok/s | host KV 0% | 1 transitions")


def test_line_says_what_start_up_is_at_and_only_then():
    metrics = RunMetrics("m", "P2->T2", num_replicas=2, started=0.0)
    assert describe(metrics, 0, 0, now=1.0).startswith("startup | ")
    metrics.startup_part = "weights"
    assert describe(metrics, 0, 0, now=1.0).startswith("startup: weights | ")
    metrics.enter(0, Activity.PREFILL, at=2.0)
    assert describe(metrics, 0, 0, now=3.0).startswith("prefill+startup | ")


def test_time_left_counts_from_ready_and_only_what_this_run_did(metrics):
    assert estimate_seconds_left(metrics, now=10.0) is None
    metrics.num_total = 100
    metrics.num_resumed = 50
    assert estimate_seconds_left(metrics, now=10.0) is None
    for _ in range(10):
        metrics.request_done(1, 1)
    assert estimate_seconds_left(metrics, now=20.0) == 80.0
    assert "| ETA 2:13:20 |" in describe(metrics, 0, 0, now=2000.0)
    metrics.num_resumed = 90
    assert estimate_seconds_left(metrics, now=20.0) == 0.0

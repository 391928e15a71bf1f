"""The progress of a run on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TextIO

from tqdm import tqdm

from seesaw_ds.observe.metrics import Activity, RunMetrics

_BAR_INTERVAL_SECONDS = 0.1
_WINDOW_SECONDS = 10.0
_SAMPLE_SECONDS = 0.25


class _Bar(tqdm):  # type: ignore[misc]
    # No monitor thread: the bar moves when the frontend says so.
    monitor_interval = 0


# tqdm's own lock is made of a POSIX semaphore too, which would be left over when a process of the run is killed.
_Bar.set_lock(threading.RLock())


class _Sample(NamedTuple):
    time: float
    prefilled_tokens: int
    decoded_tokens: int


class TokenRates:
    """Prefill and decode tokens per second over the last ten seconds, from counters that only rise."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def measure(self, now: float, prefilled_tokens: int, decoded_tokens: int) -> tuple[float, float]:
        """Take the counters at `now` and return both rates; zero until there are two moments to compare."""
        sample = _Sample(now, prefilled_tokens, decoded_tokens)
        if not self._samples or now - self._samples[-1].time >= _SAMPLE_SECONDS:
            self._samples.append(sample)
        # The sample just outside the window stays: it is the one to compare with.
        while len(self._samples) > 1 and now - self._samples[1].time >= _WINDOW_SECONDS:
            self._samples.popleft()
        first = self._samples[0]
        seconds = now - first.time
        if seconds <= 0:
            return 0.0, 0.0
        return (
            (prefilled_tokens - first.prefilled_tokens) / seconds,
            (decoded_tokens - first.decoded_tokens) / seconds,
        )


class ProgressBar:
    """Shows `metrics` on `stream`: requests answered, phase, rates, host-pool fill, transitions, time left.

    `update` may be called as often as there is news. On a terminal it redraws at most ten times a second; elsewhere
    it writes a line every `interval_seconds`, and `close` a last one.
    """

    def __init__(
        self,
        metrics: RunMetrics,
        interval_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._rates = TokenRates()
        self._bar = self._make_bar() if _is_terminal(self._stream) else None
        self._interval_seconds = interval_seconds if self._bar is None else _BAR_INTERVAL_SECONDS
        self._shown_at = clock()
        self._closed = False

    def _make_bar(self) -> _Bar:
        return _Bar(
            total=self._metrics.num_total,
            file=self._stream,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} |{bar:10}| {desc}",
        )

    def update(self) -> None:
        """Show the metrics as they are now, unless they were shown a moment ago."""
        now = self._clock()
        # The rates take every call's counters, so that their window is right whenever a line is due.
        rates = self._measure_rates(now)
        if now - self._shown_at >= self._interval_seconds:
            self._show(rates, now)

    def close(self) -> None:
        """Show the last state and leave the line. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        now = self._clock()
        self._show(self._measure_rates(now), now)
        if self._bar is not None:
            self._bar.close()

    def _measure_rates(self, now: float) -> tuple[float, float]:
        return self._rates.measure(now, self._metrics.prefilled_tokens, self._metrics.decoded_tokens)

    def _show(self, rates: tuple[float, float], now: float) -> None:
        self._shown_at = now
        text = describe(self._metrics, *rates, now)
        # A stderr that nobody reads any more must not end the run.
        with contextlib.suppress(OSError):
            if self._bar is None:
                self._print_line(text)
            else:
                self._draw(self._bar, text)

    def _print_line(self, text: str) -> None:
        total = "?" if self._metrics.num_total is None else f"{self._metrics.num_total}"
        self._stream.write(f"{self._metrics.num_answered}/{total} requests | {text}\n")
        self._stream.flush()

    def _draw(self, bar: _Bar, text: str) -> None:
        bar.total = self._metrics.num_total
        bar.n = self._metrics.num_answered
        bar.set_description_str(text, refresh=False)
        bar.refresh()


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn on `stream`: some terminals of containers are zero columns wide."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


def describe(metrics: RunMetrics, prefill_rate: float, decode_rate: float, now: float) -> str:
    """One line of state, its end the least needed, for a narrow terminal cuts it off.

    What the replicas do, time left, tokens per second of each phase, host-pool fill, transitions.
    """
    activities = "+".join(dict.fromkeys(state.activity.value for state in metrics.replicas))
    if activities == Activity.STARTUP.value and metrics.startup_part is not None:
        activities = f"{activities}: {metrics.startup_part}"
    parts = [
        activities,
        f"ETA {_format_seconds(estimate_seconds_left(metrics, now))}",
        f"prefill {prefill_rate:,.0f} decode {decode_rate:,.0f} tok/s",
        f"host KV {metrics.host_pool_fill:.0%}",
        f"{metrics.num_transitions} transitions",
    ]
    if metrics.num_failed:
        parts.insert(1, f"{metrics.num_failed} failed")
    return " | ".join(parts)


def estimate_seconds_left(metrics: RunMetrics, now: float) -> float | None:
    """Seconds to the end at the mean rate since the run was ready; None while nothing tells.

    The mean, not the recent rate: requests finish in decode only, so the recent rate is zero in each prefill phase.
    """
    if metrics.num_total is None:
        return None
    left = metrics.num_total - metrics.num_answered
    answered = metrics.num_done + metrics.num_failed
    if left <= 0:
        return 0.0
    elapsed = metrics.elapsed_seconds(now)
    return left * elapsed / answered if answered and elapsed > 0 else None


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

"""A run's timeline: spans recorded in every process, written as a Chrome trace by the frontend.

The file is the array form of the trace format, one event a line. Viewers (Perfetto, chrome://tracing) do
not ask for the closing bracket, so the file of a run that was killed opens as it is; the object form with its
"traceEvents" key would not be JSON until its end. Times are `time.monotonic`, one
clock for all processes of a node.
"""

from __future__ import annotations

import enum
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


class Track(str, enum.Enum):
    """A row of the timeline. Ranks have COMPUTE to WAIT, schedulers PHASE and SCHEDULE."""

    COMPUTE = "compute"
    SWAP_OUT = "swap-out"
    SWAP_IN = "swap-in"
    RESHARD = "re-shard"
    WAIT = "wait"
    PHASE = "phase"
    SCHEDULE = "schedule"


class Span(NamedTuple):
    """Something that took from `start` to `end` (seconds, `time.monotonic`). `args` are shown with it, as JSON."""

    track: str
    name: str
    start: float
    end: float
    args: dict[str, Any]


class SpanRecorder:
    """Collects the spans of one process, from any of its threads. A recorder that is not `enabled` keeps none."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, track: Track, name: str, start: float, end: float, **args: Any) -> None:
        """Record a span whose times are known."""
        if not self._enabled:
            return
        with self._lock:
            self._spans.append(Span(track.value, name, start, end, args))

    @contextmanager
    def span(self, track: Track, name: str, **args: Any) -> Iterator[None]:
        """Record the time spent in the body, also when it raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(track, name, start, time.monotonic(), **args)

    def drain(self) -> list[Span]:
        """The spans recorded since the last call."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


class TimelineWriter:
    """Writes the trace file as spans come in, so its memory does not grow with the run. Not thread-safe.

    A process of the trace is a rank (pid = rank) or the scheduler of a replica (pid from `SCHEDULER_PID` on).
    Raises OSError when `path` cannot be opened; errors of writing end the timeline with a warning, not the run.
    """

    SCHEDULER_PID = 1_000_000

    def __init__(self, path: Path, replica_size: int) -> None:
        self._replica_size = replica_size
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what was written survives the process.
        self._file = path.open("wb", buffering=0)
        self._lanes: dict[tuple[int, Track], list[float]] = {}
        self._named_pids: set[int] = set()
        self._failed = False
        self._separator = "\n"
        self._write_bytes(b"[")

    def add_rank_spans(self, rank: int, spans: Iterable[Span]) -> None:
        """Write what the recorder of worker `rank` gave."""
        self._add_spans(rank, spans)

    def add_scheduler_spans(self, replica: int, spans: Iterable[Span]) -> None:
        """Write what the recorder of a replica's scheduler gave."""
        self._add_spans(self.SCHEDULER_PID + replica, spans)

    def add_phase(self, replica: int, name: str, start: float, end: float) -> None:
        """Write a band of the phase track: "prefill", "decode", "transition" or "startup"."""
        self.add_scheduler_spans(replica, [Span(Track.PHASE.value, name, start, end, {})])

    def add_counters(self, replica: int, at: float, host_pool_fill: float, num_running: int) -> None:
        """Write the host pool's fill (0 to 1) and the number of running sequences at one moment."""
        pid = self.SCHEDULER_PID + replica
        events = self._name_process(pid)
        for name, unit, value in (
            ("host pool fill", "percent", 100 * host_pool_fill),
            ("running sequences", "sequences", num_running),
        ):
            event = {"ph": "C", "pid": pid, "name": name, "ts": _microseconds(at), "args": {unit: value}}
            events.append(event)
        self._write(events)

    def close(self) -> None:
        """Close the array and the file. A second call does nothing."""
        if self._file.closed:
            return
        self._write_bytes(b"\n]\n")
        self._file.close()

    def _add_spans(self, pid: int, spans: Iterable[Span]) -> None:
        events = self._name_process(pid)
        for span in sorted(spans, key=lambda span: span.start):
            track = Track(span.track)
            tid = self._choose_lane(pid, track, span, events)
            events.append(
                {
                    "ph": "X",
                    "pid": pid,
                    "tid": tid,
                    "name": span.name,
                    "ts": _microseconds(span.start),
                    "dur": _microseconds(span.end - span.start),
                    "args": span.args,
                }
            )
        self._write(events)

    def _choose_lane(self, pid: int, track: Track, span: Span, events: list[dict[str, Any]]) -> int:
        """The tid for `span`: spans of a track that overlap go to lanes of their own, for viewers drop them else."""
        lanes = self._lanes.setdefault((pid, track), [])
        lane = next((i for i, busy_until in enumerate(lanes) if busy_until <= span.start), len(lanes))
        # Lanes of a track are neighbours in the viewer; tid 0 would be taken for the idle thread.
        tid = 1 + 1000 * list(Track).index(track) + lane
        if lane == len(lanes):
            lanes.append(span.end)
            name = track.value if lane == 0 else f"{track.value} {lane + 1}"
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        lanes[lane] = span.end
        return tid

    def _name_process(self, pid: int) -> list[dict[str, Any]]:
        """The metadata events of a process, the first time it appears; a replica's scheduler stands above its ranks."""
        if pid in self._named_pids:
            return []
        self._named_pids.add(pid)
        if pid >= self.SCHEDULER_PID:
            replica = pid - self.SCHEDULER_PID
            name = f"scheduler (replica {replica})"
            sort_index = replica * (self._replica_size + 1)
        else:
            replica = pid // self._replica_size
            name = f"rank {pid} (replica {replica})"
            sort_index = pid + replica + 1
        return [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}},
            {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": sort_index}},
        ]

    def _write(self, events: list[dict[str, Any]]) -> None:
        if not events:
            return
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        self._write_bytes(f"{self._separator}{lines}".encode())
        self._separator = ",\n"

    def _write_bytes(self, data: bytes) -> None:
        if self._failed:
            return
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            self._failed = True
            logger.warning("timeline=%s: %s; the timeline ends here, the run goes on", self._path, error)

"""Copies that run beside the compute: one thread, and on CUDA one stream, per direction."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from seesaw_ds.parallel.device import new_stream, on_stream, record_event, set_device, wait_event

if TYPE_CHECKING:
    from seesaw_ds.parallel.device import Event

Copy = Callable[[], int]
Record = Callable[[str, float, float, int], None]


class _Job(NamedTuple):
    copy: Copy
    after: Event | None
    on_done: Callable[[], None]


class _InFlight(NamedTuple):
    """A copy whose call has returned; on CUDA it runs between two events, on CPU it is done."""

    on_done: Callable[[], None]
    nbytes: int
    start_seconds: float
    end_seconds: float
    start_event: Event | None
    end_event: Event | None


class CopyEngine:
    """Runs copies one after the other, in the order of `submit`, and tells when each is complete.

    Callbacks come from the engine's thread. `record` gets (name, start, end, bytes) of every copy, in seconds of
    time.perf_counter. After an exception, which `on_error` gets, no further copy runs.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        on_error: Callable[[BaseException], None],
        record: Record | None = None,
    ) -> None:
        self._name = name
        self._device = device
        self._on_error = on_error
        self._record = record
        self._stream = new_stream(device)
        # The next copy starts on the stream before one ends, so that the bus never waits for Python.
        self._max_in_flight = 1 if self._stream is None else 2
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, copy: Copy, after: Event | None, on_done: Callable[[], None]) -> None:
        """Queue `copy`, which starts its work on the current stream and returns its bytes.

        The work waits for `after` (None: its data is there already). `on_done` is called when it is complete.
        """
        self._jobs.put(_Job(copy, after, on_done))

    def drain(self) -> None:
        """Wait until every copy submitted so far is complete."""
        is_done = threading.Event()
        self.submit(lambda: 0, after=None, on_done=is_done.set)
        is_done.wait()

    def close(self) -> None:
        """Finish the queued copies and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            set_device(self._device)
            with on_stream(self._stream):
                self._run_jobs()
        except BaseException as error:
            self._on_error(error)

    def _run_jobs(self) -> None:
        in_flight: deque[_InFlight] = deque()
        closing = False
        while not closing or in_flight:
            if in_flight and (closing or len(in_flight) == self._max_in_flight or self._jobs.empty()):
                self._finish(in_flight.popleft())
                continue
            job = self._jobs.get()
            if job is None:
                closing = True
            else:
                in_flight.append(self._start(job))

    def _start(self, job: _Job) -> _InFlight:
        wait_event(job.after)
        start_seconds = time.perf_counter()
        start_event = record_event(self._device, timing=True)
        nbytes = job.copy()
        end_event = record_event(self._device, timing=True)
        return _InFlight(job.on_done, nbytes, start_seconds, time.perf_counter(), start_event, end_event)

    def _finish(self, copy: _InFlight) -> None:
        start_seconds, end_seconds = copy.start_seconds, copy.end_seconds
        if copy.start_event is not None and copy.end_event is not None:
            copy.end_event.synchronize()
            end_seconds = time.perf_counter()
            start_seconds = end_seconds - copy.start_event.elapsed_time(copy.end_event) / 1000
        if self._record is not None and copy.nbytes:
            self._record(self._name, start_seconds, end_seconds, copy.nbytes)
        copy.on_done()

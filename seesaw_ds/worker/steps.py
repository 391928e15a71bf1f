"""Tells the scheduler of finished steps, and the timeline when they ran, without the main thread waiting.

On CUDA the main thread only queues work: it starts the copy of a step's tokens into pinned memory, and a thread waits
for the copy, sends the tokens, and turns the step's events into times. On CPU a step is over when its call returns.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from seesaw_ds.engine.messages import StepDone
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.observe.timeline import SpanRecorder, Track
from seesaw_ds.parallel import device as devices
from seesaw_ds.worker.reports import Reporter


@dataclass
class StepRecord:
    """One step under way. `sampled` is set by who runs it; `answers` says whether this rank speaks for the step."""

    step_id: int
    name: str
    args: dict[str, int]
    answers: bool
    sampled: SampledTokens | None = None


class StepReporter:
    """Follows steps from their first kernel to their tokens' arrival. `seconds` adds up what they took, by name."""

    def __init__(
        self, reporter: Reporter, spans: SpanRecorder, device: torch.device, on_error: Callable[[BaseException], None]
    ) -> None:
        self._reporter = reporter
        self._spans = spans
        self._device = device
        self._on_error = on_error
        self._is_cuda = devices.is_cuda(device)
        self.seconds: dict[str, float] = {}
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step reporter", daemon=True)
        if self._is_cuda:
            # Event times are differences: this pair ties them to the host's clock.
            event: Any = devices.record_event(device, timing=True)
            event.synchronize()
            self._last_event = event
            self._last_time = time.monotonic()
            self._thread.start()

    @contextmanager
    def step(self, step_id: int, name: str, answers: bool, **args: int):
        """Run a step in the body, which sets `sampled` of the record that this gives."""
        record = StepRecord(step_id, name, args, answers)
        start_event = devices.record_event(self._device, timing=True)
        start = time.monotonic()
        yield record
        if not self._is_cuda:
            self._add_span(record, start, time.monotonic())
            self._answer(record, record.sampled.to_host() if record.sampled is not None else [])
            return
        host = None
        if record.answers and record.sampled is not None:
            packed = record.sampled.pack()
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
        self._queue.put((record, host, start_event, devices.record_event(self._device, timing=True)))

    def _run(self) -> None:
        try:
            devices.set_device(self._device)
            while (item := self._queue.get()) is not None:
                self._finish(*item)
        except BaseException as error:
            self._on_error(error)

    def _finish(self, record: StepRecord, host: torch.Tensor | None, start_event: Any, end_event: Any) -> None:
        end_event.synchronize()
        self._answer(record, record.sampled.unpack(host) if record.sampled is not None and host is not None else [])
        start = self._last_time + self._last_event.elapsed_time(start_event) / 1000
        end = start + start_event.elapsed_time(end_event) / 1000
        # From event to event: the difference of two close ones is exact, of two hours apart it is not.
        self._last_event, self._last_time = end_event, end
        self._add_span(record, start, end)

    def _add_span(self, record: StepRecord, start: float, end: float) -> None:
        self._spans.add(Track.COMPUTE, record.name, start, end, step=record.step_id, **record.args)
        self.seconds[record.name] = self.seconds.get(record.name, 0.0) + end - start

    def _answer(self, record: StepRecord, rows: list) -> None:
        if not record.answers:
            return
        logprobs = [logprob for _, logprob in rows]
        has_logprobs = any(logprob is not None for logprob in logprobs)
        token_ids = [token_id for token_id, _ in rows]
        self._reporter.result(StepDone(record.step_id, token_ids, logprobs if has_logprobs else None))

    def close(self) -> None:
        """Report everything that is under way."""
        if self._is_cuda:
            self._queue.put(None)
            self._thread.join()

"""The frontend process: hands a batch file's sequences to the replicas' schedulers, and writes results as they finish.

    workers -- PUSH (spans, counters) --> this process <-- ROUTER/DEALER --> schedulers, one a replica

A replica asks for input when its waiting queue is short; `input_sharing` says who gets how much of the file.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from pathlib import Path

import msgspec
import zmq

from seesaw_ds.batch.job import BatchJob, count_requests
from seesaw_ds.batch.results import open_results
from seesaw_ds.batch.text import load_codec
from seesaw_ds.config import max_model_len
from seesaw_ds.engine import addresses
from seesaw_ds.engine import messages as wire
from seesaw_ds.engine.input_sharing import InputSharing
from seesaw_ds.engine.lifeline import Lifeline
from seesaw_ds.engine.preflight import run_manifest
from seesaw_ds.engine.process_id import ProcessId
from seesaw_ds.engine.process_spec import ProcessSpec, read_spec
from seesaw_ds.errors import UserError
from seesaw_ds.observe.metrics import Activity, Interval, RunMetrics
from seesaw_ds.observe.progress import ProgressBar
from seesaw_ds.observe.report import format_table, summary, write_summary
from seesaw_ds.observe.timeline import TimelineWriter
from seesaw_ds.requests import SequenceRequest
from seesaw_ds.shapes import model_shape, read_hf_config

POLL_MILLISECONDS = 500
GOODBYE_SECONDS = 20.0
# So many at a time, between looks at the sockets.
READ_AHEAD_SEQUENCES = 8


class Frontend:
    """Owns the batch job, the metrics and what a user sees of the run."""

    def __init__(self, spec: ProcessSpec, lifeline: Lifeline) -> None:
        run = spec.config
        self._run = run
        self._lifeline = lifeline
        self._layouts = run.layout_pair
        shape = model_shape(read_hf_config(run.model))
        longest = max_model_len(run, shape)
        self._journal = open_results(Path(run.output), run_manifest(run), overwrite=spec.overwrite)
        self._metrics = RunMetrics(run.model, str(self._layouts), self._layouts.dp, time.monotonic())
        self._metrics.num_resumed = self._journal.num_done
        self._num_requests = count_requests(Path(run.input))
        self._metrics.num_total = self._num_requests
        self._timeline = None
        if run.timeline is not None:
            self._timeline = _open_timeline(run.timeline, self._layouts.replica_size)
        self._job = BatchJob(
            Path(run.input),
            self._journal,
            load_codec(Path(run.model)),
            self._metrics,
            model=run.model,
            seed=run.seed,
            max_model_len=longest,
            vocab_size=shape.vocab_size,
        )
        self._progress = ProgressBar(self._metrics)
        self._context = zmq.Context()
        self._schedulers = self._context.socket(zmq.ROUTER)
        self._schedulers.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._schedulers.bind(addresses.frontend(spec.run_id))
        self._telemetry = self._context.socket(zmq.PULL)
        self._telemetry.setsockopt(zmq.RCVHWM, 0)
        self._telemetry.bind(addresses.telemetry(spec.run_id))
        self._encoder = msgspec.msgpack.Encoder()
        self._from_scheduler = msgspec.msgpack.Decoder(wire.SchedulerMessage)
        self._from_worker = msgspec.msgpack.Decoder(wire.WorkerTelemetry)
        self._tokens_seen = [(0, 0)] * self._layouts.dp
        self._num_ready = 0
        self._byes = 0
        self._ahead: deque[SequenceRequest] = deque()
        self._sharing = InputSharing(self._layouts.dp)

    def run(self) -> None:
        """Serve until every line has its record; then stop the other processes and report."""
        while not self._job.is_done or self._num_ready < self._layouts.dp:
            self._receive(0 if self._read_ahead() else POLL_MILLISECONDS)
            self._progress.update()
        self._journal.close()
        self._progress.close()
        for interval, replica in zip(self._metrics.finish(time.monotonic()), range(self._layouts.dp), strict=True):
            self._band(replica, interval)
        self._say_goodbye()
        figures = summary(self._metrics)
        write_summary(Path(self._run.output).with_name("summary.json"), figures)
        print(format_table(figures), flush=True)

    def _read_ahead(self) -> bool:
        """Read and tokenize a few requests while nobody asks, above all while the workers start; False: enough."""
        room = self._layouts.dp * self._run.max_num_seqs - len(self._ahead)
        if room <= 0 or self._job.is_exhausted:
            return False
        self._ahead += self._job.take(min(room, READ_AHEAD_SEQUENCES))
        return True

    def _share_input(self) -> None:
        """Answer the replicas that asked, as far as it is their turn."""
        while (share := self._sharing.next_share(self._num_left())) is not None:
            replica, num_sequences = share
            requests = [self._ahead.popleft() for _ in range(min(num_sequences, len(self._ahead)))]
            requests += self._job.take(num_sequences - len(requests))
            self._sharing.give(replica, requests)
            self._send(replica, wire.AddSequences(requests, is_last=self._job.is_exhausted and not self._ahead))

    def _num_left(self) -> int:
        """Sequences that no replica has yet; a request that is not read counts as one."""
        unread = self._num_requests - self._metrics.num_resumed - self._job.num_opened
        # A file may have lines twice, or be read to its end before that shows.
        return len(self._ahead) + (0 if self._job.is_exhausted else max(1, unread))

    def _say_goodbye(self) -> None:
        # From here on the processes end one after the other, in good order.
        self._lifeline.stop()
        for replica in range(self._layouts.dp):
            self._send(replica, wire.Finish())
        deadline = time.monotonic() + GOODBYE_SECONDS
        while self._byes < self._layouts.dp and time.monotonic() < deadline:
            self._receive(POLL_MILLISECONDS)
        self._receive(0)
        if self._timeline is not None:
            self._timeline.close()
        self._context.destroy(linger=1000)

    def _receive(self, milliseconds: int) -> None:
        poller = zmq.Poller()
        poller.register(self._schedulers, zmq.POLLIN)
        poller.register(self._telemetry, zmq.POLLIN)
        poller.poll(milliseconds)
        while self._schedulers.poll(0):
            identity, data = self._schedulers.recv_multipart()
            self._on_scheduler(int(identity), self._from_scheduler.decode(data))
        while self._telemetry.poll(0):
            self._on_worker(self._from_worker.decode(self._telemetry.recv()))

    def _on_scheduler(self, replica: int, message: wire.SchedulerMessage) -> None:
        if isinstance(message, wire.WantInput):
            self._sharing.ask(replica, message.num_sequences)
            self._share_input()
        elif isinstance(message, wire.Results):
            for result in message.results:
                self._job.add_result(result)
                self._sharing.finish(replica, result.seq_id)
        elif isinstance(message, wire.NewTokens):
            if self._job.add_tokens(message.seq_id, message.token_ids, message.logprobs):
                self._send(replica, wire.AbortSequences([message.seq_id]))
                self._sharing.finish(replica, message.seq_id)
        elif isinstance(message, wire.Progress):
            self._on_progress(replica, message)
        elif isinstance(message, wire.PhaseChanged):
            self._enter(replica, Activity.TRANSITION, message.start)
            self._enter(replica, Activity.of(message.to), message.end)
        elif isinstance(message, wire.SchedulerReady):
            self._num_ready += 1
            self._enter(replica, Activity.PREFILL, time.monotonic())
        else:
            self._byes += 1

    def _on_progress(self, replica: int, progress: wire.Progress) -> None:
        self._metrics.set_host_blocks(replica, progress.host_blocks_used, progress.host_blocks_total)
        self._metrics.set_evictions(replica, progress.num_evictions)
        self._metrics.set_layout_changes(replica, progress.num_layout_changes)
        self._metrics.set_decode_steps(replica, progress.num_decode_steps, progress.num_decode_rows)
        prompt_tokens, output_tokens = self._tokens_seen[replica]
        self._metrics.tokens_computed(progress.prompt_tokens - prompt_tokens, progress.output_tokens - output_tokens)
        self._tokens_seen[replica] = (progress.prompt_tokens, progress.output_tokens)
        if self._timeline is not None:
            fill = progress.host_blocks_used / progress.host_blocks_total
            self._timeline.add_counters(replica, time.monotonic(), fill, progress.num_running)

    def _on_worker(self, message: wire.WorkerTelemetry) -> None:
        if isinstance(message, wire.StartingUp):
            self._metrics.startup_part = message.part
            return
        if isinstance(message, wire.StartUp):
            self._lifeline.watch(message.process)
            for part, seconds in message.seconds.items():
                self._metrics.add_startup(part, seconds)
            return
        self._metrics.set_rank(message.rank, message.counters)
        if self._timeline is not None:
            self._timeline.add_rank_spans(message.rank, message.spans)

    def _enter(self, replica: int, activity: Activity, at: float) -> None:
        if self._metrics.finished is None:
            self._band(replica, self._metrics.enter(replica, activity, at))

    def _band(self, replica: int, interval: Interval | None) -> None:
        if self._timeline is not None and interval is not None:
            self._timeline.add_phase(replica, interval.activity.value, interval.start, interval.end)

    def _send(self, replica: int, message: wire.SchedulerRequest) -> None:
        self._schedulers.send_multipart([str(replica).encode(), self._encoder.encode(message)])


def _open_timeline(path: str, replica_size: int) -> TimelineWriter:
    try:
        return TimelineWriter(Path(path), replica_size)
    except OSError as error:
        raise UserError(f"timeline={path!r}: cannot be written ({error.strerror}); give another path") from None


def main() -> None:
    """Entry point of the process; its spec comes on standard input."""
    spec = read_spec()
    lifeline = Lifeline(spec.run_id, ProcessId.of("frontend"))
    lifeline.install_signal_handlers()
    for process in spec.watch:
        lifeline.watch(process)
    try:
        Frontend(spec, lifeline).run()
    except UserError as error:
        lifeline.fail(str(error))
    except Exception as error:
        lifeline.fail(f"frontend: {error!r}", details=traceback.format_exc())


if __name__ == "__main__":
    main()

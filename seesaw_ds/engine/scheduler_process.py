"""One replica's scheduler process: a loop over three sockets. Imports no torch, so it starts in a moment.

frontend  <- DEALER ->  this process  -- PUSH, one a worker -->  workers
                                      <-- PULL, shared --------
"""

from __future__ import annotations

import logging
import time
import traceback

import msgspec
import zmq

from seesaw_ds.engine import addresses
from seesaw_ds.engine import messages as wire
from seesaw_ds.engine.core import EngineCore
from seesaw_ds.engine.decode_layout import DecodeLayout
from seesaw_ds.engine.lifeline import Lifeline
from seesaw_ds.engine.process_id import ProcessId
from seesaw_ds.engine.process_spec import ProcessSpec, read_spec
from seesaw_ds.errors import UserError
from seesaw_ds.layout import Phase
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.sched.scheduler import Scheduler
from seesaw_ds.shapes import model_shape, read_hf_config

PROGRESS_SECONDS = 0.2
POLL_MILLISECONDS = 1000
# Longest wait for the workers' goodbyes; nobody watches this process any more.
GOODBYE_SECONDS = 15.0


class SchedulerProcess:
    """Owns the sockets and the engine core of one replica."""

    def __init__(self, spec: ProcessSpec, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._config = spec.config
        layouts = spec.config.layout_pair
        self._layouts = layouts
        first_rank = spec.replica * layouts.replica_size
        self._context = zmq.Context()
        self._frontend = self._context.socket(zmq.DEALER)
        self._frontend.setsockopt(zmq.IDENTITY, str(spec.replica).encode())
        self._frontend.connect(addresses.frontend(spec.run_id))
        self._results = self._context.socket(zmq.PULL)
        self._results.bind(addresses.results(spec.run_id, spec.replica))
        self._commands = []
        for rank in range(first_rank, first_rank + layouts.replica_size):
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.bind(addresses.commands(spec.run_id, rank))
            self._commands.append(socket)
        self._encoder = msgspec.msgpack.Encoder()
        self._from_worker = msgspec.msgpack.Decoder(wire.WorkerResult)
        self._from_frontend = msgspec.msgpack.Decoder(wire.SchedulerRequest)
        self._core: EngineCore | None = None
        self._decode_layout: DecodeLayout | None = None
        self._is_waiting_for_input = False
        self._finish_deadline: float | None = None
        self._phase = Phase.PREFILL
        self._switch_start = 0.0
        self._last_step = 0.0
        self._switch_bytes = 0
        self._last_progress = 0.0
        self._workers_gone = 0

    def run(self) -> None:
        """Serve until the frontend says Finish and every worker has said goodbye."""
        self._wait_for_workers()
        poller = zmq.Poller()
        poller.register(self._results, zmq.POLLIN)
        poller.register(self._frontend, zmq.POLLIN)
        while self._workers_gone < len(self._commands):
            if self._finish_deadline is None:
                self._work()
            elif time.monotonic() > self._finish_deadline:
                break
            self._receive(poller)
        self._to_frontend(wire.SchedulerBye())
        self._context.destroy(linger=5000)

    def _wait_for_workers(self) -> None:
        ready = [self._from_worker.decode(self._results.recv()) for _ in self._commands]
        first = ready[0]
        for message in ready:
            assert isinstance(message, wire.WorkerReady)
            self._lifeline.watch(message.process)
        # On CPU each rank goes by the memory that it saw free, so that the pools may differ.
        num_gpu_blocks = min(message.num_gpu_blocks for message in ready)
        limits = SchedulerLimits(
            block_size=self._config.kv_block_size,
            num_gpu_blocks=num_gpu_blocks,
            num_host_blocks=first.num_host_blocks,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            prefill_stages=self._layouts.prefill.pp,
            decode_stages=self._layouts.decode.pp,
            mixes_steps=self._config.mixed_steps,
            is_static=self._layouts.is_static,
            preload=first.preload,
        )
        shape = model_shape(read_hf_config(self._config.model))
        chooser = on_action = None
        if self._config.may_stay:
            self._decode_layout = DecodeLayout(self._config, shape, limits)
            chooser, on_action = self._decode_layout.choice, self._decode_layout.times.issued
        scheduler = Scheduler(limits, shape.pairs_per_token, self._config.expected_output_tokens, chooser)
        self._core = EngineCore(scheduler, len(self._commands), self._to_workers, on_action)
        self._to_frontend(wire.SchedulerReady(num_gpu_blocks, first.num_host_blocks))

    def _receive(self, poller: zmq.Poller) -> None:
        """Wait for messages, then take all that have come."""
        events = dict(poller.poll(POLL_MILLISECONDS))
        if self._frontend in events:
            while self._frontend.poll(0):
                self._on_frontend(self._from_frontend.decode(self._frontend.recv()))
        if self._results in events:
            while self._results.poll(0):
                self._on_worker(self._from_worker.decode(self._results.recv()))

    def _work(self) -> None:
        core = self._core
        assert core is not None
        core.run_ahead()
        if self._decode_layout is not None:
            self._decode_layout.log_choices()
        results = core.take_results()
        if results:
            self._to_frontend(wire.Results(results))
        for news in core.take_new_tokens():
            self._to_frontend(news)
        if core.scheduler.wants_input and not self._is_waiting_for_input:
            self._is_waiting_for_input = True
            self._to_frontend(wire.WantInput(self._config.max_num_seqs))
        if time.monotonic() - self._last_progress > PROGRESS_SECONDS:
            self._send_progress()

    def _on_frontend(self, message: wire.SchedulerRequest) -> None:
        core = self._core
        assert core is not None
        if isinstance(message, wire.AddSequences):
            self._is_waiting_for_input = False
            core.add_all(message.requests)
            if message.is_last:
                core.scheduler.close_input()
        elif isinstance(message, wire.AbortSequences):
            for seq_id in message.seq_ids:
                core.abort(seq_id)
        else:
            self._finish_deadline = time.monotonic() + GOODBYE_SECONDS
            self._lifeline.stop()
            self._send_progress()
            self._to_workers(wire.Stop())

    def _on_worker(self, message: wire.WorkerResult) -> None:
        core = self._core
        assert core is not None
        if isinstance(message, wire.StepDone):
            self._last_step = time.monotonic()
            if self._decode_layout is not None:
                self._decode_layout.times.step_ended(message.step_id, self._last_step)
            core.on_step(message)
        elif isinstance(message, wire.SwapOutDone):
            core.on_swap_out(message)
        elif isinstance(message, wire.LoadDone):
            core.on_load(message)
        elif isinstance(message, wire.StoreDone):
            core.on_store(message)
        elif isinstance(message, wire.SwitchDone):
            self._on_switch(message)
        elif isinstance(message, wire.WorkerBye):
            self._workers_gone += 1

    def _on_switch(self, message: wire.SwitchDone) -> None:
        assert self._core is not None
        self._switch_bytes += message.num_bytes
        if self._core.on_switch(message):
            self._phase = message.to
            # The switch is issued while the last steps still run: the transition begins when they are done.
            start, end = max(self._switch_start, self._last_step), time.monotonic()
            if self._decode_layout is not None:
                self._decode_layout.times.switched(message.to, end - start)
            self._to_frontend(wire.PhaseChanged(message.to, start, end, self._switch_bytes))
            self._switch_bytes = 0
            self._send_progress()

    def _send_progress(self) -> None:
        core = self._core
        assert core is not None
        stats = core.scheduler.stats()
        self._last_progress = time.monotonic()
        self._to_frontend(
            wire.Progress(
                phase=self._phase,
                num_waiting=stats.num_waiting,
                num_running=stats.num_running,
                num_host=stats.num_host,
                host_blocks_used=stats.num_host_blocks_used,
                host_blocks_total=stats.num_host_blocks,
                num_evictions=stats.num_evictions,
                num_layout_changes=0 if self._decode_layout is None else self._decode_layout.num_changes,
                num_decode_steps=core.num_decode_steps,
                num_decode_rows=core.num_decode_rows,
                prompt_tokens=core.num_prompt_tokens,
                output_tokens=core.num_output_tokens,
            )
        )

    def _to_workers(self, command: wire.Command) -> None:
        if isinstance(command, wire.Switch):
            self._switch_start = time.monotonic()
        data = self._encoder.encode(command)
        for socket in self._commands:
            socket.send(data)

    def _to_frontend(self, message: wire.SchedulerMessage) -> None:
        self._frontend.send(self._encoder.encode(message))


def main() -> None:
    """Entry point of the process; its spec comes on standard input."""
    spec = read_spec()
    name = f"scheduler {spec.replica}"
    logging.basicConfig(level=logging.WARNING, format=f"[{name}] %(levelname)s %(name)s: %(message)s")
    logging.getLogger("seesaw_ds").setLevel(logging.INFO)
    lifeline = Lifeline(spec.run_id, ProcessId.of(name))
    lifeline.install_signal_handlers()
    for process in spec.watch:
        lifeline.watch(process)
    try:
        SchedulerProcess(spec, lifeline).run()
    except UserError as error:
        lifeline.fail(str(error))
    except Exception as error:
        lifeline.fail(f"{name}: {error!r}", details=traceback.format_exc())


if __name__ == "__main__":
    main()

"""One rank: takes its scheduler's commands in order, computes, and reports.

The main thread computes. Two copy engines run beside it: "swap-out" moves KV to the host pool (finished prompts,
evictions), "swap-in" brings it back. A command that copies is only handed over here; its result is reported by
the copy engine's thread when the copy is done.
"""

from __future__ import annotations

import gc
import resource
import time
import traceback
from collections.abc import Sequence
from functools import partial

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import zmq
from deepspeed.accelerator import get_accelerator

from seesaw_ds.engine import addresses
from seesaw_ds.engine import messages as wire
from seesaw_ds.engine.lifeline import Lifeline
from seesaw_ds.engine.process_id import ProcessId
from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.kv.swap import CopyEngine
from seesaw_ds.kv.transfer import copy_to_device, copy_to_host
from seesaw_ds.layout import Phase
from seesaw_ds.observe.metrics import RankCounters
from seesaw_ds.observe.timeline import SpanRecorder, Track
from seesaw_ds.parallel import device as devices
from seesaw_ds.requests import SequenceRequest
from seesaw_ds.worker.engine import Engine, StartUpTimer
from seesaw_ds.worker.reports import Reporter
from seesaw_ds.worker.steps import StepReporter

TELEMETRY_SECONDS = 0.5


class Worker:
    """Executes commands on one device."""

    def __init__(self, engine: Engine, run_id: str, reporter: Reporter, lifeline: Lifeline, is_traced: bool) -> None:
        self._engine = engine
        self._rank = dist.get_rank()
        self._reporter = reporter
        self._lifeline = lifeline
        self._requests: dict[int, SequenceRequest] = {}
        self._device = devices.device()
        self._spans = SpanRecorder(is_traced)
        self._copied_bytes = {Track.SWAP_OUT: 0, Track.SWAP_IN: 0}
        self._weight_bytes = 0
        self._kv_exchange_bytes = 0
        self._reshard_seconds = 0.0
        self._last_telemetry = time.monotonic()
        self._phase = Phase.PREFILL
        self._steps = StepReporter(reporter, self._spans, self._device, self._fail)
        self._swap_out = CopyEngine(Track.SWAP_OUT.value, self._device, self._fail, self._record_copy)
        self._swap_in = CopyEngine(Track.SWAP_IN.value, self._device, self._fail, self._record_copy)
        self._commands = reporter.context.socket(zmq.PULL)
        self._commands.setsockopt(zmq.RCVHWM, 0)
        self._commands.connect(addresses.commands(run_id, self._rank))
        self._decoder = msgspec.msgpack.Decoder(wire.Command)

    def run(self, timer: StartUpTimer) -> None:
        """Serve commands until Stop."""
        # A full collection walks through all that was imported: a fifth of a second in which nothing is launched.
        gc.collect()
        gc.freeze()
        sizes = self._engine.pool_sizes
        me = ProcessId.of(f"worker rank {self._rank}")
        self._reporter.telemetry(wire.StartUp(me, timer.seconds))
        preload = self._engine.preload
        size = None if preload is None else preload.size
        self._reporter.result(wire.WorkerReady(me, sizes.num_gpu_blocks, sizes.num_host_blocks, size))
        with torch.inference_mode():
            while True:
                command = self._next_command()
                if isinstance(command, wire.Stop):
                    break
                self._execute(command)
                if time.monotonic() - self._last_telemetry > TELEMETRY_SECONDS:
                    self._send_telemetry()
        self._close()

    def _next_command(self) -> wire.Command:
        start = time.monotonic()
        while not self._commands.poll(round(TELEMETRY_SECONDS * 1000)):
            self._send_telemetry()
        command = self._decoder.decode(self._commands.recv())
        self._spans.add(Track.WAIT, "wait", start, time.monotonic())
        return command

    def _execute(self, command: wire.Command) -> None:
        if isinstance(command, wire.Decode):
            self._run_decode(command)
        elif isinstance(command, wire.Prefill):
            self._run_prefill(command)
        elif isinstance(command, wire.Start):
            self._start(command)
        elif isinstance(command, wire.Load):
            self._start_load(command)
        elif isinstance(command, wire.Store):
            self._start_store(command)
        elif isinstance(command, wire.StartPreload):
            assert self._engine.preload is not None
            self._engine.preload.begin(command.preload.num_rounds, command.preload.gpu_block_ids)
        elif isinstance(command, wire.Switch):
            self._switch(command)
        elif isinstance(command, wire.Drop):
            for seq_id in command.seq_ids:
                del self._requests[seq_id]

    def _run_prefill(self, command: wire.Prefill) -> None:
        for request in command.requests:
            self._requests[request.seq_id] = request
        num_tokens = sum(chunk.num_tokens for chunk in command.chunks)
        with self._steps.step(command.step_id, "prefill", self._answers(Phase.PREFILL), tokens=num_tokens) as step:
            step.sampled = self._engine.prefill.run(command, self._requests)
        self._advance_preload()
        leaving = [chunk for chunk in command.chunks if chunk.host_block_ids]
        if leaving:
            blocks = [block for chunk in leaving for block in chunk.block_ids]
            host_blocks = [block for chunk in leaving for block in chunk.host_block_ids]
            self._submit_out(blocks, host_blocks, wire.SwapOutDone(self._rank, [chunk.seq_id for chunk in leaving]))

    def _run_decode(self, command: wire.Decode) -> None:
        with self._steps.step(command.step_id, "decode", self._answers(self._phase)) as step:
            step.sampled = self._engine.decode[self._phase].run(command)

        self._advance_preload()

    def _advance_preload(self) -> None:
        if self._engine.preload is not None:
            self._engine.preload.advance()

    def _answers(self, phase: Phase) -> bool:
        """Whether this rank speaks for the steps of `phase`: one rank of the last stage does."""
        groups = self._engine.state[phase]
        return groups.is_last_stage and groups.coords.tp == 0

    def _start(self, start: wire.Start) -> None:
        activate = start.activate
        self._set_slot(activate.seq_id, activate.slot, activate.num_tokens, activate.gpu_block_ids, [start.token_id])

    def _start_load(self, load: wire.Load) -> None:
        swap = load.swap
        self._set_slot(swap.seq_id, swap.slot, swap.num_tokens, swap.gpu_block_ids, load.output_token_ids)
        self._swap_in.submit(
            partial(copy_to_device, self._engine.host_pool, swap.host_block_ids, self._pool, swap.gpu_block_ids),
            after=devices.record_event(self._device),
            on_done=partial(self._reporter.result, wire.LoadDone(self._rank, swap.seq_id)),
        )

    def _set_slot(
        self, seq_id: int, slot: int, num_tokens: int, blocks: tuple[int, ...], output_token_ids: list[int]
    ) -> None:
        # Its last owner's tokens may still be under way, and must not come after this one's.
        self._engine.feedback[self._phase].read(np.array([slot]))
        self._engine.slots.set(slot, num_tokens, blocks, self._requests[seq_id], output_token_ids)

    def _start_store(self, store: wire.Store) -> None:
        evict = store.evict
        self._submit_out(evict.gpu_block_ids, evict.host_block_ids, wire.StoreDone(self._rank, evict.seq_id))

    def _submit_out(self, blocks: Sequence[int], host_blocks: Sequence[int], message: wire.WorkerResult) -> None:
        self._swap_out.submit(
            partial(copy_to_host, self._pool, blocks, self._engine.host_pool, host_blocks),
            after=devices.record_event(self._device),
            on_done=partial(self._reporter.result, message),
        )

    @property
    def _pool(self) -> DeviceKVPool:
        """The KV pool as the phase sees it."""
        return self._engine.pools[self._phase]

    def _switch(self, switch: wire.Switch) -> None:
        start = time.monotonic()
        engine, to = self._engine, switch.to
        engine.feedback[self._phase].read_all()
        for link in engine.links:
            link.drain()
        # Copies that were given earlier read and write blocks in the old layout.
        self._swap_out.drain()
        self._swap_in.drain()
        with self._spans.span(Track.RESHARD, f"to {to.value}"):
            weight_bytes = engine.reshard.run(to)
            kv_bytes = engine.kv_exchange.run(to, switch.gpu_block_ids)
            engine.slots.share(engine.state.sampling_rank(self._phase), engine.state.replica)
            devices.synchronize_stream(self._device)
        engine.state.activate(to)
        self._phase = to
        self._reshard_seconds += time.monotonic() - start
        self._weight_bytes += weight_bytes
        self._kv_exchange_bytes += kv_bytes
        self._reporter.result(wire.SwitchDone(self._rank, to, weight_bytes + kv_bytes))

    def _record_copy(self, name: str, start: float, end: float, num_bytes: int) -> None:
        track = Track(name)
        self._copied_bytes[track] += num_bytes
        self._spans.add(track, name, start, end, bytes=num_bytes)

    def _send_telemetry(self) -> None:
        self._last_telemetry = time.monotonic()
        accelerator = get_accelerator()
        counters = RankCounters(
            reshard_seconds=self._reshard_seconds,
            weight_bytes=self._weight_bytes,
            preloaded_bytes=0 if self._engine.preload is None else self._engine.preload.num_bytes,
            kv_exchange_bytes=self._kv_exchange_bytes,
            kv_out_bytes=self._copied_bytes[Track.SWAP_OUT],
            kv_in_bytes=self._copied_bytes[Track.SWAP_IN],
            peak_device_bytes=accelerator.max_memory_allocated() if devices.is_cuda(self._device) else 0,
            peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            prefill_step_seconds=self._steps.seconds.get("prefill", 0.0),
            decode_step_seconds=self._steps.seconds.get("decode", 0.0),
        )
        self._reporter.telemetry(wire.Telemetry(self._rank, self._spans.drain(), counters))

    def _fail(self, error: BaseException) -> None:
        details = "".join(traceback.format_exception(error))
        self._lifeline.fail(f"worker rank {self._rank}: {error!r}", details=details)

    def _close(self) -> None:
        # From here on the run's processes end one after the other. None of the workers may while another still watches.
        self._lifeline.stop()
        dist.barrier()
        self._steps.close()
        self._swap_out.close()
        self._swap_in.close()
        self._engine.drain()
        self._send_telemetry()
        self._reporter.result(wire.WorkerBye(self._rank))
        self._commands.close()
        self._reporter.close()
        # Last, for giving back tens of GiB of registered memory takes seconds, and nobody waits for it.
        self._engine.close()

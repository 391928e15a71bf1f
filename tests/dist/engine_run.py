"""Run the whole engine on forked gloo ranks, without launcher, files and tokenizer: sequences in, results out.

Every part is the real one (workers, schedulers, messages over ZeroMQ) but for the frontend and the lifeline. The
schedulers and the frontend are threads of the ranks, so that whatever goes wrong ends a rank and fails the test::

    rank 0                              rank 2 (of D2P2->D2T2)
    worker | scheduler 0 | frontend     worker | scheduler 1
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import torch.distributed as dist
import zmq
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from harness import run_ranks
from seesaw_ds.config import RunConfig
from seesaw_ds.engine import addresses
from seesaw_ds.engine import messages as wire
from seesaw_ds.engine.process_spec import ProcessSpec
from seesaw_ds.engine.scheduler_process import SchedulerProcess
from seesaw_ds.requests import SequenceRequest, SequenceResult
from seesaw_ds.sched.stats import SchedulerStats
from seesaw_ds.worker.reports import Reporter
from seesaw_ds.worker.engine import Engine, StartUpTimer
from seesaw_ds.worker.setup import build_engine
from seesaw_ds.worker.worker import Worker


@dataclass
class EngineOutcome:
    """What a run gave. `stats` are each scheduler's at its end, `weight_bytes` those of all ranks and transitions,
    `preloaded_bytes` what of them the ranks had before.
    """

    results: dict[int, SequenceResult] = field(default_factory=dict)
    new_tokens: dict[int, list[int]] = field(default_factory=dict)
    stats: list[SchedulerStats] = field(default_factory=list)
    num_transitions: int = 0
    weight_bytes: int = 0
    preloaded_bytes: int = 0

    @property
    def num_evictions(self) -> int:
        return sum(stats.num_evictions for stats in self.stats)


def run_engine(
    run: RunConfig,
    requests: Sequence[SequenceRequest],
    abort_after: Mapping[int, int] | None = None,
    timeout: float = 120.0,
) -> EngineOutcome:
    """Generate `requests` on as many forked CPU ranks as `run` has.

    `abort_after` says after how many tokens to abort a sequence; it must be one with stop strings, for only those
    are reported token by token. Raises RankFailure when a rank fails.
    """
    run_id = f"test-{uuid.uuid4().hex}"
    layouts = run.layout_pair
    by_rank = run_ranks(
        layouts.world_size, _serve, run, run_id, list(requests), dict(abort_after or {}), timeout=timeout
    )
    outcome: EngineOutcome = by_rank[0][0]
    outcome.stats = [stats for _, stats in by_rank if stats is not None]
    assert len(outcome.stats) == layouts.dp
    return outcome


def build_cpu_engine(run: RunConfig) -> Engine:
    """Build this rank's engine as a worker does, on the CPU even where there are GPUs."""
    set_accelerator(CPU_Accelerator())
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    return build_engine(run, StartUpTimer())


def _serve(
    run: RunConfig, run_id: str, requests: list[SequenceRequest], abort_after: dict[int, int]
) -> tuple[EngineOutcome | None, SchedulerStats | None]:
    rank = dist.get_rank()
    replica, replica_rank = divmod(rank, run.layout_pair.replica_size)
    scheduler = frontend = None
    if replica_rank == 0:
        scheduler = _ThreadResult(_serve_schedule, ProcessSpec(run_id, run, False, replica, []))
    if rank == 0:
        frontend = _ThreadResult(_Frontend(run_id, run.layout_pair.dp, requests, abort_after).run)
    engine = build_cpu_engine(run)
    Worker(engine, run_id, Reporter(run_id, replica), _StandInLifeline(), is_traced=True).run(StartUpTimer())
    return frontend and frontend.get(), scheduler and scheduler.get()


def _serve_schedule(spec: ProcessSpec) -> SchedulerStats:
    process = _CheckedScheduler(spec, _StandInLifeline())
    process.run()
    return process.stats()


class _ThreadResult:
    """A function running in a thread; an exception in it ends the process, for the main thread waits for messages."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            self._result = function(*args)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def get(self) -> Any:
        self._thread.join()
        return self._result


class _StandInLifeline:
    """Watches nobody (the harness ends all ranks when one dies) and shows a failure before it ends the rank."""

    def watch(self, process: object) -> None:
        pass

    def stop(self) -> None:
        pass

    def fail(self, message: str, exit_code: int = 1, details: str = "") -> NoReturn:
        print(f"{details}\n{message}", file=sys.stderr, flush=True)
        os._exit(exit_code)


class _CheckedScheduler(SchedulerProcess):
    """Checks its pools after every round, and ends only when nothing is in flight, so that it must be empty then."""

    _finish: wire.Finish | None = None

    def _on_frontend(self, message: wire.SchedulerRequest) -> None:
        if isinstance(message, wire.Finish):
            self._finish = message
        else:
            super()._on_frontend(message)

    def _work(self) -> None:
        super()._work()
        self._core.scheduler.check_integrity()
        if self._finish is not None and self._core.scheduler.is_done:
            super()._on_frontend(self._finish)

    def stats(self) -> SchedulerStats:
        return self._core.scheduler.stats()


class _Frontend:
    """Hands out sequences as replicas ask for them, and collects what they report."""

    def __init__(
        self, run_id: str, num_replicas: int, requests: list[SequenceRequest], abort_after: dict[int, int]
    ) -> None:
        self._requests = iter(requests)
        self._open = {request.seq_id for request in requests}
        self._abort_after = abort_after
        self._num_replicas = num_replicas
        self._num_byes = 0
        self._preloaded_bytes: dict[int, int] = {}
        self._outcome = EngineOutcome()
        self._decoder = msgspec.msgpack.Decoder(wire.SchedulerMessage)
        self._context = zmq.Context()
        self._schedulers = self._context.socket(zmq.ROUTER)
        self._schedulers.bind(addresses.frontend(run_id))
        self._telemetry = self._context.socket(zmq.PULL)
        self._telemetry.bind(addresses.telemetry(run_id))

    def run(self) -> EngineOutcome:
        poller = zmq.Poller()
        poller.register(self._schedulers, zmq.POLLIN)
        poller.register(self._telemetry, zmq.POLLIN)
        is_finishing = False
        while self._num_byes < self._num_replicas:
            events = dict(poller.poll())
            if self._telemetry in events:
                self._on_telemetry(msgspec.msgpack.decode(self._telemetry.recv(), type=wire.WorkerTelemetry))
            if self._schedulers in events:
                identity, data = self._schedulers.recv_multipart()
                self._on_message(identity, self._decoder.decode(data))
            if not self._open and not is_finishing:
                is_finishing = True
                for replica in range(self._num_replicas):
                    self._send(str(replica).encode(), wire.Finish())
        self._context.destroy(linger=0)
        self._outcome.preloaded_bytes = sum(self._preloaded_bytes.values())
        return self._outcome

    def _on_telemetry(self, message: wire.WorkerTelemetry) -> None:
        if isinstance(message, wire.Telemetry):
            self._preloaded_bytes[message.rank] = message.counters.preloaded_bytes

    def _on_message(self, identity: bytes, message: wire.SchedulerMessage) -> None:
        if isinstance(message, wire.WantInput):
            batch = list(itertools.islice(self._requests, message.num_sequences))
            self._send(identity, wire.AddSequences(batch, is_last=len(batch) < message.num_sequences))
        elif isinstance(message, wire.Results):
            for result in message.results:
                assert result.seq_id in self._open, f"sequence {result.seq_id} ended twice, or after its abort"
                self._open.remove(result.seq_id)
                self._outcome.results[result.seq_id] = result
        elif isinstance(message, wire.NewTokens):
            self._on_new_tokens(identity, message)
        elif isinstance(message, wire.PhaseChanged):
            self._outcome.num_transitions += 1
            self._outcome.weight_bytes += message.num_bytes
        elif isinstance(message, wire.SchedulerBye):
            self._num_byes += 1

    def _on_new_tokens(self, identity: bytes, message: wire.NewTokens) -> None:
        tokens = self._outcome.new_tokens.setdefault(message.seq_id, [])
        tokens.extend(message.token_ids)
        limit = self._abort_after.get(message.seq_id)
        if limit is not None and len(tokens) >= limit and message.seq_id in self._open:
            self._open.remove(message.seq_id)
            self._send(identity, wire.AbortSequences([message.seq_id]))

    def _send(self, identity: bytes, message: wire.SchedulerRequest) -> None:
        self._schedulers.send_multipart([identity, msgspec.msgpack.encode(message)])

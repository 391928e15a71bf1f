"""A rank's process from start to end: join the others, build the engine, serve."""

from __future__ import annotations

import logging
import traceback

import msgspec
import torch.distributed as dist

from seesaw_ds.config import RunConfig
from seesaw_ds.engine.lifeline import Lifeline
from seesaw_ds.engine.messages import StartingUp
from seesaw_ds.engine.process_id import ProcessId
from seesaw_ds.errors import UserError
from seesaw_ds.worker.engine import StartUpTimer
from seesaw_ds.worker.reports import Reporter
from seesaw_ds.worker.setup import build_engine, init_distributed
from seesaw_ds.worker.worker import Worker

logger = logging.getLogger(__name__)


def run_worker(
    run: RunConfig, run_id: str, lifeline: Lifeline, processes: list[ProcessId], timer: StartUpTimer
) -> None:
    """Serve as one rank until the run ends. `processes` are this one and those it started."""
    rank = -1
    try:
        with timer.part("rendezvous"):
            init_distributed()
        rank = dist.get_rank()
        _watch_everybody(lifeline, processes)
        reporter = Reporter(run_id, rank // run.layout_pair.replica_size)
        if rank == 0:
            timer.on_part = lambda part: reporter.telemetry(StartingUp(part))
        engine = build_engine(run, timer)
        Worker(engine, run_id, reporter, lifeline, is_traced=run.timeline is not None).run(timer)
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()  # NCCL would wait here for graphs that hold its communicators
    except UserError as error:
        lifeline.fail(str(error))
    except Exception as error:
        lifeline.fail(f"worker rank {rank}: {error!r}", details=traceback.format_exc())


def _watch_everybody(lifeline: Lifeline, processes: list[ProcessId]) -> None:
    """Tell the other ranks of this rank's processes, and watch theirs."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"processes-{dist.get_rank()}", msgspec.json.encode(processes).decode())
    for rank in range(dist.get_world_size()):
        for process in msgspec.json.decode(store.get(f"processes-{rank}"), type=list[ProcessId]):
            lifeline.watch(process)

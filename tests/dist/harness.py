"""Run a function on several gloo ranks of this machine, and show what the failing rank saw.

Ranks are forked from the pytest process: whatever the test module imported is there at once, and functions and
arguments need no pickling. Forking is safe here because a rank computes on one thread, so it never waits for an
OpenMP pool that stayed in the parent, and because the parent holds neither a process group nor a CUDA context
(both are checked).
"""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PR_SET_PDEATHSIG = 1
_EXIT_SECONDS = 5.0


class RankFailure(AssertionError):
    """A rank raised, died or did not finish in time; the text holds its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``function(*args)`` on `world_size` processes that form the default gloo group.

    Returns what each rank returned (it must pickle), by rank. `timeout` is in seconds, for the whole call. Raises
    RankFailure when a rank fails, after killing the others: with its traceback, or with every rank's stack when the
    time is over.
    """
    assert not dist.is_initialized(), "the parent of forked ranks must not hold a process group"
    assert not torch.cuda.is_initialized(), "the parent of forked ranks must not hold a CUDA context"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[ForkProcess] = []
        connections: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(rank, world_size, Path(folder), timeout, sender, function, args)
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: see above
                    process.start()
                sender.close()
                processes.append(process)
                connections.append(receiver)
            results = _collect(processes, connections, Path(folder), time.monotonic() + timeout)
            for process in processes:
                process.join(_EXIT_SECONDS)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for connection in connections:
                connection.close()


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives a killed pytest
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler belongs to the parent
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    stack_file = _stack_path(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stack_file)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(*args)
        dist.barrier()
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    dist.destroy_process_group()


def _collect(processes: list[ForkProcess], connections: list[Connection], folder: Path, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        waiting = {connections[rank]: rank for rank in range(len(processes)) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(_describe_hang(processes, sorted(waiting.values()), folder))
        failures = []
        for connection in ready:
            rank = waiting[connection]
            try:
                passed, value = connection.recv()
            except EOFError:
                processes[rank].join(_EXIT_SECONDS)
                passed, value = False, f"died without a word, exit code {processes[rank].exitcode}"
            if passed:
                results[rank] = value
            else:
                failures.append(f"rank {rank} of {len(processes)}: {value}")
        if failures:
            raise RankFailure("\n".join(failures))
    return [results[rank] for rank in range(len(processes))]


def _describe_hang(processes: list[ForkProcess], unfinished: list[int], folder: Path) -> str:
    for rank in unfinished:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    stacks = [f"rank {rank}:\n{_stack_path(folder, rank).read_text()}" for rank in unfinished]
    return f"ranks {unfinished} of {len(processes)} did not finish in time; their stacks:\n" + "\n".join(stacks)


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"

"""Processes of this node, told apart even when the kernel gives a dead one's pid to another. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LAUNCH_NAME = "launcher (deepspeed.launcher.launch)"
RUNNER_NAME = "launcher (deepspeed)"
LAUNCHER_NAMES = (LAUNCH_NAME, RUNNER_NAME)


class _Stat(NamedTuple):
    state: str
    parent_pid: int
    create_time: int


def _read_stat(pid: int) -> _Stat | None:
    """What /proc says of a process; None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # "pid (command) state ppid ... starttime": the command may hold spaces and parentheses, nothing after it does.
    fields = text.rpartition(")")[2].split()
    return _Stat(state=fields[0], parent_pid=int(fields[1]), create_time=int(fields[19]))


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process of this node and what to call it. `create_time` counts clock ticks from boot to its start.

    Ticks from boot, unlike a time of day, are the same for every reader when the clock is set in the meantime.
    """

    name: str
    pid: int
    create_time: int

    @classmethod
    def of(cls, name: str, pid: int | None = None) -> ProcessId:
        """The process that has `pid` now (None: this one). Raises RuntimeError when there is none."""
        pid = os.getpid() if pid is None else pid
        stat = _read_stat(pid)
        if stat is None:
            raise RuntimeError(f"{name} (pid {pid}) is not running")
        return cls(name=name, pid=pid, create_time=stat.create_time)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"

    def is_alive(self) -> bool:
        """Whether this very process runs: not ended, not a zombie, its pid not taken by another."""
        stat = _read_stat(self.pid)
        return stat is not None and stat.create_time == self.create_time and stat.state not in ("Z", "X")

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal if it is alive."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


def launcher_ancestors() -> list[ProcessId]:
    """The DeepSpeed launcher's processes above this one, nearest first: the node's launcher, then the command.

    Empty when this process was not started by the launcher, or when the launcher has died already.
    """
    found = []
    stat = _read_stat(os.getpid())
    while stat is not None and stat.parent_pid > 0:
        pid = stat.parent_pid
        stat = _read_stat(pid)
        name = _launcher_name(_command_line(pid))
        if stat is not None and name is not None:
            found.append(ProcessId(name=name, pid=pid, create_time=stat.create_time))
    return found


def missing_launcher(launchers: Iterable[ProcessId]) -> str | None:
    """The name of the launcher's process that `launcher_ancestors` should have found and did not, if any.

    Processes whose parent dies get another one, so a launcher that died before this process looked is not among its
    ancestors. Only the node's launcher is expected where the command was given on another node.
    """
    found = {process.name: process for process in launchers}
    if LAUNCH_NAME not in found:
        return LAUNCH_NAME
    from_another_node = any(item.startswith("--node_rank") for item in _command_line(found[LAUNCH_NAME].pid))
    return None if RUNNER_NAME in found or from_another_node else RUNNER_NAME


def ranks_of(launcher: ProcessId, first_rank: int) -> list[ProcessId]:
    """The ranks that the node's launcher has started, in order; `first_rank` is the lowest rank of this node.

    Ended ones are among them until the launcher notices.
    """
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    children = [
        (stat.create_time, pid) for pid in pids if (stat := _read_stat(pid)) and stat.parent_pid == launcher.pid
    ]
    return [
        ProcessId(f"worker rank {rank}", pid, create_time)
        for rank, (create_time, pid) in enumerate(sorted(children), start=first_rank)
    ]


def _command_line(pid: int) -> list[str]:
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return os.fsdecode(data).split("\0")[:-1]


def _launcher_name(argv: list[str]) -> str | None:
    target = _python_target(argv)
    if target == "deepspeed.launcher.launch" or target.endswith("/deepspeed/launcher/launch.py"):
        return LAUNCH_NAME
    if target == "deepspeed.launcher.runner" or target.rpartition("/")[2] == "deepspeed":
        return RUNNER_NAME
    return None


def _python_target(argv: list[str]) -> str:
    """The module or script that a command line runs, through a Python interpreter or by itself."""
    if not argv or not argv[0].rpartition("/")[2].startswith("python"):
        return argv[0] if argv else ""
    rest = iter(argv[1:])
    for argument in rest:
        if argument in ("-m", "-X", "-W"):
            value = next(rest, "")
            if argument == "-m":
                return value
        elif not argument.startswith("-"):
            return argument
    return ""

"""Runs of ``deepspeed launch/run.py`` on CPU ranks: starting them, looking into them, and what they leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import yaml

from ports import free_port
from seesaw_ds.engine.process_id import LAUNCH_NAME, RUNNER_NAME

REPOSITORY = Path(__file__).parents[2]
# In the environment of every process of a run, so that orphans are found too.
MARK = "SEESAW_TEST_RUN"
# On a busy machine; an idle one needs a tenth of it.
PATIENCE_SECONDS = 240.0

Value = TypeVar("Value")


def wait_until(look: Callable[[], Value], what: str, seconds: float = PATIENCE_SECONDS) -> Value:
    """The first true value of `look`; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return value


class Run:
    """A started run of two ranks with `settings` as its config. `folder` takes what it says and its temporary files.

    What it says goes to a file, not a pipe, for a pipe's reader would wait for orphans too.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *arguments: str) -> None:
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(dict(settings)))
        self.mark = uuid.uuid4().hex
        self.port = free_port()
        self.temporary = folder / f"tmp-{self.mark}"
        self.temporary.mkdir(parents=True)
        self._output_path = folder / f"output-{self.mark}.txt"
        self._shared_files: set[str] = set()
        bin_folder = Path(sys.executable).parent
        launcher = [bin_folder / "deepspeed", "--num_accelerators=2", f"--master_port={self.port}"]
        with self._output_path.open("wb") as output:
            self.command = subprocess.Popen(
                [*launcher, "launch/run.py", "--config", config, *arguments],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
                    "DS_ACCELERATOR": "cpu",
                    "OMP_NUM_THREADS": "1",
                    "TMPDIR": str(self.temporary),
                    MARK: self.mark,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What all processes have said so far."""
        return self._output_path.read_text(errors="replace")

    @property
    def error_lines(self) -> list[str]:
        """The lines that name an error to the user."""
        return [line for line in self.output.splitlines() if line.startswith("error:")]

    def wait(self) -> int:
        """The exit code, once every process has ended."""
        exit_code = self.command.wait(PATIENCE_SECONDS)
        wait_until(lambda: not self.processes(), "processes that outlive the launcher", 30.0)
        return exit_code

    def processes(self) -> dict[str, psutil.Process]:
        """The live processes of the run, under the names that its messages give them."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    # A process about to become another still has its parent's name: the first of a name counts.
                    found.setdefault(_role(process), process)
            except psutil.Error:
                continue  # it ended, or is not ours
        return found

    def wait_for(self, role: str) -> psutil.Process:
        """The process of that name, once it is there."""
        return wait_until(lambda: self.processes().get(role), f"{role}\n{self.output}")

    def note_shared_files(self) -> None:
        """Remember which files in shared memory the run has mapped now, to look for them later."""
        for process in self.processes().values():
            text = _read_proc(process, "maps")
            self._shared_files.update(re.findall(r"/dev/shm/\S+", text))

    def leftovers(self, within_seconds: float = 5.0) -> list[str]:
        """What is still there of the run after that time: processes, sockets, shared memory, temporary files.

        A process that has ended may hold its sockets for a moment more.
        """
        deadline = time.monotonic() + within_seconds
        while (found := self._find_leftovers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _find_leftovers(self) -> list[str]:
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return [
            *self.processes(),
            *(line for line in sockets if "seesaw-" in line and f"-{self.port}-" in line),
            *(path for path in self._shared_files if Path(path).exists()),
            *(str(path) for path in self.temporary.iterdir() if not _is_probe(path)),
        ]

    def end(self) -> None:
        """Kill what is left."""
        while processes := self.processes():
            for process in processes.values():
                process.kill()
            time.sleep(0.05)
        self.command.wait()


def _is_probe(path: Path) -> bool:
    """Whether `path` is how Python's tempfile tries a folder out: a bare random name, a word in it, removed at once.

    A process that is killed just between the two leaves it behind.
    """
    is_named_so = re.fullmatch("[a-z0-9_]{8}", path.name) is not None
    return is_named_so and path.is_file() and path.read_bytes() in (b"", b"blat")


StartRun = Callable[..., Run]
"""Starts a run that the test's end ends; the arguments are those of `Run`."""


@dataclass(frozen=True)
class Job:
    """A run that has ended: its settings, exit code, output files, what it said and what it left behind."""

    settings: Mapping[str, object]
    exit_code: int
    output: Path
    summary: Path
    timeline: Path
    said: str
    leftovers: list[str]


def handles_sigterm(process: psutil.Process) -> bool:
    """Whether a rank is past the start of its interpreter: from then on it notices what happens to others."""
    caught = re.search(r"SigCgt:\s*(\w+)", _read_proc(process, "status"))
    return caught is not None and bool(int(caught[1], 16) & 1 << signal.SIGTERM - 1)


def _read_proc(process: psutil.Process, name: str) -> str:
    try:
        return Path(f"/proc/{process.pid}/{name}").read_text()
    except OSError:
        return ""


def _role(process: psutil.Process) -> str:
    arguments = process.cmdline()
    text = " ".join(arguments)
    if rank := re.search(r"--local_rank=(\d+)", text):
        return f"worker rank {rank[1]}"
    if "seesaw_ds.engine.frontend" in arguments:
        return "frontend"
    if "seesaw_ds.engine.scheduler_process" in arguments:
        return "scheduler 0"
    if "deepspeed.launcher.launch" in arguments:
        return LAUNCH_NAME
    return RUNNER_NAME if "--num_accelerators=2" in arguments else f"{text} (pid {process.pid})"

"""What a process of a run is told when it starts: settings, who it is, and what to watch."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from seesaw_ds.config import RunConfig
from seesaw_ds.engine.process_id import ProcessId


class ProcessSpec(msgspec.Struct, frozen=True):
    """Passed to the frontend and scheduler processes on their standard input, as msgpack.

    `replica` counts data-parallel replicas (schedulers only); `watch` are the processes that must not outlive or be
    outlived by this one.
    """

    run_id: str
    config: RunConfig
    overwrite: bool
    replica: int
    watch: list[ProcessId]


def start_process(module: str, spec: ProcessSpec) -> subprocess.Popen[bytes]:
    """Run ``python -m module`` with `spec` on its standard input."""
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(msgspec.msgpack.encode(spec))
    process.stdin.close()
    return process


def read_spec() -> ProcessSpec:
    """The spec that `start_process` wrote."""
    return msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProcessSpec)

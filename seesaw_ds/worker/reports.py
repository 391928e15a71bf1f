"""What a worker says: results to its scheduler, telemetry to the frontend. Any thread may speak."""

from __future__ import annotations

import threading

import msgspec
import zmq

from seesaw_ds.engine import addresses
from seesaw_ds.engine.messages import WorkerResult, WorkerTelemetry


class Reporter:
    """Sends messages from any thread; each thread gets sockets of its own, for ZeroMQ sockets must not be shared.

    Messages of one thread arrive in order; those of different threads may overtake each other.
    """

    def __init__(self, run_id: str, replica: int) -> None:
        self.context = zmq.Context()
        self._results_address = addresses.results(run_id, replica)
        self._telemetry_address = addresses.telemetry(run_id)
        self._local = threading.local()

    def result(self, message: WorkerResult) -> None:
        """To the replica's scheduler."""
        self._send("results", self._results_address, message)

    def telemetry(self, message: WorkerTelemetry) -> None:
        """To the frontend."""
        self._send("telemetry", self._telemetry_address, message)

    def _send(self, name: str, address: str, message: object) -> None:
        socket = getattr(self._local, name, None)
        if socket is None:
            socket = self.context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(address)
            setattr(self._local, name, socket)
        socket.send(msgspec.msgpack.encode(message))

    def close(self) -> None:
        """Send what is queued, for at most five seconds."""
        self.context.destroy(linger=5000)

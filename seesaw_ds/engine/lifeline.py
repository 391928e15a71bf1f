"""No process of a run outlives another: each watches the rest of its node, and all stop when one is gone.

The processes of a run are the launcher's two, the workers, the schedulers and the frontend. A process that finds
another one dead claims the right to speak, says so in one line, and ends; the others find the claim and end
without a word. The claim is an abstract unix socket, which the kernel removes with its owner, so nothing is left on
disk whatever dies::

    kill -9 worker 1 ─┬─ worker 0   finds it dead, binds the socket, prints, stays until the others have left, exits 1
                      ├─ scheduler  finds it dead or the socket bound, exits 1
                      └─ launcher   sees an exit code other than 0, ends the ranks that are left

Watching is a thread that ends the process with `os._exit`, so it works while the main thread waits inside a
collective for a peer that is gone. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from types import FrameType
from typing import NoReturn

from seesaw_ds.engine.process_id import LAUNCHER_NAMES, ProcessId

POLL_SECONDS = 0.25
# The speaker keeps its claim this long, so that whoever notices late finds it and stays silent ...
STAY_SECONDS = 1.5
# ... and waits this long for the processes it watches, then kills them.
PATIENCE_SECONDS = 5.0
# An error that another's death causes may be seen this long before the death is.
ECHO_SECONDS = 1.0
# Ranks that are dismissed may still be starting their interpreter.
DISMISSAL_SECONDS = 20.0

_KEPT = "Finished results are kept: run the same command again to complete it."


class Lifeline:
    """Watches the other processes of the run `run_id` on this node, and ends this one (`me`) when one of them dies.

    The thread starts at once. Before the first process of a run exits in good order, every one of them must have
    called `stop`. Raises ValueError when `run_id` is too long for a socket name (80 bytes).
    """

    def __init__(self, run_id: str, me: ProcessId) -> None:
        if not 0 < len(run_id.encode()) <= 80:
            raise ValueError(f"run_id={run_id!r}: a run id has 1 to 80 bytes, for it is part of a socket name")
        self._address = f"\0seesaw-{run_id}-obituary"
        self._dismissal_address = f"\0seesaw-{run_id}-dismissal"
        self._me = me
        self._lock = threading.Lock()
        self._watched: dict[ProcessId, None] = {}  # a dict for its order: the first dead one is named
        self._owned: dict[int, ProcessId] = {}
        self._stopped = threading.Event()
        # Held for good by the first thread that ends the process; any other thread waits on it for that end.
        self._ending = threading.Lock()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def watch(self, process: ProcessId) -> None:
        """Stop the run when `process` dies. This process itself is ignored, so every process may be given one list.

        When several are found dead at once, the one watched first is named: give causes before consequences.
        """
        if process.pid == self._me.pid:
            return
        with self._lock:
            self._watched[process] = None

    def unwatch(self, process: ProcessId) -> None:
        """Let `process` end; unknown ones are ignored."""
        with self._lock:
            self._watched.pop(process, None)

    def own(self, pid: int) -> None:
        """End the child `pid` when this process is ended by its lifeline. Children that are gone are ignored."""
        with contextlib.suppress(RuntimeError):
            self._owned[pid] = ProcessId.of("child", pid)

    def stop(self) -> None:
        """End the watch. When it returns, the death of another process no longer has consequences here."""
        self._stopped.set()
        os.write(self._wake_write, b"\0")
        self._thread.join()

    def fail(self, message: str, exit_code: int = 1, details: str = "") -> NoReturn:
        """End this process and with it the run: print `details` (a traceback) and "error: message".

        Of all the processes that fail, only the first prints. An error with details that comes with the death of a
        watched process, such as a broken connection, is taken for its consequence: the dead one is named instead.
        """
        deadline = time.monotonic() + ECHO_SECONDS
        while details and time.monotonic() < deadline:
            dead = self._first_dead()
            if dead is not None:
                self._end(_obituary(dead), 1)
            time.sleep(0.02)
        self._end(f"{details.rstrip()}\nerror: {message}".lstrip(), exit_code)

    def dismiss(self) -> NoReturn:
        """End the run in good order before it has begun: every process exits with code 0, this one last."""
        self.stop()
        # Others read the dismissal from the socket's name; it is there until this process ends.
        dismissal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        dismissal.bind(self._dismissal_address)
        self._outlive(DISMISSAL_SECONDS)
        os._exit(0)

    def install_signal_handlers(self) -> None:
        """End on SIGTERM and SIGINT with exit code 128 + signal number, without a traceback. Main thread only.

        SIGINT says once for the run that it was interrupted. SIGTERM says nothing, unless a watched process is dead:
        the launcher ends the ranks by SIGTERM when it notices a death before they do.
        """
        # A Python handler runs in the main thread, which may be inside a collective for ever; the wake-up byte
        # is written by the C handler and reaches the watching thread whatever the main thread does.
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle_signal)

    def _handle_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._stopped.is_set():
            os._exit(128 + signum)

    def _watch(self) -> None:
        while True:
            signals = self._wait_for_signals()
            if self._stopped.is_set():
                return
            if signal.SIGINT in signals:
                self._end("interrupted; finished results are kept", 128 + signal.SIGINT)
            if _is_bound(self._dismissal_address):
                os._exit(0)
            dead = self._first_dead()
            if dead is not None:
                self._end(_obituary(dead), 1)
            if signal.SIGTERM in signals:
                self._end(None, 128 + signal.SIGTERM)
            if _is_bound(self._address):
                self._end(None, 1)

    def _wait_for_signals(self) -> bytes:
        """The numbers of the signals that came in one polling interval, at once when there are any."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        return os.read(self._wake_read, 4096) if poller.poll(POLL_SECONDS * 1000) else b""

    def _first_dead(self) -> ProcessId | None:
        with self._lock:
            watched = tuple(self._watched)
        return next((process for process in watched if not process.is_alive()), None)

    def _end(self, words: str | None, exit_code: int) -> NoReturn:
        """Exit; with the claim, print `words` first and outstay the others, so that none of them speaks too."""
        self._ending.acquire()
        claim = self._claim()
        if claim is not None and words is not None:
            _print_to_stderr(words)
        for child in tuple(self._owned.values()):
            # A child may be the speaker: it goes on when told to end, while one that is only starting does not.
            child.kill(signal.SIGTERM if claim is None else signal.SIGKILL)
        if claim is not None:
            time.sleep(STAY_SECONDS)
            self._outlive(PATIENCE_SECONDS - STAY_SECONDS)
        os._exit(exit_code)

    def _claim(self) -> socket.socket | None:
        """The socket whose existence is the right to speak; None when another process has it."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(self._address)
        except OSError as error:
            # Where a sandbox forbids such sockets, two obituaries are better than none.
            if error.errno == errno.EADDRINUSE:
                return None
        return claim

    def _outlive(self, patience_seconds: float) -> None:
        """Wait for the watched processes to end, then kill those that are left."""
        with self._lock:
            # The launcher leaves after its ranks, this process among them: it is not waited for.
            others = [process for process in self._watched if process.name not in LAUNCHER_NAMES]
        deadline = time.monotonic() + patience_seconds
        while others and time.monotonic() < deadline:
            time.sleep(0.05)
            others = [process for process in others if process.is_alive()]
        for process in others:
            process.kill()


def _obituary(dead: ProcessId) -> str:
    return f"error: {dead} died; stopping the run. {_KEPT}"


def _is_bound(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(address) == 0


def _print_to_stderr(words: str) -> None:
    """One write past Python's buffers, whose locks the main thread may hold; a closed stderr is no reason to stay."""
    # On a terminal the cursor may stand behind a progress bar.
    text = f"\n{words}\n" if os.isatty(2) else f"{words}\n"
    data = text.encode(errors="replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]

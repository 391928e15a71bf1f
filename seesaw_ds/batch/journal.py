"""The result file is the journal: what stands in it is done, so the same command run again finishes the rest.

A record is appended with one write as its request finishes, so a killed process loses at most the end of the
last line. Each record has a key of its own: `custom_id`, or the input's line number where that is null. Lines
without a usable `custom_id`, and lines that repeat an earlier one's, have null there: so neither a key nor a
`custom_id` occurs twice in the file, and a line is neither repeated nor lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from seesaw_ds.batch.files import sync_folder
from seesaw_ds.batch.lines import RecordKey
from seesaw_ds.batch.output import Record
from seesaw_ds.errors import UserError

SYNC_INTERVAL_S = 1.0
"""Seconds between writes to the disk itself: what power loss can cost. A killed process does not lose them."""


class ResultJournal:
    """A result file, locked against other runs until `close` or the end of the process.

    Opening changes nothing in the file. Call `resume` or `clear` before the first `append`. A process forked from
    this one without exec shares the lock: start others first, or by spawn.

    Raises:
        UserError: the file cannot be made or written, is no regular file, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_locked(path)
        self._size = os.fstat(self._fd).st_size
        self._done: set[RecordKey] | None = None
        self._is_dirty = False
        self._sync_error: OSError | None = None
        self._closing = threading.Event()
        self._syncer = threading.Thread(target=self._sync_regularly, name="journal-sync", daemon=True)
        self._syncer.start()

    @property
    def is_empty(self) -> bool:
        """Whether the file has no bytes at all."""
        return self._size == 0

    @property
    def num_done(self) -> int:
        """How many records the file has."""
        return len(self._done or ())

    def is_done(self, key: RecordKey) -> bool:
        """Whether the file has a record of this key."""
        return self._done is not None and key in self._done

    def clear(self) -> None:
        """Drop all records."""
        self._truncate(0)
        self._done = set()

    def resume(self) -> None:
        """Read what is done and drop a torn last line.

        Raises:
            UserError: a line other than a torn last one is not a record, or repeats one.
        """
        done: set[RecordKey] = set()
        size = 0
        for line_number, line in enumerate(self._lines(), start=1):
            if not line.endswith(b"\n"):
                break
            key = _record_key_of_line(line)
            if key is None or key in done:
                fault = "is not a result record" if key is None else f"repeats the result of {key!r}"
                raise UserError(
                    f"output={self.path}: line {line_number} {fault}; mend or delete the line, "
                    "or start anew with --overwrite"
                )
            done.add(key)
            size += len(line)
        if size < self._size:
            self._truncate(size)
        self._done = done

    def append(self, record: Record) -> None:
        """Write one record; it survives the death of this process at once, power loss after `SYNC_INTERVAL_S`.

        Raises:
            UserError: the disk is full or fails. What was written of the record is taken back.
        """
        assert self._done is not None, "resume() or clear() comes before append()"
        key = _record_key(record)
        assert key is not None, f"a record needs a custom_id or an error's line: {record}"
        assert key not in self._done, f"second record of {key!r}"
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            if self._sync_error is not None:
                raise self._sync_error
            num_written = os.write(self._fd, line)
            if num_written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # Without this the next record would continue the torn line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise self._write_failure(error) from error
        self._size += len(line)
        self._done.add(key)
        self._is_dirty = True

    def close(self) -> None:
        """Write everything to the disk and give up the lock. Further calls do nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._syncer.join()
        self._sync_if_dirty()
        os.close(self._fd)
        if self._sync_error is not None:
            raise self._write_failure(self._sync_error)

    def __enter__(self) -> ResultJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lines(self) -> Iterator[bytes]:
        os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as file:
            yield from file

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError as error:
            raise self._write_failure(error) from error
        self._size = size

    def _sync_regularly(self) -> None:
        while not self._closing.wait(SYNC_INTERVAL_S):
            self._sync_if_dirty()

    def _sync_if_dirty(self) -> None:
        if not self._is_dirty:
            return
        # Cleared first: a record appended during the sync may not be in it.
        self._is_dirty = False
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._sync_error = error

    def _write_failure(self, error: OSError) -> UserError:
        return UserError(
            f"output={self.path}: cannot write: {error.strerror}; mend that and run the same command again "
            "to finish the rest"
        )


def _open_locked(path: Path) -> int:
    """A descriptor of the file, made with its folder if absent, open for appending and exclusively locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        # O_NONBLOCK: opening a pipe must not wait for its reader.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(
            f"output={path}: cannot be written: {error.filename}: {error.strerror}; give another path"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserError(f"output={path}: must be a regular file, since it is read again to resume")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_new:
            sync_folder(path.parent)
    except BlockingIOError as error:
        os.close(fd)
        text = f"output={path}: another run is writing it; wait until it ends, or give another path"
        raise UserError(text) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _record_key_of_line(line: bytes) -> RecordKey | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _record_key(record) if isinstance(record, dict) and "response" in record else None


def _record_key(record: Record) -> RecordKey | None:
    """The key of a record: its `custom_id`, else the line that its error names; None if it has neither."""
    custom_id = record.get("custom_id")
    if custom_id is not None:
        return custom_id if isinstance(custom_id, str) else None
    error = record.get("error")
    line = error.get("line") if isinstance(error, dict) else None
    return line if isinstance(line, int) and not isinstance(line, bool) else None

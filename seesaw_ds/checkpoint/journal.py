"""The unfinished destination: a folder beside the final one, with a journal of what is done in it.

The journal's first line says what is being converted and how; each further line is a unit of weights that is on the
disk, or a source file that was hashed. A line that a kill cut short is dropped, and its work done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from seesaw_ds.batch.files import sync_folder
from seesaw_ds.errors import UserError

JOURNAL = "conversion.journal"


def partial_folder(dst: Path) -> Path:
    """Where the conversion into `dst` is made before it is renamed."""
    return dst.with_name(dst.name + ".partial")


class ConversionJournal:
    """Owns the partial folder of `dst` and a lock on it; `append` is safe to use from several threads."""

    def __init__(self, dst: Path, settings: dict[str, Any], *, restart: bool) -> None:
        """Take up the conversion with the same `settings`, or begin one.

        With `restart` an unfinished one of other settings is deleted. Raises UserError when there is one and
        `restart` is not given, and when another process is at work on it.
        """
        self.folder = partial_folder(dst)
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / JOURNAL
        self._file = path.open("a+", encoding="utf-8")
        try:
            self._take_lock()
            self._records, size = _read_records(path)
            if self._records and self._records[0] != settings:
                self._refuse_or_clear(settings, restart)
                size = 0
            self._file.truncate(size)
            if not self._records:
                self.append(settings)
        except BaseException:
            self._file.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another conversion is writing there; wait for it or stop it") from None

    def _refuse_or_clear(self, settings: dict[str, Any], restart: bool) -> None:
        begun = self._records[0]
        differing = sorted(name for name in {*begun, *settings} if begun.get(name) != settings.get(name))
        if not restart:
            raise UserError(
                f"{self.folder}: holds an unfinished conversion that differs in {', '.join(differing)}; "
                "finish it with the same settings, delete the folder, or start anew with --overwrite"
            )
        for path in self.folder.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._records = []

    def done(self, kind: str) -> dict[str, Any]:
        """The records of a kind ("unit" or "file") by name."""
        return {record["name"]: record for record in self._records[1:] if record["kind"] == kind}

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns."""
        with self._lock:
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._records.append(record)

    def publish(self, dst: Path) -> None:
        """Make the folder the finished `dst`, in place of what is there."""
        sync_folder(self.folder)
        replaced = dst.with_name(dst.name + ".replaced")
        if dst.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            dst.rename(replaced)
        self.folder.rename(dst)
        (dst / JOURNAL).unlink()
        sync_folder(dst.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def close(self) -> None:
        """Give up the lock."""
        self._file.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def _read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole records of the journal, and the bytes that they take."""
    records: list[dict[str, Any]] = []
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        records.append(record)
        size += len(line)
    return records, size

"""The result file as journal: durable, locked, resumable after a kill at any byte; and the manifest that guards it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from seesaw_ds.batch import journal as journal_module
from seesaw_ds.batch.input import read_batch
from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.batch.lines import LineError
from seesaw_ds.batch.output import Record, error_record
from seesaw_ds.batch.results import open_results
from seesaw_ds.errors import UserError


def record(key: str | int) -> Record:
    custom_id = key if isinstance(key, str) else None
    return error_record(LineError(key if isinstance(key, int) else 1, custom_id, "message \u2028", None, "code"))


@pytest.fixture
def instant_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that open many files: what reaches the disk does not matter to them."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


def resumed(path: Path) -> ResultJournal:
    journal = ResultJournal(path)
    journal.resume()
    return journal


def write(path: Path, *keys: str | int) -> bytes:
    with resumed(path) as journal:
        for key in keys:
            journal.append(record(key))
    return path.read_bytes()


def test_records_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.jsonl"
    with resumed(path) as journal:
        assert journal.is_empty
        journal.append(record("a"))
        assert json.loads(path.read_bytes()) == record("a")
        journal.append(record(2))
        assert journal.num_done == 2
        assert journal.is_done("a")
        assert journal.is_done(2)
        assert not journal.is_done("2")


@pytest.mark.usefixtures("instant_disk")
def test_resume_after_a_kill_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    keys: list[str | int] = ["a", 2, "3"]
    whole = write(path, *keys)
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_whole = whole[:size].count(b"\n")
        with resumed(path) as journal:
            assert [journal.is_done(key) for key in keys] == [i < num_whole for i in range(3)]
            assert path.read_bytes() == b"".join(lines[:num_whole])
            for key in keys[num_whole:]:
                journal.append(record(key))
        assert path.read_bytes() == whole


def test_opening_changes_nothing_until_resume(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"notes that are no results")
    ResultJournal(path).close()
    assert path.read_bytes() == b"notes that are no results"


def test_clear(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "a")
    with ResultJournal(path) as journal:
        journal.clear()
        assert journal.is_empty
        journal.append(record("a"))
    assert json.loads(path.read_bytes()) == record("a")


@pytest.mark.parametrize(
    ("damaged", "fault"),
    [
        (b"{oops\n", "is not a result record"),
        (b"[]\n", "is not a result record"),
        (b'{"response": {}}\n', "is not a result record"),
        (b'{"custom_id": "z"}\n', "is not a result record"),
        (json.dumps(record("a")).encode() + b"\n", "repeats the result of 'a'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damaged: bytes, fault: str) -> None:
    path = tmp_path / "out.jsonl"
    whole = write(path, "a", "b")
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + damaged + second)
    with ResultJournal(path) as journal, pytest.raises(UserError, match=f"line 2 {fault}.*--overwrite"):
        journal.resume()


def test_a_second_record_of_a_key_is_a_bug(tmp_path: Path) -> None:
    with resumed(tmp_path / "out.jsonl") as journal:
        journal.append(record("a"))
        with pytest.raises(AssertionError, match="second record"):
            journal.append(record("a"))


def test_two_runs_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultJournal(path), pytest.raises(UserError, match="another run"):
        ResultJournal(path)
    ResultJournal(path).close()


WRITER = """
import sys
from pathlib import Path
from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.batch.lines import LineError
from seesaw_ds.batch.output import error_record
journal = ResultJournal(Path(sys.argv[1]))
journal.resume()
for number in range(10**6):
    journal.append(error_record(LineError(number, None, "x" * 200, None, "code")))
    if number == 50:
        print("go", flush=True)
"""


def test_a_killed_run_leaves_whole_lines_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"go\n"
        with pytest.raises(UserError, match="another run"):
            ResultJournal(path)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with resumed(path) as journal:
        assert journal.num_done > 50
        assert all(journal.is_done(number) for number in range(journal.num_done))


def test_unusable_paths(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, tmp_path / "file" / "out.jsonl", fifo, Path(os.devnull)):
        with pytest.raises(UserError, match="output="):
            ResultJournal(path)


def test_folder_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        ResultJournal(path)


def test_a_full_disk_takes_back_the_torn_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    whole = write(path, "a", "b")
    real_write = os.write
    with resumed(path) as journal:
        monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[: len(data) // 2]))
        with pytest.raises(UserError, match=r"No space left.*run the same command again"):
            journal.append(record("c"))
        assert path.read_bytes() == whole
        monkeypatch.undo()
        journal.append(record("c"))
    assert path.read_bytes().count(b"\n") == 3


def test_records_are_synced_without_a_further_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    real_sync = os.fdatasync

    def sync(fd: int) -> None:
        real_sync(fd)
        synced.set()

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(journal_module, "SYNC_INTERVAL_S", 0.01)
    with resumed(tmp_path / "out.jsonl") as journal:
        journal.append(record("a"))
        assert synced.wait(10)


def test_close_syncs_what_is_left_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    journal = resumed(tmp_path / "out.jsonl")
    for number in range(100):
        journal.append(record(number))
    assert len(synced) <= 1
    journal.close()
    journal.close()
    assert 1 <= len(synced) <= 2


def test_a_failing_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal = resumed(tmp_path / "out.jsonl")
    journal.append(record("a"))
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        journal.close()


BAD_INPUT = b"""{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
not json
{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "y"}}
{"method": "POST", "url": "/v1/completions", "body": {"prompt": "z"}}
{"custom_id": "2", "method": "POST", "url": "/v1/completions", "body": {"prompt": ""}}
"""


@pytest.mark.usefixtures("instant_disk")
def test_resume_repeats_and_loses_no_line_of_a_bad_input(tmp_path: Path) -> None:
    """Whatever part of the lines is done, in whatever order, the next run does the others."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(BAD_INPUT)
    items = list(read_batch(source))
    records: list[Record] = [
        error_record(item) if isinstance(item, LineError) else record(item.custom_id) for item in items
    ]
    for done in range(2 ** len(items)):
        first = [index for index in reversed(range(len(items))) if done >> index & 1]
        with open_results(output, {"schema": 1}, overwrite=True) as journal:
            for index in first:
                journal.append(records[index])
        with open_results(output, {"schema": 1}, overwrite=False) as journal:
            left = [index for index, item in enumerate(read_batch(source)) if not journal.is_done(item.key)]
        assert sorted(first + left) == list(range(len(items)))

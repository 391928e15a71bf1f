"""Lines that are wrong fail alone: each gets an error of its own in OpenAI's form, the rest of the file is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job import BadLine, Line, bad_lines, good_lines, read_records, record_key
from launcher import Job


@pytest.fixture(scope="module")
def records(finished_job: Job) -> dict[str | int, Line]:
    return {record_key(record): record for record in read_records(finished_job.output)}


@pytest.mark.parametrize("bad", bad_lines(), ids=lambda bad: bad.custom_id or bad.text[:12])
def test_bad_line_has_an_error_for_its_result(bad: BadLine, finished_job: Job, records: dict[str | int, Line]) -> None:
    input_lines = Path(str(finished_job.settings["input"])).read_text().splitlines()
    line_number = input_lines.index(bad.text) + 1
    record = records[line_number if bad.custom_id is None else bad.custom_id]
    response = record["response"]
    assert record["custom_id"] == bad.custom_id
    assert response["status_code"] == 400
    error = response["body"]["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"]) == (bad.code, bad.param)
    assert bad.message in error["message"]
    assert record["error"] == {"code": bad.code, "message": error["message"], "line": line_number}


def test_rest_of_the_file_is_done(finished_job: Job, records: dict[str | int, Line]) -> None:
    assert finished_job.exit_code == 0
    assert len(read_records(finished_job.output)) == len(good_lines()) + len(bad_lines())
    assert all(records[line["custom_id"]]["error"] is None for line in good_lines())
    summary = json.loads(finished_job.summary.read_text())
    assert (summary["num_requests"], summary["num_failed"]) == (len(good_lines()), len(bad_lines()))

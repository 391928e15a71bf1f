"""The same command finishes what is missing, --overwrite starts anew, and a finished job is left as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from job import assert_same_results, completion, read_records
from launcher import Job, StartRun


def copy_results(job: Job, folder: Path) -> Path:
    """The job's results and manifest, in a folder of the test's own."""
    output = folder / "results.jsonl"
    for path in (job.output, job.output.with_name(job.output.name + ".manifest.json")):
        shutil.copy(path, folder)
    return output


def test_half_a_job_is_completed(finished_job: Job, start_run: StartRun, tmp_path: Path) -> None:
    output = copy_results(finished_job, tmp_path)
    lines = output.read_bytes().splitlines(keepends=True)
    half = len(lines) // 2
    kept = b"".join(lines[:half])
    # A process that was killed while it wrote has left a part of a line.
    output.write_bytes(kept + lines[half][:50])
    run = start_run(tmp_path, {**finished_job.settings, "output": str(output), "timeline": None})
    assert run.wait() == 0, run.output
    assert output.read_bytes().startswith(kept)
    assert_same_results(read_records(output), read_records(finished_job.output))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["resumed"] == half
    assert summary["num_requests"] + summary["num_failed"] == len(lines) - half


def test_finished_job_is_left_as_it_is(finished_job: Job, start_run: StartRun, tmp_path: Path) -> None:
    output = copy_results(finished_job, tmp_path)
    before = output.read_bytes()
    run = start_run(tmp_path, {**finished_job.settings, "output": str(output), "timeline": str(tmp_path / "t.json")})
    assert run.wait() == 0, run.output
    assert run.error_lines == []
    assert f"{output} has every result already" in run.output
    assert output.read_bytes() == before
    # Neither a summary nor a timeline: there was no run.
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "t.json").exists()


def test_overwrite_starts_anew(finished_job: Job, start_run: StartRun, tmp_path: Path) -> None:
    output = copy_results(finished_job, tmp_path)
    source = tmp_path / "few.jsonl"
    source.write_text(json.dumps(completion("only", "hello", max_tokens=3, ignore_eos=True)) + "\n")
    settings = {**finished_job.settings, "output": str(output), "timeline": None}
    run = start_run(tmp_path, settings, "--input", str(source), "--overwrite")
    assert run.wait() == 0, run.output
    (record,) = read_records(output)
    assert record["custom_id"] == "only"
    assert record["response"]["body"]["usage"]["completion_tokens"] == 3
    assert json.loads((tmp_path / "summary.json").read_text())["resumed"] == 0

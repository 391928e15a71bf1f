"""``layouts: auto``: the planner's choice runs on all ranks, and what cannot run is told before anything starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

from job import assert_same_results, read_records
from launcher import Job, StartRun


def test_all_ranks_run_the_planners_choice(
    job_settings: dict[str, object], finished_job: Job, start_run: StartRun, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "results.jsonl"
    run = start_run(tmp_path, job_settings | {"layouts": "auto", "hardware": "cpu", "output": str(output)})
    assert run.wait() == 0, run.output
    numbers = r"max_num_batched_tokens=\d+, max_num_seqs=\d+, kv_offloading_size=[0-9.]+"
    chosen = re.search(rf"layouts=auto: (\S+), {numbers}, predicted [0-9.]+ s for \d+ sequences", run.output)
    assert chosen is not None, run.output
    assert json.loads(output.with_name("summary.json").read_text())["layouts"] == chosen[1]
    assert_same_results(read_records(output), read_records(finished_job.output))
    assert run.output.count("layouts=auto: the others") == 1
    assert run.leftovers() == []


def test_what_cannot_be_planned_is_told_once(
    job_settings: dict[str, object], start_run: StartRun, tmp_path: Path
) -> None:
    settings = job_settings | {"layouts": "auto", "hardware": "cpu", "output": str(tmp_path / "results.jsonl")}
    run = start_run(tmp_path, settings, "--set", "num_host_kv_blocks=3")
    assert run.wait() != 0
    (error,) = run.error_lines
    assert "no layout of 2 x cpu fits: D2, P2, P2->T2, T2->P2, T2: num_host_kv_blocks=3: one request" in error
    assert error.count("needs 12 blocks") == 1
    assert "Traceback" not in run.output

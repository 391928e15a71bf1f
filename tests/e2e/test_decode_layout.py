"""The layout to decode in, chosen while a run goes on by the profile that its config names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from job import assert_same_results, read_records
from launcher import REPOSITORY, Job, StartRun


def test_a_run_on_absurdly_slow_links_never_leaves_the_prefill_layout(
    job_settings: dict[str, object], finished_job: Job, start_run: StartRun, tmp_path: Path
) -> None:
    figures = yaml.safe_load((REPOSITORY / "configs" / "hardware" / "cpu.yaml").read_text())
    figures["all_reduce"] = {2: [[0, 1000.0], [1 << 24, 2000.0]]}
    profile = tmp_path / "slow.yaml"
    profile.write_text(yaml.safe_dump(figures))
    output = tmp_path / "out" / "results.jsonl"
    run = start_run(tmp_path, job_settings | {"hardware": str(profile), "output": str(output)})
    assert run.wait() == 0, run.output
    assert_same_results(read_records(output), read_records(finished_job.output))
    summary = json.loads(output.with_name("summary.json").read_text())
    assert json.loads(finished_job.summary.read_text())["transitions"] > 0
    assert summary["transitions"] == 0
    assert summary["layout_changes"] == 0  # all as planned
    pattern = (
        r"\d+ sequences to decode, \d+ prompts left: decode on in P2, predicted (\S+) s; not decode in T2, (\S+) s"
    )
    predicted = re.findall(pattern, run.output)
    assert len(predicted) == 1, run.output
    assert 1000 * float(predicted[0][0]) < float(predicted[0][1])
    assert run.leftovers() == []


def test_a_profile_that_is_not_there_is_told_before_anything_starts(
    job_settings: dict[str, object], start_run: StartRun, tmp_path: Path
) -> None:
    run = start_run(tmp_path, job_settings | {"hardware": "nowhere", "output": str(tmp_path / "results.jsonl")})
    assert run.wait() != 0
    (error,) = run.error_lines
    assert "hardware='nowhere': cannot be read" in error

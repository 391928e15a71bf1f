"""kill -9 of any one process at any moment: the run ends and says why, nothing is left, the same command goes on."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from job import assert_same_results, read_records
from launcher import Job, Run, StartRun, handles_sigterm, wait_until
from seesaw_ds.engine.process_id import LAUNCH_NAME, RUNNER_NAME

# From the death of one process to the end of all.
END_SECONDS = 30.0
RANKS = ("worker rank 0", "worker rank 1")


@dataclass(frozen=True)
class Kill:
    """Whom to kill, and when: so long after it has started, or after so many new results."""

    role: str
    delay_seconds: float = 0.0
    num_results: int = 0

    def __str__(self) -> str:
        moment = f"{self.num_results} results" if self.num_results else f"{self.delay_seconds:.1f} s"
        return f"{self.role} after {moment}"


def choose_kills() -> list[Kill]:
    """Ten: each process once as the run starts, and once in the middle of it."""
    rng = random.Random(2)
    roles = [RUNNER_NAME, LAUNCH_NAME, "frontend", "scheduler 0"]
    starting = [Kill(role, delay_seconds=rng.uniform(0.0, 4.0)) for role in (*roles, "worker rank 0")]
    working = [Kill(role, num_results=rng.randint(1, 7)) for role in (*roles, "worker rank 1")]
    return [kill for pair in zip(starting, working, strict=True) for kill in pair]


@pytest.fixture(scope="module")
def settings(job_settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Those of the one job that all tests here work on."""
    folder = tmp_path_factory.mktemp("killed") / "out"
    return {**job_settings, "output": str(folder / "results.jsonl"), "timeline": str(folder / "timeline.json")}


def count_records(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def wait_for_moment(run: Run, kill: Kill, output: Path) -> None:
    if kill.num_results:
        num_before = count_records(output)
        wait_until(
            lambda: run.command.poll() is not None or count_records(output) >= num_before + kill.num_results,
            f"{kill.num_results} results\n{run.output}",
        )
        assert run.command.poll() is None, f"the job ended before it could be disturbed\n{run.output}"
        return
    run.wait_for(kill.role)
    # Before the ranks' interpreters are up, nobody is there who could speak.
    for rank in RANKS:
        wait_until(partial(handles_sigterm, run.wait_for(rank)), f"{rank}\n{run.output}")
    time.sleep(kill.delay_seconds)


def check_aftermath(run: Run, dead: str, folder: Path) -> None:
    assert run.leftovers(END_SECONDS) == [], run.output
    words = rf"^error: {re.escape(dead)} (\(pid \d+\) died|is not running)"
    assert re.search(words, run.output, re.MULTILINE), run.output
    files = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert files <= {"results.jsonl", "results.jsonl.manifest.json", "summary.json", "timeline.json"}


@pytest.mark.parametrize("kill", choose_kills(), ids=str)
def test_death_of_one_process_ends_the_run(
    kill: Kill, settings: dict[str, object], start_run: StartRun, tmp_path: Path
) -> None:
    output = Path(str(settings["output"]))
    run = start_run(tmp_path, settings)
    wait_for_moment(run, kill, output)
    run.note_shared_files()
    run.wait_for(kill.role).kill()
    check_aftermath(run, kill.role, output.parent)
    # DeepSpeed's command gives 0 when its own launcher was killed.
    assert run.command.wait() != 0 or kill.role == LAUNCH_NAME


def test_launcher_that_dies_before_the_ranks_start_is_missed(
    settings: dict[str, object], start_run: StartRun, tmp_path: Path
) -> None:
    run = start_run(tmp_path, settings)
    run.wait_for(LAUNCH_NAME)
    run.processes()[RUNNER_NAME].kill()
    wait_until(lambda: RUNNER_NAME in "\n".join(run.error_lines), f"a message\n{run.output}")
    check_aftermath(run, RUNNER_NAME, Path(str(settings["output"])).parent)


def test_killed_job_completes_as_if_undisturbed(
    finished_job: Job, settings: dict[str, object], start_run: StartRun, tmp_path: Path
) -> None:
    run = start_run(tmp_path, settings)
    assert run.wait() == 0, run.output
    assert_same_results(read_records(Path(str(settings["output"]))), read_records(finished_job.output))

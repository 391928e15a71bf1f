"""What the end-to-end tests share: a model, a way to start runs, and one job that ran undisturbed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from job import SETTINGS, Model, make_model, write_job
from launcher import Job, Run, StartRun


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and let those that start runs take longer than others."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random Llama with a tokenizer of one token a byte."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def job_settings(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings of a run over the tests' batch file, but for where its output goes."""
    path = tmp_path_factory.mktemp("input") / "job.jsonl"
    write_job(path)
    return {**SETTINGS, "model": str(model.folder), "input": str(path)}


@pytest.fixture
def start_run() -> Iterator[StartRun]:
    """Starts runs, and ends those that the test leaves running; its arguments are those of `Run`."""
    runs: list[Run] = []

    def start(folder: Path, settings: Mapping[str, object], *arguments: str) -> Run:
        runs.append(Run(folder, settings, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.fixture(scope="session")
def finished_job(job_settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The tests' batch file, run undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    output, timeline = folder / "out" / "results.jsonl", folder / "out" / "timeline.json"
    settings = job_settings | {"output": str(output), "timeline": str(timeline)}
    run = Run(folder, settings)
    try:
        exit_code = run.wait()
        said, leftovers = run.output, run.leftovers()
    finally:
        run.end()
    return Job(settings, exit_code, output, output.with_name("summary.json"), timeline, said, leftovers)

"""The lifeline with real processes: small interpreters that watch each other, one of which is killed."""

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw_ds.engine.lifeline import Lifeline
from seesaw_ds.engine.process_id import LAUNCH_NAME, RUNNER_NAME, ProcessId, missing_launcher, ranks_of

REPOSITORY = Path(__file__).parents[2]
# All ends within 2 s on an idle machine: a poll, then the speaker's stay.
LIMIT_SECONDS = 5

# A member of a run: its name and the run's id come as arguments, the others' pids ("name=pid,...") on stdin.
MEMBER = """
import sys, time
import seesaw_ds.engine.lifeline as module
from seesaw_ds.engine.process_id import ProcessId

module.PATIENCE_SECONDS = 2.0
name, run_id = sys.argv[1:]
lifeline = module.Lifeline(run_id, ProcessId.of(name))
lifeline.install_signal_handlers()
for item in sys.stdin.readline().strip().split(","):
    other, _, pid = item.partition("=")
    lifeline.watch(ProcessId.of(other, int(pid)))
print("ready", flush=True)
for order in sys.stdin:
    if order == "stop\\n":
        lifeline.stop()
        print("stopped", flush=True)
    elif order.startswith("fail "):
        lifeline.fail(order[5:].strip(), exit_code=3, details="Traceback: here\\n")
    elif order.startswith("own "):
        lifeline.own(int(order[4:]))
        print("owned", flush=True)
    elif order == "dismiss\\n":
        lifeline.dismiss()
    elif order == "spin\\n":
        while True:
            time.sleep(100)
"""


class Run:
    """Members of one run; their standard errors go to one file."""

    def __init__(self, folder, names):
        self.run_id = uuid.uuid4().hex
        self.stderr_path = folder / "stderr.txt"
        with self.stderr_path.open("wb") as stderr:
            self.members = {name: self._start(MEMBER, [name, self.run_id], stderr) for name in names}
        listed = ",".join(f"{name}={member.pid}" for name, member in self.members.items())
        for member in self.members.values():
            assert self.ask(member, listed) == "ready"

    @staticmethod
    def _start(code, arguments, stderr):
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            bufsize=1,
            cwd=REPOSITORY,
        )

    @staticmethod
    def tell(member, order):
        member.stdin.write(f"{order}\n")
        member.stdin.flush()

    def ask(self, member, order):
        self.tell(member, order)
        return member.stdout.readline().strip()

    def exit_codes(self, within_seconds):
        deadline = time.monotonic() + within_seconds
        return [member.wait(max(0.01, deadline - time.monotonic())) for member in self.members.values()]

    @property
    def stderr(self):
        return self.stderr_path.read_text()

    def clean_up(self):
        for member in self.members.values():
            member.kill()
            member.wait()
            member.stdin.close()
            member.stdout.close()


@pytest.fixture
def start_run(tmp_path):
    runs = []

    def start(*names):
        runs.append(Run(tmp_path, names))
        return runs[-1]

    yield start
    for run in runs:
        run.clean_up()


def test_one_killed_ends_all_with_one_obituary(start_run):
    run = start_run("worker 0", "worker 1", "scheduler", "frontend")
    # Blocked main threads must not keep a process alive.
    for member in run.members.values():
        run.tell(member, "spin")
    dead = run.members["worker 1"]
    dead.kill()
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [1, -signal.SIGKILL, 1, 1]
    assert run.stderr == (
        f"error: worker 1 (pid {dead.pid}) died; stopping the run. "
        "Finished results are kept: run the same command again to complete it.\n"
    )


def test_exit_without_stop_counts_as_death(start_run):
    run = start_run("worker 0", "worker 1")
    run.members["worker 0"].stdin.close()
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [0, 1]
    assert "worker 0" in run.stderr


def test_orderly_stop_is_silent(start_run):
    run = start_run("worker 0", "worker 1", "frontend")
    for member in run.members.values():
        assert run.ask(member, "stop") == "stopped"
    first = run.members["worker 0"]
    first.stdin.close()
    first.wait(LIMIT_SECONDS)
    time.sleep(0.6)
    for member in run.members.values():
        member.stdin.close()
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [0, 0, 0]
    assert run.stderr == ""


def test_signal_after_stop_still_ends_the_process(start_run):
    run = start_run("worker 0")
    assert run.ask(run.members["worker 0"], "stop") == "stopped"
    run.members["worker 0"].terminate()
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [128 + signal.SIGTERM]


def test_two_failures_print_once_and_end_the_rest(start_run):
    run = start_run("worker 0", "worker 1", "frontend")
    run.tell(run.members["worker 0"], "fail no model")
    run.tell(run.members["worker 1"], "fail no model")
    codes = run.exit_codes(within_seconds=LIMIT_SECONDS)
    # The slower of the two may find the claim before it is told to fail.
    assert 3 in codes[:2]
    assert set(codes) <= {1, 3}
    assert codes[2] == 1
    assert run.stderr == "Traceback: here\nerror: no model\n"


def test_error_that_follows_a_death_is_told_as_the_death(start_run):
    run = start_run("worker 0", "worker 1")
    dead = run.members["worker 1"]
    dead.kill()
    run.tell(run.members["worker 0"], "fail the connection is closed")
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [1, -signal.SIGKILL]
    assert run.stderr.startswith(f"error: worker 1 (pid {dead.pid}) died")
    assert "Traceback" not in run.stderr


def test_child_that_speaks_is_not_killed_by_its_parent(start_run):
    run = start_run("worker 0", "worker 1", "frontend")
    frontend = run.members["frontend"]
    assert run.ask(run.members["worker 0"], f"own {frontend.pid}") == "owned"
    run.tell(frontend, "fail no tokenizer")
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [1, 1, 3]
    assert run.stderr == "Traceback: here\nerror: no tokenizer\n"


def test_dismissal_ends_all_with_success_and_in_silence(start_run):
    run = start_run("worker 0", "worker 1", "worker 2")
    run.tell(run.members["worker 0"], "dismiss")
    run.tell(run.members["worker 2"], "spin")
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [0, 0, 0]
    assert run.stderr == ""


def test_interrupt_of_all_is_said_once(start_run):
    run = start_run("worker 0", "worker 1", "frontend")
    for member in run.members.values():
        member.send_signal(signal.SIGINT)
    codes = run.exit_codes(within_seconds=LIMIT_SECONDS)
    assert 128 + signal.SIGINT in codes
    assert 0 not in codes
    assert run.stderr == "interrupted; finished results are kept\n"


def test_terminate_one_ends_all_in_silence(start_run):
    run = start_run("worker 0", "worker 1")
    run.tell(run.members["worker 0"], "spin")
    run.members["worker 0"].terminate()
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [128 + signal.SIGTERM, 1]
    assert run.stderr == ""


def test_terminate_after_a_death_names_the_dead(start_run):
    run = start_run("worker 0", "worker 1")
    dead = run.members["worker 1"]
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    run.members["worker 0"].terminate()
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [1, -signal.SIGKILL]
    assert "worker 1" in run.stderr


def test_owned_child_is_killed_with_its_parent(start_run):
    run = start_run("worker 0")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        assert run.ask(run.members["worker 0"], f"own {sleeper.pid}") == "owned"
        run.tell(run.members["worker 0"], "fail over")
        assert sleeper.wait(LIMIT_SECONDS) == -signal.SIGKILL
    finally:
        sleeper.kill()
        sleeper.wait()


def test_stopped_peer_is_killed_after_the_patience(start_run):
    run = start_run("worker 0", "worker 1")
    hung = run.members["worker 1"]
    hung.send_signal(signal.SIGSTOP)
    run.tell(run.members["worker 0"], "fail over")
    assert run.exit_codes(within_seconds=LIMIT_SECONDS) == [3, -signal.SIGKILL]


def test_zombie_counts_as_dead():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = ProcessId.of("child", child.pid)
    assert process.is_alive()
    child.stdin.close()
    # WNOWAIT leaves the zombie: it has ended, and nobody has collected it.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}").exists()
    assert not process.is_alive()
    child.wait()
    assert not process.is_alive()


def test_pid_taken_by_another_process_counts_as_dead():
    mine = ProcessId.of("me")
    reused = replace(mine, create_time=mine.create_time - 1)
    assert mine.is_alive()
    assert not reused.is_alive()
    reused.kill()  # would end this test run


def test_unknown_pid_is_refused():
    with pytest.raises(RuntimeError, match=r"worker 9 .* is not running"):
        ProcessId.of("worker 9", 2**22 + 1)


def test_long_run_id_is_refused():
    with pytest.raises(ValueError, match="run_id="):
        Lifeline("x" * 81, ProcessId.of("me"))


def test_unwatched_process_may_end():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lifeline = Lifeline(uuid.uuid4().hex, ProcessId.of("me"))
    lifeline.watch(ProcessId.of("child", child.pid))
    lifeline.unwatch(ProcessId.of("child", child.pid))
    child.communicate(b"\n")
    time.sleep(0.4)
    lifeline.stop()


def test_launcher_ancestors_are_found_nearest_first(tmp_path):
    code = (
        "from seesaw_ds.engine.process_id import launcher_ancestors; import json;"
        "print(json.dumps([[p.name, p.pid] for p in launcher_ancestors()]))"
    )
    # deepspeed (a script) -> python -m deepspeed.launcher.launch -> a shell -> this rank
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    rank = f"{sys.executable} -c '{code}'; true"
    (package / "launch.py").write_text(
        f"import os, subprocess; print(os.getpid(), flush=True); subprocess.run(['sh', '-c', {rank!r}])"
    )
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--x=1"]
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "deepspeed"
    script.write_text(f"import os, subprocess; print(os.getpid(), flush=True); subprocess.run({launch!r})")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    run = subprocess.run(
        [sys.executable, str(script), "--num_gpus", "2"], env=environment, capture_output=True, text=True, check=True
    )
    runner_pid, launch_pid, found = run.stdout.splitlines()
    expected = f'[["{LAUNCH_NAME}", {launch_pid}], ["{RUNNER_NAME}", {runner_pid}]]'
    assert found.startswith(expected[:-1])


def test_launcher_that_is_not_among_the_ancestors_is_missed():
    # The command is the parent of the node's launcher, unless it was given on another node.
    sleep = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(sleep, stdin=subprocess.PIPE) as local,
        subprocess.Popen([*sleep, "--node_rank=1"], stdin=subprocess.PIPE) as remote,
    ):
        runner = ProcessId.of(RUNNER_NAME)
        assert missing_launcher([]) == LAUNCH_NAME
        assert missing_launcher([ProcessId.of(LAUNCH_NAME, local.pid)]) == RUNNER_NAME
        assert missing_launcher([ProcessId.of(LAUNCH_NAME, local.pid), runner]) is None
        assert missing_launcher([ProcessId.of(LAUNCH_NAME, remote.pid)]) is None


def test_ranks_are_the_launchers_children_in_order_of_start():
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)]
    expected = [ProcessId.of(f"worker rank {rank}", child.pid) for rank, child in enumerate(children, start=4)]
    assert ranks_of(ProcessId.of(LAUNCH_NAME), first_rank=4) == expected
    # One that has ended is there until it is collected.
    children[1].kill()
    os.waitid(os.P_PID, children[1].pid, os.WEXITED | os.WNOWAIT)
    assert ranks_of(ProcessId.of(LAUNCH_NAME), first_rank=4) == expected
    for child in children:
        child.communicate()

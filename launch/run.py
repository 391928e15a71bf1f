"""Run a batch file through a model: ``deepspeed launch/run.py --config FILE``.

The DeepSpeed launcher starts this once for each device. Rank 0 checks the settings, chooses the layouts if they are
"auto", and starts the frontend and one scheduler for each replica, before any rank loads a model. Which rank this is
it reads from the launcher's environment.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seesaw_ds.config import RunConfig
from seesaw_ds.engine.agreement import SettingsStore
from seesaw_ds.engine.auto_layouts import choose_layouts
from seesaw_ds.engine.lifeline import Lifeline
from seesaw_ds.engine.preflight import check_run, is_finished, load_config
from seesaw_ds.engine.process_id import LAUNCH_NAME, ProcessId, launcher_ancestors, missing_launcher, ranks_of
from seesaw_ds.engine.process_spec import ProcessSpec, start_process
from seesaw_ds.errors import UserError

CHILD_EXIT_SECONDS = 30.0
HOW_TO_START = "Start it with the DeepSpeed launcher: deepspeed --num_gpus N launch/run.py --config FILE"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a batch file of prompts: prefill under one parallel layout, decode under another.",
        epilog=HOW_TO_START,
    )
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--input", help="OpenAI batch JSONL to read (instead of the config's)")
    parser.add_argument("--output", help="result JSONL to write (instead of the config's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of finishing an earlier run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_args()


def start_children(run: RunConfig, run_id: str, overwrite: bool, watch: list[ProcessId]) -> dict[str, subprocess.Popen]:
    """Start the frontend and the schedulers; they run beside the loading of the model."""
    spec = ProcessSpec(run_id=run_id, config=run, overwrite=overwrite, replica=0, watch=watch)
    children = {"frontend": start_process("seesaw_ds.engine.frontend", spec)}
    for replica in range(run.layout_pair.dp):
        spec = ProcessSpec(run_id=run_id, config=run, overwrite=overwrite, replica=replica, watch=watch)
        children[f"scheduler {replica}"] = start_process("seesaw_ds.engine.scheduler_process", spec)
    return children


def watch_launch(lifeline: Lifeline, launchers: list[ProcessId], first_rank: int) -> None:
    """Watch the launcher and this node's ranks, before they have heard of each other."""
    missing = missing_launcher(launchers)
    if missing is not None:
        lifeline.fail(f"{missing} is not running: it died, or did not start this. {HOW_TO_START}", exit_code=2)
    ranks = next(ranks_of(launcher, first_rank) for launcher in launchers if launcher.name == LAUNCH_NAME)
    for process in [*launchers, *ranks]:
        lifeline.watch(process)


def wait_for(children: dict[str, subprocess.Popen]) -> int:
    """Let the children end; 1 if one of them failed after the last result, else 0."""
    failed = [name for name, child in children.items() if child.wait(CHILD_EXIT_SECONDS) != 0]
    if failed:
        print(f"error: {', '.join(failed)} failed at the end of the run; the results are whole", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    start = time.monotonic()
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        print(f"error: this is not started by itself. {HOW_TO_START}", file=sys.stderr)
        return 2
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 shows what a rank that hangs is doing
    # Megatron-core says so at every import; nothing here uses its optimizers.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    logging.basicConfig(level=logging.WARNING, format=f"[rank {rank}] %(levelname)s %(name)s: %(message)s")
    logging.getLogger("seesaw_ds").setLevel(logging.INFO)
    launchers = launcher_ancestors()
    # The same for all ranks of a node without asking: the launcher's process and the port it chose.
    run_id = f"{os.getppid()}-{os.environ['MASTER_PORT']}"
    me = ProcessId.of(f"worker rank {rank}")
    lifeline = Lifeline(run_id, me)
    lifeline.install_signal_handlers()
    watch_launch(lifeline, launchers, first_rank=rank - int(os.environ["LOCAL_RANK"]))

    children: dict[str, subprocess.Popen] = {}
    store: SettingsStore | None = None
    try:
        run = load_config(arguments.config, arguments.set, arguments.input, arguments.output)
        if rank == 0:
            check_run(run, world_size)
            if is_finished(run, arguments.overwrite):
                print(f"{run.output} has every result already; --overwrite starts anew", flush=True)
                lifeline.dismiss()
        if run.has_auto_layouts:
            store = SettingsStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank)
            if rank == 0:
                node_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"])
                run = choose_layouts(run, world_size, node_size, arguments.overwrite)
                check_run(run, world_size)
                store.publish(run)
            else:
                run = store.take()
        if rank == 0:
            children = start_children(run, run_id, arguments.overwrite, [*launchers, me])
    except UserError as error:
        if rank == 0:
            lifeline.fail(str(error), exit_code=2)
        time.sleep(CHILD_EXIT_SECONDS)  # rank 0 finds the same, says it and ends the run
        return 2
    except RuntimeError as error:  # rank 0 went away while it planned
        lifeline.fail(f"worker rank {rank}: {error!r}", details=traceback.format_exc())
    processes = [me]
    for name, child in children.items():
        lifeline.own(child.pid)
        processes.append(ProcessId.of(name, child.pid))
        lifeline.watch(processes[-1])

    from seesaw_ds.worker.engine import StartUpTimer
    from seesaw_ds.worker.main import run_worker

    timer = StartUpTimer({"imports": time.monotonic() - start})
    run_worker(run, run_id, lifeline, processes, timer)
    return wait_for(children)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # past the destructors of NCCL's communicators, which captured graphs still hold

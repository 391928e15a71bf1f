"""Where the processes of a run meet. Abstract socket names: nothing is left in a file system, however a run ends."""

from __future__ import annotations


def frontend(run_id: str) -> str:
    """Schedulers connect here (DEALER to ROUTER)."""
    return f"ipc://@seesaw-{run_id}-frontend"


def telemetry(run_id: str) -> str:
    """Workers push spans and counters to the frontend here."""
    return f"ipc://@seesaw-{run_id}-telemetry"


def commands(run_id: str, rank: int) -> str:
    """A replica's scheduler pushes commands to the worker of this rank here."""
    return f"ipc://@seesaw-{run_id}-commands-{rank}"


def results(run_id: str, replica: int) -> str:
    """A replica's workers push results to its scheduler here."""
    return f"ipc://@seesaw-{run_id}-results-{replica}"

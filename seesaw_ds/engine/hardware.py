"""Finds the hardware profile of the machine at hand, or one that a user names; nothing here imports torch."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

from seesaw_ds.errors import UserError
from seesaw_ds.plan.hardware import HardwareProfile, load_hardware

logger = logging.getLogger(__name__)

PROFILES = Path(__file__).resolve().parents[2] / "configs" / "hardware"
CALIBRATED = "local"
"""The name of a profile that tools/calibrate.py writes, and its start when the name says more."""
P2P_OFF = "-p2p-off"
"""The end of a profile's name when it holds with NCCL_P2P_DISABLE=1."""

_CPU_PROFILE = "cpu"
_CORES = " cores"
_NVIDIA_SMI_SECONDS = 20.0


def is_p2p_off() -> bool:
    """Whether devices may not reach each other's memory."""
    return os.environ.get("NCCL_P2P_DISABLE") == "1"


def device_name() -> str:
    """The first GPU's name as its driver gives it, or the processor's with its number of cores."""
    gpu = "" if os.environ.get("DS_ACCELERATOR") == "cpu" else _gpu_name()
    return gpu or f"{_processor_name()}, {os.cpu_count()}{_CORES}"


def is_cpu(device: str) -> bool:
    """Whether a `device_name` is a processor's."""
    return device.endswith(_CORES)


def find_hardware(name: str | None) -> HardwareProfile:
    """The named profile or YAML file; without a name the device's own, a calibrated one first.

    Raises UserError when there is none, with the way to make one.
    """
    if name is not None:
        path = PROFILES / f"{name}.yaml"
        return load_hardware(path if path.is_file() else Path(name))
    device = device_name()
    profiles = [load_hardware(path) for path in sorted(PROFILES.glob("*.yaml"))]
    matching = [profile for profile in profiles if profile.device == device]
    matching.sort(key=lambda profile: (profile.name.endswith(P2P_OFF) != is_p2p_off(), not _is_calibrated(profile)))
    if matching:
        return matching[0]
    if not is_cpu(device):
        raise UserError(
            f"hardware: configs/hardware has no profile of {device!r}; measure one with python tools/calibrate.py, "
            "or name one that is near"
        )
    logger.warning("no calibration of this machine: its speed is guessed; python tools/calibrate.py measures it")
    return load_hardware(PROFILES / f"{_CPU_PROFILE}.yaml")


def _is_calibrated(profile: HardwareProfile) -> bool:
    return profile.name.startswith(CALIBRATED)


def _gpu_name() -> str:
    """Empty without an NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")

"""Machines, models and small helpers that the planner's tests share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from seesaw_ds.config import RunConfig
from seesaw_ds.engine.hardware import CALIBRATED, PROFILES
from seesaw_ds.layout import LayoutPair
from seesaw_ds.plan.candidates import scheduler_limits
from seesaw_ds.plan.hardware import HardwareProfile, load_hardware
from seesaw_ds.plan.memory import size_pools
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.shapes import ModelShape, model_shape

ROOT = Path(__file__).resolve().parents[2]
# Those that tools/calibrate.py wrote on this machine are not shipped.
HARDWARE_FILES = sorted(path for path in PROFILES.glob("*.yaml") if not path.stem.startswith(CALIBRATED))


def hardware(name: str) -> HardwareProfile:
    return load_hardware(PROFILES / f"{name}.yaml")


def shape(name: str) -> ModelShape:
    sizes = model_shape(json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text()))
    return replace(sizes, max_position_embeddings=8192)


def run_config(layouts: str, lengths: list[RequestLength], host_gib: float, **changes) -> RunConfig:
    run = RunConfig(
        model="",
        input="",
        output="",
        layouts=layouts,
        dtype="bfloat16",
        max_model_len=max(sum(length) for length in lengths),
        max_num_batched_tokens=2048,
        kv_offloading_size=host_gib,
    )
    return replace(run, **changes)


def limits_of(run: RunConfig, model: ModelShape, machine: HardwareProfile) -> SchedulerLimits:
    return scheduler_limits(run, size_pools(run, model, machine.memory_bytes, machine.runtime_bytes))


def pair(text: str) -> LayoutPair:
    return LayoutPair.parse(text)

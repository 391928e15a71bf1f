"""What the calibration makes of its measurements; the measuring itself is in tests/dist."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibrate import profile_values, write_profile
from seesaw_ds.engine.hardware import device_name
from seesaw_ds.plan.hardware import load_hardware, parse_hardware

FIGURES = {
    "memory_bytes": 1 << 30,
    "flops": {"float32": 1.23456789e11},
    "memory_bandwidth": 1.5e10,
    "layer_seconds": 2e-4,
    "step_seconds": 3e-3,
    "host_to_device": 5e9,
    "device_to_host": 5e9,
    "duplex": 3e9,
    "linear": {"float32": [[1, 1e-10], [64, 2e-9]]},
    "pads_decode": 1.0,
}
LINKS = {"all_reduce": {"2": [[1024, 1e-3], [4096, 2e-3]]}, "send_seconds": 1e-4, "send_bandwidth": 2e9}


def test_a_written_profile_is_found_whole_with_sources(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "local.yaml"
    write_profile(path, FIGURES | LINKS, 2, 44.0)
    profile = load_hardware(path)
    assert (profile.name, profile.device) == ("local", device_name())
    assert profile.all_reduce == {2: ((1024.0, 1e-3), (4096.0, 2e-3))}
    assert profile.flops["float32"] == pytest.approx(1.23457e11)
    assert profile.linear == {"float32": ((1.0, 1e-10), (64.0, 2e-9))}
    assert profile.pads_decode == 1.0
    assert profile.sources["duplex"].startswith("measured by tools/calibrate.py on 20")
    assert path.read_text().startswith(f"# {device_name()}: 2 ranks at once, 44 s")


def test_one_rank_alone_has_a_profile_too() -> None:
    profile = parse_hardware(profile_values(FIGURES | {"pads_decode": 0.0}, "local", "measured here today"))
    assert profile.pads_decode is None
    assert profile.send_bandwidth == profile.memory_bandwidth
    assert "pads_decode" not in profile.sources

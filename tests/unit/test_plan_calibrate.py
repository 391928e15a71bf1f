"""What the calibration makes of its measurements; the measuring itself is in tests/dist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import calibrate
import calibration_device
from calibrate import Figures, profile_values, write_profile
from seesaw_ds.engine.hardware import device_name
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.cost import CostModel, StepWork
from seesaw_ds.plan.hardware import load_hardware, parse_hardware
from seesaw_ds.shapes import model_shape, read_hf_config

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


class OwnKernels:
    """Those of a GPU, which this is not. Keeps what was multiplied."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Size]] = []

    def prepare(self) -> bool:
        return True

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(x), weight.shape))
        return x @ weight.T


def test_products_of_few_rows_are_measured_where_there_are_kernels_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, kernels = replace(calibration_device.CPU_SIZES, matrix=(32, 16)), OwnKernels()

    def typical_seconds(run: Callable[[], object], device: torch.device) -> float:
        run()
        return 1e-6 * sizes.num_matrices

    monkeypatch.setattr(calibration_device, "typical_seconds", typical_seconds)
    assert calibration_device.row_linear_points(sizes, "float32", torch.device("cpu")) is None
    monkeypatch.setattr(calibration_device, "make_row_kernels", lambda dtype, device: kernels)
    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr(calibration_device, "_matrices", lambda *_: [torch.ones(32, 16)] * sizes.num_matrices)
    points = calibration_device.row_linear_points(sizes, "float32", cuda)  # type: ignore[arg-type]
    assert kernels.calls == [(rows, (32, 16)) for rows in (96, 64, 36, 20, 1) for _ in range(sizes.num_matrices)]
    assert [rows for rows, _ in points] == [1, 20, 36, 64, 96]
    assert points[0][1] == pytest.approx(1e-6 / 512)
    profile = parse_hardware(profile_values(FIGURES | {"row_linear": {"float32": points}}, "local", "here"))
    assert profile.row_linear["float32"][0] == pytest.approx((1.0, 1e-6 / 512), rel=1e-4)


def test_one_rank_alone_has_a_profile_too() -> None:
    figures = FIGURES | {"pads_decode": 0.0}
    profile = parse_hardware(profile_values(figures, "local", "measured here today"))
    assert profile.pads_decode is None
    assert profile.send_bandwidth == profile.memory_bandwidth
    assert "pads_decode" not in profile.sources


def test_the_hosts_work_is_what_decode_steps_of_the_engine_take_beyond_their_layers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """256 steps of each of two replicas with 4 rows, then with 24; phases apart, or decode would count as prefill."""
    step_seconds, row_seconds, layer_seconds = 1e-3, 2e-3, []

    def run_engine(config: Path, num_ranks: int, summary: Path) -> Figures:
        settings = yaml.safe_load(config.read_text())
        assert (settings["layouts"], settings["mixed_steps"]) == ("D2", False)
        num_rows = settings["max_num_seqs"]
        context = num_rows * (calibrate._PROMPT_TOKENS + calibrate._OUTPUT_TOKENS // 2)
        shape = model_shape(read_hf_config(settings["model"]))
        cost = CostModel(shape, calibrate.make_profile(figures), ParallelLayout(dp=2), "float32")
        layer_seconds.append(sum(cost.stage_seconds(StepWork(num_rows, decode_context=context, num_rows=num_rows))))
        decode = 256 * (step_seconds + row_seconds * num_rows + layer_seconds[-1])
        return {
            "decode_steps": 512,
            "decode_rows": 512 * num_rows,
            "phase_seconds": {"prefill": 1.0, "decode": decode},
        }

    monkeypatch.setattr(calibrate, "_run_engine", run_engine)
    figures = FIGURES | LINKS | {"attention_efficiency": 0.5}
    found = calibrate.host_seconds(figures, 2, tmp_path)
    assert found == {"step_seconds": pytest.approx(step_seconds), "row_seconds": pytest.approx(row_seconds)}
    assert layer_seconds[0] > layer_seconds[1]
    row_seconds = 0.0
    (tmp_path / "again").mkdir()
    assert calibrate.host_seconds(figures, 2, tmp_path / "again")["step_seconds"] == pytest.approx(step_seconds)


def test_on_gpus_a_step_is_as_short_as_one_of_the_tiny_model_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []

    def run_engine(config: Path, num_ranks: int, summary: Path) -> Figures:
        runs.append(yaml.safe_load(config.read_text())["max_num_seqs"])
        return {"decode_steps": 256, "decode_rows": 256 * runs[-1], "phase_seconds": {"prefill": 1.0, "decode": 128.0}}

    monkeypatch.setattr(calibrate, "_run_engine", run_engine)
    monkeypatch.setattr(calibrate, "is_cuda", lambda: True)
    linear = {"bfloat16": FIGURES["linear"]["float32"]}
    figures = FIGURES | LINKS | {"attention_efficiency": 0.5, "linear": linear, "flops": {"bfloat16": 1e12}}
    found = calibrate.gpu_host_seconds(1, tmp_path)
    assert found == {"step_seconds": calibrate._GPU_STEP_SECONDS, "least_step_seconds": 0.5}
    assert runs == [calibrate._MANY_REQUESTS]
    profile = parse_hardware(profile_values(figures | found, "local", "measured here today"))
    assert profile.least_step_seconds == 0.5
    assert profile.sources["least_step_seconds"] == "measured here today"
    assert profile.sources["step_seconds"].startswith("estimate")

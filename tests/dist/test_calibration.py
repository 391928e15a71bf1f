"""The calibration's measurements on CPU ranks: every figure there is, sane, and enough to plan with."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibrate import make_profile, measure_figures
from calibration_device import CPU_SIZES, MIB
from calibration_links import exchange_figures
from harness import run_ranks
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.cost import CostModel, StepWork

SIZES = replace(
    CPU_SIZES,
    dtypes=("float32", "bfloat16"),
    matrix=(64, 32),
    num_matrices=2,
    token_counts=(1, 8, 64),
    few_token_counts=(1, 64),
    copy_bytes=MIB,
    prompt_tokens=64,
    decode_rows=4,
    context_tokens=64,
    reduce_bytes=(1024, 65536),
    send_bytes=(1024, 65536),
)


def measure() -> dict:
    return measure_figures(SIZES, torch.device("cpu"))


def test_two_ranks_measure_a_whole_profile(monkeypatch) -> None:
    monkeypatch.setattr("calibration_device._SPAN_SECONDS", 0.002)
    monkeypatch.setattr("calibration_device._NUM_SPANS", 2)
    for figures in run_ranks(2, measure):
        profile = make_profile({**figures, "step_seconds": 1e-3})
        assert profile.linear is not None
        assert [tokens for tokens, _ in profile.linear["float32"]] == [1, 8, 64]
        assert [tokens for tokens, _ in profile.linear["bfloat16"]] == [1, 64]
        assert profile.pads_decode == 1.0
        assert set(profile.all_reduce) == {2}
        assert profile.exchange_bandwidth is not None and profile.exchange_bandwidth < 1e12
        assert profile.duplex <= min(profile.host_to_device, profile.device_to_host)
        cost = CostModel(SIZES.shape, profile, ParallelLayout(tp=2), "float32")
        layer = cost.layer_seconds(StepWork(num_tokens=4, decode_context=256, num_rows=4))
        assert 2 * profile.all_reduce_seconds(4 * 256 * 4, 2) < layer < 1.0


def test_the_last_of_an_odd_number_has_nobody_to_swap_with(monkeypatch) -> None:
    monkeypatch.setattr("calibration_device._SPAN_SECONDS", 0.002)
    monkeypatch.setattr("calibration_device._NUM_SPANS", 2)
    figures = run_ranks(3, exchange_figures, SIZES, torch.device("cpu"))
    assert figures[0]["exchange_bandwidth"] > 0 and figures[1]["exchange_bandwidth"] > 0

"""The timing of layers under load."""

from __future__ import annotations

import time

import pytest
import torch

from profile_layers import loaded_milliseconds


def test_what_runs_before_the_load_is_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profile_layers._TIMED_SECONDS", 0.1)
    start = time.perf_counter()

    def run() -> None:
        time.sleep(0.001 if time.perf_counter() - start < 0.2 else 0.004)

    assert loaded_milliseconds(run, torch.device("cpu"), load_seconds=0.25) >= 4
    assert time.perf_counter() - start >= 0.35

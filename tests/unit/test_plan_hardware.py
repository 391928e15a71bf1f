"""Hardware profiles: every shipped file is whole and sane, and a wrong one is refused with its figure's name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from plan_cases import HARDWARE_FILES, hardware
from seesaw_ds.errors import UserError
from seesaw_ds.plan.hardware import load_hardware, parse_hardware

MIB = 1 << 20


def values() -> dict:
    return yaml.safe_load(HARDWARE_FILES[0].read_text())


def test_the_promised_machines_are_there():
    names = {path.stem for path in HARDWARE_FILES}
    wanted = {"a10", "l4", "a100-40-pcie", "a100-40-nvlink", "h100", "h200-nvlink", "h200-p2p-off", "cpu"}
    assert wanted <= names


@pytest.mark.parametrize("path", HARDWARE_FILES, ids=lambda path: path.stem)
def test_shipped_profiles_are_whole_and_named_as_their_files(path):
    profile = load_hardware(path)
    assert profile.name == path.stem
    assert profile.duplex <= min(profile.host_to_device, profile.device_to_host)
    assert profile.memory_bandwidth > profile.send_bandwidth
    for degree in (2, 4, 8):
        assert profile.all_reduce_seconds(MIB, degree) < profile.all_reduce_seconds(16 * MIB, degree)
    assert profile.all_reduce_seconds(MIB, 2) <= profile.all_reduce_seconds(MIB, 4)


@pytest.mark.parametrize("path", HARDWARE_FILES, ids=lambda path: path.stem)
def test_every_figure_has_a_source_with_words_in_it(path):
    assert all(len(source.split()) >= 3 for source in load_hardware(path).sources.values())


def test_all_reduce_is_linear_between_and_beyond_the_points():
    profile = parse_hardware(values() | {"all_reduce": {2: [[100, 1.0], [200, 2.0], [400, 3.0]]}})
    assert profile.all_reduce_seconds(10**9, 1) == 0.0
    assert profile.all_reduce_seconds(150, 2) == pytest.approx(1.5)
    assert profile.all_reduce_seconds(300, 2) == pytest.approx(2.5)
    assert profile.all_reduce_seconds(800, 2) == pytest.approx(5.0)
    assert profile.all_reduce_seconds(0, 2) == pytest.approx(1.0)  # never below the smallest measured
    assert profile.all_reduce_seconds(300, 8) == pytest.approx(2.5)  # the largest degree known


def test_scaling_all_reduce_bandwidth_keeps_the_latency():
    slow = hardware("a10")
    fast = slow.with_all_reduce_scaled(10.0)
    assert fast.all_reduce_seconds(0, 4) == slow.all_reduce_seconds(0, 4)
    gain = slow.all_reduce_seconds(1 << 34, 4) / fast.all_reduce_seconds(1 << 34, 4)
    assert gain == pytest.approx(10.0, rel=0.01)


def test_scaling_all_reduce_bandwidth_scales_that_of_few_rows_too():
    slow = replace(hardware("h200-p2p-off"), row_all_reduce={2: ((0.0, 1.0), (100.0, 2.0))})
    fast = slow.with_all_reduce_scaled(10.0)
    assert fast.all_reduce_seconds(0, 2, has_few_rows=True) == 1.0
    assert fast.all_reduce_seconds(100, 2, has_few_rows=True) == pytest.approx(1.1)
    assert hardware("a10").with_all_reduce_scaled(10.0).row_all_reduce is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bandwith": 1.0}, "memory_bandwith=1.0: unknown figure.*did you mean 'memory_bandwidth'"),
        ({"send_seconds": 0}, "send_seconds=0: must be a number above 0"),
        ({"duplex": "fast"}, "duplex='fast': must be a number above 0"),
        ({"gemm_efficiency": 1.2}, "gemm_efficiency=1.2: a share of the peak"),
        ({"flops": {}}, "flops={}: must be a mapping"),
        ({"all_reduce": {2: [[0, 1.0]]}}, "at least two"),
        ({"all_reduce": {2: [[0, 2.0], [8, 1.0]]}}, "both rising"),
        ({"linear": {"bfloat16": [[1, 2.0], [8, 1.0]]}}, "linear.bfloat16=.*both rising"),
        ({"kv_bandwidth": 1e9}, "sources: kv_bandwidth has none"),
        ({"sources": {"flops": "a data sheet"}}, "sources: memory_bytes has none"),
    ],
)
def test_a_wrong_figure_is_named(change, message):
    with pytest.raises(UserError, match=message):
        parse_hardware(values() | change)


def test_a_missing_figure_is_named():
    profile = values()
    del profile["layer_seconds"]
    with pytest.raises(UserError, match="layer_seconds: missing"):
        parse_hardware(profile)


def test_unreadable_profiles_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_hardware(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold figures"):
        load_hardware(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_hardware(tmp_path / "broken.yaml")


def test_calibrated_figures_are_read_and_may_be_left_out():
    profile = values()
    assert parse_hardware(profile).linear is None
    profile["sources"] = profile["sources"] | {"linear": "measured here today", "pads_decode": "measured here today"}
    parsed = parse_hardware(profile | {"linear": {"bfloat16": [[1, "1e-12"], [8, "2e-12"]]}, "pads_decode": 1})
    assert parsed.linear == {"bfloat16": ((1.0, 1e-12), (8.0, 2e-12))}
    assert parsed.pads_decode == 1.0

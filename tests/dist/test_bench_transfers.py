"""The benchmark of transfers on CPU ranks: a row for each transfer, figures that fit, and wrong bits seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from bench_transfers import BACKEND, BOTH_WAYS, TO_DEVICE, TO_HOST, Row, carriers, measure, plain_rates, print_header, print_row
from calibration_device import CPU_SIZES
from harness import run_ranks
from seesaw_ds.kv.transfer import copy_to_device, copy_to_host
from seesaw_ds.layout import LayoutPair
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.shapes import ModelShape
from staged import staged_transport
from transfer_cases import Carrier, Setting

CPU = torch.device("cpu")
SHAPE = replace(CPU_SIZES.shape, num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48)
LAYER_BYTES = 4 * SHAPE.layer_parameters
BLOCK_BYTES = 4 * SHAPE.num_layers * 2 * SHAPE.num_kv_heads * 16 * SHAPE.head_dim
NUM_BLOCKS = 150  # two sequences, the second a short one
RATES = {TO_HOST: 4e9, TO_DEVICE: 2e9, BOTH_WAYS: 1e9, BACKEND: 5e8}
WEIGHTS = ["weight exchange to decode", "weight exchange to prefill"]
RELOAD = ["weight reload to decode", "weight reload to prefill"]
KV = ["KV exchange to decode", "KV exchange to prefill"]
SWAP = ["KV swap-out in prefill", "KV swap-in in prefill", "KV swap-out in decode", "KV swap-in in decode"]


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr("calibration_device._SPAN_SECONDS", 0.001)
    monkeypatch.setattr("calibration_device._NUM_SPANS", 1)


def measure_rank(text: str, fault: str = "", shape: ModelShape = SHAPE) -> list[Row]:
    setting = Setting(shape, LayoutPair.parse(text), torch.float32, NUM_BLOCKS * BLOCK_BYTES, 2 * LAYER_BYTES)
    state = ParallelState(setting.layouts)
    carried_by = carriers(state.replica, CPU)
    if fault == "transport":
        carried_by = [Carrier("broken", BrokenTransport(carried_by[0].transport), BACKEND)]
    elif not fault:
        carried_by.append(Carrier("host memory", staged_transport(state.replica_ranks), BOTH_WAYS))
    return list(measure(setting, state, carried_by, RATES, CPU))


class BrokenTransport:
    """Changes one bit of the last element that rank 1 sends, in whatever it sends."""

    def __init__(self, transport) -> None:
        self._transport = transport

    def exchange(self, sends, receives):
        if dist.get_rank() == 1:
            sends = [(tensor.clone(), peer) for tensor, peer in sends]
            for tensor, _ in sends:
                tensor.view(-1).view(torch.uint8)[-1] ^= 1
        return self._transport.exchange(sends, receives)


def test_each_transfer_has_a_row_with_its_bytes_and_rates(capsys):
    rows, others = run_ranks(2, measure_rank, "P2->T2")
    assert rows == others
    named = {(row.name, row.carrier): row for row in rows}
    both = [(name, carrier) for name in WEIGHTS + KV for carrier in ("gloo", "host memory")]
    assert set(named) == {*both, *((name, "host copy") for name in RELOAD), *((name, "copy engine") for name in SWAP)}
    assert len(named) == len(rows)
    half_layer = LAYER_BYTES // 2
    for names, num_bytes in ((WEIGHTS, 2 * half_layer), (RELOAD, half_layer), (KV, NUM_BLOCKS * BLOCK_BYTES // 4)):
        assert {row.num_bytes for row in rows if row.name in names} == {num_bytes}
    assert {row.num_bytes for row in rows if row.name in SWAP} == {NUM_BLOCKS * BLOCK_BYTES // 2}
    for row in rows:
        assert row.is_exact and row.seconds > 0
        assert row.rate == pytest.approx(row.num_bytes / row.seconds)
        assert row.share == pytest.approx(row.rate / row.plain_rate)
    assert named["KV swap-out in decode", "copy engine"].plain_rate == RATES[TO_HOST]
    assert named["weight reload to decode", "host copy"].plain_rate == RATES[TO_DEVICE]
    assert named["KV exchange to decode", "host memory"].plain_rate == RATES[BOTH_WAYS]
    assert named["weight exchange to decode", "gloo"].plain_rate == RATES[BACKEND]
    print_header(RATES)
    for row in rows:
        print_row(row)
    table = capsys.readouterr().out
    assert "both ways at once 1.0 GB/s" in table and "WRONG" not in table
    assert len(table.splitlines()) == 2 + len(rows)


def test_one_layout_for_both_phases_has_only_swaps():
    rows = run_ranks(2, measure_rank, "T2")[0]
    assert [row.name for row in rows] == SWAP[:2] and all(row.is_exact for row in rows)


def test_weights_of_layouts_that_are_not_nested_come_from_the_host():
    shape = replace(SHAPE, num_heads=6, num_kv_heads=6)
    rows = run_ranks(6, measure_rank, "T2P3->T3P2", "", shape)[0]
    assert {row.name for row in rows} == {*RELOAD, *KV, *SWAP} and all(row.is_exact for row in rows)


def test_a_wrong_bit_in_an_exchange_is_seen(capsys):
    rows = run_ranks(2, measure_rank, "P2->T2", "transport")[0]
    assert {row.name for row in rows if not row.is_exact} == {*WEIGHTS, *KV}
    for row in rows:
        print_row(row)
    assert capsys.readouterr().out.count("WRONG BITS") == 4


def lose_a_block(pool, blocks, host_pool, host_blocks):
    return copy_to_host(pool, blocks[1:], host_pool, host_blocks[1:])


def lose_a_block_on_the_way_in(host_pool, host_blocks, pool, blocks):
    return copy_to_device(host_pool, host_blocks[1:], pool, blocks[1:])


@pytest.mark.parametrize(
    ("function", "fault", "wrong"),
    [
        ("copy_to_host", lose_a_block, set(SWAP)),
        ("copy_to_device", lose_a_block_on_the_way_in, {name for name in SWAP if "swap-in" in name}),
    ],
)
def test_a_lost_block_is_seen(monkeypatch, function, fault, wrong):
    monkeypatch.setattr(f"transfer_cases.{function}", fault)
    rows = run_ranks(2, measure_rank, "P2->T2", function)[0]
    assert {row.name for row in rows if not row.is_exact} == wrong


def measure_plain() -> dict[str, float]:
    return plain_rates(replace(CPU_SIZES, copy_bytes=1 << 20), CPU)


def test_plain_rates_are_measured_for_every_link():
    for rates in run_ranks(2, measure_plain):
        assert set(rates) == {TO_HOST, TO_DEVICE, BOTH_WAYS, BACKEND}
        assert all(rate > 1e6 for rate in rates.values())

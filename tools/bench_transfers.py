"""Measure how fast weights and KV move when the layout changes, and check them bit for bit; a table, and JSON.

    deepspeed --num_gpus 2 tools/bench_transfers.py --model-shape llama2-70b --layouts "P2->T2" --layers 16
    NCCL_P2P_DISABLE=1 deepspeed ...                              the same devices as if joined by PCIe alone
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 ... --model-shape FOLDER --layers 4 --kv-gib 0.1

It builds the parts of a worker that move data, of fewer layers. Rates are GB/s of each rank, in one direction, with all
ranks at work; a share is that of a plain copy over the same link. "Slowed" is by how much longer matrix products of the
model's sizes, as the engine computes them, take beside the transfer, those of a prefill micro-batch and those of a
decode step, on a device that is under load all the time: a card that was idle is faster for some tens of milliseconds,
which would count as slowed.
Exits with 1 when a bit is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from calibration_device import CPU_SIZES, CUDA_SIZES, Sizes, copy_rates, typical_seconds
from seesaw_ds.errors import UserError, exit_with
from seesaw_ds.layout import LayoutPair
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.model.weights import cell_tensors
from seesaw_ds.parallel import device as devices
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.transport import BackendTransport, Transport, choose_transport
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config
from seesaw_ds.worker.setup import init_distributed
from transfer_cases import BACKEND, BOTH_WAYS, TO_DEVICE, TO_HOST, Carrier, Case, Setting, Transfers
from transfer_contents import BLOCK_SIZE

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
_NUM_RUNS = 3
_OVERLAP = 0.8  # of a transfer's time, for the products beside it: they are to end first
_LOAD_SECONDS = 1.0  # of products, until a card has the clock that its power limit allows
_LEAD_SECONDS = 0.06  # of products, in which all that is to start together is queued
_NUM_TOKENS = (512, 36)  # of a prefill micro-batch and a decode step
_NUM_TOKENS_ON_CPU = (16, 2)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `slowed_...` are parts of 1; rates are in bytes/s, and the slowest rank counts."""

    name: str
    carrier: str
    num_bytes: int
    seconds: float
    rate: float
    plain_rate: float
    share: float
    slowed_prefill: float
    slowed_decode: float
    is_exact: bool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", required=True, help="a name in configs/models, or a folder with config.json")
    parser.add_argument("--layouts", required=True, help='for example "P2->T2"')
    parser.add_argument("--layers", type=int, default=16, help="of the model's, that are built")
    parser.add_argument("--kv-gib", type=float, default=8.0, help="KV of all ranks, on the devices and in host memory")
    parser.add_argument("--host-weights-gib", type=float, default=8.0, help="at most, for the reload from host memory")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    return parser.parse_args()


class _Beside(NamedTuple):
    """How much longer than alone products took beside a transfer, a part of 1, and whether its bits were right."""

    slowed: float
    is_exact: bool


class Products:
    """Matrix products of one tensor-parallel rank's sizes, on the current stream. `seconds` is what all four take."""

    seconds: float

    def __init__(self, setting: Setting, ops: LayerOps, device: torch.device, num_tokens: int) -> None:
        specs = cell_tensors(setting.shape, setting.layouts.cells_per_layer)
        self._matrices = [torch.randn(s.rows, s.cols, dtype=setting.dtype, device=device) for s in specs]
        self._x = torch.randn(num_tokens, setting.shape.hidden_size, dtype=setting.dtype, device=device)
        self._ops = ops
        ops.tune_linear([num_tokens], self._matrices)

    def run(self, count: int = 1) -> None:
        """All four matrices, `count` times."""
        for _ in range(count):
            for matrix in self._matrices:
                self._ops.linear(self._x, matrix)


class Bench:
    """Runs cases. Collective over all ranks, which go through the same cases."""

    def __init__(self, setting: Setting, device: torch.device, plain_rates: dict[str, float]) -> None:
        self._device = device
        self._plain_rates = plain_rates
        num_tokens = _NUM_TOKENS if devices.is_cuda(device) else _NUM_TOKENS_ON_CPU
        ops = choose_backends(setting.shape, BLOCK_SIZE, setting.dtype, device).ops
        self._products = [Products(setting, ops, device, number) for number in num_tokens]
        for products in self._products:
            products.seconds = self._most(typical_seconds(products.run, device))
        self._stream = devices.new_stream(device)

    def rows(self, pair: list[Case]) -> list[Row]:
        """Run the cases of `pair` in turn: once to warm up, a few times alone, then beside products."""
        seconds: list[list[float]] = [[] for _ in pair]
        is_exact = [True for _ in pair]
        num_bytes = [0 for _ in pair]
        for _ in range(1 + _NUM_RUNS):
            for i, case in enumerate(pair):
                self._begin(case)
                taken, num_bytes[i] = self._alone(case)
                seconds[i].append(taken)
                is_exact[i] &= self._check(case)
        medians = [self._most(statistics.median(taken[1:])) for taken in seconds]
        beside = [self._beside(pair, medians, products) for products in self._products]
        rows = []
        for i, (case, median, prefill, decode) in enumerate(zip(pair, medians, *beside, strict=True)):
            is_exact[i] &= prefill.is_exact and decode.is_exact
            moved = int(self._most(float(num_bytes[i])))
            rate, plain = moved / median, self._plain_rates[case.link]
            slowed = (prefill.slowed, decode.slowed)
            rows.append(Row(case.name, case.carrier, moved, median, rate, plain, rate / plain, *slowed, is_exact[i]))
        return rows

    def _begin(self, case: Case) -> None:
        case.prepare()
        _synchronize(self._device)
        dist.barrier()

    def _check(self, case: Case) -> bool:
        """Whether the outcome is right on every rank; it is looked at when all have done their part."""
        dist.barrier()
        return self._most(float(not case.is_exact())) == 0

    def _alone(self, case: Case) -> tuple[float, int]:
        start = time.perf_counter()
        begin: Any = devices.record_event(self._device, timing=True)
        num_bytes = case.run(begin)
        end: Any = devices.record_event(self._device, timing=True)
        _synchronize(self._device)
        return (time.perf_counter() - start if begin is None else begin.elapsed_time(end) / 1000), num_bytes

    def _beside(self, pair: list[Case], seconds: list[float], products: Products) -> list[_Beside]:
        """`products` beside each case of `pair`, which takes `seconds`."""
        if devices.is_cuda(self._device):
            products.run(math.ceil(_LOAD_SECONDS / products.seconds))
        counts = [max(1, int(_OVERLAP * taken / products.seconds)) for taken in seconds]
        alone: list[list[float]] = [[] for _ in pair]
        beside: list[list[float]] = [[] for _ in pair]
        is_exact = [True] * len(pair)
        for _ in range(_NUM_RUNS):
            for i, case in enumerate(pair):
                alone[i].append(self._products_beside(products, counts[i], _nothing))
                self._begin(case)
                beside[i].append(self._products_beside(products, counts[i], case.run))
                is_exact[i] &= self._check(case)
        medians = [
            (statistics.median(without), statistics.median(taken)) for without, taken in zip(alone, beside, strict=True)
        ]
        slowed = [self._most(taken / without - 1) for without, taken in medians]
        return list(map(_Beside, slowed, is_exact))

    def _products_beside(self, products: Products, count: int, run: Callable[[Any], object]) -> float:
        """Seconds of `count` products that start together with `run`."""
        if not devices.is_cuda(self._device):
            other = threading.Thread(target=run, args=(None,))
            other.start()
            start = time.perf_counter()
            products.run(count)
            seconds = time.perf_counter() - start
            other.join()
            return seconds
        products.run(math.ceil(_LEAD_SECONDS / products.seconds))
        begin: Any = devices.record_event(self._device, timing=True)
        products.run(count)
        end: Any = devices.record_event(self._device, timing=True)
        with devices.on_stream(self._stream):
            run(begin)
        _synchronize(self._device)
        return float(begin.elapsed_time(end)) / 1000

    def _most(self, value: float) -> float:
        """The largest over all ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)


def plain_rates(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Bytes/s of plain copies, by link: one way, each way with both at once, and each way of the process group."""
    copies = copy_rates(sizes, device)
    rates = {TO_DEVICE: copies["host_to_device"], TO_HOST: copies["device_to_host"], BOTH_WAYS: copies["duplex"]}
    if dist.get_world_size() > 1:
        world = dist.group.WORLD
        assert world is not None
        transport = BackendTransport(world, device)
        sent, received = (torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        after, before = ((dist.get_rank() + step) % dist.get_world_size() for step in (1, -1))

        def run() -> None:
            transport.exchange([(sent, after)], [(received, before)]).wait()

        rates[BACKEND] = sizes.copy_bytes / typical_seconds(run, device)
    return rates


def carriers(group: dist.ProcessGroup, device: torch.device) -> list[Carrier]:
    """What the engine would choose, and the process group to compare with when that is another."""
    backend = {"nccl": "NCCL"}.get(dist.get_backend(group), dist.get_backend(group))
    chosen: Transport = choose_transport(group, device)
    if isinstance(chosen, BackendTransport):
        return [Carrier(backend, chosen, BACKEND)]
    return [
        Carrier("host memory", chosen, BOTH_WAYS),
        Carrier(backend, BackendTransport(group, device), BACKEND),
    ]


def measure(
    setting: Setting, state: ParallelState, carried_by: list[Carrier], rates: dict[str, float], device: torch.device
) -> Iterator[Row]:
    """The table, line by line; collective."""
    bench = Bench(setting, device, rates)
    for pair in Transfers(setting, state, carried_by, device).pairs():
        yield from bench.rows(pair)


def print_header(rates: dict[str, float]) -> None:
    """Rates in GB/s."""
    print("plain: " + ", ".join(f"{link} {rate / 1e9:.1f} GB/s" for link, rate in rates.items()))
    print(
        f"{'what':<28}{'over':<13}{'GB':>8}{'s':>9}{'GB/s':>8}{'plain':>8}{'share %':>9}"
        f"{'slowed: prefill %':>19}{'decode %':>10}",
        flush=True,
    )


def print_row(row: Row) -> None:
    """What is wrong is marked."""
    mark = "" if row.is_exact else "  WRONG BITS"
    print(
        f"{row.name:<28}{row.carrier:<13}{row.num_bytes / 1e9:>8.3f}{row.seconds:>9.4f}{row.rate / 1e9:>8.1f}"
        f"{row.plain_rate / 1e9:>8.1f}{100 * row.share:>9.1f}{100 * row.slowed_prefill:>19.1f}"
        f"{100 * row.slowed_decode:>10.1f}{mark}",
        flush=True,
    )


def write_json(path: Path, arguments: argparse.Namespace, rows: list[Row], rates: dict[str, float]) -> None:
    """The settings, plain rates by link, and rows, in bytes, seconds and bytes/s."""
    settings = {key: getattr(arguments, key) for key in ("model_shape", "layouts", "layers", "kv_gib")}
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {**settings, "plain_rates": rates, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(figures, indent=2) + "\n")


def read_shape(name: str, num_layers: int) -> ModelShape:
    """The named model cut to `num_layers`. Raises UserError when there is none."""
    known = ROOT / "configs" / "models" / f"{name}.json"
    shape = model_shape(json.loads(known.read_text()) if known.is_file() else read_hf_config(name))
    return replace(shape, num_layers=num_layers)


def read_setting(arguments: argparse.Namespace, device: torch.device) -> Setting:
    """What the command line asks for. Raises UserError with the rule that it breaks."""
    try:
        layouts = LayoutPair.parse(arguments.layouts)
    except ValueError as error:
        raise UserError(str(error)) from None
    if layouts.world_size != dist.get_world_size():
        raise UserError(f"layouts={arguments.layouts!r}: has {layouts.world_size} ranks; start as many")
    if not layouts.has_equal_stages:
        raise UserError(f"layouts={arguments.layouts!r}: models are cut here, so leave out the layers of each stage")
    if arguments.layers < layouts.replica_size:
        raise UserError(f"layers={arguments.layers}: must be {layouts.replica_size} or more, one for each rank")
    return Setting(
        shape=read_shape(arguments.model_shape, arguments.layers),
        layouts=layouts,
        dtype=torch.bfloat16 if devices.is_cuda(device) else torch.float32,
        kv_bytes=int(arguments.kv_gib * GIB),
        host_weight_bytes=int(arguments.host_weights_gib * GIB),
    )


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    init_distributed()
    device = devices.device()
    setting = read_setting(arguments, device)
    sizes = replace(CUDA_SIZES, copy_bytes=GIB) if devices.is_cuda(device) else CPU_SIZES
    rates = plain_rates(sizes, device)
    state = ParallelState(setting.layouts)
    is_first = dist.get_rank() == 0
    if is_first:
        print(f"{arguments.model_shape}, {arguments.layers} layers, {arguments.layouts}, {device}, a rank each way:")
        print_header(rates)
    rows: list[Row] = []
    for row in measure(setting, state, carriers(state.replica, device), rates, device):
        rows.append(row)
        if is_first:
            print_row(row)
    if is_first:
        print(f"{time.monotonic() - start:.0f} s")
        if arguments.json is not None:
            write_json(arguments.json, arguments, rows, rates)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(row.is_exact for row in rows) else 1


def _nothing(after: Any) -> None:
    pass


def _synchronize(device: torch.device) -> None:
    if devices.is_cuda(device):
        get_accelerator().synchronize()


if __name__ == "__main__":
    exit_with(main)

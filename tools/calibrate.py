"""Measure this machine for the planner: writes a hardware profile in the form of configs/hardware/*.yaml.

    python tools/calibrate.py                                          all GPUs, or two ranks on a CPU machine
    NCCL_P2P_DISABLE=1 python tools/calibrate.py                       the same machine as if joined by PCIe alone

It starts one process a device, which measure at the same time, and the engine for a moment, on CPU twice. Leave the
machine alone meanwhile: whatever else runs is measured too. ``layouts: auto`` then finds the profile by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
import torch.distributed as dist
import yaml
from torch import multiprocessing

from calibration_device import (
    CPU_SIZES,
    CUDA_SIZES,
    Sizes,
    copy_rates,
    layer_figures,
    linear_points,
    row_linear_points,
)
from calibration_links import link_figures
from seesaw_ds.engine.hardware import CALIBRATED, P2P_OFF, PROFILES, device_name, is_p2p_off
from seesaw_ds.errors import UserError, exit_with
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.cost import CostModel, StepWork
from seesaw_ds.plan.hardware import HardwareProfile, parse_hardware
from seesaw_ds.shapes import model_shape
from seesaw_ds.worker.memory import runtime_bytes

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, Any]

_QUIET_LOAD = 0.5
# The small runs: about all sequences are in every decode step, so its steps are alike.
_FEW_REQUESTS, _MANY_REQUESTS = 4, 24
_PROMPT_TOKENS = 16
_OUTPUT_TOKENS = 129
# Sampling and a few small copies, of the device's time: too little to be told from the host's work with a tiny model.
_GPU_STEP_SECONDS = 3e-4
_TINY_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,  # of most models: kernels that are compiled for it serve them too
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="devices to measure; all GPUs, or 2 processes on CPU")
    parser.add_argument("--output", type=Path, help="YAML to write; local.yaml in configs/hardware, where runs look")
    return parser.parse_args()


def is_cuda() -> bool:
    """Whether the engine would run on GPUs."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def measure(rank: int, world_size: int, may_measure: Event, rendezvous: str, result: str) -> None:
    """One rank: measure together with the others; the first writes what it saw to `result` as JSON."""
    may_measure.wait()
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if is_cuda() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    sizes = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    figures = measure_figures(sizes, device)
    if rank == 0:
        Path(result).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def ranks_to_measure(num_ranks: int, folder: Path) -> Iterator[Callable[[], Figures]]:
    """Ranks that import what they need and wait; the function lets them measure and returns what they saw."""
    may_measure = multiprocessing.get_context("spawn").Event()
    result = folder / "figures.json"
    ranks = multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        measure, (num_ranks, may_measure, str(folder / "rendezvous"), str(result)), nprocs=num_ranks, join=False
    )

    def measured() -> Figures:
        may_measure.set()
        while not ranks.join():
            pass
        figures: Figures = json.loads(result.read_text())
        return figures

    try:
        yield measured
    finally:
        for process in ranks.processes:
            process.terminate()


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """The first rank says how long it took."""
    start = time.monotonic()
    yield
    if dist.get_rank() == 0:
        print(f"  {name}: {time.monotonic() - start:.0f} s", flush=True)


def measure_figures(sizes: Sizes, device: torch.device) -> Figures:
    """All that ranks can measure without the engine around them; collective."""
    dtype = getattr(torch, sizes.dtypes[0])
    with part("matrix products"):
        linear = {name: linear_points(sizes, name, device) for name in sizes.dtypes}
        row_linear = row_linear_points(sizes, sizes.dtypes[0], device)
    with part("all-reduces and sends"):
        links = link_figures(sizes, dtype, device) if dist.get_world_size() > 1 else {}
    with part("copies"):
        copies = copy_rates(sizes, device)
    figures: Figures = {
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total // 2 // dist.get_world_size(),
        "linear": linear,
        "flops": {name: max(2 * tokens / seconds for tokens, seconds in points) for name, points in linear.items()},
        "memory_bandwidth": dtype.itemsize / linear[sizes.dtypes[0]][0][1],
        **links,
        **copies,
    }
    with part("layers"):
        profile = make_profile({**figures, "layer_seconds": 1e-6, "step_seconds": 1e-6})
        figures |= layer_figures(sizes, profile, device)
    if row_linear is not None:  # not for the layers, which are measured with torch's products
        figures["row_linear"] = {sizes.dtypes[0]: row_linear}
    if device.type == "cuda":
        figures["runtime_bytes"] = runtime_bytes()
    return figures


def make_profile(figures: Figures) -> HardwareProfile:
    """The profile of `figures`."""
    return parse_hardware(profile_values(figures, "local", ""))


def profile_values(figures: Figures, name: str, measured: str) -> Figures:
    """The YAML mapping of a profile: `figures` in the fields' order, with `measured` as the source of each.

    What is not measured, for want of a second rank or of a use, is filled in.
    """
    whole = {
        "gemm_efficiency": 1.0,
        "attention_efficiency": 0.5,
        "memory_efficiency": 1.0,
        # One rank has no links; a profile has to name some, and no layout of one rank uses them.
        "all_reduce": {2: [[0, 1e-6], [1 << 20, 1e-4]]},
        "send_seconds": 1e-6,
        "send_bandwidth": figures["memory_bandwidth"],
        **figures,
    }
    if not whole.get("pads_decode"):
        whole.pop("pads_decode", None)
    fields = [field.name for field in dataclasses.fields(HardwareProfile)]
    values = {field: _rounded(whole[field]) for field in fields if field in whole}
    sources = dict.fromkeys(values, measured)
    sources["gemm_efficiency"] = sources["memory_efficiency"] = "1: the rates above are measured, not peaks"
    if "least_step_seconds" in values:
        sources["step_seconds"] = "estimate: sampling and a few small copies; the host's work is hidden"
    return {"name": name, "device": device_name(), **values, "sources": sources}


def _rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {int(key) if str(key).isdigit() else key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value if isinstance(value, int) else float(f"{value:.6g}")


def host_seconds(figures: Figures, num_ranks: int, folder: Path) -> Figures:
    """What the engine takes on CPU beyond the layers of a tiny model: per decode step, and per row of one."""
    many = decode_step(num_ranks, _MANY_REQUESTS, folder / "many")
    few = decode_step(num_ranks, _FEW_REQUESTS, folder / "few")
    many_seconds, few_seconds = (step.seconds - _layer_seconds(step, figures) for step in (many, few))
    row_seconds = max(0.0, (many_seconds - few_seconds) / (many.num_rows - few.num_rows))
    found = {"step_seconds": max(1e-6, few_seconds - row_seconds * few.num_rows)}
    return found | ({"row_seconds": row_seconds} if row_seconds else {})


def gpu_host_seconds(num_ranks: int, folder: Path) -> Figures:
    """On GPUs a step's host work, rows and all, is done while the device computes the one before: there a step of the
    tiny model is as short as one can be.
    """
    return {
        "step_seconds": _GPU_STEP_SECONDS,
        "least_step_seconds": decode_step(num_ranks, _MANY_REQUESTS, folder / "many").seconds,
    }


class DecodeStep(NamedTuple):
    """Rows of a decode step of the tiny model, on average, and its seconds."""

    num_rows: float
    seconds: float


def decode_step(num_ranks: int, num_requests: int, folder: Path) -> DecodeStep:
    """A step of a run of `num_requests` a rank, each a replica of its own: what links take is measured apart."""
    folder.mkdir()
    batch, config, output = folder / "input.jsonl", folder / "config.yaml", folder / "out" / "results.jsonl"
    rng = random.Random(0)
    with batch.open("w") as file:
        for number in range(num_ranks * num_requests):
            prompt = [rng.randrange(3, _TINY_MODEL["vocab_size"]) for _ in range(_PROMPT_TOKENS)]
            body = {"prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "ignore_eos": True, "temperature": 0}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    settings: Figures = {"model": str(_write_tiny_model(folder / "model")), "load_format": "dummy"}
    settings |= {"dtype": _tiny_dtype(), "layouts": str(ParallelLayout(dp=num_ranks)), "max_num_seqs": num_requests}
    settings |= {"kv_offloading_size": 0.25, "input": str(batch), "output": str(output)}
    settings["mixed_steps"] = False  # decode by itself, and its seconds apart
    config.write_text(yaml.safe_dump(settings))
    summary = _run_engine(config, num_ranks, output.with_name("summary.json"))
    seconds = summary["phase_seconds"]["decode"] * num_ranks / summary["decode_steps"]
    return DecodeStep(summary["decode_rows"] / summary["decode_steps"], seconds)


def _layer_seconds(step: DecodeStep, figures: Figures) -> float:
    """What the layers of such a step take by the cost model."""
    cost = CostModel(model_shape(_TINY_MODEL), make_profile(figures), ParallelLayout(), _tiny_dtype())
    context = round(step.num_rows * (_PROMPT_TOKENS + _OUTPUT_TOKENS // 2))
    num_rows = round(step.num_rows)
    return sum(cost.stage_seconds(StepWork(num_rows, decode_context=context, num_rows=num_rows)))


def _tiny_dtype() -> str:
    return "bfloat16" if is_cuda() else "float32"


def _write_tiny_model(folder: Path) -> Path:
    """A folder without weights, and with a word for each token id."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_TINY_MODEL))
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(1024)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}')
    return folder


def _run_engine(config: Path, num_ranks: int, summary: Path) -> Figures:
    """The summary of a run on `num_ranks`. Raises UserError with the end of what it said when it fails."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher = ["deepspeed", "--num_gpus", str(num_ranks)]
    if not is_cuda():
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        launcher[1] = "--num_accelerators"
    command = [*launcher, str(ROOT / "launch" / "run.py"), "--config", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or not summary.exists():
        raise UserError(f"the engine's small run failed with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    figures: Figures = json.loads(summary.read_text())
    return figures


def write_profile(path: Path, figures: Figures, num_ranks: int, seconds: float) -> None:
    """Write the YAML, after checking it as a reader would."""
    measured = f"measured by tools/calibrate.py on {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
    values = profile_values(figures, path.stem, measured)
    parse_hardware(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"# {values['device']}: {num_ranks} ranks at once, {seconds:.0f} s, by tools/calibrate.py.\n"
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=10_000, allow_unicode=True)
    path.write_text(header + text)


def main() -> int:
    arguments = parse_arguments()
    start = time.monotonic()
    num_ranks = arguments.ranks or (torch.cuda.device_count() if is_cuda() else 2)
    name = CALIBRATED + (P2P_OFF if is_cuda() and is_p2p_off() else "")
    path = arguments.output or PROFILES / f"{name}.yaml"
    folder = Path(tempfile.mkdtemp())
    try:
        print(f"{device_name()}: {num_ranks} ranks measure; about a minute", flush=True)
        if (load := os.getloadavg()[0]) > _QUIET_LOAD:
            print(f"warning: other programs are running (load {load:.1f}), and are measured too", file=sys.stderr)
        with ranks_to_measure(num_ranks, folder) as measured:
            if is_cuda():  # the engine runs while the ranks start
                host = gpu_host_seconds(num_ranks, folder)
                print(f"  the engine with a tiny model: {time.monotonic() - start:.0f} s", flush=True)
                figures = measured() | host
            else:
                figures = measured() | {"step_seconds": 1e-6}
                print(f"  {time.monotonic() - start:.0f} s so far; now the engine with a tiny model", flush=True)
                figures |= host_seconds(figures, num_ranks, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_profile(path, figures, num_ranks, time.monotonic() - start)
    print(path.read_text().split("sources:")[0] + f"written to {path} after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    exit_with(main)

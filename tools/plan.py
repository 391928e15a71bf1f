"""Predict which layouts run a batch fastest on a machine, without the machine.

    python tools/plan.py --model-shape llama2-70b --hardware a10 --gpus 8 --workload arxiv --requests 500 \
        --kv-offloading-size 640

The hardware is a profile of configs/hardware by name, or a file of the same form. With --model and --input
the prompts of one's own batch file are counted in tokens, and max_tokens is taken for the length of the outputs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from seesaw_ds.config import AUTO_MOST, RunConfig
from seesaw_ds.engine.hardware import PROFILES, find_hardware
from seesaw_ds.errors import UserError, exit_with
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.planner import Plan, make_plan
from seesaw_ds.plan.report import plan_json, plan_table
from seesaw_ds.plan.sensitivity import (
    BANDWIDTH_FACTORS,
    OUTPUT_RATIOS,
    Curves,
    bandwidth_curves,
    output_ratio_curves,
)
from seesaw_ds.plan.static_engine import HostWork
from seesaw_ds.plan.static_search import StaticEngineKind
from seesaw_ds.plan.workloads import RequestLength, workload_lengths
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.json"))
    profiles = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-shape", choices=shapes, help="sizes of a known model")
    model.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--hardware", required=True, help=f"a profile ({', '.join(profiles)}), or a YAML file")
    parser.add_argument("--gpus", type=int, required=True, help="devices in all")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="a replica stays within a node")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--workload", help="arxiv, sharegpt, or constant lengths as INxOUT")
    work.add_argument("--input", type=Path, help="OpenAI batch file; needs --model for its tokenizer")
    parser.add_argument("--requests", type=int, default=500, help="requests of the workload")
    parser.add_argument("--kv-offloading-size", type=float, required=True, help="host KV pool in GiB, over all devices")
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        default=AUTO_MOST["max_num_seqs"],
        help="most sequences decoding at once, in a replica; fewer where that is faster",
    )
    parser.add_argument(
        "--no-mixed-steps", action="store_true", help="plan without decode rows in prefill micro-batches"
    )
    parser.add_argument(
        "--static-step-ms", type=float, help="host time of the static engine's steps instead of the machine's"
    )
    parser.add_argument("--static-row-us", type=float, default=0.0, help="and for each row, with --static-step-ms")
    parser.add_argument(
        "--static-virtual-engines",
        action="store_true",
        help="each pipeline group of the static engine has its own queue and its own share of the KV room, as in vLLM"
        " before V1",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of weights, activations and KV")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw throughput against length and bandwidth")
    return parser.parse_args()


def input_lengths(path: Path, folder: Path, shape: ModelShape) -> list[RequestLength]:
    """Lengths of all sequences of a batch file; lines at fault are left out. Raises UserError when none is left."""
    from seesaw_ds.batch.input import read_batch
    from seesaw_ds.batch.lines import BatchRequest, TokenizedRequest
    from seesaw_ds.batch.text import load_codec
    from seesaw_ds.batch.tokenization import tokenize_request

    codec = load_codec(folder)
    lengths: list[RequestLength] = []
    for line in read_batch(path):
        if not isinstance(line, BatchRequest):
            continue
        tokenized = tokenize_request(line, codec, shape.max_position_embeddings, shape.vocab_size)
        if isinstance(tokenized, TokenizedRequest):
            for prompt in tokenized.prompts:
                lengths += [RequestLength(len(prompt.token_ids), prompt.params.max_tokens)] * prompt.params.n
    if not lengths:
        raise UserError(f"input={str(path)!r}: no request in it can run")
    return lengths


def find_plotting() -> Any:
    """The module that draws. Raises UserError without matplotlib."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UserError("--plot: needs matplotlib; install it, for example as pip install 'seesaw-ds[plot]'") from None


def make_curves(
    plan: Plan,
    run: RunConfig,
    shape: ModelShape,
    hardware: HardwareProfile,
    lengths: Sequence[RequestLength],
    static: StaticEngineKind,
) -> list[Curves]:
    """Of the best pair, and of its two layouts in the static engine; with a progress bar."""
    pair = plan.best.candidate.pair
    layouts = list(dict.fromkeys((pair.prefill, pair.decode)))
    num_points = (1 + len(layouts)) * (len(OUTPUT_RATIOS) + len(BANDWIDTH_FACTORS))
    with tqdm(total=num_points, desc="curves", unit="point") as bar:
        return [
            output_ratio_curves(run, shape, hardware, [pair], layouts, static, bar.update),
            bandwidth_curves(run, shape, hardware, [pair], layouts, lengths, static, bar.update),
        ]


def draw(path: Path, curves: list[Curves], plotting: Any) -> None:
    """Write the curves side by side as a PNG."""
    figure = plotting.Figure(figsize=(6 * len(curves), 4.5), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
        for name, values in curve.requests_per_second.items():
            points = [(x, y) for x, y in zip(curve.x, values) if y is not None]
            axes.plot(*zip(*points), marker="o", label=name)
        axes.set(xlabel=curve.x_label, ylabel="requests/s", xscale="log" if curve.is_log else "linear")
        axes.legend()
    figure.savefig(path)


def main() -> int:
    arguments = parse_arguments()
    if arguments.input and not arguments.model:
        raise UserError("--input: the prompts are counted in tokens; give the model's folder with --model")
    plotting = find_plotting() if arguments.plot else None
    if arguments.model:
        config = read_hf_config(arguments.model)
    else:
        config = json.loads((ROOT / "configs" / "models" / f"{arguments.model_shape}.json").read_text())
    shape = model_shape(config)
    if arguments.input:
        lengths = input_lengths(arguments.input, arguments.model, shape)
    else:
        lengths = workload_lengths(arguments.workload, arguments.requests)
        # A workload may be longer than the model was trained for: only its sizes matter here.
        longest = max(sum(length) for length in lengths)
        shape = replace(shape, max_position_embeddings=max(longest, shape.max_position_embeddings))
    run = RunConfig(
        model=str(arguments.model or arguments.model_shape),
        input=str(arguments.input or arguments.workload),
        output="",
        layouts="auto",
        dtype=arguments.dtype,
        max_model_len=max(sum(length) for length in lengths),
        max_num_seqs=arguments.max_num_seqs,
        kv_offloading_size=arguments.kv_offloading_size,
        mixed_steps=not arguments.no_mixed_steps,
    )
    hardware = find_hardware(arguments.hardware)
    host = None
    if arguments.static_step_ms is not None:
        host = HostWork(arguments.static_step_ms / 1e3, arguments.static_row_us / 1e6)
    static = StaticEngineKind(host, arguments.static_virtual_engines)
    plan = make_plan(run, shape, hardware, arguments.gpus, lengths, arguments.gpus_per_node, static_kind=static)
    print(json.dumps(plan_json(plan), indent=2) if arguments.json else plan_table(plan))
    if arguments.plot:
        draw(arguments.plot, make_curves(plan, run, shape, hardware, lengths, static), plotting)
    return 0


if __name__ == "__main__":
    exit_with(main)

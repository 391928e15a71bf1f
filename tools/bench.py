"""Measure the engine: named workloads, model shapes with random weights, any layouts; a table, and JSON.

    python tools/bench.py --model-shape llama2-70b --workload arxiv:160 --layouts "P2->T2" T2 P2

Every run is ``deepspeed launch/run.py`` over a batch file of random token ids whose outputs run to their length, so the
figures hold for the engine as users start it. `elapsed_time` is from the first scheduled prompt to the last result,
as vLLM's ``bench throughput`` counts it; start-up is apart. Seconds of prefill and decode are those of their steps.
With ``--hardware`` each row is followed by what the planner's simulator predicts for it, and by how much more was
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from seesaw_ds.config import dtype_name, parse_config
from seesaw_ds.engine.hardware import find_hardware
from seesaw_ds.errors import exit_with
from seesaw_ds.layout import LayoutPair
from seesaw_ds.plan.candidates import scheduler_limits
from seesaw_ds.plan.hardware import HardwareProfile
from seesaw_ds.plan.memory import size_pools
from seesaw_ds.plan.roofline import Machine, Utilisation, roofline_seconds, utilisation
from seesaw_ds.plan.simulator import Simulator
from seesaw_ds.plan.workloads import RequestLength, parse_workload, workload_lengths
from seesaw_ds.shapes import ModelShape, model_shape

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.json"))
    parser.add_argument("--model-shape", choices=shapes, required=True, help="sizes of a known model, random weights")
    parser.add_argument(
        "--workload", nargs="+", required=True, help="NAME:REQUESTS with NAME arxiv, sharegpt or INxOUT"
    )
    parser.add_argument("--layouts", nargs="+", required=True, help='layouts to measure, for example "P2->T2" T2')
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for inputs, results and bench.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an engine setting; repeatable")
    parser.add_argument("--peak-tflops", type=float, default=750.0, help="of one device: what large products reach")
    parser.add_argument("--hbm-gbps", type=float, default=4300.0, help="memory bandwidth of one device, GB/s")
    parser.add_argument("--hardware", help="a profile of configs/hardware, or a YAML file: predict each run from it")
    parser.add_argument("--keep-going", action="store_true", help="go on with the next layout when one fails")
    return parser.parse_args()


def make_model_folder(folder: Path, shape_name: str, longest: int) -> ModelShape:
    """A Hugging Face folder of the shape: config and a word-level tokenizer with a word for each id; no weights.

    The config takes `longest` tokens even where the model was trained for fewer: nobody reads the output.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = json.loads((ROOT / "configs" / "models" / f"{shape_name}.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], longest)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "bos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model_shape(config)


def random_prompts(lengths: list[RequestLength], vocab_size: int) -> list[list[int]]:
    """Random token ids for each request, the same every time."""
    rng = random.Random(1)
    return [[rng.randrange(3, vocab_size) for _ in range(length.input_tokens)] for length in lengths]


def write_input(path: Path, lengths: list[RequestLength], vocab_size: int) -> None:
    """A batch file of random prompts (token ids) whose outputs run to their length."""
    with path.open("w") as file:
        for number, prompt in enumerate(random_prompts(lengths, vocab_size)):
            body = {
                "model": "bench",
                "prompt": prompt,
                "max_tokens": lengths[number].output_tokens,
                "ignore_eos": True,
                "temperature": 1.0,
            }
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def run_settings(changes: list[str], model: Path, longest: int, layouts: str, out: Path) -> dict[str, Any]:
    """The engine's settings of one run, changed by KEY=VALUE `changes`; it writes to the folder `out`."""
    settings = {
        "model": str(model),
        "load_format": "dummy",
        "layouts": layouts,
        "max_model_len": longest,
        "gpu_memory_utilization": 0.92,
        "timeline": str(out / "timeline.json"),
    }
    settings |= dict(change.split("=", 1) for change in changes)
    return {key: _number(value) for key, value in settings.items()}


def run_engine(settings: dict[str, Any], batch: Path, out: Path) -> dict[str, Any]:
    """One run of the engine; its summary. Raises RuntimeError with the log's end when it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = out / "config.yaml"
    config.write_text(json.dumps(settings))
    layouts = settings["layouts"]
    world_size = LayoutPair.parse(layouts).world_size
    command = ["deepspeed", "--num_gpus", str(world_size), str(ROOT / "launch" / "run.py"), "--config", str(config)]
    command += ["--input", str(batch), "--output", str(out / "results.jsonl"), "--overwrite"]
    with (out / "log.txt").open("w") as log:
        code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
    if code != 0 or not (out / "summary.json").exists():
        tail = (out / "log.txt").read_text()[-3000:]
        raise RuntimeError(f"layouts {layouts}: exit code {code}; the end of {out / 'log.txt'}:\n{tail}")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def predict(
    settings: dict[str, Any], shape: ModelShape, lengths: list[RequestLength], hardware: HardwareProfile
) -> dict[str, Any]:
    """What the simulator says of a run with these settings on `hardware`; seconds by part as `compared` names them."""
    run = parse_config({**settings, "input": "batch.jsonl", "output": "results.jsonl"})
    pools = size_pools(run, shape, hardware.memory_bytes, hardware.runtime_bytes)
    simulated = Simulator(
        shape,
        hardware,
        run.layout_pair,
        scheduler_limits(run, pools),
        dtype_name(run, shape),
        run.weight_reshard,
        stays=run.hardware is not None,
    ).run(lengths)
    return {
        "hardware": hardware.name,
        "requests_per_second": round(simulated.requests_per_second, 4),
        "prefill": round(simulated.prefill_seconds, 3),
        "decode": round(simulated.decode_seconds, 3),
        "transition": round(simulated.transition_seconds, 3),
    }


def compared(row: dict[str, Any]) -> dict[str, float]:
    """The measured figures of a row that a prediction has too."""
    return {
        "requests_per_second": row["requests_per_second"],
        **row["step_seconds"],
        "transition": row["phase_seconds"]["transition"],
    }


def _number(value: Any) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def figures(
    summary: dict[str, Any], shape: ModelShape, lengths: list[RequestLength], machine: Machine, world_size: int
) -> dict[str, Any]:
    """The summary with utilisation of each phase and the ratio to the roofline."""
    steps = summary["step_seconds"]
    used: Utilisation = utilisation(
        shape,
        lengths,
        machine,
        world_size,
        steps["prefill"],
        steps["decode"],
        summary["decode_steps"],
        summary["decode_rows"],
    )
    floor = roofline_seconds(shape, lengths, machine, world_size)
    return {
        **summary,
        "prefill_mfu": round(used.prefill_flops, 4),
        "decode_flops_utilisation": round(used.decode_flops, 4),
        "decode_hbm_utilisation": round(used.decode_bytes, 4),
        "roofline_requests_per_second": round(len(lengths) / floor, 4),
        "roofline_ratio": round(floor / summary["elapsed_time"], 4),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    width = max(12, 2 + max((len(row["layouts"]) for row in rows), default=0))
    header = (
        f"{'workload':<16}{'layouts':<{width}}{'req/s':>8}{'tok/s':>9}{'prefill s':>10}{'decode s':>9}{'switch s':>9}"
    )
    print(header + f"{'switches':>9}{'evict':>6}{'MFU %':>7}{'HBM %':>7}{'roofline %':>11}{'start s':>8}")
    for row in rows:
        if "error" in row:
            print(f"{row['workload']:<16}{row['layouts']:<{width}}failed: {row['error'].splitlines()[0]}")
            continue
        phases, steps = row["phase_seconds"], row["step_seconds"]
        print(
            f"{row['workload']:<16}{row['layouts']:<{width}}{row['requests_per_second']:>8.3f}"
            f"{row['tokens_per_second']:>9.0f}{steps['prefill']:>10.2f}{steps['decode']:>9.2f}"
            f"{phases['transition']:>9.2f}{row['transitions']:>9}"
            f"{row['evictions']:>6}{100 * row['prefill_mfu']:>7.1f}{100 * row['decode_hbm_utilisation']:>7.1f}"
            f"{100 * row['roofline_ratio']:>11.1f}{phases['startup']:>8.1f}",
            flush=True,
        )
        if "predicted" in row:
            _print_prediction(row["predicted"], compared(row), width)


def _print_prediction(predicted: dict[str, Any], measured: dict[str, float], width: int) -> None:
    """Two lines under a row: the prediction, and how much more was measured than predicted."""
    columns = {"requests_per_second": 8, "prefill": 19, "decode": 9, "transition": 9}
    digits = {"requests_per_second": 3}
    values = "".join(f"{predicted[name]:>{size}.{digits.get(name, 2)}f}" for name, size in columns.items())
    print(f"{'  predicted':<16}{predicted['hardware']:<{width}}{values}")
    changes = "".join(
        f"{measured[name] / predicted[name] - 1:>+{size}.1%}" if predicted[name] else " " * size
        for name, size in columns.items()
    )
    print(f"{'  measured':<16}{'':<{width}}{changes}", flush=True)


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.out / "models" / arguments.model_shape
    workloads = {text: workload_lengths(*parse_workload(text)) for text in arguments.workload}
    longest = max(sum(length) for lengths in workloads.values() for length in lengths)
    shape = make_model_folder(model, arguments.model_shape, longest)
    machine = Machine(arguments.peak_tflops * 1e12, arguments.hbm_gbps * 1e9)
    hardware = find_hardware(arguments.hardware) if arguments.hardware is not None else None
    rows = []
    for workload, lengths in workloads.items():
        batch = arguments.out / f"{workload.replace(':', '-')}.jsonl"
        write_input(batch, lengths, shape.vocab_size)
        for layouts in arguments.layouts:
            run: dict[str, Any] = {"workload": workload, "layouts": layouts, "model_shape": arguments.model_shape}
            folder = arguments.out / f"{workload.replace(':', '-')}-{layouts.replace('->', '-to-')}"
            settings = run_settings(arguments.set, model, longest, layouts, folder)
            if hardware is not None:
                run["predicted"] = predict(settings, shape, lengths, hardware)
            try:
                summary = run_engine(settings, batch, folder)
                world_size = LayoutPair.parse(layouts).world_size
                rows.append({**figures(summary, shape, lengths, machine, world_size), **run})
            except RuntimeError as error:
                print(error, file=sys.stderr)
                rows.append({**run, "error": str(error)})
                if not arguments.keep_going:
                    return 1
            (arguments.out / "bench.json").write_text(json.dumps(rows, indent=2) + "\n")
            print_table(rows[-1:])
    print_table(rows)
    return 0


if __name__ == "__main__":
    exit_with(main)

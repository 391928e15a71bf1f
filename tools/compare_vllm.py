"""Run vLLM's own LLM class on the benchmark's requests, where vLLM is installed, for figures beside `tools/bench.py`.

    python tools/compare_vllm.py --model-shape llama2-70b --workload arxiv:160 --tensor-parallel-size 2

The requests, the shape and the random prompts are those of `tools/bench.py`; outputs run to their length at
temperature 1, without prefix caching, as there. The time is that of one `generate` call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import make_model_folder, random_prompts
from seesaw_ds.errors import UserError
from seesaw_ds.plan.workloads import parse_workload, workload_lengths


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", required=True, help="a name in configs/models")
    parser.add_argument("--workload", required=True, help="NAME:REQUESTS with NAME arxiv, sharegpt or INxOUT")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, help="vLLM's chunk of prefill and decode")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument(
        "--out", type=Path, default=Path("out/vllm"), help="folder for the model's config and result.json"
    )
    return parser.parse_args()


def run_vllm(arguments: argparse.Namespace) -> dict[str, Any]:
    """One `generate` over the workload; the keys of ``vllm bench throughput``. Raises UserError without vLLM."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(
            f"vllm cannot be imported ({error}); install it in this environment to compare with it"
        ) from None

    lengths = workload_lengths(*parse_workload(arguments.workload))
    longest = max(sum(length) for length in lengths)
    folder = arguments.out / "models" / arguments.model_shape
    shape = make_model_folder(folder, arguments.model_shape, longest)
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        tensor_parallel_size=arguments.tensor_parallel_size,
        pipeline_parallel_size=arguments.pipeline_parallel_size,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=longest,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts(lengths, shape.vocab_size)]
    params = [SamplingParams(temperature=1.0, max_tokens=length.output_tokens, ignore_eos=True) for length in lengths]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - start
    num_tokens = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_tokens,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": num_tokens / elapsed,
    }


def main() -> int:
    arguments = parse_arguments()
    try:
        result = run_vllm(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time the sampler by kind of request: the engine's kernels on a CUDA device, beside plain torch.

    python tools/profile_sampler.py --vocab-size 32000 128256 --rows 36 256

Logits are random; all rows of a batch have the same parameters. Milliseconds a call, host work included, in the median.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_draw import Draw, TorchDraw
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.requests import SamplingParams

KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "random": SamplingParams(),
    "top_k": SamplingParams(top_k=50),
    "top_k, top_p": SamplingParams(top_k=50, top_p=0.9),
    "top_p": SamplingParams(top_p=0.9),
    "min_p": SamplingParams(min_p=0.05),
    "penalties": SamplingParams(presence_penalty=0.5),
    "logprobs 5": SamplingParams(logprobs=5),
}
_ROUNDS, _CALLS = 7, 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--rows", type=int, nargs="+", default=[36, 256])
    return parser.parse_args()


def milliseconds(logits: torch.Tensor, params: SamplingParams, draw: Draw) -> float:
    """Of a call of the sampler, in the median of some rounds of calls; the first round, a warm-up, does not count."""
    num_rows, vocab_size = logits.shape
    state = SamplingState(num_rows, vocab_size, logits.device)
    for slot in range(num_rows):
        state.set_slot(slot, params, seed=slot)
    slots = torch.arange(num_rows, device=logits.device)
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(_CALLS):
            sample(logits, slots, slots, state, range(num_rows), draw)
        if logits.is_cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / _CALLS)
    return 1e3 * statistics.median(seconds[1:])


def draws(device: torch.device) -> dict[str, Draw]:
    if device.type != "cuda":
        return {"torch": TorchDraw()}
    from seesaw_ds.model.ops.cuda_sampling import CudaDraw

    return {"kernels": CudaDraw(), "torch": TorchDraw()}


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, ms a call\n{'vocabulary':>10}{'rows':>6}  {'draw':<8}" + "".join(f"{kind:>14}" for kind in KINDS))
    for vocab_size in arguments.vocab_size:
        for num_rows in arguments.rows:
            logits = (4 * torch.randn(num_rows, vocab_size, device=device)).to(torch.bfloat16)
            for label, draw in draws(device).items():
                times = [milliseconds(logits, params, draw) for params in KINDS.values()]
                row = "".join(f"{value:>14.3f}" for value in times)
                print(f"{vocab_size:>10}{num_rows:>6}  {label:<8}{row}", flush=True)


if __name__ == "__main__":
    main()

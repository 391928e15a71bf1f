"""Small models, prompts of mixed length, and what `transformers` generates for them, one prompt at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from models import make_llama
from seesaw_ds.config import RunConfig
from seesaw_ds.requests import FinishReason, SamplingParams, SequenceRequest

MAX_MODEL_LEN = 160
STOP_TOKEN_IDS = tuple(range(5, 300, 7))
# Two ways of adding up the same sums differ by about 1e-6 in these models' logits.
MIN_MARGIN = 2e-5


@dataclass(frozen=True)
class Workload:
    """Greedy requests to a model in `folder`, with what transformers generates for each."""

    folder: Path
    model: PreTrainedModel
    requests: list[SequenceRequest]
    expected: list[tuple[tuple[int, ...], FinishReason]]


def run_config(folder: Path, layouts: str, **changes: Any) -> RunConfig:
    """A run with pools of few blocks: about six prompts fit the host pool and three the GPU's."""
    run = RunConfig(
        model=str(folder),
        input="",
        output="",
        layouts=layouts,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        max_num_batched_tokens=96,
        kv_block_size=4,
        num_gpu_kv_blocks=40,
        num_host_kv_blocks=100,
        expected_output_tokens=3,
    )
    return replace(run, **changes)


def make_model(folder: Path, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of 4 layers, 16 query and 8 KV heads, and a vocabulary that no tensor-parallel size divides."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 301}
    return make_llama(folder, seed=seed, **(sizes | changes))


def make_workload(folder: Path, num_requests: int, *, seed: int = 0, **changes: Any) -> Workload:
    """A Llama of `make_model`, and requests to it."""
    return make_requests(folder, make_model(folder, seed=seed, **changes), num_requests, seed=seed)


def make_requests(folder: Path, model: PreTrainedModel, num_requests: int, *, seed: int = 0) -> Workload:
    """Requests of 5 to 120 prompt tokens and 1 to 40 output tokens to `model`, which is in `folder`.

    Those of the first half may stop early, and those of the second run to their ends. The scheduler expects short
    outputs (`run_config`), takes too many sequences to the GPU, and has to evict some.
    """
    choice = random.Random(seed)
    requests = []
    for seq_id in range(num_requests):
        is_first_half = 2 * seq_id < num_requests
        num_prompt_tokens = choice.randint(5, 120 if is_first_half else 40)
        max_tokens = choice.randint(*((1, 40) if is_first_half else (20, 30)))
        request = SequenceRequest(
            seq_id=seq_id,
            prompt_token_ids=tuple(choice.randrange(model.config.vocab_size) for _ in range(num_prompt_tokens)),
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            seed=seq_id,
            stop_token_ids=STOP_TOKEN_IDS if is_first_half else (),
        )
        requests.append(request)
    return Workload(folder, model, requests, [_generate(model, request) for request in requests])


def _generate(model: PreTrainedModel, request: SequenceRequest) -> tuple[tuple[int, ...], FinishReason]:
    num_prompt_tokens = len(request.prompt_token_ids)
    output = model.generate(
        torch.tensor([request.prompt_token_ids]),
        attention_mask=torch.ones(1, num_prompt_tokens, dtype=torch.int64),
        max_new_tokens=request.params.max_tokens,
        do_sample=False,
        eos_token_id=list(request.stop_token_ids) or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best, second = torch.cat(output.logits).topk(2, dim=1).values.T
    assert (best - second).min() > MIN_MARGIN, "greedy tokens of this model are too close to compare: take another seed"
    tokens = tuple(output.sequences[0, num_prompt_tokens:].tolist())
    return tokens, FinishReason.STOP if tokens[-1] in request.stop_token_ids else FinishReason.LENGTH

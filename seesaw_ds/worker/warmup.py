"""The first run of a prefill micro-batch, before the first request: nothing is compiled or connected later."""

from __future__ import annotations

import torch

from seesaw_ds.config import RunConfig
from seesaw_ds.engine.messages import Prefill
from seesaw_ds.plan.memory import most_step_tokens
from seesaw_ds.requests import SamplingParams, SequenceRequest
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.output import PrefillChunk
from seesaw_ds.shapes import ModelShape
from seesaw_ds.worker.prefill import PrefillRunner


def warm_up_blocks(run: RunConfig, max_model_len: int) -> int:
    """KV blocks that `warm_up_prefill` needs."""
    return sum(blocks_for(length, run.kv_block_size) for length in _lengths(run, max_model_len))


def _lengths(run: RunConfig, max_model_len: int, share: int = 1) -> list[int]:
    """Prompts that fill the largest micro-batch, or the given share of it."""
    longest = max(1, max_model_len - 1)
    full, rest = divmod(-(-most_step_tokens(run) // share), longest)
    return [longest] * full + [rest] * (rest > 0)


def warm_up_prefill(prefill: PrefillRunner, run: RunConfig, shape: ModelShape, max_model_len: int) -> None:
    """Run the largest micro-batch and smaller ones, of made-up prompts, sampling included. Collective.

    Matrix products of other sizes use other kernels, which are loaded at their first use.
    """
    for share in (1, 2, 3, 4, 6, 8, 12, 16, 32):
        _run_micro_batch(prefill, run, shape, _lengths(run, max_model_len, share))


def _run_micro_batch(prefill: PrefillRunner, run: RunConfig, shape: ModelShape, lengths: list[int]) -> None:
    requests: dict[int, SequenceRequest] = {}
    chunks = []
    first_block = 0
    for seq_id, length in enumerate(lengths):
        prompt = tuple(token % shape.vocab_size for token in range(length))
        requests[seq_id] = SequenceRequest(seq_id, prompt, SamplingParams(), seed=0)
        last_block = first_block + blocks_for(length, run.kv_block_size)
        blocks = tuple(range(first_block, last_block))
        chunks.append(PrefillChunk(seq_id, 0, length, blocks, is_last=True))
        first_block = last_block
    with torch.inference_mode():
        prefill.run(Prefill(0, tuple(chunks), None, []), requests)

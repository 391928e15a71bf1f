"""The first run of a prefill micro-batch, before the first request: nothing is compiled or connected later."""

from __future__ import annotations

import torch

from seesaw_ds.config import RunConfig
from seesaw_ds.requests import SamplingParams, SequenceRequest
from seesaw_ds.sched.output import PrefillBatch, PrefillChunk
from seesaw_ds.shapes import ModelShape
from seesaw_ds.worker.prefill import PrefillRunner


def warm_up_prefill(prefill: PrefillRunner, run: RunConfig, shape: ModelShape, max_model_len: int) -> None:
    """Run a full micro-batch of made-up prompts through the pipeline, sampling included. Collective."""
    lengths = []
    left = run.max_num_batched_tokens
    while left > 0:
        lengths.append(min(left, max_model_len - 1))
        left -= lengths[-1]
    requests: dict[int, SequenceRequest] = {}
    chunks = []
    first_block = 0
    for seq_id, length in enumerate(lengths):
        prompt = tuple(token % shape.vocab_size for token in range(length))
        requests[seq_id] = SequenceRequest(seq_id, prompt, SamplingParams(), seed=0)
        last_block = first_block + -(-length // run.kv_block_size)
        blocks = tuple(range(first_block, last_block))
        chunks.append(PrefillChunk(seq_id, 0, length, blocks, is_last=True))
        first_block = last_block
    with torch.inference_mode():
        prefill.run(PrefillBatch(0, tuple(chunks)), requests)

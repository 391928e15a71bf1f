"""Sequences get slots and tokens without the host waiting for the device, so that it stays a step ahead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from seesaw_ds.engine.messages import Decode
from seesaw_ds.requests import SamplingParams, SequenceRequest
from seesaw_ds.worker.slots import DecodingSlots

pytestmark = pytest.mark.gpu(1)

VOCAB_SIZE = 1001
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, seed=3),
    SamplingParams(top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={5: 1.0}),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Have torch raise RuntimeError for what makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device() -> None:
    from seesaw_ds.model.ops.cuda_sampling import CudaDraw

    slots = DecodingSlots(16, 8, VOCAB_SIZE, torch.device("cuda"), CudaDraw())
    requests = [
        SequenceRequest(seq_id, tuple(range(3, 20)), params, seed=seq_id)
        for seq_id, params in enumerate(itertools.islice(itertools.cycle(PARAMS), 12))
    ]
    logits = torch.randn(len(requests), VOCAB_SIZE, device="cuda")
    slots.sample_first(logits, requests)  # kernels compile, memory is taken
    with torch.inference_mode(), no_waiting():
        slots.sample_first(logits, requests)
        for request in requests:
            slots.set(request.seq_id, 17, (request.seq_id,), request, [7 + request.seq_id])
        step = slots.step(Decode(0, 0, [request.seq_id for request in requests], [(0, 12)]))
        first = slots.tokens[step.index]
        slots.sample(logits, step)
        slots.advance(step)
        slots.step(Decode(1, 0, None, []))
        slots.sample(logits, step)
    assert first.tolist() == [7 + request.seq_id for request in requests]


def test_the_check_notices_a_copy_that_waits() -> None:
    tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        tokens[1] = 5

"""The sampler's kernels against plain torch on the same device: the same tokens, every one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_draw import Draw, TorchDraw
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.requests import SamplingParams

pytestmark = pytest.mark.gpu(1)

NUM_ROWS = 150
FILTERS = list(itertools.product((0.0, 0.7, 1.0), (1.0, 0.9, 0.3, 1e-9), (0, 1, 40), (0.0, 0.05)))


def tokens(logits: torch.Tensor, draw: Draw, changes: list[dict]) -> list[int]:
    rng = random.Random(0)
    num_rows, vocab_size = logits.shape
    state = SamplingState(num_rows, vocab_size, "cuda")
    for slot in range(num_rows):
        state.set_slot(slot, SamplingParams(**changes[slot % len(changes)]), seed=rng.getrandbits(64))
    slots = torch.arange(num_rows, device="cuda")
    return sample(logits, slots, 3 * slots, state, range(num_rows), draw).token_ids.tolist()


def random_logits(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(vocab_size)
    logits = 4 * torch.randn(NUM_ROWS, vocab_size, generator=generator, device="cuda")
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1001, 32000, 128256])
def test_draws_and_filters_choose_as_plain_torch(vocab_size: int, dtype: torch.dtype) -> None:
    from seesaw_ds.model.ops.cuda_sampling import CudaDraw

    logits = random_logits(vocab_size, dtype)
    plain = [{"temperature": temperature} for temperature in (1.0, 0.0, 0.5, 2.0)]
    filtered = [
        {"temperature": heat, "top_p": top_p, "top_k": top_k, "min_p": min_p} for heat, top_p, top_k, min_p in FILTERS
    ]
    for changes in (plain, filtered):
        assert tokens(logits, CudaDraw(), changes) == tokens(logits, TorchDraw(), changes)


def test_forbidden_and_equal_logits() -> None:
    from seesaw_ds.model.ops.cuda_sampling import CudaDraw

    logits = random_logits(1001, torch.float32).round()
    logits[:, ::3] = -torch.inf
    logits[5] = -torch.inf
    changes: list[dict] = [{"top_p": 0.8}, {"top_k": 30}, {"min_p": 0.2}, {"temperature": 0.0}, {}]
    chosen = tokens(logits, CudaDraw(), changes)
    expected = tokens(logits, TorchDraw(), changes)
    assert chosen[:5] + chosen[6:] == expected[:5] + expected[6:]
    assert chosen[5] == 0

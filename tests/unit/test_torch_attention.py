"""The torch attention backend against attention written out for one token and one head at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seesaw_ds.model.attention.interface import AttentionBatch, AttentionRule
from seesaw_ds.model.attention.torch_backend import TorchAttention
from stages import attended

NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 8, 4, 40
PLAIN = AttentionRule(scale=HEAD_DIM**-0.5)
RULES = [PLAIN, AttentionRule(0.7), AttentionRule(0.4, window=5), AttentionRule(1.0, soft_cap=1.5)]
RULES.append(AttentionRule(1.0, soft_cap=1.5, window=3))


class PagedSequences:
    """Sequences of random keys and values (tokens, KV heads, head_dim), spread over blocks in random order."""

    def __init__(self, kv_lens: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kv_lens = kv_lens
        self.keys, self.values = (
            [torch.randn(length, NUM_KV_HEADS, HEAD_DIM, generator=generator) for length in kv_lens] for _ in range(2)
        )
        # What no token was written to must not matter: it is large here.
        self.cache = torch.full((NUM_BLOCKS, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), 1e4)
        width = -(-max(kv_lens) // BLOCK_SIZE) + 1
        blocks = iter(torch.randperm(NUM_BLOCKS, generator=generator).tolist())
        self.tables = np.zeros((len(kv_lens), width), dtype=np.int32)
        for row, length in enumerate(kv_lens):
            for i in range(-(-length // BLOCK_SIZE)):
                self.tables[row, i] = next(blocks)
            for token in range(length):
                block = self.tables[row, token // BLOCK_SIZE]
                self.cache[block, 0, :, token % BLOCK_SIZE] = self.keys[row][token]
                self.cache[block, 1, :, token % BLOCK_SIZE] = self.values[row][token]

    def batch(self, query_lens: list[int]) -> AttentionBatch:
        return AttentionBatch(np.array(query_lens, np.int32), np.array(self.kv_lens, np.int32), self.tables)

    def expected(self, q: torch.Tensor, query_lens: list[int], rule: AttentionRule = PLAIN) -> torch.Tensor:
        """Each token attends to the last of its sequence up to itself; query heads share KV heads in groups."""
        out = torch.empty_like(q)
        group_size = q.shape[1] // NUM_KV_HEADS
        row = 0
        for sequence, (query_len, kv_len) in enumerate(zip(query_lens, self.kv_lens, strict=True)):
            for position in range(kv_len - query_len, kv_len):
                first = 0 if rule.window is None else max(0, position + 1 - rule.window)
                for head in range(q.shape[1]):
                    keys = self.keys[sequence][first : position + 1, head // group_size]
                    values = self.values[sequence][first : position + 1, head // group_size]
                    scores = keys @ q[row, head] * rule.scale
                    if rule.soft_cap is not None:
                        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
                    out[row, head] = scores.softmax(dim=0) @ values
                row += 1
        return out


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize(
    ("kv_lens", "query_lens"),
    [
        ([9], [9]),
        ([5, 12, 1, 8], [5, 12, 1, 8]),
        ([17, 6, 21], [5, 6, 1]),
        ([1, 13, 4, 16], [1, 1, 1, 1]),
        ([23], [1]),
        ([1, 1], [1, 1]),
    ],
    ids=["one prompt", "whole prompts", "chunks of prompts", "decode", "decode of one", "prompts of one token"],
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_output_is_that_of_plain_attention(kv_lens, query_lens, num_heads, rule):
    sequences = PagedSequences(kv_lens)
    q = torch.randn(sum(query_lens), num_heads, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    attention = TorchAttention(rule, BLOCK_SIZE, torch.device("cpu"))
    attention.plan(sequences.batch(query_lens))
    expected = sequences.expected(q, query_lens, rule)
    for _ in range(2):  # one plan serves all layers
        torch.testing.assert_close(attended(attention, q, sequences.cache), expected)


def test_a_prompt_in_chunks_and_steps_attends_as_one():
    sequences = PagedSequences([19])
    q = torch.randn(19, 4, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    whole = sequences.expected(q, [19])
    attention = TorchAttention(PLAIN, BLOCK_SIZE, torch.device("cpu"))
    for start, stop in ((0, 7), (7, 16), (16, 17), (17, 18), (18, 19)):
        attention.plan(AttentionBatch(np.array([stop - start], np.int32), np.array([stop], np.int32), sequences.tables))
        torch.testing.assert_close(attended(attention, q[start:stop], sequences.cache), whole[start:stop])

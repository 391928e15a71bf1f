"""Micro-batches as graphs, up to each attention or of all, with a graph that runs what it is of once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seesaw_ds.model.attention.interface import AttentionBatch
from seesaw_ds.model.attention.torch_backend import TorchAttention
from seesaw_ds.worker.graphs import GraphPool
from seesaw_ds.worker.segments import SegmentGraphs
from stages import BLOCK_SIZE, CPU, QUERY_LENS, plan, prepare


class FixedTorchAttention(TorchAttention):
    """What is planned is read when a graph is run once more. For fewer sequences than six."""

    def fits(self, batch: AttentionBatch) -> bool:
        return len(batch.query_lens) < 6


class RepeatingPool(GraphPool):
    """In the place of the device's graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_graphs = 0

    def capture(self, body: Callable[[], object]) -> Any:
        body()
        self.num_graphs += 1
        return SimpleNamespace(replay=body)


def fixed_attention(backends: Sequence[TorchAttention]) -> tuple[FixedTorchAttention, ...]:
    return tuple(FixedTorchAttention(each._rule, BLOCK_SIZE, CPU) for each in backends)


@pytest.mark.parametrize("is_fixed", [False, True], ids=["segments", "whole"])
@pytest.mark.parametrize(("layouts", "pp_rank", "rows"), [("T1", 0, None), ("P2[1,3]", 1, [0, 1, 15]), ("P2", 0, None)])
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"],
)
def test_graphs_make_the_steps_of_the_stage(tmp_path, architecture, layouts, pp_rank, rows, is_fixed):
    stage, batch = prepare(tmp_path, architecture, layouts, pp_rank)
    kv = batch.kv[: len(stage.layers)].clone()
    pool, captures = RepeatingPool(), []
    fixed = fixed_attention(batch.attention) if is_fixed else ()
    graphs = SegmentGraphs(stage, batch.rotary, batch.hidden.shape[1], sum(QUERY_LENS), fixed, torch.float32, CPU)
    assert not graphs.serves(batch.batch)
    with torch.inference_mode():
        graphs.capture(list(kv), pool, lambda: captures.append(pool.num_graphs))
    assert captures == [1 if is_fixed else len(stage.layers)]
    for attention in fixed:
        attention.plan(batch.batch)

    index = None if rows is None else torch.tensor(rows)
    for factor in (1.0, 0.3):
        kv.copy_(batch.kv[: len(stage.layers)])
        hidden = factor * batch.hidden
        with torch.inference_mode():
            result = graphs.run(hidden, batch.places, batch.attention, index)
        batch.hidden = hidden
        expected, expected_kv = batch.run(stage, rows)
        assert torch.equal(result, expected)
        assert torch.equal(kv, expected_kv)
        assert not torch.equal(kv, batch.kv[: len(stage.layers)])


@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_micro_batch_is_served_when_it_is_full_and_attention_has_room(tmp_path, is_fixed):
    stage, batch = prepare(tmp_path, "LlamaForCausalLM", "T1", 0)
    fixed = fixed_attention(batch.attention) if is_fixed else ()
    num_tokens = sum(QUERY_LENS)
    graphs = SegmentGraphs(stage, batch.rotary, batch.hidden.shape[1], num_tokens, fixed, torch.float32, CPU)
    with torch.inference_mode():
        graphs.capture(list(batch.kv), RepeatingPool(), lambda: None)
    assert graphs.serves(batch.batch)
    fewer, _ = plan([num_tokens - 1], [num_tokens - 1], 0, BLOCK_SIZE)
    assert not graphs.serves(fewer)
    many, _ = plan([1, 1, 1, 1, 1, num_tokens - 5], [9] * 5 + [num_tokens], 5, BLOCK_SIZE)
    assert graphs.serves(many) != is_fixed

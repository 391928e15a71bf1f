"""Micro-batches in segments that end at attention, with a graph that runs what it is of once more."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seesaw_ds.worker.graphs import GraphPool
from seesaw_ds.worker.segments import SegmentGraphs
from stages import CPU, QUERY_LENS, prepare


class RepeatingPool(GraphPool):
    """In the place of the device's graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_graphs = 0

    def capture(self, body: Callable[[], object]) -> Any:
        body()
        self.num_graphs += 1
        return SimpleNamespace(replay=body)


@pytest.mark.parametrize(("layouts", "pp_rank", "rows"), [("T1", 0, None), ("P2[1,3]", 1, [0, 1, 15]), ("P2", 0, None)])
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"],
)
def test_segments_make_the_steps_of_the_stage(tmp_path, architecture, layouts, pp_rank, rows):
    stage, batch = prepare(tmp_path, architecture, layouts, pp_rank)
    kv = batch.kv[: len(stage.layers)].clone()
    pool, captures = RepeatingPool(), []
    graphs = SegmentGraphs(stage, batch.rotary, batch.hidden.shape[1], sum(QUERY_LENS), torch.float32, CPU)
    with torch.inference_mode():
        graphs.capture(list(kv), pool, lambda: captures.append(pool.num_graphs))
    assert captures == [len(stage.layers)]

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

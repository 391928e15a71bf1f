"""Micro-batches as graphs, of all layers or of the segments between attention: what the stage computes by kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from family_models import make_family
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.model.backends import choose_backends
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.shapes import model_shape, read_hf_config
from seesaw_ds.worker.graphs import GraphPool
from seesaw_ds.worker.segments import SegmentGraphs
from stages import make_stage, plan

HOPPER = pytest.mark.gpu(1, capability=(9, 0))
BLOCK_SIZE, NUM_TOKENS = 16, 64
# Of each micro-batch: tokens of each sequence, and how many they are with those before; decode rows first.
MICRO_BATCHES = [
    ([1, 1, 1, 40, 21], [90, 7, 300, 40, 60]),
    ([64], [200]),
    ([1] * 30 + [34], [*range(20, 320, 10), 34]),
]


@pytest.mark.parametrize("is_fixed", [False, pytest.param(True, marks=HOPPER)], ids=["segments", "whole"])
@pytest.mark.parametrize("rows", [None, [0, 2, 63]], ids=["all", "some"])
@pytest.mark.parametrize(
    "architecture",
    [
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Olmo2ForCausalLM",
        pytest.param("MixtralForCausalLM", marks=HOPPER),  # experts are captured there
    ],
)
def test_graphs_compute_what_the_stage_does(
    tmp_path: Path, architecture: str, rows: list[int] | None, is_fixed: bool
) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    make_family(tmp_path, architecture, head_dim=128, hidden_size=256, intermediate_size=512)
    shape = model_shape(read_hf_config(tmp_path))
    backends = choose_backends(shape, BLOCK_SIZE, dtype, device)
    assert backends.has_graphs
    stage = make_stage(tmp_path, shape, backends, ParallelLayout.parse("T1"), 0, dtype, device)
    rotary = ModelRotation(read_hf_config(tmp_path), shape, device, 512)
    workspace = torch.empty(backends.workspace_bytes(1, NUM_TOKENS), dtype=torch.uint8, device=device)
    attention = backends.make_attention(Phase.PREFILL, 1, workspace)
    pool = torch.randn((1000, shape.num_kv_heads, shape.num_layers, 2, BLOCK_SIZE, shape.head_dim), device=device)
    expected_pool, pool = pool.to(dtype), pool.to(dtype)
    kv_caches, expected_caches = (
        [memory[:, :, layer].transpose(1, 2) for layer in range(shape.num_layers)] for memory in (pool, expected_pool)
    )
    untouched = pool.clone()
    fixed = backends.make_fixed_attention(1, workspace, NUM_TOKENS, 40, 1000) if is_fixed else ()
    assert len(fixed) == (len(attention) if is_fixed else 0)
    graphs = SegmentGraphs(stage, rotary, shape.hidden_size, NUM_TOKENS, fixed, dtype, device)
    with torch.inference_mode():
        graphs.capture(kv_caches, GraphPool(), lambda: None)
    pool.copy_(untouched)

    index = None if rows is None else torch.tensor(rows, device=device)
    for query_lens, kv_lens in MICRO_BATCHES * 2:
        batch, places = plan(query_lens, kv_lens, query_lens.count(1), BLOCK_SIZE)
        places = places.to(device)
        hidden = torch.randn((NUM_TOKENS, shape.hidden_size), device=device).to(dtype)
        assert graphs.serves(batch)
        for backend in attention + fixed:
            backend.plan(batch)
        with torch.inference_mode():
            expected = stage(hidden.clone(), rotary.places(*places.unbind()), attention, expected_caches, index)
            result = graphs.run(hidden, places, attention, index)
        difference = (result - expected).float().norm() / expected.float().norm()
        print(f"{architecture}: relative difference {difference:.1e}")
        assert expected.float().std() > 0.1
        assert difference < 1e-2
        torch.testing.assert_close(pool, expected_pool, atol=0.05, rtol=0.05)
    assert not torch.equal(pool, untouched)

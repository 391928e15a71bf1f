"""A last stage whose last layer goes on with some rows alone: for them it gives what a run of all tokens gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cells import load_cells
from family_models import make_family
from seesaw_ds.checkpoint.source import SafetensorsSource
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.model.attention.interface import AttentionBatch
from seesaw_ds.model.backends import Backends, choose_backends
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.layers import bind
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.model.tensors import replicated_tensors
from seesaw_ds.parallel.groups import PhaseGroups
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

CPU = torch.device("cpu")
BLOCK_SIZE = 4
# Two decode rows, the middle of a prompt, the end of another and a prompt of one token.
QUERY_LENS, KV_LENS = np.array([1, 1, 7, 6, 1], np.int32), np.array([9, 30, 12, 11, 1], np.int32)
SAMPLED = [0, 1, 14, 15]


class OneRank:
    """What layers ask of a process group and of its all-reduce, of a single rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def make_stage(folder: Path, shape: ModelShape, backends: Backends, layout: ParallelLayout, pp_rank: int):
    """A stage with the weights of its layers; of a layout without tensor parallelism."""
    one: Any = OneRank()
    groups = PhaseGroups(Phase.PREFILL, layout, layout.coords(pp_rank), one, one, one, one, tuple(range(layout.pp)))
    source = SafetensorsSource(shape, check_checkpoint(folder, shape), torch.float32)
    layers = layout.stage_layers(shape.num_layers)[pp_rank]
    replicated = {name: source.replicated(name) for name in replicated_tensors(shape)}
    stage = DecoderStage(shape, groups, layers, 1, replicated, backends.ops, one, torch.float32)
    for index, layer in zip(layers.indices(), stage.layers, strict=True):
        (cell,) = load_cells(source, shape, index, 1)
        bind(layer.qkv, cell["qkv"])
        bind(layer.o, cell["o"].t())
        layer.ffn.bind(cell["gate_up"], cell["down"])
    return stage


class MicroBatch:
    """The tokens of `QUERY_LENS`, on random hidden states and KV."""

    def __init__(self, folder: Path, shape: ModelShape, backends: Backends) -> None:
        generator = torch.Generator().manual_seed(0)
        width = -(-KV_LENS.max() // BLOCK_SIZE)
        tables = np.arange(len(KV_LENS) * width, dtype=np.int32).reshape(-1, width)
        self.attention = backends.make_attention(Phase.PREFILL, 1, torch.empty(0))
        for attention in self.attention:
            attention.plan(AttentionBatch(QUERY_LENS, KV_LENS, tables))
        rows = np.repeat(np.arange(len(KV_LENS)), QUERY_LENS)
        positions = np.concatenate([np.arange(kv - query, kv) for query, kv in zip(QUERY_LENS, KV_LENS, strict=True)])
        blocks = tables[rows, positions // BLOCK_SIZE]
        places = np.stack((positions, KV_LENS[rows], blocks, positions % BLOCK_SIZE)).astype(np.int64)
        self.places = ModelRotation(read_hf_config(folder), shape, CPU).places(*torch.from_numpy(places))
        self.hidden = torch.randn(len(rows), shape.hidden_size, generator=generator)
        pool = (shape.num_layers, tables.size, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.kv = torch.randn(pool, generator=generator)

    def run(self, stage: DecoderStage, rows: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of `rows`, or of all tokens, and the KV of the stage's layers."""
        kv = self.kv[: len(stage.layers)].clone()
        index = None if rows is None else torch.tensor(rows)
        with torch.inference_mode():
            return stage(self.hidden.clone(), self.places, self.attention, list(kv), index), kv


def prepare(folder: Path, architecture: str, layouts: str, pp_rank: int) -> tuple[DecoderStage, MicroBatch]:
    make_family(folder, architecture)
    shape = model_shape(read_hf_config(folder))
    backends = choose_backends(shape, BLOCK_SIZE, torch.float32, CPU)
    stage = make_stage(folder, shape, backends, ParallelLayout.parse(layouts), pp_rank)
    return stage, MicroBatch(folder, shape, backends)


@pytest.mark.parametrize("rows", [SAMPLED, [5]], ids=["sampled", "one"])
@pytest.mark.parametrize(("layouts", "pp_rank"), [("T1", 0), ("P2[3,1]", 1)])
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"],
)
def test_rows_are_those_of_the_whole_micro_batch(tmp_path, architecture, layouts, pp_rank, rows):
    stage, batch = prepare(tmp_path, architecture, layouts, pp_rank)
    of_all, kv_of_all = batch.run(stage, None)
    of_rows, kv = batch.run(stage, rows)
    assert of_all.shape == batch.hidden.shape
    torch.testing.assert_close(of_rows, of_all[rows])
    assert torch.equal(kv, kv_of_all)
    assert not torch.equal(kv, batch.kv[: len(stage.layers)])


def test_a_stage_that_another_follows_goes_on_with_all_tokens(tmp_path):
    stage, batch = prepare(tmp_path, "LlamaForCausalLM", "P2", 0)
    with pytest.raises(AssertionError, match="the next stage needs all tokens"):
        batch.run(stage, SAMPLED)

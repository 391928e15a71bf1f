"""A pipeline stage by itself, without the ranks around it, and micro-batches for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cells import load_cells
from family_models import make_family
from seesaw_ds.checkpoint.source import SafetensorsSource
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
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
QUERY_LENS, KV_LENS = [1, 1, 7, 6, 1], [9, 30, 12, 11, 1]


class OneRank:
    """What layers ask of a process group and of its all-reduce, of a single rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def make_stage(
    folder: Path,
    shape: ModelShape,
    backends: Backends,
    layout: ParallelLayout,
    pp_rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderStage:
    """A stage with the weights of its layers; of a layout without tensor parallelism."""
    one: Any = OneRank()
    groups = PhaseGroups(Phase.PREFILL, layout, layout.coords(pp_rank), one, one, one, one, tuple(range(layout.pp)))
    source = SafetensorsSource(shape, check_checkpoint(folder, shape), dtype)
    layers = layout.stage_layers(shape.num_layers)[pp_rank]
    replicated = {name: source.replicated(name).to(device) for name in replicated_tensors(shape)}
    stage = DecoderStage(shape, groups, layers, 1, replicated, backends.ops, one, dtype)
    for index, layer in zip(layers.indices(), stage.layers, strict=True):
        (cell,) = load_cells(source, shape, index, 1, dtype)
        cell = {name: piece.to(device) for name, piece in cell.items()}
        bind(layer.qkv, cell["qkv"])
        bind(layer.o, cell["o"].t())
        layer.ffn.bind(cell["gate_up"], cell["down"])
    return stage


def plan(
    query_lens: list[int], kv_lens: list[int], num_rows: int, block_size: int
) -> tuple[AttentionBatch, torch.Tensor]:
    """A micro-batch whose first `num_rows` sequences decode, with KV blocks in any order; its tokens' places (4, N)."""
    queries, kv = np.array(query_lens, np.int32), np.array(kv_lens, np.int32)
    width = -(-int(kv.max()) // block_size)
    tables = np.random.default_rng(len(kv)).permutation(len(kv) * width).astype(np.int32).reshape(-1, width)
    rows = np.repeat(np.arange(len(kv)), queries)
    positions = np.concatenate([np.arange(end - count, end) for count, end in zip(queries, kv, strict=True)])
    blocks = tables[rows, positions // block_size]
    places = np.stack((positions, kv[rows], blocks, positions % block_size)).astype(np.int64)
    return AttentionBatch(queries, kv, tables, num_rows), torch.from_numpy(places)


def attended(backend: AttentionBackend, q_NHD: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
    """What a backend makes of queries, as planned, in memory that was NaN before."""
    out_NHD = torch.full_like(q_NHD, torch.nan)
    backend.forward(q_NHD, kv_cache, out_NHD)
    return out_NHD


class MicroBatch:
    """The tokens of `QUERY_LENS`, on random hidden states and KV, on the CPU."""

    def __init__(self, folder: Path, shape: ModelShape, backends: Backends) -> None:
        generator = torch.Generator().manual_seed(0)
        batch, self.places = plan(QUERY_LENS, KV_LENS, 0, BLOCK_SIZE)
        self.attention = backends.make_attention(Phase.PREFILL, 1, torch.empty(0))
        for attention in self.attention:
            attention.plan(batch)
        self.batch = batch
        self.rotary = ModelRotation(read_hf_config(folder), shape, CPU)
        self.hidden = torch.randn(sum(QUERY_LENS), shape.hidden_size, generator=generator)
        pool = (shape.num_layers, batch.block_tables.size, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.kv = torch.randn(pool, generator=generator)

    def run(self, stage: DecoderStage, rows: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of `rows`, or of all tokens, and the KV of the stage's layers."""
        kv = self.kv[: len(stage.layers)].clone()
        index = None if rows is None else torch.tensor(rows)
        places = self.rotary.places(*self.places.unbind())
        with torch.inference_mode():
            return stage(self.hidden.clone(), places, self.attention, list(kv), index), kv


def prepare(folder: Path, architecture: str, layouts: str, pp_rank: int) -> tuple[DecoderStage, MicroBatch]:
    """A stage of a small model of the family, in float32 on the CPU, and a micro-batch."""
    make_family(folder, architecture)
    shape = model_shape(read_hf_config(folder))
    backends = choose_backends(shape, BLOCK_SIZE, torch.float32, CPU)
    stage = make_stage(folder, shape, backends, ParallelLayout.parse(layouts), pp_rank, torch.float32, CPU)
    return stage, MicroBatch(folder, shape, backends)

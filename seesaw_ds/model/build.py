"""Both phases' decoders over one arena: fill the arena, bind each phase's layers to their views of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.model.decoder import DecoderLayer, DecoderStage
from seesaw_ds.model.layers import bind, padded_vocab_size
from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.model.tensors import replicated_tensors
from seesaw_ds.model.weights import WeightSource, vocab_shard
from seesaw_ds.parallel.all_reduce import AllReduce
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.host import HostWeights
from seesaw_ds.reshard.plan import ReshardPlan
from seesaw_ds.shapes import ModelShape


def load_arena(
    arena: WeightArena,
    plan: ReshardPlan,
    replica_rank: int,
    source: WeightSource,
    host: HostWeights | None,
    on_progress: Callable[[int, int], None],
) -> None:
    """Read this rank's prefill cells into the arena, and into the node-shared copy where there is one.

    Together the ranks of a replica own every cell in the prefill phase, so the shared copy ends up whole.
    `on_progress` gets (cells done, cells in all).
    """
    cells = {
        cell: {spec.name: arena.cell(spec.name, slot) for spec in arena.cell_tensors}
        for cell, slot in sorted(plan.placement[Phase.PREFILL][replica_rank].items())
    }
    source.load(cells, plan.layouts.cells_per_layer, on_progress)
    if host is not None:
        for (layer, cell), matrices in cells.items():
            for name, matrix in matrices.items():
                host.store(layer, cell, name, matrix)


def build_stages(
    shape: ModelShape,
    layouts: LayoutPair,
    state: ParallelState,
    plan: ReshardPlan,
    arena: WeightArena,
    replica_rank: int,
    source: WeightSource,
    ops: LayerOps,
    all_reduces: dict[Phase, AllReduce],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Phase, DecoderStage]:
    """The stage that this rank runs in each phase. With a static layout both are the same object."""
    replicated = {name: source.replicated(name).to(device) for name in replicated_tensors(shape)}
    stages: dict[Phase, DecoderStage] = {}
    for phase in Phase:
        if layouts.is_static and stages:
            stages[phase] = stages[phase.other]
            continue
        groups = state.activate(phase)
        shard = groups.layout.shard(replica_rank, shape.num_layers, shape.num_kv_heads)
        num_cells = plan.cells_per_rank(phase)
        stage = DecoderStage(shape, groups, shard.layers, num_cells, replicated, ops, all_reduces[phase], dtype)
        first_slots = [plan.first_slot(phase, replica_rank, layer) for layer in shard.layers.indices()]
        _bind_layers(stage, arena, first_slots, num_cells)
        _bind_vocabulary(stage, shape, source, device)
        stages[phase] = stage.eval()
    state.activate(Phase.PREFILL)
    return stages


def _bind_layers(stage: DecoderStage, arena: WeightArena, first_slots: list[int], num_cells: int) -> None:
    for slot, layer in zip(first_slots, stage.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        bind(layer.qkv, arena.matrix("qkv", slot, num_cells))
        bind(layer.o, arena.matrix("o", slot, num_cells).t())
        layer.ffn.bind(arena.matrix("gate_up", slot, num_cells), arena.matrix("down", slot, num_cells))


def _bind_vocabulary(stage: DecoderStage, shape: ModelShape, source: WeightSource, device: torch.device) -> None:
    tp, rank = stage.groups.layout.tp, stage.groups.coords.tp
    padded = padded_vocab_size(shape.vocab_size, tp)
    if stage.embedding is not None:
        bind(stage.embedding, vocab_shard(source.embedding, shape.vocab_size, padded, rank, tp).to(device))
    if stage.head is not None:
        if shape.tie_word_embeddings and stage.embedding is not None:
            bind(stage.head, stage.embedding.weight.data)
        else:
            bind(stage.head, vocab_shard(source.head, shape.vocab_size, padded, rank, tp).to(device))

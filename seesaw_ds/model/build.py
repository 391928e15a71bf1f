"""Both phases' decoders over the same arenas: fill them, bind each phase's layers to their views of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.model.decoder import DecoderLayer, DecoderStage
from seesaw_ds.model.layers import bind, padded_vocab_size
from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.model.tensors import replicated_tensors
from seesaw_ds.model.weights import WeightSource, read_table_cell
from seesaw_ds.parallel.all_reduce import AllReduce
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.reshard.arena import PlacedCells
from seesaw_ds.reshard.host import HostWeights
from seesaw_ds.reshard.plan import CellTensor
from seesaw_ds.shapes import ModelShape

_TABLE = "table"


def table_cell(shape: ModelShape, num_cells: int) -> CellTensor:
    """A cell of the embedding or the LM head: rows of the vocabulary, which is padded to a multiple of `num_cells`."""
    return CellTensor(_TABLE, padded_vocab_size(shape.vocab_size, num_cells) // num_cells, shape.hidden_size)


def load_layers(
    layers: PlacedCells,
    replica_rank: int,
    source: WeightSource,
    host: HostWeights | None,
    on_progress: Callable[[int, int], None],
) -> None:
    """Read this rank's prefill cells of the layers into the arena, and into the node-shared copy where there is one.

    Together the ranks of a replica own every cell in the prefill phase, so the shared copy ends up whole.
    `on_progress` gets (cells done, cells in all).
    """
    plan, arena = layers
    cells = {
        cell: {spec.name: arena.cell(spec.name, slot) for spec in arena.cell_tensors}
        for cell, slot in sorted(plan.placement[Phase.PREFILL][replica_rank].items())
    }
    source.load(cells, plan.layouts.cells_per_layer, on_progress)
    if host is not None:
        for (layer, cell), matrices in cells.items():
            for name, matrix in matrices.items():
                host.store(layer, cell, name, matrix)


def load_tables(
    tables: PlacedCells, replica_rank: int, source: WeightSource, host: HostWeights | None, vocab_size: int
) -> None:
    """The same for the embedding and the LM head."""
    plan, arena = tables
    for (table, cell), slot in sorted(plan.placement[Phase.PREFILL][replica_rank].items()):
        target = arena.cell(_TABLE, slot)
        read_table_cell(source.head if table else source.embedding, vocab_size, cell, target)
        if host is not None:
            host.store(table, cell, _TABLE, target)


def build_stages(
    shape: ModelShape,
    layouts: LayoutPair,
    state: ParallelState,
    placed_layers: PlacedCells,
    placed_tables: PlacedCells,
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
        num_cells = placed_layers.plan.cells_per_rank(phase)
        stage = DecoderStage(shape, groups, shard.layers, num_cells, replicated, ops, all_reduces[phase], dtype)
        _bind_layers(stage, placed_layers, phase, replica_rank)
        _bind_tables(stage, placed_tables, phase, replica_rank)
        stages[phase] = stage.eval()
    state.activate(Phase.PREFILL)
    return stages


def _bind_layers(stage: DecoderStage, placed: PlacedCells, phase: Phase, replica_rank: int) -> None:
    plan, arena = placed
    num_cells = plan.cells_per_rank(phase)
    for index, layer in zip(stage.layer_range.indices(), stage.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        slot = plan.first_slot(phase, replica_rank, index)
        bind(layer.qkv, arena.matrix("qkv", slot, num_cells))
        bind(layer.o, arena.matrix("o", slot, num_cells).t())
        layer.ffn.bind(arena.matrix("gate_up", slot, num_cells), arena.matrix("down", slot, num_cells))


def _bind_tables(stage: DecoderStage, placed: PlacedCells, phase: Phase, replica_rank: int) -> None:
    plan, arena = placed

    def table(number: int) -> torch.Tensor:
        return arena.matrix(_TABLE, plan.first_slot(phase, replica_rank, number), plan.cells_per_rank(phase))

    if stage.embedding is not None:
        bind(stage.embedding, table(0))
    if stage.head is not None:
        bind(stage.head, table(plan.num_layers - 1))

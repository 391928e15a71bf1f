"""Bring a rank's weights into its arenas, and make what moves them when the phase changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from seesaw_ds.checkpoint.cell_layout import is_cells_folder
from seesaw_ds.checkpoint.source import CellsSource, SafetensorsSource
from seesaw_ds.config import RunConfig
from seesaw_ds.model.build import load_layers, load_tables, table_cell
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.weights import DummySource, WeightSource, cell_tensors
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.shared_memory import share_mapping
from seesaw_ds.parallel.transport import Transport
from seesaw_ds.reshard.arena import PlacedCells, WeightArena
from seesaw_ds.reshard.exchange import ExchangeReshard
from seesaw_ds.reshard.host import HostReshard, HostWeights
from seesaw_ds.reshard.joined import JoinedReshard
from seesaw_ds.reshard.plan import CellTensor, ReshardPlan, WeightReshard, plan_reshard, plan_tables
from seesaw_ds.shapes import ModelShape

logger = logging.getLogger(__name__)

LOAD_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class RankWeights:
    """What a rank has of the layers and of the vocabulary's tables, in prefill layout at first.

    `exchange` is the layers' part of `reshard`, None where their weights come from the host.
    """

    layers: PlacedCells
    tables: PlacedCells
    reshard: WeightReshard
    exchange: ExchangeReshard | None
    source: WeightSource


def load_weights(
    run: RunConfig,
    shape: ModelShape,
    state: ParallelState,
    replica_rank: int,
    transport: Transport,
    scratch: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> RankWeights:
    """Load this rank's prefill cells. Collective over the replica; `scratch` is for exchanges."""
    layouts, num_cells = run.layout_pair, run.layout_pair.cells_per_layer

    def place(plan: ReshardPlan, pieces: Sequence[CellTensor]) -> PlacedCells:
        return PlacedCells(plan, WeightArena(pieces, plan.num_slots[replica_rank], dtype, device))

    def host_copy(name: str, placed: PlacedCells) -> HostWeights | None:
        """Memory of the node for all cells, where the settings have weights come from there."""
        if run.weight_reshard != "host":
            return None
        plan, arena = placed
        cells = (arena.cell_tensors, plan.num_layers, num_cells, dtype)
        num_bytes = HostWeights.required_bytes(*cells)
        mapping = share_mapping(name, num_bytes, state.replica, device, num_bytes // plan.num_layers)
        return HostWeights(mapping, *cells)

    def make_reshard(placed: PlacedCells, host: HostWeights | None) -> ExchangeReshard | HostReshard:
        if host is not None:
            return HostReshard(*placed, host, replica_rank)
        return ExchangeReshard(*placed, transport, replica_rank, list(state.replica_ranks), scratch)

    layers = place(plan_reshard(layouts, shape.num_layers), cell_tensors(shape, num_cells))
    tables = place(plan_tables(layouts, shape.tie_word_embeddings), (table_cell(shape, num_cells),))
    source = _source(run, shape, dtype, device)
    host_layers, host_tables = host_copy("weights", layers), host_copy("tables", tables)
    load_layers(layers, replica_rank, source, host_layers, _LoadProgress())
    load_tables(tables, replica_rank, source, host_tables, shape.vocab_size)
    dist.barrier(group=state.replica)
    of_layers = make_reshard(layers, host_layers)
    reshard = JoinedReshard([of_layers, make_reshard(tables, host_tables)])
    exchange = of_layers if isinstance(of_layers, ExchangeReshard) else None
    return RankWeights(layers, tables, reshard, exchange, source)


def _source(run: RunConfig, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> WeightSource:
    if run.load_format == "dummy":
        return DummySource(shape, dtype, device, run.seed)
    if is_cells_folder(run.model):
        return CellsSource(run.model, shape, dtype)
    return SafetensorsSource(shape, check_checkpoint(run.model, shape), dtype)


class _LoadProgress:
    """Says on the log how far loading is, every few seconds, from the first rank."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if dist.get_rank() == 0 and now - self._said > LOAD_PROGRESS_SECONDS:
            self._said = now
            logger.info("weights: %d of %d cells", done, total)

"""Both weight strategies on gloo ranks, with values that tell layer, cell, tensor and place apart."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from harness import RankFailure, run_ranks
from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.parallel.transport import BackendTransport, Transport
from seesaw_ds.reshard import exchange
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.exchange import ExchangeReshard
from seesaw_ds.reshard.host import HostReshard, HostWeights
from seesaw_ds.reshard.plan import CellTensor, ReshardPlan, plan_reshard
from seesaw_ds.reshard.preload import CellPreload
from seesaw_ds.sched.output import PreloadSize
from staged import staged_transport

CELL_TENSORS = (CellTensor("qkv", 6, 4), CellTensor("o", 2, 4), CellTensor("down", 5, 3))
CELL_BYTES = 4 * sum(spec.numel for spec in CELL_TENSORS)


def cell_values(layer: int, cell: int, index: int) -> torch.Tensor:
    spec = CELL_TENSORS[index]
    return torch.arange(spec.numel).view(spec.rows, spec.cols) + 1000 * index + 10_000 * cell + 1_000_000 * layer


def fill(arena: WeightArena, plan: ReshardPlan, rank: int) -> None:
    for (layer, cell), slot in plan.placement[Phase.PREFILL][rank].items():
        for index, spec in enumerate(CELL_TENSORS):
            arena.cell(spec.name, slot).copy_(cell_values(layer, cell, index))


def check(arena: WeightArena, plan: ReshardPlan, phase: Phase, rank: int) -> None:
    """Compare each layer's whole matrices, as the model reads them."""
    width = plan.cells_per_rank(phase)
    for layer in {cell.layer for cell in plan.placement[phase][rank]}:
        cells = sorted(cell.cell for cell in plan.placement[phase][rank] if cell.layer == layer)
        for index, spec in enumerate(CELL_TENSORS):
            matrix = arena.matrix(spec.name, plan.first_slot(phase, rank, layer), width)
            assert matrix.is_contiguous()
            expected = torch.cat([cell_values(layer, cell, index) for cell in cells])
            assert torch.equal(matrix, expected.to(matrix.dtype)), (phase, rank, layer, spec.name)


def make_arena(plan: ReshardPlan, rank: int) -> WeightArena:
    arena = WeightArena(CELL_TENSORS, plan.num_slots[rank], torch.int32, torch.device("cpu"))
    assert arena.nbytes == plan.num_slots[rank] * CELL_BYTES
    return arena


def transit_ten_times(
    reshard, arena: WeightArena, plan: ReshardPlan, rank: int, preload: CellPreload | None = None
) -> None:
    """If there is a preload, ever more of the exchange to decode comes early, but at the end steps are too few for it."""
    addresses = [arena.cell(spec.name, 0).data_ptr() for spec in CELL_TENSORS]
    phase = Phase.PREFILL
    for transition in range(10):
        phase = phase.other
        if preload is not None and phase is Phase.DECODE:
            num_rounds, round_blocks = min(transition // 2, preload.size.num_rounds), preload.size.round_blocks
            blocks = range(1, 1 + num_rounds * round_blocks)
            num_first = num_rounds // 2
            preload.begin(num_first, blocks[: num_first * round_blocks])
            num_steps = 40 if transition < 8 else 5
            for _ in range(num_steps):
                preload.advance()
            preload.begin(num_rounds - num_first, blocks[num_first * round_blocks :])
            for _ in range(num_steps):
                preload.advance()
        assert reshard.run(phase) == len(plan.incoming(phase, rank)) * CELL_BYTES
        check(arena, plan, phase, rank)
    with pytest.raises(AssertionError, match="in phase prefill already"):
        reshard.run(phase)
    assert addresses == [arena.cell(spec.name, 0).data_ptr() for spec in CELL_TENSORS]
    reshard.close()


def exchange_rank(
    text: str,
    num_layers: int,
    piece_bytes: int,
    is_staged: bool,
    chunk_numel: int | None = None,
    early: str = "the same",
) -> int:
    """Returns the bytes that came early. `early` is the transport they take, if there is a `chunk_numel` for them."""
    exchange._PIECE_BYTES = piece_bytes
    layouts = LayoutPair.parse(text)
    groups = [
        list(range(first, first + layouts.replica_size)) for first in range(0, layouts.world_size, layouts.replica_size)
    ]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    replica, rank = divmod(dist.get_rank(), layouts.replica_size)
    plan = plan_reshard(layouts, num_layers)
    arena = make_arena(plan, rank)
    fill(arena, plan, rank)
    transport = staged_transport(groups[replica]) if is_staged else BackendTransport(group, torch.device("cpu"))
    reshard = ExchangeReshard(plan, arena, transport, rank, groups[replica])
    if chunk_numel is not None:
        blocks = torch.zeros((200, chunk_numel + rank), dtype=torch.int32)
        early_transport: Transport = transport
        if early == "staged":
            early_transport = staged_transport(groups[replica])
        elif early == "backend":
            early_transport = BackendTransport(group, torch.device("cpu"))
        reshard.preload = CellPreload(plan, arena, early_transport, rank, groups[replica], blocks, chunk_numel)
        num_chunks = sum(-(-spec.numel // chunk_numel) for spec in CELL_TENSORS)
        assert reshard.preload.size == PreloadSize(len(plan.rounds(Phase.DECODE)), num_chunks)
    transit_ten_times(reshard, arena, plan, rank, reshard.preload)
    return 0 if reshard.preload is None else reshard.preload.num_bytes


def host_rank(text: str, num_layers: int) -> None:
    rank = dist.get_rank()
    plan = plan_reshard(LayoutPair.parse(text), num_layers)
    num_cells = plan.layouts.cells_per_layer
    store = dist.distributed_c10d._get_default_store()
    nbytes = HostWeights.required_bytes(CELL_TENSORS, num_layers, num_cells, torch.int32)
    mapping = (
        NodeSharedMapping.create("weights", nbytes, store) if rank == 0 else NodeSharedMapping.attach("weights", store)
    )
    host = HostWeights(mapping, CELL_TENSORS, num_layers, num_cells, torch.int32)
    arena = make_arena(plan, rank)
    fill(arena, plan, rank)
    for (layer, cell), slot in plan.placement[Phase.PREFILL][rank].items():
        for spec in CELL_TENSORS:
            host.store(layer, cell, spec.name, arena.cell(spec.name, slot))
    dist.barrier()
    transit_ten_times(HostReshard(plan, arena, host, rank), arena, plan, rank)


@pytest.mark.parametrize(
    ("text", "num_layers", "piece_bytes"),
    [
        ("P2->T2", 4, 1 << 20),
        ("P2->T2", 5, 16),  # a row of "qkv" at a time: pieces alternate between the two buffers
        ("T2->P2", 5, 40),
        ("P4->T4", 8, 1 << 20),
        ("P4->T4", 5, 40),
        ("T4->P4", 6, 40),
        ("T2P2->T4", 5, 40),
        ("P4->T2P2", 5, 1 << 20),
        ("D2P2->D2T2", 5, 40),
        ("P2->P2", 3, 40),
    ],
)
def test_exchange_is_exact_after_ten_transitions(text, num_layers, piece_bytes):
    run_ranks(LayoutPair.parse(text).world_size, exchange_rank, text, num_layers, piece_bytes, False)


@pytest.mark.parametrize(("text", "num_layers"), [("P2->T2", 5), ("P4->T4", 5), ("T4->P4", 6), ("D2P2->D2T2", 5)])
def test_exchange_through_host_memory_is_exact_after_ten_transitions(monkeypatch, text, num_layers):
    monkeypatch.setattr("seesaw_ds.parallel.host_transport.MAX_SLOT_BYTES", 64)
    run_ranks(LayoutPair.parse(text).world_size, exchange_rank, text, num_layers, 80, True)


@pytest.mark.parametrize("chunk_numel", [7, 8, 24])
@pytest.mark.parametrize(("text", "num_layers"), [("P2->T2", 6), ("P4->T4", 5), ("P4->T2P2", 5)])
def test_exchange_that_begins_early_is_exact_after_ten_transitions(monkeypatch, text, num_layers, chunk_numel):
    monkeypatch.setattr("seesaw_ds.parallel.host_transport.MAX_SLOT_BYTES", 64)
    assert sum(run_ranks(LayoutPair.parse(text).world_size, exchange_rank, text, num_layers, 80, True, chunk_numel)) > 0


@pytest.mark.parametrize("early", ["staged", "backend"])
@pytest.mark.parametrize(("text", "num_layers"), [("P2->T2", 6), ("P4->T4", 5), ("D2P2->D2T2", 6)])
def test_exchange_that_begins_on_another_transport_is_exact_after_ten_transitions(monkeypatch, text, num_layers, early):
    monkeypatch.setattr("seesaw_ds.parallel.host_transport.MAX_SLOT_BYTES", 64)
    num_ranks = LayoutPair.parse(text).world_size
    assert sum(run_ranks(num_ranks, exchange_rank, text, num_layers, 80, False, 8, early)) > 0


@pytest.mark.parametrize(
    ("text", "num_layers"), [("P2->T2", 5), ("T4->P4", 5), ("T2P2->T4", 4), ("P4->T2P2", 7), ("T2P3->T3P2", 5)]
)
def test_host_reload_is_exact_after_ten_transitions(text, num_layers):
    run_ranks(LayoutPair.parse(text).world_size, host_rank, text, num_layers)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("cell 17")
    dist.barrier()


def test_harness_shows_the_failing_ranks_traceback():
    with pytest.raises(RankFailure, match=r"rank 1 of 2: Traceback[\s\S]*in fail_on_rank_one[\s\S]*cell 17"):
        run_ranks(2, fail_on_rank_one)


def test_harness_shows_the_stacks_of_ranks_that_hang():
    with pytest.raises(RankFailure, match=r"did not finish in time[\s\S]*in hang"):
        run_ranks(2, hang, timeout=1.5)


def hang() -> None:
    dist.recv(torch.zeros(1), src=1 - dist.get_rank())


def test_harness_returns_what_each_rank_returns():
    assert run_ranks(3, lambda factor: factor * dist.get_rank(), 10) == [0, 10, 20]

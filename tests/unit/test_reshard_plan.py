"""The cell plan, executed on dicts of slots whose values are the cells themselves."""

from __future__ import annotations

import pytest

from seesaw_ds.layout import LayoutPair, Phase, split_evenly
from seesaw_ds.reshard.plan import CellId, ReshardPlan, plan_reshard, plan_tables

NESTED = [
    "P2->T2", "T2->P2", "P4->T4", "T4->P4", "T2P2->T4", "T4->T2P2", "P4->T2P2", "T2P2->P4", "P3->T3", "P6->T3P2",
    "T2P4->T8", "P8->T4P2", "T8->P8", "D2P2->D2T2",
]  # fmt: skip
STATIC = ["T1", "P2", "T2", "T2P2"]
# of seven layers
UNEQUAL_STAGES = [
    "P2[6,1]->T2", "T2->P2[1,6]", "P4[1,4,1,1]->T4", "P4[3,2,1,1]->T2P2[2,5]", "T2P2[1,6]->P4[1,1,1,4]",
    "P2->P2[6,1]", "P2[1,6]->P2[6,1]", "T2P2->T2P2[6,1]", "P3[1,1,5]->T3", "P4[1,2,3,1]->P4[1,3,2,1]",
]  # fmt: skip
NOT_NESTED = ["T2P3->T3P2", "T3P2->T2P3"]
LAYER_COUNTS = range(1, 14)

Slots = list[dict[int, CellId]]


def layer_counts(text: str) -> range:
    """The numbers of layers of models that `text` is tried on."""
    return range(7, 8) if "[" in text else LAYER_COUNTS


def owned_cells(layouts: LayoutPair, phase: Phase, rank: int, num_layers: int) -> set[CellId]:
    layout = layouts[phase]
    coords = layout.coords(rank)
    layers = layout.stage_layers(num_layers)[coords.pp].indices()
    cells = split_evenly(layouts.cells_per_layer, layout.tp)[coords.tp].indices()
    return {CellId(layer, cell) for layer in layers for cell in cells}


def loaded(plan: ReshardPlan, phase: Phase) -> Slots:
    return [{slot: cell for cell, slot in placement.items()} for placement in plan.placement[phase]]


def exchange(plan: ReshardPlan, slots: Slots, to_phase: Phase) -> None:
    """Execute the rounds, checking at each that one bounce buffer per rank is enough."""
    for transfers in plan.rounds(to_phase):
        assert transfers
        assert len({t.src_rank for t in transfers}) == len({t.dst_rank for t in transfers}) == len(transfers)
        assert all(t.src_rank != t.dst_rank for t in transfers)
        sent = [slots[t.src_rank].pop(t.src_slot) for t in transfers]
        for transfer, cell in zip(transfers, sent, strict=True):
            assert cell == (transfer.layer, transfer.cell)
            assert transfer.dst_slot not in slots[transfer.dst_rank], "the slot of a received cell must be free"
            assert transfer.dst_slot < plan.num_slots[transfer.dst_rank]
            slots[transfer.dst_rank][transfer.dst_slot] = cell


@pytest.mark.parametrize("text", NESTED + STATIC + UNEQUAL_STAGES)
def test_exchange_moves_every_cell_home_and_back_ten_times(text):
    for num_layers in layer_counts(text):
        plan = plan_reshard(LayoutPair.parse(text), num_layers)
        slots = loaded(plan, Phase.PREFILL)
        for _ in range(5):
            for phase in (Phase.DECODE, Phase.PREFILL):
                exchange(plan, slots, phase)
                assert slots == loaded(plan, phase)


@pytest.mark.parametrize("text", NESTED + STATIC + NOT_NESTED + UNEQUAL_STAGES)
def test_placement_holds_the_owned_cells_in_the_larger_phases_slots(text):
    layouts = LayoutPair.parse(text)
    for num_layers in layer_counts(text):
        plan = plan_reshard(layouts, num_layers)
        for rank in range(layouts.replica_size):
            shard_sizes = []
            for phase in Phase:
                placement = plan.placement[phase][rank]
                assert set(placement) == owned_cells(layouts, phase, rank, num_layers)
                assert len(set(placement.values())) == len(placement)
                assert all(0 <= slot < plan.num_slots[rank] for slot in placement.values())
                shard_sizes.append(len(placement))
            assert plan.num_slots[rank] == max(shard_sizes)


@pytest.mark.parametrize("text", NESTED + STATIC + NOT_NESTED + UNEQUAL_STAGES)
def test_cells_of_a_layer_lie_side_by_side_at_an_aligned_slot(text):
    layouts = LayoutPair.parse(text)
    for num_layers in layer_counts(text):
        plan = plan_reshard(layouts, num_layers)
        for phase in Phase:
            width = plan.cells_per_rank(phase)
            for rank in range(layouts.replica_size):
                for layer in {cell.layer for cell in plan.placement[phase][rank]}:
                    first = plan.first_slot(phase, rank, layer)
                    assert first % width == 0
                    slots = [slot for cell, slot in sorted(plan.placement[phase][rank].items()) if cell.layer == layer]
                    assert slots == list(range(first, first + width))


@pytest.mark.parametrize("text", NESTED + UNEQUAL_STAGES)
def test_kept_cells_keep_their_slot_so_the_host_reads_what_the_exchange_sends(text):
    layouts = LayoutPair.parse(text)
    for num_layers in layer_counts(text):
        plan = plan_reshard(layouts, num_layers)
        for to_phase in Phase:
            for rank in range(layouts.replica_size):
                lacking = owned_cells(layouts, to_phase, rank, num_layers)
                lacking -= owned_cells(layouts, to_phase.other, rank, num_layers)
                assert set(plan.incoming(to_phase, rank)) == lacking
                assert plan.num_cells_received(to_phase, rank) == len(lacking)
                assert plan.num_cells_sent(to_phase, rank) == plan.num_cells_received(to_phase.other, rank)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_pp_to_tp_moves_all_but_one_nth_of_the_shard_in_the_fewest_rounds(size):
    layers_per_stage = 3 * size
    plan = plan_reshard(LayoutPair.parse(f"P{size}->T{size}"), size * layers_per_stage)
    for rank in range(size):
        shard = plan.num_slots[rank]
        assert shard == layers_per_stage * size
        assert plan.num_cells_sent(Phase.DECODE, rank) * size == shard * (size - 1)
    assert len(plan.rounds(Phase.DECODE)) == layers_per_stage * (size - 1)


@pytest.mark.parametrize("text", NESTED + UNEQUAL_STAGES)
def test_number_of_rounds_is_near_the_busiest_ranks_cells(text):
    layouts = LayoutPair.parse(text)
    for num_layers in layer_counts(text):
        plan = plan_reshard(layouts, num_layers)
        ranks = range(layouts.replica_size)
        busiest = max(
            max(plan.num_cells_sent(Phase.DECODE, rank), plan.num_cells_received(Phase.DECODE, rank)) for rank in ranks
        )
        assert busiest <= len(plan.rounds(Phase.DECODE)) <= busiest + 2


def test_each_sender_goes_through_the_layers_in_order():
    plan = plan_reshard(LayoutPair.parse("P4->T4"), 16)
    for rank in range(4):
        layers = [t.layer for transfers in plan.rounds(Phase.DECODE) for t in transfers if t.src_rank == rank]
        assert layers == sorted(layers)


@pytest.mark.parametrize("text", STATIC)
def test_nothing_moves_when_the_layout_stays(text):
    plan = plan_reshard(LayoutPair.parse(text), 5)
    assert plan.is_nested
    assert plan.rounds(Phase.DECODE) == plan.rounds(Phase.PREFILL) == ()
    assert plan.incoming(Phase.DECODE, 0) == {}


@pytest.mark.parametrize("text", NOT_NESTED)
def test_exchange_of_layouts_that_do_not_nest_is_refused_with_the_mend(text):
    plan = plan_reshard(LayoutPair.parse(text), 6)
    assert not plan.is_nested
    with pytest.raises(ValueError, match=r"TP size divides the other's .* set weight_reshard=host"):
        plan.rounds(Phase.DECODE)


@pytest.mark.parametrize("text", [*NOT_NESTED, "T2P3[5,1,1]->T3P2[2,5]"])
def test_reading_the_lacking_cells_from_the_host_completes_the_arena(text):
    for num_layers in layer_counts(text):
        plan = plan_reshard(LayoutPair.parse(text), num_layers)
        slots = loaded(plan, Phase.PREFILL)
        for to_phase in (Phase.DECODE, Phase.PREFILL, Phase.DECODE):
            for rank, expected in enumerate(loaded(plan, to_phase)):
                slots[rank].update({slot: cell for cell, slot in plan.incoming(to_phase, rank).items()})
                assert {slot: slots[rank][slot] for slot in expected} == expected


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("text", NESTED + STATIC)
def test_the_vocabularys_tables_go_where_each_phase_needs_them(text, is_tied):
    layouts = LayoutPair.parse(text)
    plan = plan_tables(layouts, is_tied)
    has_stages = any(layouts[phase].pp > 1 for phase in Phase)
    assert plan.num_layers == (2 if has_stages or not is_tied else 1)
    for phase in Phase:
        layout = layouts[phase]
        width = plan.cells_per_rank(phase)
        for rank, placement in enumerate(plan.placement[phase]):
            coords = layout.coords(rank)
            tables = {0} if coords.pp == 0 else set()
            tables |= {plan.num_layers - 1} if coords.pp == layout.pp - 1 else set()
            cells = range(coords.tp * width, (coords.tp + 1) * width)
            assert set(placement) == {CellId(table, cell) for table in tables for cell in cells}
    slots = loaded(plan, Phase.PREFILL)
    for phase in (Phase.DECODE, Phase.PREFILL, Phase.DECODE):
        exchange(plan, slots, phase)
        assert slots == loaded(plan, phase)

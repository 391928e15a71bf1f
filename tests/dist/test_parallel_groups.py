"""Both phases' groups on gloo ranks: who is in them, and that Megatron-core's globals follow the current phase."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from harness import run_ranks
from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase, RankCoords
from seesaw_ds.parallel.groups import ParallelState, PhaseGroups


def axis_ranks(layout: ParallelLayout, coords: RankCoords) -> dict[str, list[int]]:
    """The ranks that differ from `coords` in one axis alone."""
    return {
        "tp": [layout.rank(coords._replace(tp=i)) for i in range(layout.tp)],
        "pp": [layout.rank(coords._replace(pp=i)) for i in range(layout.pp)],
        "dp": [layout.rank(coords._replace(dp=i)) for i in range(layout.dp)],
    }


def check_members(groups: PhaseGroups, layout: ParallelLayout) -> None:
    coords = layout.coords(dist.get_rank())
    assert (groups.layout, groups.coords) == (layout, coords)
    expected = axis_ranks(layout, coords)
    for axis, group in (("tp", groups.tp), ("pp", groups.pp), ("dp", groups.dp), ("pp", groups.feedback)):
        assert dist.get_process_group_ranks(group) == expected[axis]
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total, group=group)
        assert total.item() == sum(expected[axis])
    assert groups.feedback is not groups.pp
    assert list(groups.pp_ranks) == expected["pp"]
    assert groups.is_first_stage == (coords.pp == 0)
    assert groups.is_last_stage == (coords.pp == layout.pp - 1)


def check_megatron(groups: PhaseGroups) -> None:
    layout, coords = groups.layout, groups.coords
    assert parallel_state.get_tensor_model_parallel_group() is groups.tp
    assert parallel_state.get_pipeline_model_parallel_group() is groups.pp
    assert parallel_state.get_data_parallel_group() is groups.dp
    assert parallel_state.get_tensor_model_parallel_world_size() == layout.tp
    assert parallel_state.get_pipeline_model_parallel_world_size() == layout.pp
    assert parallel_state.get_data_parallel_world_size() == layout.dp
    assert parallel_state.get_tensor_model_parallel_rank() == coords.tp
    assert parallel_state.get_pipeline_model_parallel_rank() == coords.pp
    assert parallel_state.get_data_parallel_rank() == coords.dp
    assert parallel_state.is_pipeline_first_stage() == groups.is_first_stage
    assert parallel_state.is_pipeline_last_stage() == groups.is_last_stage


def switch_phases(text: str) -> None:
    layouts = LayoutPair.parse(text)
    state = ParallelState(layouts)
    check_megatron(state[Phase.PREFILL])
    for phase in Phase:
        assert state[phase].phase is phase
        check_members(state[phase], layouts[phase])
    for phase in (Phase.DECODE, Phase.PREFILL, Phase.DECODE):
        assert state.activate(phase) is state[phase]
        check_megatron(state[phase])
    first = dist.get_rank() // layouts.replica_size * layouts.replica_size
    assert state.replica_ranks == tuple(range(first, first + layouts.replica_size))
    assert dist.get_process_group_ranks(state.replica) == list(state.replica_ranks)
    spanning = [state[phase].tp for phase in (Phase.DECODE, Phase.PREFILL) if layouts[phase].tp == layouts.replica_size]
    assert not spanning or state.replica is spanning[0]


@pytest.mark.parametrize("text", ["P2->T2", "T2->P2", "T2", "T2P2->T4", "P4->T2P2", "D2P2->D2T2"])
def test_groups_and_megatron_getters_follow_the_phase(text):
    run_ranks(LayoutPair.parse(text).world_size, switch_phases, text)


def refuse_four_ranks() -> None:
    with pytest.raises(RuntimeError, match=r"world_size=2: layouts P4->T4 need 4"):
        ParallelState(LayoutPair.parse("P4->T4"))


def test_layouts_of_another_world_size_are_refused():
    run_ranks(2, refuse_four_ranks)

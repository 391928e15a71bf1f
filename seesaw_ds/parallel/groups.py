"""Both phases' process groups: built once with Megatron-core, made current at a phase change.

Megatron-core keeps one set of groups in module globals. `ParallelState` lets it build each phase's set, takes the
globals away after each, and puts a phase's set back when that phase becomes current, so code that still asks
``megatron.core.parallel_state`` gets the right answer. Our own code never asks: it takes a `PhaseGroups`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase, RankCoords

# Tensor axis fastest, data axis slowest: a replica is a run of consecutive ranks in both phases (see layout.py).
_RANK_ORDER = "tp-cp-ep-pp-dp"
_GLOBAL = re.compile(r"_[A-Z][A-Z_]*|_global_process_group_list")


@dataclass(frozen=True)
class PhaseGroups:
    """One phase's groups of this rank, and the global ranks in them.

    `feedback` has the ranks of `pp` on a communicator of its own: sampled tokens travel from the last stage to the
    first on it, against the stream of hidden states, and must not queue behind them.
    """

    phase: Phase
    layout: ParallelLayout
    coords: RankCoords
    tp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    feedback: ProcessGroup
    pp_ranks: tuple[int, ...]

    @property
    def is_first_stage(self) -> bool:
        return self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coords.pp == self.layout.pp - 1


class ParallelState:
    """The groups of both phases on this rank. Every rank of the run must construct it at the same point."""

    def __init__(self, layouts: LayoutPair) -> None:
        if dist.get_world_size() != layouts.world_size:
            raise RuntimeError(f"world_size={dist.get_world_size()}: layouts {layouts} need {layouts.world_size}")
        self._saved: dict[Phase, dict[str, Any]] = {}
        self._groups: dict[Phase, PhaseGroups] = {}
        for phase in Phase:
            if layouts.is_static and self._groups:
                first = self._groups[phase.other]
                self._saved[phase] = self._saved[phase.other]
                self._groups[phase] = PhaseGroups(**{**vars(first), "phase": phase})
            else:
                self._build(phase, layouts[phase])
        self.replica_ranks = _replica_ranks(layouts)
        # A communicator takes up to half a GiB of each device: a group of the same ranks serves for the replica too.
        spanning = [phase for phase in (Phase.DECODE, Phase.PREFILL) if layouts[phase].tp == layouts.replica_size]
        self.replica = self._groups[spanning[0]].tp if spanning else _replica_group(layouts)
        self.activate(Phase.PREFILL)

    def __getitem__(self, phase: Phase) -> PhaseGroups:
        return self._groups[phase]

    def sampling_rank(self, phase: Phase) -> int:
        """The rank of this replica that speaks for the tokens of `phase`: the first of the last stage."""
        layout = self._groups[phase].layout
        return self.replica_ranks[layout.tp * (layout.pp - 1)]

    def activate(self, phase: Phase) -> PhaseGroups:
        """Make `phase` current in Megatron-core, and return its groups."""
        for name, value in self._saved[phase].items():
            setattr(parallel_state, name, value)
        return self._groups[phase]

    def _build(self, phase: Phase, layout: ParallelLayout) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            order=_RANK_ORDER,
            create_gloo_process_groups=False,
        )
        pp = parallel_state.get_pipeline_model_parallel_group()
        self._groups[phase] = PhaseGroups(
            phase=phase,
            layout=layout,
            coords=layout.coords(dist.get_rank()),
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=pp,
            dp=parallel_state.get_data_parallel_group(),
            feedback=_feedback_group(layout),
            pp_ranks=tuple(dist.get_process_group_ranks(pp)),
        )
        self._saved[phase] = {name: value for name, value in vars(parallel_state).items() if _GLOBAL.fullmatch(name)}
        parallel_state.destroy_model_parallel()


def _pipelines(layout: ParallelLayout) -> list[list[int]]:
    return [
        [layout.rank(RankCoords(dp=dp, pp=pp, tp=tp)) for pp in range(layout.pp)]
        for dp in range(layout.dp)
        for tp in range(layout.tp)
    ]


def _feedback_group(layout: ParallelLayout) -> ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(_pipelines(layout))
    return group


def _replica_ranks(layouts: LayoutPair) -> tuple[int, ...]:
    first = dist.get_rank() // layouts.replica_size * layouts.replica_size
    return tuple(range(first, first + layouts.replica_size))


def _replica_group(layouts: LayoutPair) -> ProcessGroup:
    size = layouts.replica_size
    replicas = [list(range(dp * size, (dp + 1) * size)) for dp in range(layouts.dp)]
    group, _ = dist.new_subgroups_by_enumeration(replicas)
    return group

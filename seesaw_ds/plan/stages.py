"""How many layers each pipeline stage gets, so that the slowest stage of a step is as fast as it can be.

All layers take the same time but the model's last one, of which prefill computes less. The last stage has the LM head
besides. So only the last stage's number of layers is to be found, and the others share the rest::

    P4, 32 layers, LM head as long as 1.9 layers     equal     8  8  8  8 + 1.9     slowest 9.9
                                                     balanced  8  9  8  7 + 1.9     slowest 9
    P2, 13 layers, last layer 0.7 shorter            equal     7  6 - 0.7           slowest 7
                                                     balanced  6  7 - 0.7           slowest 6.3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, product
from typing import NamedTuple

from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase
from seesaw_ds.plan.cost import CostModel, StepWork


class StageTimes(NamedTuple):
    """The layers of each stage of a phase, and its seconds in a typical step."""

    num_layers: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, cost: CostModel, step: StepWork) -> StageTimes:
        """Those of `cost.layout` in `step`."""
        return cls(cost.stage_layers, tuple(cost.stage_seconds(step)))


def balanced_last(cost: CostModel, step: StepWork) -> int:
    """Layers of the last stage, at least 1, that make the slowest stage of `step` fastest.

    Of those that do, as many as with equal stages or else the most.
    """
    num_layers, others = cost.shape.num_layers, cost.layout.pp - 1
    if others == 0:
        return num_layers
    layer, end = cost.layer_seconds(step), cost.end_seconds(step)

    def slowest(last: int) -> float:
        return max(-(-(num_layers - last) // others) * layer, last * layer + end)

    # Less than a layer is spared: it can make room for one more only where equal stages give the first ones more.
    equal, most = num_layers // cost.layout.pp, -(-num_layers // cost.layout.pp)
    return min(chain(range(equal, 0, -1), (most,)), key=slowest)


def with_last_stage(layout: ParallelLayout, num_layers: int, last: int) -> ParallelLayout:
    """`layout` with `last` layers on the last stage.

    The others share the rest. Its remainder goes to the middle ones, for the first has the embedding in its memory.
    """
    size, longer = divmod(num_layers - last, layout.pp - 1)
    others = (size + (1 <= stage <= longer) for stage in range(layout.pp - 1))
    return replace(layout, layer_counts=(*others, last))


def unequal_splits(costs: Mapping[Phase, CostModel], steps: Mapping[Phase, StepWork]) -> list[LayoutPair]:
    """Splits that balance `steps` in one phase or both, where equal stages do not; `costs` are of equal stages.

    The one layout of a static pair can only be a compromise: it is tried with all splits up to those of both phases.
    """
    pair = LayoutPair(costs[Phase.PREFILL].layout, costs[Phase.DECODE].layout)
    choices = {phase: _choices(cost, balanced_last(cost, steps[phase])) for phase, cost in costs.items()}
    if pair.is_static:
        return [LayoutPair(layout, layout) for layout in dict.fromkeys(chain(*choices.values()))][1:]
    ends = ((layouts[0], layouts[-1]) if len(layouts) > 1 else layouts for layouts in choices.values())
    return [LayoutPair(*layouts) for layouts in product(*ends)][1:]


def _choices(cost: CostModel, last: int) -> list[ParallelLayout]:
    """The layout with equal stages, then with the last one's layers one by one nearer to `last`."""
    layout, num_layers = cost.layout, cost.shape.num_layers
    equal = num_layers // layout.pp
    step = 1 if last > equal else -1
    counts = range(equal + step, last + step, step)
    return [layout, *(with_last_stage(layout, num_layers, count) for count in counts)]

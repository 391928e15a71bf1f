"""The choice of the layout to decode in, while a run goes on: built from its profile, told what happens, logged."""

from __future__ import annotations

import logging
import math

from seesaw_ds.config import RunConfig, dtype_name
from seesaw_ds.engine.hardware import find_hardware
from seesaw_ds.layout import Phase
from seesaw_ds.plan.cost import CostModel
from seesaw_ds.plan.layout_choice import LayoutChoice, choice_text
from seesaw_ds.plan.step_times import StepTimes
from seesaw_ds.plan.transfers import reshard_seconds
from seesaw_ds.sched.output import SchedulerLimits
from seesaw_ds.shapes import ModelShape

logger = logging.getLogger(__name__)


class DecodeLayout:
    """One replica's choice, and the times that correct it. `num_changes` counts choices that differ from the plan's."""

    def __init__(self, run: RunConfig, shape: ModelShape, limits: SchedulerLimits) -> None:
        self._pair = run.layout_pair
        hardware, dtype = find_hardware(run.hardware), dtype_name(run, shape)
        costs = {phase: CostModel(shape, hardware, self._pair[phase], dtype) for phase in Phase}
        reshard = reshard_seconds(shape, self._pair, hardware, dtype, run.weight_reshard, run.kv_block_size)
        self.choice = LayoutChoice(costs, reshard, limits, float(run.expected_output_tokens or math.inf))
        self.times = StepTimes(costs, reshard, self.choice.corrections)
        self.num_changes = 0

    def log_choices(self) -> None:
        """Say on the log what was chosen since the last call."""
        for choice in self.choice.take_choices():
            self.num_changes += choice.is_changed
            logger.info(
                "%d sequences to decode, %d prompts left: %s, predicted %.3g s; %s%s, %.3g s (%s)",
                choice.num_sequences,
                choice.num_prompts_left,
                choice_text(self._pair, choice.taken),
                choice.taken_seconds,
                "not as planned: " if choice.is_changed else "not ",
                choice_text(self._pair, choice.other),
                choice.other_seconds,
                self._factors(),
            )

    def _factors(self) -> str:
        """How the model was corrected."""
        factors = self.choice.corrections.known()
        return ", ".join(f"{kind.value} x {factor:.3g}" for kind, factor in factors.items()) or "nothing measured yet"

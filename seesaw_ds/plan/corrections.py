"""What a run has taken so far, against what the cost model says: a factor for each kind of work."""

from __future__ import annotations

import enum
from collections import deque
from statistics import median_low

from seesaw_ds.layout import Phase


class WorkKind(enum.Enum):
    """Kinds of work that are timed apart: micro-batches with prompts, decode steps and transitions by layout."""

    MICRO_BATCH = "micro-batches"
    PREFILL_LAYOUT_STEP = "decode steps in the prefill layout"
    DECODE_LAYOUT_STEP = "decode steps in the decode layout"
    TO_PREFILL = "transitions to prefill"
    TO_DECODE = "transitions to decode"

    @classmethod
    def step(cls, phase: Phase) -> WorkKind:
        """Decode steps in the layout of `phase`."""
        return cls.PREFILL_LAYOUT_STEP if phase is Phase.PREFILL else cls.DECODE_LAYOUT_STEP

    @classmethod
    def transition(cls, to: Phase) -> WorkKind:
        """Transitions into `to`."""
        return cls.TO_PREFILL if to is Phase.PREFILL else cls.TO_DECODE


# Whose factor stands in for one that is not known yet. Errors of a profile are mostly common to both layouts: a factor
# for one of them alone would make it look worse than the other for having been tried.
_KIN = {
    WorkKind.MICRO_BATCH: (),
    WorkKind.PREFILL_LAYOUT_STEP: (WorkKind.DECODE_LAYOUT_STEP, WorkKind.MICRO_BATCH),
    WorkKind.DECODE_LAYOUT_STEP: (WorkKind.PREFILL_LAYOUT_STEP, WorkKind.MICRO_BATCH),
    WorkKind.TO_PREFILL: (WorkKind.TO_DECODE,),
    WorkKind.TO_DECODE: (WorkKind.TO_PREFILL,),
}
_TRANSITIONS = (WorkKind.TO_PREFILL, WorkKind.TO_DECODE)
_MOST_SAMPLES = 31
# The lower median of two transitions is the faster one, which leaves out a first one that had to warm up.
_FEWEST_TRANSITIONS = 2
_FEWEST_STEPS = 4


class Corrections:
    """Keeps the latest ratios of observed to predicted seconds of each kind; their median is the kind's factor."""

    def __init__(self) -> None:
        self._ratios: dict[WorkKind, deque[float]] = {kind: deque(maxlen=_MOST_SAMPLES) for kind in WorkKind}

    def add(self, kind: WorkKind, observed_seconds: float, predicted_seconds: float) -> None:
        """Count a sample: a transition, or a stretch of many steps."""
        self._ratios[kind].append(observed_seconds / predicted_seconds)

    def factor(self, kind: WorkKind) -> float:
        """What to multiply predictions of `kind` by: its own factor, else that of its nearest kin, else 1."""
        known = self.known()
        return next((known[each] for each in (kind, *_KIN[kind]) if each in known), 1.0)

    def known(self) -> dict[WorkKind, float]:
        """The factors of kinds with enough samples."""
        return {
            kind: median_low(ratios)
            for kind, ratios in self._ratios.items()
            if len(ratios) >= (_FEWEST_TRANSITIONS if kind in _TRANSITIONS else _FEWEST_STEPS)
        }

"""Several re-shards as one: of the layers' cells, and of the vocabulary's tables."""

from __future__ import annotations

from collections.abc import Sequence

from seesaw_ds.layout import Phase
from seesaw_ds.reshard.plan import WeightReshard


class JoinedReshard:
    """Runs `parts` one after the other; all must be in the same phase."""

    def __init__(self, parts: Sequence[WeightReshard]) -> None:
        self._parts = tuple(parts)

    def run(self, to_phase: Phase) -> int:
        """Change the phase of every part; returns the bytes that this rank received."""
        return sum(part.run(to_phase) for part in self._parts)

    def close(self) -> None:
        """Release what the parts hold."""
        for part in self._parts:
            part.close()

"""What a simulated run says about itself."""

from __future__ import annotations

from dataclasses import dataclass


class TookTooLong(Exception):
    """A simulated clock came to the time after which nobody is interested in the run."""


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """Seconds and counts of one run. The seconds by part are those of the replica that finished last.

    `prefill_seconds` are those of steps with prompt tokens in them, decode rows or not. `busy_share` is how much of the
    time the stages computed, over all replicas; `mean_decode_batch` counts the rows of a step that has any, averaged
    over steps; `riding_share` is how many of all decode rows were in a step with prompt tokens. `num_left_after_stay`:
    sequences decoded on in the prefill layout, when prefill stopped, until so many were left; 0: to the end; None: they
    did not. `host_pool_share` is the most of a replica's host pool that was used at once.
    """

    num_requests: int
    seconds: float
    prefill_seconds: float
    decode_seconds: float
    transition_seconds: float
    num_transitions: int
    num_evictions: int
    busy_share: float
    mean_decode_batch: float
    riding_share: float
    num_left_after_stay: int | None = None
    host_pool_share: float = 0.0

    @property
    def requests_per_second(self) -> float:
        """Requests over the seconds of the whole run."""
        return self.num_requests / self.seconds

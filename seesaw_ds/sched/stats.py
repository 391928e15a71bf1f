"""What the scheduler tells about itself."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from seesaw_ds.layout import Phase


class TransitionReason(enum.Enum):
    """Why the phase changed; the last leads to prefill, the others to decode.

    FEW_LEFT: no prompt was left, and the sequences decoded in the prefill layout until few of them were.
    """

    HOST_FULL = "host_full"
    NO_PROMPT_LEFT = "no_prompt_left"
    FEW_LEFT = "few_left"
    HOST_EMPTY = "host_empty"


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot. Each live sequence is in one of the first four counts.

    `num_prefilling` ends when the sequence decodes or its KV is on the host, `num_host` when that is back on the GPU,
    and `num_finished` leaves out aborted sequences. Block counts include blocks in transit, but
    not those lent to weights.
    """

    phase: Phase
    num_waiting: int
    num_prefilling: int
    num_host: int
    num_running: int
    num_finished: int
    num_gpu_blocks_used: int
    num_gpu_blocks: int
    num_host_blocks_used: int
    num_host_blocks: int
    num_transitions: int
    num_evictions: int

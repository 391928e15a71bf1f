"""What the scheduler remembers of one sequence."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from seesaw_ds.requests import FinishReason
from seesaw_ds.sched.blocks import blocks_for
from seesaw_ds.sched.output import SequenceSpec


class SequenceState(enum.Enum):
    """Where a sequence stands. One that ends does so from any state, and keeps what is still in use::

    WAITING -> PREFILLING ----------------------------------------> RUNNING -> ENDED
                         `-> SWAPPING_OUT -> HOST -> SWAPPING_IN ->|
                                             HOST <-- EVICTING <---'
    """

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    SWAPPING_OUT = enum.auto()
    HOST = enum.auto()
    SWAPPING_IN = enum.auto()
    RUNNING = enum.auto()
    EVICTING = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence's progress and the blocks it owns.

    `order` rises with arrival. `in_flight` counts the actions that use its blocks and are not answered yet:
    chunks, the swap-out, decode steps, a swap-in, an eviction. `stays`: its prompt's KV stays on the GPU, and the
    sequence has a slot from its admission on. `num_issued_tokens` counts output tokens sampled
    or being sampled by a step in flight, `num_output_tokens` only those whose value arrived. `peak_blocks` holds
    the longest it may become; the last sampled token's KV is never written.
    """

    spec: SequenceSpec
    order: int
    block_size: int
    state: SequenceState = SequenceState.WAITING
    num_prefilled_tokens: int = 0
    num_issued_tokens: int = 0
    num_output_tokens: int = 0
    in_flight: int = 0
    stays: bool = False
    is_swapped_out: bool = False
    host_blocks: tuple[int, ...] = ()
    gpu_blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    group: int = 0
    step_group: int = 0
    seq_id: int = field(init=False)
    prompt_blocks: int = field(init=False)
    peak_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.seq_id = self.spec.seq_id
        self.prompt_blocks = blocks_for(self.spec.num_prompt_tokens, self.block_size)
        self.peak_blocks = blocks_for(self.spec.num_prompt_tokens + self.spec.max_tokens - 1, self.block_size)

    @property
    def goes_to_host(self) -> bool:
        """Whether a prompt that does not stay has to be kept: there is more to sample than its first token."""
        return not self.stays and self.spec.max_tokens > 1

    @property
    def num_stored_tokens(self) -> int:
        """Tokens whose KV exists when no step is in flight: all but the last one sampled."""
        return self.spec.num_prompt_tokens + self.num_output_tokens - 1

    @property
    def next_position(self) -> int:
        """The index of the token that the next decode step feeds."""
        return self.spec.num_prompt_tokens + self.num_issued_tokens - 1

    @property
    def is_fully_issued(self) -> bool:
        """Whether the steps in flight already reach its largest number of tokens."""
        return self.num_issued_tokens >= self.spec.max_tokens

    def append(self, token: int) -> FinishReason | None:
        """Count one sampled token; returns why the sequence ends with it, or None."""
        self.num_output_tokens += 1
        if token in self.spec.stop_token_ids and self.num_output_tokens > self.spec.min_tokens:
            return FinishReason.STOP
        if self.num_output_tokens == self.spec.max_tokens:
            return FinishReason.LENGTH
        return None

"""Decoding on in the prefill layout where the phase could change: what is asked, and for how long the answer holds.

When no prompt is left, or there is no room for one, the decode layout costs a transition, or two. Where the batch is
large it may even be the slower one. So whoever knows what layouts cost may have the sequences decode where they are,
and change only when few of them are left, or never::

    live   160 ---------------------- 24 -------- 0      no prompt is left
    layout     prefill layout           | decode layout
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from seesaw_ds.sched.sequence import Sequence, SequenceState

# A stay is thought over when this part of its sequences has ended: one in so many.
_PARTS_BETWEEN_QUESTIONS = 4


class LiveSequence(NamedTuple):
    """A sequence that has its first token: tokens of KV that it has, and the most that it may still produce."""

    num_stored_tokens: int
    num_remaining_tokens: int


class LiveBatch(NamedTuple):
    """All sequences that are to decode when prefill cannot go on.

    `mean_tokens` is the mean number of tokens after which a sequence stops by itself, as known now, infinite if none
    does. `num_prompts_left` wait for room, so that the prefill layout will be needed again; maybe more are to come.
    `preloaded` is the share of the decode layout's weights that have come early, or are on their way.
    """

    on_gpu: tuple[LiveSequence, ...]
    on_host: tuple[LiveSequence, ...]
    mean_tokens: float
    num_prompts_left: int
    preloaded: float = 0.0

    @property
    def num_sequences(self) -> int:
        """On the GPU and on the host."""
        return len(self.on_gpu) + len(self.on_host)


def live_batch(sequences: Iterable[Sequence], mean_tokens: float, num_prompts_left: int, preloaded: float) -> LiveBatch:
    """What decodes of `sequences`, which have all their prompts issued: all that have not ended or are about to."""
    on_gpu: list[LiveSequence] = []
    on_host: list[LiveSequence] = []
    for seq in sequences:
        if seq.state is not SequenceState.ENDED and not seq.is_fully_issued:
            is_on_gpu = seq.slot is not None and seq.state is not SequenceState.EVICTING
            live = LiveSequence(seq.next_position, seq.spec.max_tokens - seq.num_issued_tokens)
            (on_gpu if is_on_gpu else on_host).append(live)
    return LiveBatch(tuple(on_gpu), tuple(on_host), mean_tokens, num_prompts_left, preloaded)


class LayoutChooser(Protocol):
    """Knows what decoding costs in either layout, and a transition between them."""

    def num_left_to_switch(self, batch: LiveBatch) -> int | None:
        """None: take the decode layout now. Else how many sequences are to be left by then, fewer than there are."""


class Staying:
    """Whether the sequences of a prefill phase decode on in its layout. `chooser` None: they never do.

    `num_left` is how many were left when the last stay ended with a change of layout, 0 when none did, and None when
    there was no stay.
    """

    def __init__(self, chooser: LayoutChooser | None) -> None:
        self._chooser = chooser
        self._num_ends_to_go = 0
        self._has_prompts_left = False
        self._has_stayed = False
        self.num_left: int | None = None

    @property
    def is_possible(self) -> bool:
        """Whether there is anybody to ask."""
        return self._chooser is not None

    @property
    def has_stayed(self) -> bool:
        """Whether there was a stay in this phase."""
        return self._has_stayed

    def is_on(self, has_prompts_left: bool) -> bool:
        """Whether the last answer was to stay, and still holds: the question is another one without prompts."""
        return self._num_ends_to_go > 0 and has_prompts_left == self._has_prompts_left

    def begins(self, batch: LiveBatch) -> bool:
        """Ask whether to stay; True begins a stay, or goes on with one."""
        num_left = None if self._chooser is None else self._chooser.num_left_to_switch(batch)
        if num_left is None:
            if self._has_stayed:
                self.num_left = batch.num_sequences
            return False
        num_sequences = batch.num_sequences
        assert 0 <= num_left < num_sequences
        self._num_ends_to_go = min(num_sequences - num_left, -(-num_sequences // _PARTS_BETWEEN_QUESTIONS))
        self._has_prompts_left = batch.num_prompts_left > 0
        self._has_stayed = True
        self.num_left = 0
        return True

    def count_end(self) -> None:
        """A sequence has ended."""
        self._num_ends_to_go -= 1

    def start_phase(self) -> None:
        """The phase has changed."""
        self._num_ends_to_go = 0
        self._has_stayed = False

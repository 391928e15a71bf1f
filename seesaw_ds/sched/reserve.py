"""The rule that keeps enough KV blocks free for somebody to finish, without reserving everybody's worst case.

Let sequence i hold b_i blocks (on the GPU or on the host; those in transit count once) and never need more than
m_i, and need_i = m_i - b_i. F is what no live sequence holds, in both pools together. The rule is

    F >= max(need_i) + max(b_i)        over the live sequences.

A prompt is admitted, and a running sequence takes one more block, only if the rule holds afterwards. When it
would not, one running sequence is designated: it alone may take blocks, until it ends or the rule allows others
to grow again. Every m_i fits each pool alone (checked when a sequence is added), so a lone sequence is always
admitted.

Nobody waits for ever. Transfers in flight settle by themselves, so suppose none is left. The designated sequence
d is running, and since the rule held when it was designated and only d grew since, before each of its growths
F > max(b_i). If the GPU has a free block, d takes it. If not, all of F is host room, which any victim's blocks
fit into: somebody else on the GPU is evicted and d goes on. If nobody else is there, d holds the whole GPU pool,
so b_d >= m_d and it needs no block. d is never a victim, so it ends, at the latest at its m_i; then all its
blocks return, F is at least what it was at the designation, and the rule holds again. The same argument gives a
block to any sequence whose growth the rule allows.
"""

from __future__ import annotations


class Reserve:
    """Counts the blocks that live sequences hold and may need, and decides who may take one.

    `num_blocks` is the size of the GPU and host pools together.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.designated: int | None = None
        self._held_at_designation = 0
        self._held: dict[int, int] = {}
        self._peak: dict[int, int] = {}
        self._num_held = 0
        # Upper bounds of the two maxima. They are exact unless `_is_stale`: whoever had a maximum left or grew.
        self._max_need = 0
        self._max_held = 0
        self._is_stale = False

    @property
    def num_free(self) -> int:
        """Blocks that no live sequence holds: F."""
        return self.num_blocks - self._num_held

    @property
    def num_kept_free(self) -> int:
        """The right side of the rule, or somewhat more: blocks that sequences may not take."""
        return self._max_need + self._max_held

    def admits(self, held: int, peak: int, soon_free: int = 0) -> bool:
        """Whether the rule holds once a new sequence holds `held` blocks and may grow to `peak`.

        `soon_free` blocks are held by sequences that are about to end.
        """
        return self._holds(self.num_free + soon_free - held, peak - held, held)

    def add(self, seq_id: int, held: int, peak: int) -> None:
        """Start counting a sequence that `admits` accepted."""
        assert seq_id not in self._held
        self._held[seq_id] = held
        self._peak[seq_id] = peak
        self._num_held += held
        self._max_need = max(self._max_need, peak - held)
        self._max_held = max(self._max_held, held)
        self.designated = None

    def allows_growth(self, seq_id: int) -> bool:
        """Whether `seq_id` may take one block now."""
        if self._holds(self.num_free - 1, 0, self._held[seq_id] + 1):
            self.designated = None
            return True
        return seq_id == self.designated

    def designate(self, seq_id: int) -> None:
        """Let `seq_id`, a running sequence, grow although the rule will not hold. Only when nobody is designated."""
        assert self.designated is None
        self.designated = seq_id
        self._held_at_designation = self._held[seq_id]

    def grow(self, seq_id: int) -> None:
        """Count one more block, after `allows_growth`."""
        held = self._held[seq_id] + 1
        assert held <= self._peak[seq_id], f"sequence {seq_id} outgrew its {self._peak[seq_id]} blocks"
        self._is_stale |= self._peak[seq_id] - held + 1 >= self._max_need
        self._max_held = max(self._max_held, held)
        self._held[seq_id] = held
        self._num_held += 1

    def remove(self, seq_id: int) -> None:
        """Stop counting a sequence that ended: its blocks are free now, or as soon as nothing in flight uses them."""
        held = self._held.pop(seq_id)
        need = self._peak.pop(seq_id) - held
        self._num_held -= held
        self._is_stale |= held >= self._max_held or need >= self._max_need
        if seq_id == self.designated:
            self.designated = None

    def _holds(self, num_free: int, extra_need: int, extra_held: int) -> bool:
        """The rule, for `num_free` blocks and one more sequence with the extra need and holding."""
        if num_free >= max(self._max_need, extra_need) + max(self._max_held, extra_held):
            return True
        if not self._is_stale:
            return False
        self._max_need = max((self._peak[i] - held for i, held in self._held.items()), default=0)
        self._max_held = max(self._held.values(), default=0)
        self._is_stale = False
        return num_free >= max(self._max_need, extra_need) + max(self._max_held, extra_held)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the counts agree and the rule holds, the designated's growth undone."""
        if sum(self._held.values()) != self._num_held:
            raise RuntimeError(f"reserve: sum of held blocks {sum(self._held.values())} != count {self._num_held}")
        held = dict(self._held)
        if self.designated is not None:
            held[self.designated] = self._held_at_designation
        num_free = self.num_blocks - sum(held.values())
        max_need = max((self._peak[i] - blocks for i, blocks in held.items()), default=0)
        max_held = max(held.values(), default=0)
        if num_free < max_need + max_held:
            raise RuntimeError(f"reserve: {num_free} free blocks < {max_need} largest need + {max_held} largest held")

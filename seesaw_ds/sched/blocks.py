"""Pools of equal blocks, handed out as plain integers."""

from __future__ import annotations

from collections.abc import Iterable


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks of `block_size` tokens hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """Block ids ``0 .. num_blocks``, each free or used; taking or returning one is O(1).

    The block freed last is handed out first. `name` appears in error texts. `most_used` is the most that were used at
    once so far.
    """

    def __init__(self, name: str, num_blocks: int) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.most_used = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks handed out and not returned."""
        return self.num_blocks - len(self._free)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take `num_blocks` blocks. Raises RuntimeError, taking none, when fewer are free."""
        if not 0 <= num_blocks <= len(self._free):
            raise RuntimeError(
                f"{self.name} pool: num_blocks={num_blocks} asked for, "
                f"but {self.num_free} of {self.num_blocks} are free"
            )
        first = len(self._free) - num_blocks
        ids = tuple(reversed(self._free[first:]))
        del self._free[first:]
        for block_id in ids:
            self._is_used[block_id] = 1
        self.most_used = max(self.most_used, self.num_used)
        return ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Return blocks. Freeing a block that is not used is an assertion error."""
        for block_id in block_ids:
            assert self._is_used[block_id], f"{self.name} pool: block {block_id} is freed twice"
            self._is_used[block_id] = 0
            self._free.append(block_id)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block is either in the free list, once, or marked as used."""
        num_marked = sum(self._is_used)
        num_free = len(set(self._free))
        if num_free != len(self._free) or num_free + num_marked != self.num_blocks:
            raise RuntimeError(
                f"{self.name} pool: {len(self._free)} in the free list ({num_free} different) "
                f"+ {num_marked} used != {self.num_blocks} blocks"
            )
        marked_and_free = [block_id for block_id in self._free if self._is_used[block_id]]
        if marked_and_free:
            raise RuntimeError(f"{self.name} pool: blocks {marked_and_free} are free and used at once")

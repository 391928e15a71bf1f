"""Block pools: every block is handed out once, comes back once, and the counts agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw_ds.sched.blocks import BlockPool, blocks_for
from seesaw_ds.sched.reserve import Reserve


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "expected"), [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (5, 1, 5)]
)
def test_blocks_for(num_tokens: int, block_size: int, expected: int) -> None:
    assert blocks_for(num_tokens, block_size) == expected


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 20), st.lists(st.integers(0, 8), max_size=40))
def test_blocks_in_use_are_distinct(num_blocks: int, requests: list[int]) -> None:
    pool = BlockPool("test", num_blocks)
    held: list[tuple[int, ...]] = []
    most_used = 0
    for number in requests:
        if number > pool.num_free:
            with pytest.raises(RuntimeError, match=f"num_blocks={number} asked for"):
                pool.allocate(number)
            if held:
                pool.free(held.pop(0))
        else:
            held.append(pool.allocate(number))
        used = [block_id for ids in held for block_id in ids]
        assert len(set(used)) == len(used) == pool.num_used == num_blocks - pool.num_free
        assert all(0 <= block_id < num_blocks for block_id in used)
        most_used = max(most_used, pool.num_used)
        assert pool.most_used == most_used
        pool.check_integrity()


def test_double_free_is_our_bug() -> None:
    pool = BlockPool("host", 4)
    ids = pool.allocate(2)
    pool.free(ids)
    with pytest.raises(AssertionError, match=r"host pool: block .* is freed twice"):
        pool.free(ids[:1])


def test_check_integrity_shows_both_sides() -> None:
    pool = BlockPool("host", 4)
    pool.allocate(1)
    pool._free.pop()
    with pytest.raises(RuntimeError, match=r"2 in the free list \(2 different\) \+ 1 used != 4 blocks"):
        pool.check_integrity()


def test_check_integrity_finds_a_block_that_is_free_and_used() -> None:
    pool = BlockPool("host", 2)
    (taken,) = pool.allocate(1)
    pool._free = [taken]
    with pytest.raises(RuntimeError, match="free and used at once"):
        pool.check_integrity()


class TestReserve:
    def test_admits_only_while_the_rule_holds(self) -> None:
        reserve = Reserve(10)
        assert reserve.admits(held=2, peak=5)  # 8 free >= 3 + 2
        reserve.add(0, held=2, peak=5)
        assert reserve.admits(held=2, peak=5)  # 6 free >= 3 + 2
        reserve.add(1, held=2, peak=5)
        assert not reserve.admits(held=2, peak=5)  # 4 free < 3 + 2
        assert reserve.admits(held=2, peak=5, soon_free=1)
        assert reserve.admits(held=1, peak=1)  # 5 free >= 3 + 2
        reserve.check_integrity()

    def test_designated_grows_alone_until_the_rule_holds(self) -> None:
        reserve = Reserve(10)
        reserve.add(0, held=2, peak=5)
        reserve.add(1, held=2, peak=5)
        assert not reserve.allows_growth(1)  # 5 free < 3 + 3
        reserve.designate(0)
        assert not reserve.allows_growth(1)
        for _ in range(3):
            assert reserve.allows_growth(0)
            reserve.grow(0)
            reserve.check_integrity()
        assert not reserve.allows_growth(1)
        reserve.remove(0)
        assert reserve.designated is None
        assert reserve.allows_growth(1)
        reserve.check_integrity()

    def test_designation_ends_when_the_rule_allows_others(self) -> None:
        reserve = Reserve(10)
        reserve.add(0, held=2, peak=5)
        reserve.add(1, held=2, peak=5)
        reserve.add(2, held=1, peak=1)
        assert not reserve.allows_growth(1)
        reserve.designate(2)
        reserve.remove(0)
        assert reserve.designated == 2
        assert reserve.allows_growth(1)  # 6 free >= 3 + 3
        assert reserve.designated is None

    def test_maxima_follow_when_the_largest_leaves(self) -> None:
        reserve = Reserve(20)
        reserve.add(0, held=6, peak=10)
        reserve.add(1, held=1, peak=2)
        assert not reserve.admits(held=6, peak=10)
        reserve.remove(0)
        assert reserve.admits(held=6, peak=10)

    def test_check_integrity_finds_a_broken_rule(self) -> None:
        reserve = Reserve(4)
        reserve.add(0, held=2, peak=4)
        reserve.add(1, held=2, peak=2)
        with pytest.raises(RuntimeError, match="0 free blocks < 2 largest need"):
            reserve.check_integrity()

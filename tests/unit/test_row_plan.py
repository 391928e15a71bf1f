"""Plans of `RowAttention`, walked as its kernel walks them: every page is read once, and all parts come together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw_ds.model.attention import row_plan
from seesaw_ds.model.attention.row_plan import PAGE, WARPS, RowPlan, packed_size, plan_rows

FIRST_BLOCK = 7


def plan_of(kv_lens: list[int], num_kv_heads: int, num_ctas: int) -> RowPlan:
    """With blocks that count up from FIRST_BLOCK, row after row."""
    num_pages = [-(-kv_len // PAGE) for kv_len in kv_lens]
    tables = np.zeros((len(kv_lens), max(num_pages, default=0) + 1), np.int32)
    first = FIRST_BLOCK
    for row, count in enumerate(num_pages):
        tables[row, :count] = np.arange(first, first + count)
        first += count
    return plan_rows(np.array(kv_lens, np.int32), tables, num_kv_heads, num_ctas)


def check(plan: RowPlan, kv_lens: list[int], num_kv_heads: int) -> None:
    num_pages = [-(-kv_len // PAGE) for kv_len in kv_lens]
    num_read = [np.zeros((num_kv_heads, count), int) for count in num_pages]
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of units that several CTAs have: (CTA, its side)
    for cta, shares in enumerate(plan.shares):
        pieces = []  # (unit, has the first page, has the last) of units that a warp has a part of
        for warp, (row, head, page, num_left, *rest) in enumerate(shares.tolist()):
            if not num_left:
                assert not shares[warp:].any()
                break
            first = sum(num_pages[:row])
            ids = [FIRST_BLOCK + first + page, FIRST_BLOCK + first + page + 1]
            assert rest[:3] == [first, kv_lens[row], ids[0]]
            assert rest[3] == ids[1] or page + 1 == num_pages[row]
            while num_left:
                end = min(num_pages[row], page + num_left)
                num_read[row][head, page:end] += 1
                if (page, end) != (0, num_pages[row]):
                    pieces.append(((row, head), page == 0, end == num_pages[row]))
                num_left -= end - page
                page = 0
                row, head = (row, head + 1) if head + 1 < num_kv_heads else (row + 1, 0)
        for unit in dict.fromkeys(piece[0] for piece in pieces):
            begins = any(begins for other, begins, _ in pieces if other == unit)
            ends = any(ends for other, _, ends in pieces if other == unit)
            if not (begins and ends):
                parts.setdefault(unit, []).append((cta, int(begins)))
    for (row, head), sides in parts.items():
        ctas = [cta for cta, _ in sides]
        assert ctas == list(range(ctas[0], ctas[0] + len(ctas)))
        assert [side for _, side in sides] == [1] + [0] * (len(ctas) - 1)
        assert plan.splits[ctas[0], 2] == len(ctas)
        for cta in ctas[1:]:
            assert plan.splits[cta].tolist()[:2] == [ctas[0], len(ctas)]
            assert plan.splits[cta, 3] == row * num_kv_heads + head
    assert all((counts == 1).all() for counts in num_read)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize(
    "kv_lens",
    [[1], [16], [17], [8192], [1000, 2], [5, 6, 7, 8], [415] * 100, [3070] * 36, [1] * 1024, [131072]],
    ids=lambda kv_lens: f"{len(kv_lens)}x{kv_lens[0]}",
)
def test_every_page_is_read_once(kv_lens: list[int], num_kv_heads: int) -> None:
    check(plan_of(kv_lens, num_kv_heads, 132), kv_lens, num_kv_heads)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.integers(1, 8), st.sampled_from([1, 3, 132]))
def test_every_page_is_read_once_with_any_lengths(kv_lens: list[int], num_kv_heads: int, num_ctas: int) -> None:
    check(plan_of(kv_lens, num_kv_heads, num_ctas), kv_lens, num_kv_heads)


@pytest.mark.parametrize("kv_lens", [[3070] * 36, [415] * 100, list(range(200, 4000, 37))], ids=len)
def test_shares_are_nearly_equal(kv_lens: list[int]) -> None:
    counts = plan_of(kv_lens, 8, 132).shares[:, :, 3]
    assert counts.sum(axis=1).max() <= (1 + 2 * row_plan._SLACK) * counts.sum() / 132 + 1
    assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 1


def test_short_rows_of_few_units_are_not_cut_between_ctas() -> None:
    plan = plan_of([400] * 16, 2, 132)
    assert plan.splits[:32, 1:3].tolist() == [[1, 1]] * 32
    assert (plan.shares[:32, :, 3].sum(axis=1) == 25).all()
    assert not plan.shares[32:].any()


def test_a_packed_plan_has_its_parts_at_the_same_places_for_any_number_of_rows() -> None:
    for kv_lens in ([], [20, 40], [100] * 5):
        plan = plan_of(kv_lens, 2, 3)
        packed = plan.packed(max_num_rows=5)
        assert len(packed) == packed_size(3, 5, len(plan.blocks))
        shares, splits, rows, blocks = np.split(packed, np.cumsum([3 * WARPS * 8, 3 * 4, 2 * 7]))
        assert (shares == plan.shares.ravel()).all()
        assert (splits == plan.splits.ravel()).all()
        rows = rows.reshape(7, 2)
        assert (rows[: len(kv_lens), 1] == kv_lens).all()
        assert rows[len(kv_lens)].tolist() == [len(plan.blocks), 0]
        assert (blocks[: len(plan.blocks)] == plan.blocks).all()

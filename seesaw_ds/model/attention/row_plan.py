"""Who reads what in `RowAttention`: the pages of all decode rows, cut into equal shares for the warps of a device.

Letters: B rows, K local KV heads, C thread blocks (CTAs), one a multiprocessor, W warps of each. A page is the part of
a block that one KV head has, 16 tokens of a layer. A unit is a (row, KV head); all units' pages are laid end to end,
row by row and head by head in a row, and cut::

    units     | row 0 head 0 | row 0 head 1 | row 1 head 0 ....
    CTAs      |--------- 0 --------|--------- 1 --------|--- ..
    warps     |  0 |  1 |  2 |  3  |  0 |  1 |  2 |  3  | ..

so that each reads as many bytes as the others, whatever the rows' lengths. A unit that is cut costs its warps and CTAs
some microseconds at the end, for putting their parts together; hence where cuts are not equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAGE = 16
WARPS = 8
# What the kernel may read, and not use, past the last row's blocks.
_SPARE_BLOCKS = 64
# Fewer pages than that are not worth another warp: putting together takes longer than reading them.
_LEAST_PAGES_PER_WARP = 2
# A unit of up to so many pages has a CTA for itself, when there are enough of them.
_MOST_PAGES_OF_ONE_CTA = 64
# By what part of a CTA's share a cut may move to where a unit begins.
_SLACK = 0.15


@dataclass(frozen=True)
class RowPlan:
    """int32 arrays, as row_attention.cu reads them.

    shares  (C, W, 8) row, KV head and page of the row where a warp begins; how many pages; the row's first place in
                      `blocks` and its tokens; the first two blocks
    splits  (C, 4)    of the units that a CTA begins and ends in: the first CTA that has a part of the former and how
                      many have, how many have of the latter, and the former's number
    rows    (B, 2)    first place in `blocks`, tokens
    blocks  (sum of the rows' blocks,)

    CTAs and warps with nothing to do have zeros.
    """

    shares: np.ndarray
    splits: np.ndarray
    rows: np.ndarray
    blocks: np.ndarray

    def packed(self, max_num_rows: int) -> np.ndarray:
        """All arrays in one, with room for `max_num_rows` so that the places of each are the same in every plan."""
        head = self.shares.size + self.splits.size
        num_rows = len(self.rows)
        packed = np.zeros(packed_size(len(self.splits), max_num_rows, len(self.blocks)), np.int32)
        packed[: self.shares.size] = self.shares.ravel()
        packed[self.shares.size : head] = self.splits.ravel()
        packed[head : head + 2 * num_rows] = self.rows.ravel()
        packed[head + 2 * num_rows] = len(self.blocks)
        blocks = head + 2 * (max_num_rows + 2)
        packed[blocks : blocks + len(self.blocks)] = self.blocks
        return packed


def packed_size(num_ctas: int, max_num_rows: int, max_num_blocks: int) -> int:
    return num_ctas * (WARPS * 8 + 4) + 2 * (max_num_rows + 2) + max_num_blocks + _SPARE_BLOCKS


def plan_rows(kv_lens: np.ndarray, block_tables: np.ndarray, num_kv_heads: int, num_ctas: int) -> RowPlan:
    """Plan for rows of `kv_lens` tokens (B,), each 1 or more, with `block_tables` (B, any), as in `AttentionBatch`."""
    shares = np.zeros((num_ctas, WARPS, 8), np.int32)
    splits = np.zeros((num_ctas, 4), np.int32)
    if len(kv_lens) == 0:
        return RowPlan(shares, splits, np.zeros((0, 2), np.int32), np.zeros(0, np.int32))
    num_pages = -(-kv_lens.astype(np.int64) // PAGE)
    first_blocks = np.zeros(len(num_pages) + 1, np.int64)
    np.cumsum(num_pages, out=first_blocks[1:])
    blocks = block_tables[np.arange(block_tables.shape[1], dtype=np.int32) < num_pages[:, None]]
    places = _Places(num_pages, first_blocks * num_kv_heads)

    cuts = _cut(places, num_kv_heads, num_ctas)
    num_cut = len(cuts) - 1
    sizes = np.diff(cuts)[:, None]
    num_warps = np.minimum(WARPS, -(-sizes // _LEAST_PAGES_PER_WARP))
    bounds = cuts[:-1, None] + np.minimum(np.arange(WARPS + 1), num_warps) * sizes // num_warps
    counts = np.diff(bounds)
    is_busy = counts > 0
    row, head, page = places.find(bounds[:, :-1][is_busy])
    first = first_blocks[row] + page
    second = np.minimum(first + 1, len(blocks) - 1)
    columns = (row, head, page, counts[is_busy], first_blocks[row], kv_lens[row], blocks[first], blocks[second])
    shares[:num_cut][is_busy] = np.stack(columns, axis=1)

    first_cta, last_cta = places.ctas_of_unit_at(cuts[:-1], cuts)
    splits[:num_cut, 0], splits[:num_cut, 1] = first_cta, last_cta - first_cta + 1
    first_cta, last_cta = places.ctas_of_unit_at(cuts[1:] - 1, cuts)
    splits[:num_cut, 2] = last_cta - first_cta + 1
    splits[:num_cut, 3] = shares[:num_cut, 0, 0] * num_kv_heads + shares[:num_cut, 0, 1]
    rows = np.stack((first_blocks[:-1], kv_lens), axis=1).astype(np.int32)
    return RowPlan(shares, splits, rows, blocks.astype(np.int32, copy=False))


@dataclass(frozen=True)
class _Places:
    """Pages by their number in the order of all units: `num_pages` (B,) of a unit in each row, `starts` (B + 1,)."""

    num_pages: np.ndarray
    starts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    def find(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, KV head, page of that unit) of pages."""
        row = np.searchsorted(self.starts, at, side="right") - 1
        rest = at - self.starts[row]
        return row, rest // self.num_pages[row], rest % self.num_pages[row]

    def ctas_of_unit_at(self, at: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last CTA with a part of the unit that has page `at`."""
        row, _, page = self.find(at)
        begin = at - page
        end = begin + self.num_pages[row] - 1
        return np.searchsorted(cuts, begin, side="right") - 1, np.searchsorted(cuts, end, side="right") - 1


def _cut(places: _Places, num_kv_heads: int, num_ctas: int) -> np.ndarray:
    """Where each CTA's share begins, and the end of the last."""
    num_pages, total = places.num_pages, places.total
    if len(num_pages) * num_kv_heads <= num_ctas and num_pages.max() <= _MOST_PAGES_OF_ONE_CTA:
        starts = places.starts[:-1, None] + np.arange(num_kv_heads) * num_pages[:, None]
        return np.append(starts.ravel(), total)
    num_cut = min(num_ctas, -(-total // (WARPS * _LEAST_PAGES_PER_WARP)))
    cuts = np.arange(num_cut + 1) * total // num_cut
    inner = cuts[1:-1]
    row, _, back = places.find(inner)
    ahead = num_pages[row] - back
    slack = _SLACK * total / num_cut
    cuts[1:-1] += np.where(np.minimum(back, ahead) > slack, 0, np.where(back <= ahead, -back, ahead))
    return cuts

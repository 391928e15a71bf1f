"""What tools/profile_rows.py times: rows of a shape, with blocks that no two of them share."""

from __future__ import annotations

import pytest

from profile_rows import make_batch, parse_shape
from seesaw_ds.errors import UserError


def test_a_shape_is_rows_context_and_heads() -> None:
    assert parse_shape("36x3070x4") == (36, 3070, 4)
    for text in ("36x3070", "36x0x4", "36x3070x4x8", "axbxc"):
        with pytest.raises(UserError, match="must be ROWSxCONTEXTxKVHEADS"):
            parse_shape(text)


def test_rows_have_blocks_of_their_own() -> None:
    batch = make_batch(36, 3070, num_blocks=36 * 192 * 2)
    assert batch.block_tables.shape == (36, 192)
    assert len(set(batch.block_tables.ravel().tolist())) == 36 * 192
    assert batch.kv_lens.tolist() == [3070] * 36
    assert batch.num_decode_rows == 36

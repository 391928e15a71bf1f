"""How tensors are cut for the all-reduce through host memory, and that slots and flags have room for every cut."""

from __future__ import annotations

import pytest

from seesaw_ds.parallel.host_all_reduce import (
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    chunk_bytes_for,
    max_tensor_bytes,
    required_bytes,
    wave_size,
)


@pytest.mark.parametrize(
    ("num_bytes", "num_writers", "expected"),
    [
        (16, 32, 4 << 10),
        (128 << 10, 32, 4 << 10),
        ((128 << 10) + 16, 32, 8 << 10),
        (256 << 10, 32, 8 << 10),
        (256 << 10, 16, 16 << 10),
        (512 << 10, 32, 16 << 10),
        ((512 << 10) + 16, 32, 8 << 10),
        (576 << 10, 48, 16 << 10),
        (8 << 20, 32, 8 << 10),
    ],
)
def test_small_tensors_are_one_chunk_a_writer_and_large_ones_several(num_bytes, num_writers, expected):
    assert chunk_bytes_for(num_bytes, num_writers) == expected


@pytest.mark.parametrize("num_writers", [1, 3, 8, 32, 64])
def test_chunks_are_powers_of_two_within_limits_and_leave_no_writer_idle_for_long(num_writers):
    for num_bytes in range(16, 3 << 20, 16 * 977):
        chunk = chunk_bytes_for(num_bytes, num_writers)
        assert chunk & (chunk - 1) == 0
        assert MIN_CHUNK_BYTES <= chunk <= MAX_CHUNK_BYTES
        num_chunks = -(-num_bytes // chunk)
        assert num_chunks <= num_writers or num_bytes > num_writers * MAX_CHUNK_BYTES
        assert 2 * num_chunks > num_writers or chunk == MIN_CHUNK_BYTES


@pytest.mark.parametrize("num_ranks", [2, 4, 6, 8])
def test_every_rank_reads_8_mib_at_most_and_the_mapping_holds_two_halves_and_a_flag_for_each_chunk(num_ranks):
    largest = max_tensor_bytes(num_ranks)
    assert largest % MIN_CHUNK_BYTES == 0
    assert (8 << 20) - largest * (num_ranks - 1) in range(MIN_CHUNK_BYTES * (num_ranks - 1))
    flags_bytes = largest // MIN_CHUNK_BYTES * 64
    assert required_bytes(num_ranks) == num_ranks * (2 * largest + flags_bytes)


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(16, 0), ((256 << 10) - 16, 0), (256 << 10, 8), (512 << 10, 4), (8 << 20, 8)]
)
def test_writers_of_large_tensors_begin_in_waves_of_64_kib(num_bytes, expected):
    assert wave_size(num_bytes, chunk_bytes_for(num_bytes, 32)) == expected

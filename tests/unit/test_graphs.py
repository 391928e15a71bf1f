"""The batch sizes of CUDA graphs."""

from __future__ import annotations

import pytest

from seesaw_ds.worker.graphs import graph_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 60, 64, 120, 128, 256, 257, 300, 800, 1024])
def test_sizes_rise_to_the_most_and_pad_few_rows(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert 128 not in sizes[:-1]
    for num_rows in range(9, most + 1):
        padding = next(size for size in sizes if size >= num_rows) - num_rows
        most_padding = 3 if num_rows <= 64 else 7 if num_rows <= 120 else 23 if num_rows <= 144 else num_rows // 4
        assert padding <= most_padding, num_rows


def test_few_graphs_are_captured_however_many_sequences_may_run():
    assert len(graph_sizes(64)) <= 18
    assert len(graph_sizes(256)) <= 33
    assert len(graph_sizes(1024)) <= 46

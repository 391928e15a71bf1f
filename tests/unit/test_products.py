"""Which algorithm a linear product is given, and what of it torch keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from seesaw_ds.model.ops import products
from seesaw_ds.model.ops.products import TunedProducts, faster


@pytest.mark.parametrize(
    ("times", "usual", "expected"),
    [
        ({}, 1.0, None),
        ({0: 1.0, 3: 0.9}, 1.0, 3),
        ({0: 0.7, 3: 0.9}, 1.0, 0),
        ({0: 1.0, 3: 1.1}, 1.0, None),
        ({0: 0.99}, 1.0, None),  # within what timings differ by
    ],
)
def test_another_algorithm_has_to_be_faster_by_more_than_timings_differ(times, usual, expected):
    assert faster(times, usual) == expected


@pytest.mark.parametrize("has_bias", [False, True])
def test_sizes_that_were_not_timed_are_torchs(has_bias):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    bias = torch.randn(5) if has_bias else None
    linear = TunedProducts()
    linear.tune([(3, weight)])  # float32: not cuBLASLt's here
    assert linear.get(3, weight) is None
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


class Clock:
    """Torch's products take 9 us a row."""

    def time(self, work: Callable[[], torch.Tensor], count: int) -> float:
        return 9e-3 * len(work())


def test_each_size_is_timed_once(monkeypatch):
    monkeypatch.setattr(products, "proposed_products", lambda num_rows, weight: [])
    monkeypatch.setattr(products, "_Flush", lambda device: Clock())
    weights = [torch.randn(5, 8, dtype=torch.bfloat16) for _ in range(3)]
    sizes = [(rows, weight) for rows in (1, 2, products.MOST_ROWS + 1) for weight in weights]
    times = TunedProducts().tune(sizes)
    assert times.usual == times.tuned == pytest.approx(27e-3)

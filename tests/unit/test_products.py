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
    linear.tune([3], [weight])  # float32: not cuBLASLt's here
    assert linear.get(3, weight) is None
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


class OwnProduct:
    """Takes up to two rows."""

    def multiplies(self, num_rows: int, weight: torch.Tensor) -> bool:
        return num_rows <= 2

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T


class Clock:
    """A product of torch's takes 9 us; our own `own_us`."""

    def __init__(self, own_us: float) -> None:
        self._own_us = own_us

    def time(self, work: Callable[[], object], count: int) -> float:
        work()
        is_own = getattr(work, "func", None) != F.linear
        return (self._own_us if is_own else 9.0) / 1e3


@pytest.mark.parametrize(
    ("own_us", "num_rows", "is_own"),
    [(8.0, 1, True), (13.9, 2, True), (14.1, 2, False), (8.0, 3, False)],
)
def test_our_own_kernel_is_chosen_where_it_is_as_fast_but_for_its_beginning(monkeypatch, own_us, num_rows, is_own):
    monkeypatch.setattr(products, "proposed_products", lambda num_rows, weight: [])
    monkeypatch.setattr(products, "_Flush", lambda device: Clock(own_us))
    weight, own, linear = torch.randn(5, 8, dtype=torch.bfloat16), OwnProduct(), TunedProducts()
    times = linear.tune([num_rows], [weight], own)
    assert (linear.get(num_rows, weight) == own.multiply) is is_own
    assert times.usual == pytest.approx(9e-3)
    assert times.tuned == pytest.approx((own_us - 5 if is_own else 9.0) / 1e3)

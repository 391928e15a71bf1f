"""Tensors cut out of a scratch memory do not overlap, are aligned, and must fit."""

from __future__ import annotations

import pytest
import torch

from seesaw_ds.parallel.scratch import Cutter, padded


def test_tensors_lie_behind_each_other_and_keep_their_values():
    cutter = Cutter(torch.empty(padded(40) + padded(14) + 16, dtype=torch.uint8))
    first = cutter.take((5, 2), torch.int32).fill_(7)
    second = cutter.take((7,), torch.bfloat16).fill_(3)
    third = cutter.take((2,), torch.int64).fill_(-1)
    assert (first == 7).all()
    assert (second == 3).all()
    assert (third == -1).all()
    starts = [tensor.data_ptr() - first.data_ptr() for tensor in (first, second, third)]
    assert starts == [0, padded(40), padded(40) + padded(14)]
    assert all(tensor.is_contiguous() for tensor in (first, second, third))


def test_a_tensor_may_end_with_the_memory_but_not_behind_it():
    Cutter(torch.empty(64, dtype=torch.uint8)).take((64,), torch.uint8)
    with pytest.raises(AssertionError):
        Cutter(torch.empty(63, dtype=torch.uint8)).take((64,), torch.uint8)

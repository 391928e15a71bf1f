"""Which streams carry the transfers through host memory: those that do not share a hardware queue."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from seesaw_ds.parallel.host_transport import pick_apart


def pick(num_queues: int, first: int) -> list[int]:
    """Choose among streams that are dealt to queues in turn; the current stream has queue 0."""
    numbers = itertools.count(first)

    def holds_up(stream: int, chosen: Sequence[int]) -> bool:
        return stream % num_queues in {0, *(other % num_queues for other in chosen)}

    return pick_apart(lambda: next(numbers), holds_up, num_wanted=2)


def test_the_first_two_streams_do_when_they_are_apart(caplog):
    with caplog.at_level(logging.INFO):
        assert pick(8, first=1) == [1, 2]
    assert not caplog.records


def test_streams_that_hold_up_the_current_one_or_each_other_are_passed_over(caplog):
    with caplog.at_level(logging.INFO):
        assert pick(3, first=3) == [4, 5]
        assert pick(8, first=7) == [7, 9]
    assert "passed over 1 stream(s)" in caplog.text


def test_too_few_queues_are_warned_of_and_still_give_two_lanes(caplog):
    assert pick(2, first=2) == [3, 2]
    assert pick(1, first=5) == [5, 6]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32" in caplog.text

"""How replicas share the input."""

from __future__ import annotations

import heapq

import pytest

from seesaw_ds.engine.input_sharing import InputSharing
from seesaw_ds.requests import SamplingParams, SequenceRequest


def request(seq_id: int, num_tokens: int) -> SequenceRequest:
    return SequenceRequest(seq_id, tuple(range(num_tokens - 1)), SamplingParams(max_tokens=1), seed=0)


def share_out(num_requests: int, speeds: list[int], appetite: int, starts: list[float]) -> list[tuple[float, int]]:
    """(end, sequences) of each replica, which computes `speeds` tokens a second one sequence after the other.

    It asks for `appetite` sequences when it has fewer waiting, and again as soon as it has an answer.
    """
    sharing = InputSharing(len(speeds))
    left = [request(i, 10 + i * 7 % 20) for i in range(num_requests)]
    queues: list[list[SequenceRequest]] = [[] for _ in speeds]
    counts, ends, asks = [0] * len(speeds), [0.0] * len(speeds), [False] * len(speeds)
    events = [(start, replica, -1) for replica, start in enumerate(starts)]
    heapq.heapify(events)
    while events:
        now, replica, done = heapq.heappop(events)
        if done >= 0:
            sharing.finish(replica, done)
            ends[replica] = now
        pending = [replica]
        while pending:
            one = pending.pop()
            if not asks[one] and len(queues[one]) < appetite and now >= starts[one]:
                asks[one] = True
                sharing.ask(one, appetite)
            while left and (share := sharing.next_share(len(left))) is not None:
                other, num = share
                asks[other] = False
                got, left = left[:num], left[num:]
                sharing.give(other, got)
                if not queues[other] and got:
                    heapq.heappush(events, (now + len(got[0].prompt_token_ids) / speeds[other], other, got[0].seq_id))
                queues[other] += got
                counts[other] += num
                pending.append(other)
        if done >= 0:
            queues[replica].pop(0)
            if queues[replica]:
                first = queues[replica][0]
                heapq.heappush(events, (now + len(first.prompt_token_ids) / speeds[replica], replica, first.seq_id))
    assert not left
    return list(zip(ends, counts, strict=True))


@pytest.mark.parametrize("starts", [[0.0, 0.0], [0.0, 0.4]])
def test_equal_replicas_end_together_though_one_could_take_all(starts: list[float]) -> None:
    (end_0, num_0), (end_1, num_1) = share_out(73, [100, 100], appetite=32, starts=starts)
    assert abs(end_0 - end_1) < 0.5
    assert num_0 + num_1 == 73
    assert abs(num_0 - num_1) <= 8


def test_a_faster_replica_gets_more_of_a_long_input() -> None:
    (end_0, num_0), (end_1, num_1) = share_out(400, [300, 100], appetite=8, starts=[0.0, 0.0])
    assert 2.7 < num_0 / num_1 < 3.3
    assert abs(end_0 - end_1) < 1


def test_one_replica_gets_what_it_asks_for() -> None:
    sharing = InputSharing(1)
    sharing.ask(0, 32)
    assert sharing.next_share(73) == (0, 32)
    assert sharing.next_share(41) is None


def test_who_has_least_to_do_is_answered_first_and_a_late_starter_finds_its_part() -> None:
    sharing = InputSharing(2)
    sharing.ask(1, 32)
    assert sharing.next_share(40) == (1, 10)
    sharing.give(1, [request(i, 20) for i in range(10)])
    sharing.ask(1, 32)
    assert sharing.next_share(30) is None, "the other one has not asked yet"
    sharing.ask(0, 32)
    assert sharing.next_share(30) == (0, 8)
    sharing.give(0, [request(10 + i, 20) for i in range(8)])
    assert sharing.next_share(22) == (1, 6)
    for seq_id in range(10):
        sharing.finish(1, seq_id)
    sharing.finish(1, 99)
    sharing.ask(0, 32)
    sharing.ask(1, 32)
    assert sharing.next_share(16) == (1, 4)


def test_at_the_end_everybody_is_told() -> None:
    sharing = InputSharing(2)
    sharing.ask(0, 4)
    sharing.ask(1, 4)
    assert [sharing.next_share(0), sharing.next_share(0), sharing.next_share(0)] == [(0, 0), (1, 0), None]

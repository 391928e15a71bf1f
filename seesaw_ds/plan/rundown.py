"""How a batch of sequences decodes to its end: how many step at once, and for how many steps, in whatever layout.

Sequences end when they have their tokens; those on the host take their places while there is room. What comes out is a
list of spans in which about as many sequences step, so that the seconds of a layout are a sum over few terms::

    on the GPU   ########============--------
    spans        a       b           c            steps of 8 tokens with 20 rows, of 12 with 11, ...
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from seesaw_ds.sched.staying import LiveBatch, LiveSequence

# A span ends when one in so many of its sequences has ended.
_PARTS = 12
# Multiples of it, modulo one, are spread evenly however many there are.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Span(NamedTuple):
    """`num_steps` steps of each sequence on the GPU, which are `num_rows` on average.

    At its start `num_left` sequences are live, on the GPU or on the host, and `num_gpu_tokens` tokens of KV are on the
    GPU. `mean_context` and `most_context` are of the tokens that a row reads, on average over the span.
    """

    num_steps: int
    num_rows: int
    mean_context: float
    most_context: float
    num_left: int
    num_gpu_tokens: int


class Room(NamedTuple):
    """What bounds the sequences on the GPU."""

    num_tokens: int
    max_num_seqs: int


def tokens_to_go(sequences: Sequence[LiveSequence], mean_tokens: float) -> list[int]:
    """How many tokens each is taken to produce.

    Stopping is equally likely at each token, so stops are spread evenly over the exponential distribution of that
    mean: the last of many sequences goes on for several times the mean. None goes on past its most.
    """
    if math.isinf(mean_tokens):
        return [seq.num_remaining_tokens for seq in sequences]
    shares = ((i * _GOLDEN_RATIO + 0.5) % 1.0 for i in range(len(sequences)))
    stops = (1 - mean_tokens * math.log(1 - share) for share in shares)
    return [min(seq.num_remaining_tokens, int(stop)) for seq, stop in zip(sequences, stops, strict=True)]


class Refill(NamedTuple):
    """`num_prompts` of about `prompt_tokens` tokens find room while the full GPU makes the steps of `span`."""

    span: Span
    num_prompts: int
    prompt_tokens: int


def refill(live: LiveBatch, mean_tokens: float, room: Room) -> Refill:
    """What is decoded, in whatever layout, for as many prompts to find room as the host holds sequences, or are left.

    For each of them a sequence must have been decoded from its first token to its last. Those on the host have come
    there from prefill, so they show what prompts and outputs are like. But they may be short ones, and those on the GPU
    long: it is at least what is decoded until the host is empty, or a part of that, and until as many have ended there.
    """
    samples = live.on_host or live.on_gpu
    togo = tokens_to_go(samples, mean_tokens)
    num_prompts = max(1, min(len(live.on_host), live.num_prompts_left))
    num_rows = max(1, len(live.on_gpu))
    spans = run_down(live, mean_tokens, room, is_host_enough=True)
    num_emptying = sum(span.num_steps * span.num_rows for span in spans) * num_prompts / max(1, len(live.on_host))
    num_tokens = max(num_prompts * sum(togo) / len(togo), num_emptying)
    ends = sorted(tokens_to_go(live.on_gpu, mean_tokens)) or [1]
    num_steps = max(1, round(num_tokens / num_rows), ends[min(num_prompts, len(ends)) - 1])
    contexts = [seq.num_stored_tokens for seq in live.on_gpu or samples]
    span = Span(num_steps, num_rows, sum(contexts) / num_rows, max(contexts), live.num_sequences, sum(contexts))
    return Refill(span, num_prompts, sum(seq.num_stored_tokens for seq in samples) // len(samples))


def run_down(live: LiveBatch, mean_tokens: float, room: Room, is_host_enough: bool = False) -> list[Span]:
    """The spans until all have ended, or with `is_host_enough` until the last one has come from the host.

    Those on the host with most to go come first, as in the scheduler's end game; else in their order.
    """
    togo = tokens_to_go([*live.on_gpu, *live.on_host], mean_tokens)
    batch = _Batch(room)
    for seq, num_tokens in zip(live.on_gpu, togo, strict=False):
        batch.join(seq.num_stored_tokens, num_tokens)
    host = [(seq.num_stored_tokens, num) for seq, num in zip(live.on_host, togo[len(live.on_gpu) :], strict=True)]
    host.reverse()  # the next one is the last of the list
    if not is_host_enough:
        host.sort(key=lambda seq: seq[1])
    spans: list[Span] = []
    while True:
        while host and batch.has_room(*host[-1]):
            batch.join(*host.pop())
        if batch.num_rows == 0 or (is_host_enough and not host):
            return spans
        spans.append(batch.advance(len(host)))


class _Batch:
    """The sequences on the GPU. Sums are kept as of step 0 of the run, so that a step changes none of them."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._now = 0
        self._ends: list[tuple[int, int]] = []  # a heap of (last step, context at step 0)
        self._context = 0
        self._last_steps = 0

    @property
    def num_rows(self) -> int:
        return len(self._ends)

    def join(self, context: int, num_tokens: int) -> None:
        heapq.heappush(self._ends, (self._now + num_tokens, context - self._now))
        self._context += context - self._now
        self._last_steps += self._now + num_tokens

    def has_room(self, context: int, num_tokens: int) -> bool:
        """Whether one more fits when everybody has half of what it will get."""
        num_rows = self.num_rows + 1
        if num_rows == 1:
            return True
        held = self._context + (num_rows - 1) * self._now + context
        to_come = self._last_steps - (num_rows - 1) * self._now + num_tokens
        return num_rows <= self._room.max_num_seqs and held + to_come / 2 <= self._room.num_tokens

    def advance(self, num_on_host: int) -> Span:
        """Step until a part of the sequences has ended; they leave."""
        start, num_rows, context = self._now, self.num_rows, self._context
        most = max(base for _, base in self._ends)
        ended = [heapq.heappop(self._ends) for _ in range(-(-num_rows // _PARTS))]
        self._now = ended[-1][0]
        while self._ends and self._ends[0][0] == self._now:
            ended.append(heapq.heappop(self._ends))
        self._context -= sum(base for _, base in ended)
        self._last_steps -= sum(end for end, _ in ended)
        middle = (start + self._now) / 2
        missed = sum(self._now - end for end, _ in ended)  # steps that those who ended first did not make
        num_steps = self._now - start
        return Span(
            num_steps,
            max(1, round(num_rows - missed / num_steps)),
            context / num_rows + middle,
            most + middle,
            num_rows + num_on_host,
            context + num_rows * start,
        )

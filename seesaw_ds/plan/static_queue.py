"""Requests of a simulated static engine that wait, and the KV room that they start in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class StaticRequest:
    """A request's prompt to compute, tokens to come, and the decode step at which it joined."""

    prompt: int
    output: int
    computed: int = 0
    join_step: int = 0


class KvQueue:
    """The waiting requests and the KV room of one or more pipeline groups; `idle` holds the groups with nothing to do.

    Room is counted in tokens, with half a block for each sequence's last one.
    """

    def __init__(self, num_kv_tokens: int, block_size: int) -> None:
        self.waiting: deque[StaticRequest] = deque()
        self.idle: list[int] = []
        self._num_free = num_kv_tokens
        self._half_block = block_size // 2

    def can_start(self) -> bool:
        """Whether a request waits and there is room for its prompt."""
        return bool(self.waiting) and self.waiting[0].prompt + self._half_block <= self._num_free

    def start(self) -> StaticRequest:
        """Take the next request out, with room for its prompt."""
        request = self.waiting.popleft()
        self._num_free -= request.prompt + self._half_block
        return request

    def can_grow(self, num_tokens: int) -> bool:
        """Whether running sequences may get `num_tokens` more in all."""
        return num_tokens <= self._num_free

    def grow(self, num_tokens: int) -> None:
        """Take room for `num_tokens` more of running sequences."""
        self._num_free -= num_tokens

    def release(self, request: StaticRequest, num_grown: int) -> None:
        """Give back the room of a prompt and of the tokens that it grew by."""
        self._num_free += request.prompt + self._half_block + num_grown

    def preempt(self, request: StaticRequest, num_grown: int) -> None:
        """Put a request back before all others; what it has grown by belongs to its prompt from now on."""
        self.release(request, num_grown)
        request.prompt, request.output, request.computed = request.prompt + num_grown, request.output - num_grown, 0
        self.waiting.appendleft(request)

"""How the replicas share the input: each in turn gets a part of what is left, the one with least to do first.

Parts shrink with what is left, down to single sequences (guided self-scheduling), so that no replica sits on work
at the end while another has none, and a replica that is faster gets more.
"""

from __future__ import annotations

from collections.abc import Iterable

from seesaw_ds.requests import SequenceRequest

# What is left is handed out in so many parts a replica, or more.
_PARTS = 2


class InputSharing:
    """Keeps who asked for how much, and how many tokens each replica still has to compute at most."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._asked: dict[int, int] = {}
        self._has_asked: set[int] = set()
        self._given: list[dict[int, int]] = [{} for _ in range(num_replicas)]
        self._load = [0] * num_replicas

    def ask(self, replica: int, num_sequences: int) -> None:
        """The replica has room for so many more; it asks again once it was answered."""
        self._asked[replica] = num_sequences
        self._has_asked.add(replica)

    def next_share(self, num_left: int) -> tuple[int, int] | None:
        """Whom to answer now, and how many of the `num_left` sequences it may have; None when nobody is to be answered.

        Until all have asked for the first time, for some start sooner, each gets one part.
        """
        is_start = len(self._has_asked) < self._num_replicas
        waiting = [replica for replica in self._asked if not (is_start and self._load[replica])]
        if not waiting:
            return None
        replica = min(waiting, key=lambda replica: (self._load[replica], replica))
        num_sequences = self._asked.pop(replica)
        if self._num_replicas > 1:
            num_sequences = min(num_sequences, -(-num_left // (_PARTS * self._num_replicas)))
        return replica, num_sequences

    def give(self, replica: int, requests: Iterable[SequenceRequest]) -> None:
        """Count what the replica got."""
        for request in requests:
            num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
            self._given[replica][request.seq_id] = num_tokens
            self._load[replica] += num_tokens

    def finish(self, replica: int, seq_id: int) -> None:
        """Count a sequence that ended; one that is not known any more is ignored."""
        self._load[replica] -= self._given[replica].pop(seq_id, 0)

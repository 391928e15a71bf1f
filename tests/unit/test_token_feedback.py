"""Tokens on their way back to the first stage: taken when they are needed, and when too many lie unread."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from seesaw_ds.parallel.links import most_unread_steps
from seesaw_ds.worker.slots import StepSlots, TokenFeedback

CPU = torch.device("cpu")


class FakeLink:
    """Gives step n's tokens as ``100 * n + row``."""

    def __init__(self) -> None:
        self.num_read = 0

    def recv_tokens(self, num_rows: int) -> torch.Tensor:
        self.num_read += 1
        return torch.arange(num_rows) + 100 * self.num_read


def first_stage() -> tuple[TokenFeedback, FakeLink, torch.Tensor]:
    groups = SimpleNamespace(is_first_stage=True, is_last_stage=False, layout=SimpleNamespace(pp=2))
    link, tokens = FakeLink(), torch.zeros(200, dtype=torch.int64)
    return TokenFeedback(groups, link, SimpleNamespace(tokens=tokens)), link, tokens


def test_a_step_takes_the_tokens_of_its_sequences_and_those_before():
    feedback, link, tokens = first_stage()
    for slots in ([0, 1], [2, 3], [4]):
        feedback.read(np.array(slots))
        feedback.pass_on(StepSlots(slots, CPU), None)
    assert link.num_read == 0
    feedback.read(np.array([3, 7]))
    assert link.num_read == 2
    assert tokens[:5].tolist() == [100, 101, 200, 201, 0]


def test_tokens_of_ended_sequences_do_not_pile_up():
    feedback, link, _ = first_stage()
    num_steps, most = 50, most_unread_steps(2)
    for step in range(num_steps):
        feedback.read(np.array([step]))
        feedback.pass_on(StepSlots([step], CPU), None)
        assert step + 1 - link.num_read <= most
    assert link.num_read == num_steps - most
    feedback.read_all()
    assert link.num_read == num_steps

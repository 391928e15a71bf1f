"""The order in which weight pieces are exchanged: several under way, and none lands where another is still read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.parallel.transport import Message
from seesaw_ds.reshard.arena import WeightArena
from seesaw_ds.reshard.exchange import ExchangeReshard
from seesaw_ds.reshard.plan import CellTensor, plan_reshard


def places(messages: Sequence[Message]) -> set[int]:
    return {tensor.data_ptr() for tensor, _ in messages}


class RecordingTransport:
    """Moves nothing; checks what is under way."""

    def __init__(self) -> None:
        self.under_way: list[RecordedHandle] = []
        self.most_under_way = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> RecordedHandle:
        for handle in self.under_way:
            assert not places(receives) & (handle.sources | handle.targets), "lands in what is still used"
            assert not places(sends) & handle.targets, "sends what has not arrived"
        self.under_way.append(RecordedHandle(self, places(sends), places(receives)))
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        return self.under_way[-1]


class RecordedHandle:
    def __init__(self, transport: RecordingTransport, sources: set[int], targets: set[int]) -> None:
        self.sources, self.targets = sources, targets
        self._transport = transport

    def wait(self) -> None:
        self._transport.under_way.remove(self)


@pytest.mark.parametrize("num_layers", [4, 5, 11])
@pytest.mark.parametrize("text", ["P2->T2", "T2->P2", "P4->T4", "T4->P4", "T2P2->T4", "P4->T2P2", "P8->T8"])
def test_no_piece_lands_where_another_is_read_or_written(text, num_layers):
    plan = plan_reshard(LayoutPair.parse(text), num_layers)
    ranks = range(plan.layouts.replica_size)
    most = 0
    for rank in ranks:
        arena = WeightArena([CellTensor("qkv", 2, 3)], plan.num_slots[rank], torch.int32, torch.device("cpu"))
        transport = RecordingTransport()
        reshard = ExchangeReshard(plan, arena, transport, rank, ranks)
        for phase in (Phase.DECODE, Phase.PREFILL):
            num_received = plan.num_cells_received(phase, rank)
            assert reshard.run(phase) == num_received * 24
            assert not transport.under_way
        most = max(most, transport.most_under_way)
    assert most == 3 or num_layers < 11, "pieces of different cells are under way together"

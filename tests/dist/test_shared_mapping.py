"""A mapping that is populated beside other work, as on CUDA; what CUDA would lock is noted instead."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from harness import RankFailure, run_ranks
from seesaw_ds.errors import UserError
from seesaw_ds.parallel import shared_memory
from seesaw_ds.parallel.shared_memory import NodeSharedMapping, begin_mapping

NUM_BYTES = 1 << 20


def stand_in_for_cuda(populate) -> list[int]:
    """Have this process act as on CUDA; the answer gets the unit of each locking."""
    locked: list[int] = []
    shared_memory.is_cuda = lambda device: True
    NodeSharedMapping.populate = populate
    NodeSharedMapping.register_for_dma = lambda mapping, unit_bytes: locked.append(unit_bytes)
    return locked


def rank_that_works_meanwhile() -> None:
    may_populate = threading.Event()
    populated: list[str] = []

    def populate(mapping: NodeSharedMapping) -> None:
        assert may_populate.wait(60)
        populated.append(mapping.name)

    locked = stand_in_for_cuda(populate)
    begun = begin_mapping("pool", NUM_BYTES, dist.group.WORLD, torch.device("cpu"), unit_bytes=4096)
    dist.barrier()  # what ranks do together goes on while the first one's memory is being populated
    assert populated == locked == []
    may_populate.set()
    mapping = begun.end()
    assert populated == (["pool-0"] if dist.get_rank() == 0 else [])
    assert locked == [4096]
    mapping.tensor(dist.get_rank(), (1,), torch.uint8).fill_(7)
    dist.barrier()
    assert mapping.tensor(0, (2,), torch.uint8).tolist() == [7, 7]
    mapping.close()


def test_ranks_work_on_while_one_of_them_populates():
    run_ranks(2, rank_that_works_meanwhile)


def rank_whose_memory_is_refused() -> None:
    def refuse(mapping: NodeSharedMapping) -> None:
        raise UserError(f"mapping={mapping.name}: 9 GiB were refused")

    stand_in_for_cuda(refuse)
    begin_mapping("pool", NUM_BYTES, dist.group.WORLD, torch.device("cpu")).end()


def test_refused_memory_is_said_at_the_end():
    with pytest.raises(RankFailure, match="mapping=pool-0: 9 GiB were refused"):
        run_ranks(1, rank_whose_memory_is_refused)

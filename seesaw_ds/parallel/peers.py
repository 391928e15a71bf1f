"""How the devices of a group can reach each other's memory."""

from __future__ import annotations

import enum
import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_T = TypeVar("_T")


class Reach(enum.Enum):
    """What lies between the CUDA devices of a group."""

    PEER = "peer"  # each reads and writes the others' memory
    HOST = "host"  # one node, but some pair has only host memory in common, or NCCL_P2P_DISABLE=1 says so
    OTHER = "other"  # several nodes, or a device with several ranks


def reach(group: ProcessGroup, device: torch.device) -> Reach:
    """The same on every rank of `group`, which all call this."""
    places = gather((os.uname().nodename, device.index), group)
    if len({node for node, _ in places}) > 1 or len(set(places)) < len(places):
        return Reach.OTHER
    others = [peer for _, peer in places if peer != device.index]
    has_access = all(torch.cuda.can_device_access_peer(device.index, peer) for peer in others)
    has_access = has_access and os.environ.get("NCCL_P2P_DISABLE") != "1"
    return Reach.PEER if all(gather(has_access, group)) else Reach.HOST


def gather(value: _T, group: ProcessGroup) -> list[_T]:
    """Every rank's `value`, by rank."""
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values

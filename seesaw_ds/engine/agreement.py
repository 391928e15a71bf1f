"""One run's settings on every rank: the first decides what is left open, the others take it over."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec

from seesaw_ds.config import RunConfig

WAIT_SECONDS = 1800.0
"""Longest time for planning; a first rank that dies ends the others long before."""

_KEY = "seesaw-run-config"


class SettingsStore:
    """The key-value store at the launcher's address, which the first rank serves.

    `torch.distributed` meets at the same address and shares the server: keep this until it has.
    """

    def __init__(self, host: str, port: int, rank: int) -> None:
        import torch.distributed as dist  # late: most runs have nothing to agree on, and start faster without

        timeout = datetime.timedelta(seconds=WAIT_SECONDS)
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )

    def publish(self, run: RunConfig) -> None:
        """Give the other ranks the settings."""
        self._store.set(_KEY, msgspec.json.encode(run).decode())

    def take(self) -> RunConfig:
        """Wait for the settings."""
        return msgspec.json.decode(self._store.get(_KEY), type=RunConfig)

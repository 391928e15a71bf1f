"""What a worker runs on, and how long it took to build."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.kv.exchange import KVExchange
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.layout import Phase
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.plan.memory import PoolSizes
from seesaw_ds.reshard.arena import PlacedCells
from seesaw_ds.reshard.plan import WeightReshard
from seesaw_ds.reshard.preload import CellPreload
from seesaw_ds.worker.decode import DecodeRunner
from seesaw_ds.worker.prefill import PrefillRunner
from seesaw_ds.worker.slots import DecodingSlots, TokenFeedback


@dataclass
class StartUpTimer:
    """Seconds that each named part of start-up took. `on_part` is told of a part when it begins."""

    seconds: dict[str, float] = field(default_factory=dict)
    on_part: Callable[[str], None] = lambda part: None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.on_part(name)
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


@dataclass
class Engine:
    """All that a worker runs on. `decode` has a runner for each phase in which there are decode steps.

    `preload` is a part of `reshard`, None where weights do not come early.
    """

    state: ParallelState
    stages: dict[Phase, DecoderStage]
    layers: PlacedCells
    tables: PlacedCells
    reshard: WeightReshard
    preload: CellPreload | None
    pools: dict[Phase, DeviceKVPool]
    kv_exchange: KVExchange
    host_pool: HostKVPool
    slots: DecodingSlots
    prefill: PrefillRunner
    decode: dict[Phase, DecodeRunner]
    feedback: dict[Phase, TokenFeedback]
    links: tuple[PipelineLink, ...]
    pool_sizes: PoolSizes

    def drain(self) -> None:
        """Complete every transfer of the pipelines: the last steps' tokens are sent only when somebody receives."""
        for feedback in self.feedback.values():
            feedback.read_all()
        for link in self.links:
            link.drain()

    def close(self) -> None:
        """Give back host memory. `drain` comes first."""
        self.reshard.close()
        self.host_pool.close()

"""The engine's transfers of weights and KV, put together as a worker does, for tools/bench_transfers.py."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from seesaw_ds.kv.exchange import KVExchange
from seesaw_ds.kv.host_pool import HostKVPool
from seesaw_ds.kv.layout import HostBlockLayout
from seesaw_ds.kv.swap import CopyEngine
from seesaw_ds.kv.transfer import copy_to_device, copy_to_host
from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.parallel import device as devices
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.shared_memory import share_mapping
from seesaw_ds.parallel.transport import Transport
from seesaw_ds.reshard.exchange import ExchangeReshard
from seesaw_ds.reshard.host import HostReshard, HostWeights
from seesaw_ds.shapes import ModelShape
from transfer_contents import BLOCK_SIZE, BLOCKS_AT_ONCE, KnownKV, KnownWeights

if TYPE_CHECKING:
    from seesaw_ds.parallel.device import Event

TO_HOST, TO_DEVICE, BOTH_WAYS = "to the host", "to the device", "both ways at once"
BACKEND = "send and receive"


@dataclass(frozen=True, slots=True)
class Carrier:
    """A transport, its name, and the plain rate to compare it with: BOTH_WAYS or BACKEND."""

    name: str
    transport: Transport
    link: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What is built: `shape` with the layers to move, the replica's bytes of KV, and of the host's copy of weights."""

    shape: ModelShape
    layouts: LayoutPair
    dtype: torch.dtype
    kv_bytes: int
    host_weight_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """One way of a transfer. It runs in turn with the other way, for each undoes the other.

    `run` starts when its event has come, or at once; it queues the transfer on the current stream or waits for its
    end, and returns this rank's bytes. `prepare` comes before it. `is_exact` looks at every bit of the outcome.
    """

    name: str
    carrier: str
    link: str
    run: Callable[[Event | None], int]
    is_exact: Callable[[], bool]
    prepare: Callable[[], None]


class Transfers:
    """All pairs of cases of a replica, over memory that they share. All its ranks make it and run its cases alike."""

    def __init__(self, setting: Setting, state: ParallelState, carriers: list[Carrier], device: torch.device) -> None:
        self._setting, self._state, self._carriers, self._device = setting, state, carriers, device
        self._ranks = state.replica_ranks
        self._rank = dist.get_rank() - self._ranks[0]
        shape, layouts, itemsize = setting.shape, setting.layouts, setting.dtype.itemsize
        self._host_layout = HostBlockLayout(
            layouts, shape.num_layers, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, itemsize
        )
        self._num_blocks = max(1, setting.kv_bytes // self._host_layout.row_bytes)
        shards = {phase: self._host_layout.shard(phase, self._rank) for phase in Phase}
        self._kv = KnownKV(shape, shards, self._num_blocks, setting.dtype, device)
        rng = random.Random(0)
        self._blocks, self._host_blocks = (rng.sample(range(self._num_blocks), self._num_blocks) for _ in range(2))

    def pairs(self) -> Iterator[list[Case]]:
        """There and back, of everything that these layouts have to move. Memory is given back in between."""
        if not self._setting.layouts.is_static:
            yield from self._weight_exchange()
            yield from self._weight_reload()
            yield from self._kv_exchange()
        yield from self._swap()

    def _weight_exchange(self) -> Iterator[list[Case]]:
        setting = self._setting
        weights = KnownWeights(setting.shape, setting.layouts, self._rank, setting.dtype, self._device)
        if not weights.plan.is_nested:
            return
        for carrier in self._carriers:
            reshard = ExchangeReshard(weights.plan, weights.arena, carrier.transport, self._rank, self._ranks)
            yield self._there_and_back("weight exchange", carrier.name, carrier.link, reshard.run, weights.is_exact)
            reshard.close()

    def _weight_reload(self) -> Iterator[list[Case]]:
        """Of as many layers as the host may hold."""
        setting = self._setting
        layer_bytes = setting.shape.layer_parameters * setting.dtype.itemsize
        num_layers = max(setting.layouts.replica_size, setting.host_weight_bytes // layer_bytes)
        shape = replace(setting.shape, num_layers=min(setting.shape.num_layers, num_layers))
        weights = KnownWeights(shape, setting.layouts, self._rank, setting.dtype, self._device)
        cells = (weights.arena.cell_tensors, shape.num_layers, setting.layouts.cells_per_layer, setting.dtype)
        num_bytes = HostWeights.required_bytes(*cells)
        host = HostWeights(
            share_mapping("weights", num_bytes, self._state.replica, self._device, num_bytes // shape.num_layers),
            *cells,
        )
        weights.store(host)
        dist.barrier(group=self._state.replica)
        reshard = HostReshard(weights.plan, weights.arena, host, self._rank)
        yield self._there_and_back("weight reload", "host copy", TO_DEVICE, reshard.run, weights.is_exact)
        reshard.close()

    def _kv_exchange(self) -> Iterator[list[Case]]:
        shape = self._setting.shape
        self._kv.fill(Phase.PREFILL)
        for carrier in self._carriers:
            exchange = KVExchange(
                self._setting.layouts,
                self._kv.pools,
                shape.num_layers,
                shape.num_kv_heads,
                carrier.transport,
                self._ranks,
            )
            run = partial(exchange.run, blocks=self._blocks)
            yield self._there_and_back("KV exchange", carrier.name, carrier.link, run, self._kv.is_exact)

    def _there_and_back(
        self, name: str, carrier: str, link: str, run: Callable[[Phase], int], is_exact: Callable[[Phase], bool]
    ) -> list[Case]:
        def run_after(to: Phase, after: Event | None) -> int:
            devices.wait_event(after)
            return run(to)

        return [
            Case(
                name=f"{name} to {to.value}",
                carrier=carrier,
                link=link,
                run=partial(run_after, to),
                is_exact=partial(is_exact, to),
                prepare=lambda: None,
            )
            for to in (Phase.DECODE, Phase.PREFILL)
        ]

    def _swap(self) -> Iterator[list[Case]]:
        layout = self._host_layout
        num_bytes = layout.row_bytes * self._num_blocks
        mapping = share_mapping("kv", num_bytes, self._state.replica, self._device, layout.row_bytes)
        host_pool = HostKVPool(mapping, layout, self._num_blocks, self._setting.dtype)
        rows = mapping.tensor(0, (self._num_blocks, layout.row_numel), self._setting.dtype)
        engines = {name: CopyEngine(name, self._device, on_error=_end_process) for name in ("swap-out", "swap-in")}
        phases = [Phase.PREFILL] if self._setting.layouts.is_static else list(Phase)
        for phase in phases:
            yield [
                Case(
                    name=f"KV swap-out in {phase.value}",
                    carrier="copy engine",
                    link=TO_HOST,
                    run=partial(self._swap_out, engines["swap-out"], host_pool, phase),
                    is_exact=partial(self._is_host_exact, rows),
                    prepare=partial(self._kv.fill, phase),
                ),
                Case(
                    name=f"KV swap-in in {phase.value}",
                    carrier="copy engine",
                    link=TO_DEVICE,
                    run=partial(self._swap_in, engines["swap-in"], host_pool, phase),
                    is_exact=partial(self._kv.is_exact, phase),
                    prepare=self._clear,
                ),
            ]
        for engine in engines.values():
            engine.close()
        del rows
        host_pool.close()

    def _swap_out(self, engine: CopyEngine, host_pool: HostKVPool, phase: Phase, after: Event | None) -> int:
        pool = self._kv.pools[phase]
        for blocks, host_blocks in self._sequences():
            engine.submit(partial(copy_to_host, pool, blocks, host_pool, host_blocks), after, _nothing)
        engine.drain()
        return int(pool.tensor.numel() * pool.tensor.element_size())

    def _swap_in(self, engine: CopyEngine, host_pool: HostKVPool, phase: Phase, after: Event | None) -> int:
        pool = self._kv.pools[phase]
        for blocks, host_blocks in self._sequences():
            engine.submit(partial(copy_to_device, host_pool, host_blocks, pool, blocks), after, _nothing)
        engine.drain()
        return int(pool.tensor.numel() * pool.tensor.element_size())

    def _sequences(self) -> Iterator[tuple[list[int], list[int]]]:
        """Device blocks and host blocks of one sequence after the other."""
        for start in range(0, self._num_blocks, BLOCKS_AT_ONCE):
            part = slice(start, start + BLOCKS_AT_ONCE)
            yield self._blocks[part], self._host_blocks[part]

    def _clear(self) -> None:
        self._kv.memory.zero_()

    def _is_host_exact(self, rows: torch.Tensor) -> bool:
        """Whether every rank's part of every block is in its row."""
        layout = self._host_layout
        block_of = torch.empty(self._num_blocks, dtype=torch.int64)
        block_of[torch.tensor(self._host_blocks)] = torch.tensor(self._blocks)
        for start in range(0, self._num_blocks, BLOCKS_AT_ONCE):
            part = slice(start, start + BLOCKS_AT_ONCE)
            copied, blocks = rows[part].to(self._device), block_of[part].to(self._device)
            for offset, shard in zip(layout.piece_offsets, layout.pieces, strict=True):
                expected = self._kv.expected(blocks, shard)
                piece = copied[:, offset : offset + layout.shard_numel(shard)].view(torch.int64)
                if not torch.equal(piece, expected.flatten(1)):
                    return False
        return True


def _nothing() -> None:
    pass


def _end_process(error: BaseException) -> None:
    """Whoever waits for a copy engine that failed would wait for ever."""
    traceback.print_exception(error)
    os._exit(1)

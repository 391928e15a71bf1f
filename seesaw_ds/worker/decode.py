"""Decode steps on one rank, in the decode layout: one step at a time for a group of slots."""

from __future__ import annotations

import numpy as np
import torch

from seesaw_ds.engine.messages import Decode
from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.worker.graphs import StepExecutor
from seesaw_ds.worker.slots import DecodingSlots, TokenFeedback


class StepInputs:
    """Device tensors that a step's kernels read; they stay in place, so that a captured step can be replayed.

    `host` rows are (token position, KV block to write, offset in it); `hidden` is for stages after the first.
    """

    def __init__(self, max_num_seqs: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.hidden = torch.zeros((max_num_seqs, hidden_size), dtype=dtype, device=device)
        self._places = torch.zeros((3, max_num_seqs), dtype=torch.int64, device=device)

    def set_places(self, host: np.ndarray) -> None:
        """Take (3, rows) int64 of a step."""
        self._places[:, : host.shape[1]].copy_(to_device(host, self._places.device))

    def places(self, rotary: ModelRotation, size: int) -> tuple[TokenPlaces, ...]:
        positions, blocks, offsets = self._places[:, :size].unbind()
        return rotary.places(positions, positions + 1, blocks, offsets)


class DecodeRunner:
    """Runs decode steps.

    A step's tokens are written to their slots on the device, so the next step of a group can be queued before
    anybody has read them. Under pipeline parallelism the last stage samples and the first embeds.

    `pool` has one block more than the scheduler knows of: rows that only pad a step to a graph's size write there.
    """

    def __init__(
        self,
        stage: DecoderStage,
        link: PipelineLink,
        rotary: ModelRotation,
        attention: tuple[AttentionBackend, ...],
        executor: StepExecutor,
        slots: DecodingSlots,
        feedback: TokenFeedback,
        pool: DeviceKVPool,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._link = link
        self._rotary = rotary
        self._attention = attention
        self._executor = executor
        self._slots = slots
        self._feedback = feedback
        self._block_size = pool.block_size
        self._scratch_block = pool.num_blocks - 1
        self._kv_caches = [pool.layer(i) for i in range(stage.layer_range.size)]
        self._inputs = StepInputs(slots.max_num_seqs, hidden_size, pool.tensor.dtype, device)

    def warm_up(self) -> None:
        """Run a step of padding at each of the executor's sizes, and every transfer of the pipeline once.

        Collective over the stage's ranks and over the pipeline.
        """
        nothing = np.zeros(0, dtype=np.int64)
        for size in reversed(self._executor.sizes):
            self._plan(nothing, size)
            self._executor.run(size, self._compute)
        groups = self._stage.groups
        if not groups.is_first_stage:
            self._link.recv_hidden(1)
        if not groups.is_last_stage:
            self._link.send_hidden(self._inputs.hidden[:1])
        self._feedback.warm_up()
        self._link.drain()

    def run(self, step: Decode) -> SampledTokens | None:
        """Run a step; on the last stage return its sampled tokens, else None."""
        slots = self._slots.step(step)
        num_rows = len(slots)
        size = self._executor.padded_size(num_rows)
        self._plan(slots.host, size)
        groups = self._stage.groups
        if groups.is_first_stage:
            self._feedback.read(slots.host)
            self._inputs.token_ids[:num_rows] = self._slots.tokens[slots.index]
        else:
            self._inputs.hidden[:num_rows] = self._link.recv_hidden(num_rows)
        result = self._executor.run(size, self._compute)[:num_rows]
        sampled = None
        if groups.is_last_stage:
            sampled = self._slots.sample(result, slots)
        else:
            # A copy: the next step may overwrite the result before the transfer has read it.
            self._link.send_hidden(result.clone())
        self._feedback.pass_on(slots, sampled)
        self._slots.advance(slots)
        return sampled

    def _plan(self, slots: np.ndarray, size: int) -> None:
        """Put the step's places on the device and plan its attention. Rows past the slots are padding."""
        num_rows = len(slots)
        table = self._slots.table
        positions = table.positions[slots]
        places = np.zeros((3, size), dtype=np.int64)
        places[0, :num_rows] = positions
        places[1, :num_rows] = table.blocks[slots, positions // self._block_size]
        places[1, num_rows:] = self._scratch_block
        places[2, :num_rows] = positions % self._block_size
        self._inputs.set_places(places)
        tables = np.full((size, table.blocks.shape[1]), self._scratch_block, dtype=np.int32)
        tables[:num_rows] = table.blocks[slots]
        kv_lens = (places[0] + 1).astype(np.int32)
        for attention in self._attention:
            attention.plan(AttentionBatch(np.ones(size, dtype=np.int32), kv_lens, tables, num_decode_rows=size))

    def _compute(self, size: int) -> torch.Tensor:
        """The step's kernels at a batch of `size` rows: logits on the last stage, else hidden states."""
        places = self._inputs.places(self._rotary, size)
        is_first = self._stage.groups.is_first_stage
        hidden = self._stage.embed(self._inputs.token_ids[:size]) if is_first else self._inputs.hidden[:size]
        hidden = self._stage(hidden, places, self._attention, self._kv_caches)
        return self._stage.logits(hidden) if self._stage.groups.is_last_stage else hidden

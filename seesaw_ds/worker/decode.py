"""Decode on one rank: per-slot state, and one step at a time for a group of slots."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from seesaw_ds.engine.messages import Decode, Load
from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.requests import SequenceRequest
from seesaw_ds.worker.graphs import StepExecutor


class SlotTable:
    """What the host knows of each slot: its sequence's next position, prompt length and blocks."""

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self.positions = np.zeros(max_num_seqs, dtype=np.int64)
        self.prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self.blocks = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs

    def set(self, slot: int, position: int, prompt_len: int, blocks: tuple[int, ...]) -> None:
        self.positions[slot] = position
        self.prompt_lens[slot] = prompt_len
        self.blocks[slot, : len(blocks)] = blocks
        self._num_blocks[slot] = len(blocks)

    def append_block(self, slot: int, block: int) -> None:
        self.blocks[slot, self._num_blocks[slot]] = block
        self._num_blocks[slot] += 1


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
    """Runs decode steps in the decode layout.

    A step's tokens are written to their slots on the device, so the next step of a group can be queued before
    anybody has read them. Under pipeline parallelism the last stage samples and the first embeds; tokens travel back
    on the feedback group, and the first stage takes them off it just before it needs them, in the order of the steps.

    `pool` has one block more than the scheduler knows of: rows that only pad a step to a graph's size write there.
    """

    def __init__(
        self,
        stage: DecoderStage,
        link: PipelineLink,
        rotary: ModelRotation,
        attention: tuple[AttentionBackend, ...],
        executor: StepExecutor,
        pool: DeviceKVPool,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._link = link
        self._rotary = rotary
        self._attention = attention
        self._executor = executor
        self._device = device
        self._block_size = pool.block_size
        self._scratch_block = pool.num_blocks - 1
        self._kv_caches = [pool.layer(i) for i in range(stage.layer_range.size)]
        self._slots = SlotTable(max_num_seqs, max_blocks_per_seq)
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._inputs = StepInputs(max_num_seqs, hidden_size, pool.tensor.dtype, device)
        self._group_slots: dict[int, tuple[np.ndarray, torch.Tensor]] = {}
        self._unread: deque[tuple[np.ndarray, torch.Tensor]] = deque()
        self._sampling: SamplingState | None = None
        if stage.groups.is_last_stage:
            self._sampling = SamplingState(max_num_seqs, stage.vocab_size, device)

    def load(self, load: Load, request: SequenceRequest) -> None:
        """Give a swapped-in sequence its slot. Its KV arrives separately."""
        swap = load.swap
        self._read_tokens(np.array([swap.slot]))
        self._tokens[swap.slot] = load.output_token_ids[-1]
        self._slots.set(swap.slot, swap.num_tokens, len(request.prompt_token_ids), swap.gpu_block_ids)
        if self._sampling is not None:
            self._sampling.set_slot(
                swap.slot,
                request.params,
                request.seed,
                request.stop_token_ids,
                request.prompt_token_ids,
                load.output_token_ids,
            )

    def warm_up(self) -> None:
        """Run a step of padding at every size that the executor captures, and every transfer of the pipeline once.

        Collective over the stage's ranks and over the pipeline.
        """
        nothing = np.zeros(0, dtype=np.int64)
        for size in reversed(self._executor.sizes):
            self._plan(nothing, size)
            self._executor.run(size, self._compute)
        groups = self._stage.groups
        if groups.is_first_stage and groups.is_last_stage:
            return
        if not groups.is_first_stage:
            self._link.recv_hidden(1)
        if not groups.is_last_stage:
            self._link.send_hidden(self._inputs.hidden[:1])
        if groups.is_last_stage:
            self._link.send_tokens(self._inputs.token_ids[:1])
        if groups.is_first_stage:
            self._link.recv_tokens(1)
        self._link.drain()

    def run(self, step: Decode) -> SampledTokens | None:
        """Run a step; on the last stage return its sampled tokens, else None."""
        if step.slots is not None:
            slots = np.array(step.slots)
            self._group_slots[step.group] = (slots, to_device(slots, self._device))
        slots, index = self._group_slots[step.group]
        for slot, block in step.new_blocks:
            self._slots.append_block(slot, block)
        size = self._executor.padded_size(len(slots))
        self._plan(slots, size)
        groups = self._stage.groups
        if groups.is_first_stage:
            self._read_tokens(slots)
            self._inputs.token_ids[: len(slots)] = self._tokens[index]
        else:
            self._inputs.hidden[: len(slots)] = self._link.recv_hidden(len(slots))
        result = self._executor.run(size, self._compute)[: len(slots)]
        sampled = None
        if groups.is_last_stage:
            sampled = self._sample(result, slots, index)
        else:
            # A copy: the next step may overwrite the result before the transfer has read it.
            self._link.send_hidden(result.clone())
        if groups.is_first_stage and not groups.is_last_stage:
            self._unread.append((slots, index))
        self._slots.positions[slots] += 1
        return sampled

    def _plan(self, slots: np.ndarray, size: int) -> None:
        """Put the step's places on the device and plan its attention. Rows past the slots are padding."""
        num_rows = len(slots)
        positions = self._slots.positions[slots]
        places = np.zeros((3, size), dtype=np.int64)
        places[0, :num_rows] = positions
        places[1, :num_rows] = self._slots.blocks[slots, positions // self._block_size]
        places[1, num_rows:] = self._scratch_block
        places[2, :num_rows] = positions % self._block_size
        self._inputs.set_places(places)
        tables = np.full((size, self._slots.blocks.shape[1]), self._scratch_block, dtype=np.int32)
        tables[:num_rows] = self._slots.blocks[slots]
        kv_lens = (places[0] + 1).astype(np.int32)
        for attention in self._attention:
            attention.plan(AttentionBatch(np.ones(size, dtype=np.int32), kv_lens, tables))

    def _compute(self, size: int) -> torch.Tensor:
        """The step's kernels at a batch of `size` rows: logits on the last stage, else hidden states."""
        places = self._inputs.places(self._rotary, size)
        is_first = self._stage.groups.is_first_stage
        hidden = self._stage.embed(self._inputs.token_ids[:size]) if is_first else self._inputs.hidden[:size]
        hidden = self._stage(hidden, places, self._attention, self._kv_caches)
        return self._stage.logits(hidden) if self._stage.groups.is_last_stage else hidden

    def _sample(self, logits: torch.Tensor, slots: np.ndarray, index: torch.Tensor) -> SampledTokens:
        assert self._sampling is not None
        output_positions = self._slots.positions[slots] + 1 - self._slots.prompt_lens[slots]
        sampled = sample(logits, index, to_device(output_positions, self._device), self._sampling, slots.tolist())
        if self._stage.groups.is_first_stage:
            self._tokens[index] = sampled.token_ids
        else:
            self._link.send_tokens(sampled.token_ids)
        return sampled

    def _read_tokens(self, slots: np.ndarray) -> None:
        """Take the feedback of earlier steps, oldest first, until no unread step has a token for `slots`."""
        while any(np.isin(slots, unread).any() for unread, _ in self._unread):
            unread, index = self._unread.popleft()
            self._tokens[index] = self._link.recv_tokens(len(unread))

    def read_all_tokens(self) -> None:
        """Take all feedback that is still under way; before the pipeline is taken apart."""
        while self._unread:
            self._read_tokens(self._unread[0][0])

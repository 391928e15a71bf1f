"""Decode on one rank: per-slot state that stays on the device, one step at a time for a group of slots."""

from __future__ import annotations

from collections import deque

import torch

from seesaw_ds.engine.messages import Decode, Load
from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
from seesaw_ds.model.decoder import DecoderStage, Rotation
from seesaw_ds.model.rope import RotaryTables
from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.requests import SequenceRequest


class DecodeRunner:
    """Runs decode steps in the decode layout.

    A slot holds a running sequence: its last token, next position and block table. A step's tokens are written to
    their slots on the device, so the next step of a group can be queued before anybody has read them. Under
    pipeline parallelism the last stage samples and the first embeds; tokens travel back on the feedback group and the
    first stage takes them off it just before it needs them, in the order of the steps.
    """

    def __init__(
        self,
        stage: DecoderStage,
        link: PipelineLink,
        rotary: RotaryTables,
        attention: AttentionBackend,
        pool: DeviceKVPool,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._link = link
        self._rotary = rotary
        self._attention = attention
        self._block_size = pool.block_size
        self._device = device
        self._kv_caches = [pool.layer(i) for i in range(stage.layer_range.size)]
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._block_tables = torch.zeros((max_num_seqs, max_blocks_per_seq), dtype=torch.int64, device=device)
        self._num_blocks = [0] * max_num_seqs
        self._positions = [0] * max_num_seqs
        self._prompt_lens = [0] * max_num_seqs
        self._group_slots: dict[int, list[int]] = {}
        self._unread: deque[list[int]] = deque()
        self._sampling: SamplingState | None = None
        if stage.groups.is_last_stage:
            self._sampling = SamplingState(max_num_seqs, stage.vocab_size, device)

    def load(self, load: Load, request: SequenceRequest) -> None:
        """Give a swapped-in sequence its slot. Its KV arrives separately."""
        slot, blocks = load.swap.slot, load.swap.gpu_block_ids
        self._read_tokens({slot})
        self._tokens[slot] = load.output_token_ids[-1]
        self._block_tables[slot, : len(blocks)] = torch.tensor(blocks, device=self._device)
        self._num_blocks[slot] = len(blocks)
        self._positions[slot] = load.swap.num_tokens
        self._prompt_lens[slot] = len(request.prompt_token_ids)
        if self._sampling is not None:
            self._sampling.set_slot(
                slot,
                request.params,
                request.seed,
                request.stop_token_ids,
                request.prompt_token_ids,
                load.output_token_ids,
            )

    def run(self, step: Decode) -> SampledTokens | None:
        """Run a step; on the last stage return its sampled tokens, else None."""
        if step.slots is not None:
            self._group_slots[step.group] = step.slots
        slots = self._group_slots[step.group]
        self._append_blocks(step.new_blocks)
        groups = self._stage.groups
        index = torch.tensor(slots, device=self._device)
        positions = torch.tensor([self._positions[slot] for slot in slots], device=self._device)
        rotation = Rotation(*self._rotary.cos_sin(positions, positions + 1))
        self._attention.plan(self._attention_batch(slots, index, positions))
        if groups.is_first_stage:
            self._read_tokens(set(slots))
            hidden = self._stage.embed(self._tokens[index])
        else:
            hidden = self._link.recv_hidden(len(slots))
        hidden = self._stage(hidden, rotation, self._attention, self._kv_caches)
        sampled = None
        if groups.is_last_stage:
            sampled = self._sample(hidden, slots, index, positions)
        else:
            self._link.send_hidden(hidden)
        if groups.is_first_stage and not groups.is_last_stage:
            self._unread.append(slots)
        for slot in slots:
            self._positions[slot] += 1
        return sampled

    def _sample(
        self, hidden: torch.Tensor, slots: list[int], index: torch.Tensor, positions: torch.Tensor
    ) -> SampledTokens:
        assert self._sampling is not None
        prompt_lens = torch.tensor([self._prompt_lens[slot] for slot in slots], device=self._device)
        sampled = sample(self._stage.logits(hidden), index, positions + 1 - prompt_lens, self._sampling, slots)
        if self._stage.groups.is_first_stage:
            self._tokens[index] = sampled.token_ids
        else:
            self._link.send_tokens(sampled.token_ids)
        return sampled

    def _read_tokens(self, slots: set[int]) -> None:
        """Take the feedback of earlier steps, oldest first, until no unread step has a token for `slots`."""
        while any(not slots.isdisjoint(step) for step in self._unread):
            step = self._unread.popleft()
            self._tokens[torch.tensor(step, device=self._device)] = self._link.recv_tokens(len(step))

    def read_all_tokens(self) -> None:
        """Take all feedback that is still under way; before the pipeline is taken apart."""
        while self._unread:
            self._read_tokens(set(self._unread[0]))

    def _append_blocks(self, new_blocks: list[tuple[int, int]]) -> None:
        for slot, block in new_blocks:
            self._block_tables[slot, self._num_blocks[slot]] = block
            self._num_blocks[slot] += 1

    def _attention_batch(self, slots: list[int], index: torch.Tensor, positions: torch.Tensor) -> AttentionBatch:
        tables = self._block_tables[index]
        rows = torch.arange(len(slots), device=self._device)
        return AttentionBatch(
            query_lens=[1] * len(slots),
            kv_lens=[self._positions[slot] + 1 for slot in slots],
            block_tables=tables,
            write_blocks=tables[rows, positions // self._block_size],
            write_offsets=positions % self._block_size,
        )

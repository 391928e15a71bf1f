"""Prefill on one rank: run a micro-batch through this rank's stage, sample first tokens, hand KV to swap-out."""

from __future__ import annotations

import numpy as np
import torch

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
from seesaw_ds.sched.output import PrefillBatch


class PrefillRunner:
    """Runs micro-batches in the prefill layout."""

    def __init__(
        self,
        stage: DecoderStage,
        link: PipelineLink,
        rotary: ModelRotation,
        attention: tuple[AttentionBackend, ...],
        pool: DeviceKVPool,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._link = link
        self._rotary = rotary
        self._attention = attention
        self._block_size = pool.block_size
        self._device = device
        self._kv_caches = [pool.layer(i) for i in range(stage.layer_range.size)]

    def run(self, batch: PrefillBatch, requests: dict[int, SequenceRequest]) -> SampledTokens | None:
        """Compute `batch`; on the last stage return the first tokens of its prompts that end in it, else None."""
        groups = self._stage.groups
        prompts = [requests[chunk.seq_id].prompt_token_ids for chunk in batch.chunks]
        places = self._plan(batch, prompts)
        if groups.is_first_stage:
            hidden = self._stage.embed(self._token_ids(batch, prompts))
        else:
            hidden = self._link.recv_hidden(places[0].write_blocks.shape[0])
        hidden = self._stage(hidden, places, self._attention, self._kv_caches)
        if not groups.is_last_stage:
            self._link.send_hidden(hidden)
            return None
        return self._sample(batch, hidden, requests)

    def _plan(self, batch: PrefillBatch, prompts: list[tuple[int, ...]]) -> tuple[TokenPlaces, ...]:
        """Plan the batch's attention; where its tokens stand."""
        chunks = batch.chunks
        query_lens = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int32)
        tables = np.zeros((len(chunks), max(len(chunk.block_ids) for chunk in chunks)), dtype=np.int32)
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.block_ids)] = chunk.block_ids
        kv_lens = np.array([chunk.start for chunk in chunks], dtype=np.int32) + query_lens
        for attention in self._attention:
            attention.plan(AttentionBatch(query_lens, kv_lens, tables))

        positions = np.concatenate([np.arange(c.start, c.start + c.num_tokens) for c in chunks])
        rows = np.repeat(np.arange(len(chunks)), query_lens)
        context_lens = np.array([len(prompt) for prompt in prompts])[rows]
        blocks = tables[rows, positions // self._block_size]
        places = np.stack((positions, context_lens, blocks, positions % self._block_size))
        positions_, context_lens_, write_blocks, write_offsets = to_device(places, self._device).unbind()
        return self._rotary.places(positions_, context_lens_, write_blocks, write_offsets)

    def _token_ids(self, batch: PrefillBatch, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        token_ids = [
            token
            for chunk, prompt in zip(batch.chunks, prompts, strict=True)
            for token in prompt[chunk.start : chunk.start + chunk.num_tokens]
        ]
        return to_device(token_ids, self._device)

    def _sample(
        self, batch: PrefillBatch, hidden: torch.Tensor, requests: dict[int, SequenceRequest]
    ) -> SampledTokens | None:
        ends, last_rows, end = [], [], 0
        for chunk in batch.chunks:
            end += chunk.num_tokens
            if chunk.is_last:
                ends.append(requests[chunk.seq_id])
                last_rows.append(end - 1)
        if not ends:
            return None
        logits = self._stage.logits(hidden[to_device(last_rows, self._device)])
        state = SamplingState(len(ends), logits.shape[1], self._device)
        for slot, request in enumerate(ends):
            state.set_slot(
                slot,
                request.params,
                request.seed,
                request.stop_token_ids,
                request.prompt_token_ids,
                output_token_ids=(),
            )
        slots = torch.arange(len(ends), device=self._device)
        return sample(logits, slots, torch.zeros_like(slots), state, range(len(ends)))

"""Prefill on one rank: run a micro-batch through this rank's stage, sample first tokens, hand KV to swap-out."""

from __future__ import annotations

import torch

from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
from seesaw_ds.model.decoder import DecoderStage, Rotation
from seesaw_ds.model.rope import RotaryTables
from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.requests import SequenceRequest
from seesaw_ds.sched.output import PrefillBatch


class PrefillRunner:
    """Runs micro-batches in the prefill layout."""

    def __init__(
        self,
        stage: DecoderStage,
        link: PipelineLink,
        rotary: RotaryTables,
        attention: AttentionBackend,
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
        positions = self._positions(batch)
        prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        query_lens = torch.tensor([chunk.num_tokens for chunk in batch.chunks], device=self._device)
        rotation = Rotation(*self._rotary.cos_sin(positions, prompt_lens.repeat_interleave(query_lens)))
        self._attention.plan(self._attention_batch(batch, positions))
        if groups.is_first_stage:
            hidden = self._stage.embed(self._token_ids(batch, prompts))
        else:
            hidden = self._link.recv_hidden(positions.shape[0])
        hidden = self._stage(hidden, rotation, self._attention, self._kv_caches)
        if not groups.is_last_stage:
            self._link.send_hidden(hidden)
            return None
        return self._sample(batch, hidden, requests)

    def _token_ids(self, batch: PrefillBatch, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        token_ids = [
            token
            for chunk, prompt in zip(batch.chunks, prompts, strict=True)
            for token in prompt[chunk.start : chunk.start + chunk.num_tokens]
        ]
        return torch.tensor(token_ids, device=self._device)

    def _positions(self, batch: PrefillBatch) -> torch.Tensor:
        return torch.cat([torch.arange(c.start, c.start + c.num_tokens) for c in batch.chunks]).to(self._device)

    def _attention_batch(self, batch: PrefillBatch, positions: torch.Tensor) -> AttentionBatch:
        chunks = batch.chunks
        width = max(len(chunk.block_ids) for chunk in chunks)
        padded = [[*chunk.block_ids, *[0] * (width - len(chunk.block_ids))] for chunk in chunks]
        tables = torch.tensor(padded, device=self._device)
        query_lens = [chunk.num_tokens for chunk in chunks]
        rows = torch.arange(len(chunks), device=self._device).repeat_interleave(
            torch.tensor(query_lens, device=self._device)
        )
        return AttentionBatch(
            query_lens=query_lens,
            kv_lens=[chunk.start + chunk.num_tokens for chunk in chunks],
            block_tables=tables,
            write_blocks=tables[rows, positions // self._block_size],
            write_offsets=positions % self._block_size,
        )

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
        logits = self._stage.logits(hidden[torch.tensor(last_rows, device=self._device)])
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

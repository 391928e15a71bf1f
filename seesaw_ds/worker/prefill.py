"""Prefill on one rank: micro-batches of prompt chunks, and of the decode rows that ride with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

from seesaw_ds.engine.messages import Prefill
from seesaw_ds.kv.device_pool import DeviceKVPool
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.links import PipelineLink
from seesaw_ds.requests import SequenceRequest
from seesaw_ds.sched.output import PrefillChunk
from seesaw_ds.worker.graphs import GraphPool
from seesaw_ds.worker.segments import SegmentGraphs
from seesaw_ds.worker.slots import DecodingSlots, StepSlots, TokenFeedback


class PrefillRunner:
    """Runs micro-batches in the prefill layout. Tokens stand in this order: decode rows, then the chunks'.

    Those that `graphs` serve, once captured, run as these; the rest kernel by kernel.
    """

    def __init__(
        self,
        stage: DecoderStage,
        link: PipelineLink,
        rotary: ModelRotation,
        attention: tuple[AttentionBackend, ...],
        slots: DecodingSlots,
        feedback: TokenFeedback,
        graphs: SegmentGraphs | None,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._link = link
        self._rotary = rotary
        self._attention = attention
        self._slots = slots
        self._feedback = feedback
        self._graphs = graphs
        self._device = device
        self._block_size = 0
        self._kv_caches: list[torch.Tensor] = []

    @property
    def has_graphs(self) -> bool:
        """Whether there is something to capture."""
        return self._graphs is not None

    def attach(self, pool: DeviceKVPool) -> None:
        """Use `pool` from now on."""
        self._block_size = pool.block_size
        self._kv_caches = [pool.layer(i) for i in range(self._stage.layer_range.size)]

    def detach(self) -> None:
        """Let go of the pool."""
        self._kv_caches = []

    def capture(self, pool: GraphPool, after_capture: Callable[[], None]) -> None:
        """Capture the graphs, if any, over the KV pool in use. Collective over the stage's ranks."""
        if self._graphs is not None:
            self._graphs.capture(self._kv_caches, pool, after_capture)

    def run(self, command: Prefill, requests: dict[int, SequenceRequest]) -> SampledTokens | None:
        """Compute a micro-batch; on the last stage return its tokens, else None.

        They are those of the decode rows, then the first ones of the prompts that end in the micro-batch.
        """
        groups = self._stage.groups
        chunks = command.chunks
        slots = None if command.rows is None else self._slots.step(command.rows)
        prompts = [requests[chunk.seq_id].prompt_token_ids for chunk in chunks]
        batch, places = self._lay_out(chunks, prompts, slots)
        graphs = self._graphs if self._graphs is not None and self._graphs.serves(batch) else None
        attention = graphs.attention if graphs is not None and graphs.attention else self._attention
        for backend in attention:
            backend.plan(batch)
        if groups.is_first_stage:
            hidden = self._stage.embed(self._token_ids(chunks, prompts, slots))
        else:
            hidden = self._link.recv_hidden(places.shape[1])
        rows = self._rows_to_sample(chunks, slots) if groups.is_last_stage else None
        if graphs is not None:
            hidden = graphs.run(hidden, places, attention, rows)
        else:
            rotated = self._rotary.places(*places.unbind())
            hidden = self._stage(hidden, rotated, attention, self._kv_caches, rows)
        sampled = None
        if groups.is_last_stage:
            sampled = self._sample(chunks, hidden, requests, slots)
        else:
            self._link.send_hidden(hidden)
        if slots is not None:
            if not groups.is_last_stage:
                self._feedback.pass_on(slots, None)
            self._slots.advance(slots)
        return sampled

    def _lay_out(
        self, chunks: tuple[PrefillChunk, ...], prompts: list[tuple[int, ...]], slots: StepSlots | None
    ) -> tuple[AttentionBatch, torch.Tensor]:
        """The micro-batch for attention; where its N tokens stand, (4, N) as `ModelRotation.places` takes them."""
        num_rows = 0 if slots is None else len(slots)
        query_lens = np.ones(num_rows + len(chunks), dtype=np.int32)
        query_lens[num_rows:] = [chunk.num_tokens for chunk in chunks]
        starts = np.empty_like(query_lens)
        starts[num_rows:] = [chunk.start for chunk in chunks]
        # What rotary kinds that depend on length go by: the prompt's, or for a row its own so far.
        lengths = np.empty(len(query_lens), dtype=np.int64)
        lengths[num_rows:] = [len(prompt) for prompt in prompts]
        width = max((len(chunk.block_ids) for chunk in chunks), default=0)
        if slots is not None:
            table = self._slots.table
            starts[:num_rows] = table.positions[slots.host]
            lengths[:num_rows] = starts[:num_rows] + 1
            width = max(width, int(starts[:num_rows].max()) // self._block_size + 1)
        tables = np.zeros((len(query_lens), width), dtype=np.int32)
        if slots is not None:
            used = table.blocks[slots.host, :width]
            tables[:num_rows, : used.shape[1]] = used
        for row, chunk in enumerate(chunks, start=num_rows):
            tables[row, : len(chunk.block_ids)] = chunk.block_ids

        rows = np.repeat(np.arange(len(query_lens)), query_lens)
        first = np.cumsum(query_lens) - query_lens
        positions = np.arange(len(rows)) - (first - starts)[rows]
        blocks = tables[rows, positions // self._block_size]
        places = np.stack((positions, lengths[rows], blocks, positions % self._block_size)).astype(np.int64)
        return AttentionBatch(query_lens, starts + query_lens, tables, num_rows), to_device(places, self._device)

    def _token_ids(
        self, chunks: tuple[PrefillChunk, ...], prompts: list[tuple[int, ...]], slots: StepSlots | None
    ) -> torch.Tensor:
        token_ids = to_device(
            [
                token
                for chunk, prompt in zip(chunks, prompts, strict=True)
                for token in prompt[chunk.start : chunk.start + chunk.num_tokens]
            ],
            self._device,
        )
        if slots is None:
            return token_ids
        self._feedback.read(slots.host)
        return torch.cat((self._slots.tokens[slots.index], token_ids))

    def _rows_to_sample(self, chunks: tuple[PrefillChunk, ...], slots: StepSlots | None) -> torch.Tensor:
        """The tokens whose logits are sampled: the decode rows and the last token of each prompt that ends."""
        num_rows = 0 if slots is None else len(slots)
        ends = itertools.accumulate(chunk.num_tokens for chunk in chunks)
        last_tokens = [num_rows + end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last]
        # Where nothing is sampled one token goes on, the same on all ranks of the stage: kernels take no empty tensors,
        # and leaving the rest of the layer out would save little, seldom.
        return to_device([*range(num_rows), *last_tokens] or [0], self._device)

    def _sample(
        self,
        chunks: tuple[PrefillChunk, ...],
        hidden: torch.Tensor,
        requests: dict[int, SequenceRequest],
        slots: StepSlots | None,
    ) -> SampledTokens | None:
        """Sample from the hidden states of `_rows_to_sample`."""
        num_rows = 0 if slots is None else len(slots)
        ends = [requests[chunk.seq_id] for chunk in chunks if chunk.is_last]
        if not ends and slots is None:
            return None
        logits = self._stage.logits(hidden)
        row_tokens = None if slots is None else self._slots.sample(logits[:num_rows], slots)
        if slots is not None:
            # Before the first tokens are sampled: the next step of these rows waits for it.
            self._feedback.pass_on(slots, row_tokens)
        if not ends:
            return row_tokens
        first_tokens = self._slots.sample_first(logits[num_rows:], ends)
        return first_tokens if row_tokens is None else row_tokens.joined(first_tokens)

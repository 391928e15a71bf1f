"""Prefill micro-batches whose layers run as CUDA graphs: one of all, or where attention cannot be captured one a layer.

A layer is a dozen short kernels. To launch them one by one takes the host some 0.6 ms a layer, as long as the device
needs for 256 tokens of a layer of the 70B shape, and longer than it needs for smaller layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from seesaw_ds.model.attention.interface import AttentionBackend, AttentionBatch, FixedAttention
from seesaw_ds.model.decoder import DecoderStage, StageStep
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.worker.graphs import GraphPool

MOST_TOKENS = 2048
"""Larger micro-batches keep the device busy for longer than the host, and would need the memory twice."""


class SegmentGraphs:
    """A stage, for micro-batches of `num_tokens` tokens, as graphs up to its last attention.

        hidden ->  norm, qkv, RoPE  [attention 0]  o, FFN, norm, qkv, RoPE  [attention 1]  ...  o, FFN  -> hidden
        `attention`   ------------------------- one graph --------------------------            - eager -
        without it -- graph 0 ---                  ------- graph 1 -------                      - eager -

    `attention`, one of each kind, are backends whose plans stay in place. Others' kernels and arguments are those of a
    micro-batch's plan: a graph of them would not fit the next, so they run between graphs. What follows the last
    attention is for as many rows as are sampled. Graphs hold the addresses of weights and of KV, which no transition
    moves.
    """

    def __init__(
        self,
        stage: DecoderStage,
        rotary: ModelRotation,
        hidden_size: int,
        num_tokens: int,
        attention: tuple[FixedAttention, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.attention = attention
        self._stage = stage
        self._rotary = rotary
        self._hidden = torch.zeros((num_tokens, hidden_size), dtype=dtype, device=device)
        self._places = torch.zeros((4, num_tokens), dtype=torch.int64, device=device)
        self._buffers = stage.attention_buffers(self._hidden)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._step: StageStep | None = None
        self._residual = self._hidden

    def serves(self, batch: AttentionBatch) -> bool:
        """Whether a micro-batch can run as the graphs; none can before `capture`."""
        is_full = int(batch.query_lens.sum()) == self._hidden.shape[0]
        return bool(self._graphs) and is_full and all(attention.fits(batch) for attention in self.attention)

    def capture(self, kv_caches: Sequence[torch.Tensor], pool: GraphPool, after_capture: Callable[[], None]) -> None:
        """Capture all, over the KV of `kv_caches`, one view a layer. Writes to their first block.

        Collective over the stage's ranks; `after_capture` is what their all-reduce wants called then.
        """
        for buffer in self._buffers:
            buffer.zero_()
        segments = [partial(self._segment, index, kv_caches) for index in range(len(kv_caches))]
        if self.attention:
            for attention in self.attention:
                attention.plan(self._one_chunk(kv_caches[0]))
            segments = [partial(self._all_segments, kv_caches)]
        for segment in segments:
            segment()
        graphs = [pool.capture(segment) for segment in segments]
        after_capture()
        self._graphs = graphs

    def _segment(self, index: int, kv_caches: Sequence[torch.Tensor]) -> None:
        if index == 0:
            self._residual = self._hidden
            self._step = self._stage.step(self._rotary.places(*self._places.unbind()), kv_caches, self._buffers)
        assert self._step is not None
        # What a segment hands to the next stays referenced until that is captured, so its memory is not given away.
        self._residual = self._stage.to_attention(index, self._residual, self._step)

    def _all_segments(self, kv_caches: Sequence[torch.Tensor]) -> None:
        for index in range(len(kv_caches)):
            self._segment(index, kv_caches)
            assert self._step is not None
            self._stage.attend(index, self.attention, self._step)

    def _one_chunk(self, kv_cache: torch.Tensor) -> AttentionBatch:
        """A micro-batch of one prompt's tokens, all of whose blocks are the first."""
        num_tokens, block_size = self._hidden.shape[0], kv_cache.shape[3]
        lens = np.array([num_tokens], dtype=np.int32)
        return AttentionBatch(lens, lens, np.zeros((1, -(-num_tokens // block_size)), dtype=np.int32))

    def run(
        self,
        hidden_NM: torch.Tensor,
        places: torch.Tensor,
        attention: Sequence[AttentionBackend],
        rows_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `DecoderStage.forward`, for a micro-batch that is served; `places` (4, N) as `ModelRotation.places` takes
        them. `attention` is what is planned: `self.attention`, if there is any.
        """
        assert self._step is not None, "capture() comes before run()"
        self._hidden.copy_(hidden_NM)
        self._places.copy_(places)
        for index, graph in enumerate(self._graphs):
            graph.replay()
            if not self.attention:
                self._stage.attend(index, attention, self._step)
        return self._stage.finish(self._residual, self._step, rows_R)

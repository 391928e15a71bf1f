"""One pipeline stage of a Llama-family decoder, in one phase's layout.

Shape letters: N tokens of the batch, R rows that need logits, H local query heads, K local KV heads, D head dim,
M hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from seesaw_ds.layout import Range
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.layers import ColumnLinear, RMSNorm, RowLinear, VocabEmbedding, padded_vocab_size
from seesaw_ds.model.ops.interface import LayerOps, TokenPlaces
from seesaw_ds.parallel.all_reduce import AllReduce
from seesaw_ds.parallel.groups import PhaseGroups
from seesaw_ds.parallel.links import gather_last_dim
from seesaw_ds.shapes import ModelShape


class DecoderLayer(nn.Module):
    """Attention and FFN with their norms; matrices are bound to arena views after construction.

    The fused QKV output is grouped by KV head, ``[q_0 .. q_G-1, k, v]`` for each; gate and up alternate by
    cell. Both are what the re-shard plan's cells hold, so a rank's cells, one after another, are its matrix.
    """

    def __init__(
        self,
        shape: ModelShape,
        groups: PhaseGroups,
        num_cells: int,
        norms: tuple[RMSNorm, RMSNorm],
        ops: LayerOps,
        all_reduce: AllReduce,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._ops = ops
        self._qkv_shape = (shape.num_kv_heads // groups.layout.tp, shape.queries_per_kv_head + 2, shape.head_dim)
        self._num_cells = num_cells
        qkv_size = shape.num_kv_heads * (shape.queries_per_kv_head + 2) * shape.head_dim
        self.input_norm, self.post_attention_norm = norms
        self.qkv = ColumnLinear(shape.hidden_size, qkv_size, groups.tp, dtype)
        self.o = RowLinear(shape.num_heads * shape.head_dim, shape.hidden_size, groups.tp, all_reduce, dtype)
        self.gate_up = ColumnLinear(shape.hidden_size, 2 * shape.intermediate_size, groups.tp, dtype)
        self.down = RowLinear(shape.intermediate_size, shape.hidden_size, groups.tp, all_reduce, dtype)

    def forward(
        self,
        x_NM: torch.Tensor,
        residual_NM: torch.Tensor | None,
        places: TokenPlaces,
        attention: AttentionBackend,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) to (x, residual): the hidden state is their sum, which the next norm takes as it reads them."""
        x_NM, residual_NM = self.input_norm(x_NM, residual_NM)
        x_NM = self._attend(x_NM, places, attention, kv_cache)
        x_NM, residual_NM = self.post_attention_norm(x_NM, residual_NM)
        return self._feed_forward(x_NM), residual_NM

    def _attend(
        self, x_NM: torch.Tensor, places: TokenPlaces, attention: AttentionBackend, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        qkv, _ = self.qkv(x_NM)
        q_NHD = self._ops.rotate_and_store(qkv.view(-1, *self._qkv_shape), places, kv_cache)
        out, _ = self.o(attention.forward(q_NHD, kv_cache).flatten(1))
        return out

    def _feed_forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up(x_NM)
        out, _ = self.down(self._ops.silu_and_mul(gate_up.view(x_NM.shape[0], self._num_cells, 2, -1)))
        return out


class DecoderStage(nn.Module):
    """The layers of one stage; the first stage embeds tokens, the last turns hidden states into logits."""

    def __init__(
        self,
        shape: ModelShape,
        groups: PhaseGroups,
        layers: Range,
        num_cells: int,
        norms: dict[str, RMSNorm],
        ops: LayerOps,
        all_reduce: AllReduce,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.vocab_size = shape.vocab_size
        self.layer_range = layers
        self.layers = nn.ModuleList(
            DecoderLayer(
                shape, groups, num_cells, (norms[f"input.{i}"], norms[f"post_attention.{i}"]), ops, all_reduce, dtype
            )
            for i in layers.indices()
        )
        vocab_size = padded_vocab_size(shape.vocab_size, groups.layout.tp)
        self.embedding: VocabEmbedding | None = None
        if groups.is_first_stage:
            self.embedding = VocabEmbedding(vocab_size, shape.hidden_size, groups.tp, dtype)
        self.norm: RMSNorm | None = None
        self.head: ColumnLinear | None = None
        if groups.is_last_stage:
            self.norm = norms["final"]
            self.head = ColumnLinear(shape.hidden_size, vocab_size, groups.tp, dtype)

    def embed(self, token_ids_N: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, M) of int64 token ids; first stage only."""
        assert self.embedding is not None
        return self.embedding(token_ids_N)

    def forward(
        self,
        hidden_NM: torch.Tensor,
        places: TokenPlaces,
        attention: AttentionBackend,
        kv_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """Run the stage's layers; `kv_caches` are their (blocks, 2, K, block size, D) views, in order."""
        x_NM: torch.Tensor = hidden_NM
        residual_NM: torch.Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x_NM, residual_NM = layer(x_NM, residual_NM, places, attention, kv_cache)
        return x_NM if residual_NM is None else x_NM + residual_NM

    def logits(self, hidden_RM: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the given rows, the same on every rank of the stage; last stage only."""
        assert self.norm is not None and self.head is not None
        x_RM, _ = self.norm(hidden_RM, None)
        local, _ = self.head(x_RM)
        return gather_last_dim(local, self.groups.tp)[:, : self.vocab_size]

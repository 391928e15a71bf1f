"""One pipeline stage of a Llama-family decoder, in one phase's layout.

Shape letters: N tokens of the batch, R rows that need logits, H local query heads, K local KV heads, G query heads
per KV head, D head dim, M hidden size, F local FFN size, C cells that this rank owns of a layer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from seesaw_ds.layout import Range
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.layers import ColumnLinear, RMSNorm, RowLinear, VocabEmbedding, padded_vocab_size
from seesaw_ds.model.rope import RotaryTables
from seesaw_ds.parallel.groups import PhaseGroups
from seesaw_ds.parallel.links import gather_last_dim
from seesaw_ds.shapes import ModelShape


@dataclass(frozen=True)
class Rotation:
    """cos and sin (N, D) of a step's tokens."""

    cos: torch.Tensor
    sin: torch.Tensor


class DecoderLayer(nn.Module):
    """Attention and FFN with their norms; matrices are bound to arena views after construction.

    The fused QKV output is grouped by KV head, ``[q_0 .. q_G-1, k, v]`` for each; gate and up alternate by
    cell. Both are what the re-shard plan's cells hold, so a rank's cells, one after another, are its matrix.
    """

    def __init__(
        self, shape: ModelShape, groups: PhaseGroups, num_cells: int, norms: tuple[RMSNorm, RMSNorm], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_local_kv_heads = shape.num_kv_heads // groups.layout.tp
        self.queries_per_kv_head = shape.queries_per_kv_head
        self.head_dim = shape.head_dim
        self.num_cells = num_cells
        qkv_size = shape.num_kv_heads * (shape.queries_per_kv_head + 2) * shape.head_dim
        self.input_norm, self.post_attention_norm = norms
        self.qkv = ColumnLinear(shape.hidden_size, qkv_size, groups.tp, dtype)
        self.o = RowLinear(shape.num_heads * shape.head_dim, shape.hidden_size, groups.tp, dtype)
        self.gate_up = ColumnLinear(shape.hidden_size, 2 * shape.intermediate_size, groups.tp, dtype)
        self.down = RowLinear(shape.intermediate_size, shape.hidden_size, groups.tp, dtype)

    def forward(
        self, hidden_NM: torch.Tensor, rotation: Rotation, attention: AttentionBackend, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        hidden_NM = hidden_NM + self._attend(self.input_norm(hidden_NM), rotation, attention, kv_cache)
        return hidden_NM + self._feed_forward(self.post_attention_norm(hidden_NM))

    def _attend(
        self, x_NM: torch.Tensor, rotation: Rotation, attention: AttentionBackend, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        num_tokens = x_NM.shape[0]
        qkv, _ = self.qkv(x_NM)
        qkv = qkv.view(num_tokens, self.num_local_kv_heads, self.queries_per_kv_head + 2, self.head_dim)
        q_NHD = qkv[:, :, : self.queries_per_kv_head].reshape(num_tokens, -1, self.head_dim)
        q_NHD = RotaryTables.apply(q_NHD, rotation.cos, rotation.sin)
        k_NKD = RotaryTables.apply(qkv[:, :, -2], rotation.cos, rotation.sin)
        out_NHD = attention.forward(q_NHD, k_NKD, qkv[:, :, -1], kv_cache)
        out, _ = self.o(out_NHD.reshape(num_tokens, -1))
        return out

    def _feed_forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up(x_NM)
        gate_up = gate_up.view(x_NM.shape[0], self.num_cells, 2, -1)
        x_NF = (F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]).reshape(x_NM.shape[0], -1)
        out, _ = self.down(x_NF)
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
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.vocab_size = shape.vocab_size
        self.layer_range = layers
        self.layers = nn.ModuleList(
            DecoderLayer(shape, groups, num_cells, (norms[f"input.{i}"], norms[f"post_attention.{i}"]), dtype)
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
        self, hidden_NM: torch.Tensor, rotation: Rotation, attention: AttentionBackend, kv_caches: list[torch.Tensor]
    ) -> torch.Tensor:
        """Run the stage's layers; `kv_caches` are their (blocks, 2, K, block size, D) views, in order."""
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_NM = layer(hidden_NM, rotation, attention, kv_cache)
        return hidden_NM

    def logits(self, hidden_RM: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the given rows, the same on every rank of the stage; last stage only."""
        assert self.norm is not None and self.head is not None
        local, _ = self.head(self.norm(hidden_RM))
        return gather_last_dim(local, self.groups.tp)[:, : self.vocab_size]

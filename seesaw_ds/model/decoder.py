"""One pipeline stage of a decoder, in one phase's layout: Llama's, with what other families have in its places.

Shape letters: N tokens of the batch, R rows that need logits, H local query heads, K local KV heads, D head dim,
M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.experts import Experts
from seesaw_ds.model.layers import ColumnLinear, RowLinear, VocabEmbedding, bind, padded_vocab_size
from seesaw_ds.model.norms import AddResidual, HeadNorm, OutputNorm, OutputScale, ProjectionNorm, RMSNorm
from seesaw_ds.model.ops.interface import LayerOps, TokenPlaces
from seesaw_ds.parallel.all_reduce import AllReduce
from seesaw_ds.parallel.groups import PhaseGroups
from seesaw_ds.parallel.links import gather_last_dim
from seesaw_ds.shapes import ModelShape


class FeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))``; gate and up alternate by cell."""

    def __init__(
        self,
        shape: ModelShape,
        groups: PhaseGroups,
        num_cells: int,
        ops: LayerOps,
        all_reduce: AllReduce,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._num_cells = num_cells
        self._ops = ops
        self.gate_up = ColumnLinear(shape.hidden_size, 2 * shape.intermediate_size, groups.tp, ops.linear, dtype)
        self.down = RowLinear(
            shape.intermediate_size, shape.hidden_size, groups.tp, ops.linear_all_reduce, all_reduce, dtype
        )

    def bind(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Take arena views, both (rows, M)."""
        bind(self.gate_up, gate_up)
        bind(self.down, down.t())

    def forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        out, _ = self.down(self._ops.linear_act_and_mul(x_NM, self.gate_up.weight, self._num_cells))
        return out


@dataclass(frozen=True)
class StageStep:
    """What the layers of a stage have in a step, beside hidden states.

    places     for each of the shape's attention kinds
    kv_caches  the layers' (blocks, 2, K, block size, D) views, in order
    queries    (N, H, D), written by a layer for its attention
    attended   (N, H, D), what attention makes of them; the next layer's takes its place
    """

    places: Sequence[TokenPlaces]
    kv_caches: Sequence[torch.Tensor]
    queries: torch.Tensor
    attended: torch.Tensor


class DecoderLayer(nn.Module):
    """Attention and FFN with their norms; matrices are bound to arena views after construction.

    The fused QKV output is grouped by KV head, ``[q_0 .. q_G-1, k, v]`` for each, and gate and up alternate by
    cell. Both are what the re-shard plan's cells hold, so a rank's cells, one after another, are its matrix.
    `replicated` has the tensors of `replicated_tensors`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer: int,
        groups: PhaseGroups,
        num_cells: int,
        replicated: Mapping[str, torch.Tensor],
        ops: LayerOps,
        all_reduce: AllReduce,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._ops = ops
        self._qkv_shape = (shape.num_kv_heads // groups.layout.tp, shape.queries_per_kv_head + 2, shape.head_dim)
        qkv_size = shape.num_kv_heads * (shape.queries_per_kv_head + 2) * shape.head_dim
        self.qkv = ColumnLinear(shape.hidden_size, qkv_size, groups.tp, ops.linear, dtype)
        if shape.family.has_qkv_bias:
            bias = replicated[f"qkv_bias.{layer}"].chunk(groups.layout.tp)[groups.coords.tp]
            self.qkv.bias = nn.Parameter(bias, requires_grad=False)
        self.o = RowLinear(
            shape.num_heads * shape.head_dim, shape.hidden_size, groups.tp, ops.linear_all_reduce, all_reduce, dtype
        )
        self.ffn: FeedForward | Experts
        if shape.num_experts:
            self.ffn = Experts(shape, replicated[f"router.{layer}"], num_cells, ops, all_reduce)
        else:
            self.ffn = FeedForward(shape, groups, num_cells, ops, all_reduce, dtype)

        self.before_attention = _norm_before(shape, replicated.get(f"before_attention.{layer}"), ops)
        self.after_attention = _norm_after(shape, replicated.get(f"after_attention.{layer}"), ops)
        self.before_ffn = _norm_before(shape, replicated.get(f"before_ffn.{layer}"), ops)
        self.after_ffn = _norm_after(shape, replicated.get(f"after_ffn.{layer}"), ops)
        self.qk_norm = _qk_norm(shape, layer, groups, replicated, ops, all_reduce)

    def to_attention(
        self,
        x_NM: torch.Tensor,
        residual_NM: torch.Tensor | None,
        places: TokenPlaces,
        kv_cache: torch.Tensor,
        q_NHD: torch.Tensor,
    ) -> torch.Tensor:
        """Write the queries to `q_NHD`, keys and values to the cache, and return the residual.

        The hidden state is x + residual, which the norm takes as it reads them.
        """
        x_NM, residual_NM = self.before_attention(x_NM, residual_NM)
        qkv, _ = self.qkv(x_NM)
        qkv = self.qk_norm(qkv.view(-1, *self._qkv_shape))
        self._ops.rotate_and_store(qkv, places, kv_cache, q_NHD)
        return residual_NM

    def from_attention(
        self, attended_NHD: torch.Tensor, residual_NM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows attention: (x, residual), whose sum is the hidden state."""
        out_NM, _ = self.o(attended_NHD.flatten(1))
        x_NM, residual_NM = self.before_ffn(self.after_attention(out_NM), residual_NM)
        return self.after_ffn(self.ffn(x_NM)), residual_NM


def _norm_before(shape: ModelShape, weight: torch.Tensor | None, ops: LayerOps) -> RMSNorm | AddResidual:
    return AddResidual() if weight is None else RMSNorm(weight, shape.rms_norm_eps, ops)


def _norm_after(shape: ModelShape, weight: torch.Tensor | None, ops: LayerOps) -> nn.Module:
    if weight is not None:
        return OutputNorm(weight, shape.rms_norm_eps, ops)
    return nn.Identity() if shape.residual_scale == 1.0 else OutputScale(shape.residual_scale)


def _qk_norm(
    shape: ModelShape,
    layer: int,
    groups: PhaseGroups,
    replicated: Mapping[str, torch.Tensor],
    ops: LayerOps,
    all_reduce: AllReduce,
) -> nn.Module:
    if shape.family.qk_norm is None:
        return nn.Identity()
    query, key = replicated[f"query.{layer}"], replicated[f"key.{layer}"]
    if shape.family.qk_norm == "head":
        return HeadNorm(query, key, shape.rms_norm_eps, ops)
    heads = split_evenly(shape.num_kv_heads, groups.layout.tp)[groups.coords.tp]
    by_kv_head = (shape.num_kv_heads, -1, shape.head_dim)
    local_query, local_key = (weight.view(by_kv_head)[heads.start : heads.stop] for weight in (query, key))
    return ProjectionNorm(local_query, local_key, query.numel(), key.numel(), shape.rms_norm_eps, all_reduce)


class DecoderStage(nn.Module):
    """The layers of one stage; the first stage embeds tokens, the last turns hidden states into logits."""

    def __init__(
        self,
        shape: ModelShape,
        groups: PhaseGroups,
        layers: Range,
        num_cells: int,
        replicated: Mapping[str, torch.Tensor],
        ops: LayerOps,
        all_reduce: AllReduce,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.vocab_size = shape.vocab_size
        self.layer_range = layers
        self.layers = nn.ModuleList(
            DecoderLayer(shape, i, groups, num_cells, replicated, ops, all_reduce, dtype) for i in layers.indices()
        )
        self._kinds = [shape.layer_kind(i) for i in layers.indices()]
        self._heads = (shape.num_heads // groups.layout.tp, shape.head_dim)
        vocab_size = padded_vocab_size(shape.vocab_size, groups.layout.tp * num_cells)
        self.embedding: VocabEmbedding | None = None
        if groups.is_first_stage:
            self.embedding = VocabEmbedding(vocab_size, shape.hidden_size, groups.tp, dtype)
        # Rounded as Gemma was trained with: in bfloat16 the square root of 3072 is 55.5.
        self._embedding_scale = torch.tensor(shape.embedding_scale, dtype=dtype).item()
        self.norm: RMSNorm | None = None
        self.head: ColumnLinear | None = None
        if groups.is_last_stage:
            self.norm = RMSNorm(replicated["final"], shape.rms_norm_eps, ops)
            self.head = ColumnLinear(shape.hidden_size, vocab_size, groups.tp, ops.linear, dtype)
        self._logit_scale = shape.logit_scale
        self._logit_soft_cap = shape.logit_soft_cap

    def embed(self, token_ids_N: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, M) of int64 token ids; first stage only."""
        assert self.embedding is not None
        hidden_NM = self.embedding(token_ids_N)
        return hidden_NM if self._embedding_scale == 1.0 else hidden_NM * self._embedding_scale

    def forward(
        self,
        hidden_NM: torch.Tensor,
        places: Sequence[TokenPlaces],
        attention: Sequence[AttentionBackend],
        kv_caches: Sequence[torch.Tensor],
        rows_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the stage's layers; the hidden states (R, M) of the tokens `rows_R` of the batch, or (N, M) of all.

        `places` and `attention` have one for each of the shape's attention kinds; `kv_caches` as in `StageStep`.
        `rows_R` int64, at least one, is for the last stage only: its last layer computes what follows attention for
        them alone. Keys and values are written for all tokens, and all attend, for the attention of fewer would need a
        plan of its own.
        """
        step = self.step(places, kv_caches, self.attention_buffers(hidden_NM))
        flow_NM = hidden_NM
        for index in range(len(self.layers)):
            flow_NM = self.to_attention(index, flow_NM, step)
            self.attend(index, attention, step)
        return self.finish(flow_NM, step, rows_R)

    def _layer(self, index: int) -> DecoderLayer:
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def step(
        self,
        places: Sequence[TokenPlaces],
        kv_caches: Sequence[torch.Tensor],
        buffers: tuple[torch.Tensor, torch.Tensor],
    ) -> StageStep:
        """A step over the KV of all layers, with `buffers` of `attention_buffers`."""
        assert len(kv_caches) == len(self.layers), (len(kv_caches), len(self.layers))
        return StageStep(places, kv_caches, *buffers)

    def attention_buffers(self, hidden_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the queries of a step's tokens, and for what attention makes of them."""
        shape = (hidden_NM.shape[0], *self._heads)
        return hidden_NM.new_empty(shape), hidden_NM.new_empty(shape)

    def to_attention(self, index: int, flow_NM: torch.Tensor, step: StageStep) -> torch.Tensor:
        """Go on to the attention of layer `index` of the stage: from its start, or from the attention before.

        `flow_NM` are the stage's hidden states or, past its first attention, the residual that this has returned.
        It may be overwritten.
        """
        x_NM, residual_NM = flow_NM, None
        if index:
            x_NM, residual_NM = self._layer(index - 1).from_attention(step.attended, flow_NM)
        places, kv_cache = step.places[self._kinds[index]], step.kv_caches[index]
        return self._layer(index).to_attention(x_NM, residual_NM, places, kv_cache, step.queries)

    def attend(self, index: int, attention: Sequence[AttentionBackend], step: StageStep) -> None:
        """The attention of layer `index` of the stage."""
        attention[self._kinds[index]].forward(step.queries, step.kv_caches[index], step.attended)

    def finish(self, residual_NM: torch.Tensor, step: StageStep, rows_R: torch.Tensor | None) -> torch.Tensor:
        """What follows the last attention; `rows_R` and the result as in `forward`."""
        assert rows_R is None or self.groups.is_last_stage, "the next stage needs all tokens"
        attended_NHD = step.attended
        if rows_R is not None:
            attended_NHD, residual_NM = attended_NHD[rows_R], residual_NM[rows_R]
        x_NM, residual_NM = self._layer(-1).from_attention(attended_NHD, residual_NM)
        return x_NM + residual_NM

    def linear_weights(self) -> list[torch.Tensor]:
        """Those of the layers' dense products and of the LM head, all (out, in)."""
        return [module.weight for module in self.modules() if isinstance(module, ColumnLinear | RowLinear)]

    def logits(self, hidden_RM: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the given rows, the same on every rank of the stage; last stage only."""
        assert self.norm is not None and self.head is not None
        x_RM, _ = self.norm(hidden_RM, None)
        local, _ = self.head(x_RM)
        logits_RV = gather_last_dim(local, self.groups.tp)[:, : self.vocab_size]
        if self._logit_scale != 1.0:
            logits_RV = logits_RV * self._logit_scale
        if self._logit_soft_cap is not None:
            logits_RV = self._logit_soft_cap * torch.tanh(logits_RV / self._logit_soft_cap)
        return logits_RV

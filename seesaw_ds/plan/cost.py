"""How long one pipeline stage takes for one micro-batch, and how long data takes on the links.

It starts from the terms of the paper's appendix A (`seesaw_ds.plan.appendix_a`) and adds what they leave out: the
efficiency of kernels, attention by chunk, the latency of all-reduces, launches, the LM head, sends and copies.

A matrix product is bound by memory or by compute, and near the ridge of the roofline by both: its seconds are the
4-norm of the two bounds, so that its utilisation of the peak saturates as the tokens grow::

    tokens / tokens at the ridge    0.25   0.5    1     2     4
    seconds / larger bound          1.00   1.02   1.19  1.02  1.00

Of a prefill micro-batch only the rows that are sampled leave the last stage. So the model's last layer has all tokens
in the QKV product and attention, and the rows alone in the o projection, the FFN and their all-reduces. With 80 layers
that is about 1% of prefill. Norms and activations, a few percent of a layer, are counted for all tokens there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from seesaw_ds.errors import UserError
from seesaw_ds.layout import ParallelLayout
from seesaw_ds.plan.hardware import HardwareProfile, Points, interpolate
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape

# Reads and writes of activations per token and layer outside matrix products and attention, in vectors: residual
# additions and norms touch 8 of the hidden size (whole on every rank), RoPE and SiLU 3 of the sharded widths.
_HIDDEN_PASSES = 8
_SHARDED_PASSES = 3


class StepWork(NamedTuple):
    """What one micro-batch asks of every layer.

    num_tokens       through the matrices
    prefill_pairs    (query, key) pairs of prompt tokens, by causal attention
    prefill_context  KV tokens that prefill chunks read: each chunk's start and own length
    decode_context   KV tokens that decode rows read
    num_rows         tokens whose logits are sampled
    """

    num_tokens: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    decode_context: int = 0
    num_rows: int = 0

    def divided_by(self, parts: int) -> StepWork:
        """An equal part of the work, rounded up."""
        return StepWork(*(-(-value // parts) for value in self)) if parts > 1 else self

    def times(self, count: int) -> StepWork:
        """As much work `count` times."""
        return StepWork(*(count * value for value in self)) if count > 1 else self


def chunk_work(start: int, num_tokens: int, is_last: bool) -> StepWork:
    """The work of prompt tokens ``start .. start + num_tokens``; the last chunk of a prompt samples a token."""
    pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return StepWork(num_tokens, pairs, start + num_tokens, 0, int(is_last))


def add_work(*parts: StepWork) -> StepWork:
    """The work of all parts in one micro-batch."""
    return StepWork(*map(sum, zip(*parts, strict=True)))


class _TokenSeconds(NamedTuple):
    """Seconds of one layer on one device that depend on the number of tokens alone: all, and a part of them.

    after_attention    o projection and FFN, with their all-reduces
    """

    layer: float
    after_attention: float


@dataclass(frozen=True)
class CostModel:
    """Seconds of one layout of a model on one kind of machine. Pure arithmetic; equal calls give equal answers.

    `is_ours`: of this engine. The model's last layer goes on after attention with the sampled rows alone, and steps of
    few rows have kernels of its own. Others, vLLM among them, run all layers for all tokens and pick the rows out after
    that.
    """

    shape: ModelShape
    hardware: HardwareProfile
    layout: ParallelLayout
    dtype: str
    is_ours: bool = True

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one weight, activation or KV number."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each pipeline stage."""
        return tuple(layers.size for layers in self.layout.stage_layers(self.shape.num_layers))

    @cached_property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's KV, all layers and heads."""
        return self.shape.kv_block_bytes(self.shape.num_layers, self.shape.num_kv_heads, 1, self.dtype)

    @cached_property
    def rank_kv_token_bytes(self) -> float:
        """Bytes of one token's KV on a rank of the stage that has most layers."""
        return self.kv_token_bytes * max(self.stage_layers) / self.shape.num_layers / self.layout.tp

    @cached_property
    def _kv_bandwidth(self) -> float:
        return self.hardware.kv_bandwidth or self._bandwidth

    @cached_property
    def _element_bandwidth(self) -> float:
        return self.hardware.element_bandwidth or self._bandwidth

    @cached_property
    def _flops(self) -> float:
        peak = self.hardware.flops.get(self.dtype)
        if peak is None:
            known = ", ".join(self.hardware.flops)
            raise UserError(f"dtype={self.dtype!r}: hardware {self.hardware.name!r} has flops for {known} only")
        return peak

    @cached_property
    def _bandwidth(self) -> float:
        return self.hardware.memory_bandwidth * self.hardware.memory_efficiency

    @cached_property
    def _attention_flops(self) -> float:
        return self._flops * self.hardware.attention_efficiency

    @cached_property
    def _pair_flops(self) -> float:
        """Of one (query, key) pair in one layer on one device."""
        return 4 * self.shape.num_heads * self.shape.head_dim / self.layout.tp

    @cached_property
    def _layer_kv_bytes(self) -> float:
        """Of one token in one layer on one device."""
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * self.itemsize / self.layout.tp

    @cached_property
    def _layer_parameters(self) -> float:
        return self.shape.layer_parameters / self.layout.tp

    @cached_property
    def _qkv_parameters(self) -> float:
        num_heads = self.shape.num_heads + 2 * self.shape.num_kv_heads
        return num_heads * self.shape.head_dim * self.shape.hidden_size / self.layout.tp

    # A simulation asks for the same few numbers of tokens and rows over and over.

    @cached_property
    def _seconds_by_tokens(self) -> dict[int, _TokenSeconds]:
        return {}

    @cached_property
    def _head_by_rows(self) -> dict[int, float]:
        return {}

    @cached_property
    def _row_linear(self) -> Points:
        """Of this engine's kernels for few rows; none where there are not any."""
        return (self.hardware.row_linear or {}).get(self.dtype, ()) if self.is_ours else ()

    def _has_own_kernels(self, num_tokens: int) -> bool:
        return len(self._row_linear) > 0 and num_tokens <= self._row_linear[-1][0]

    def linear_seconds(self, parameters: float, num_tokens: int) -> float:
        """One pass of `num_tokens` through `parameters` weights, which one device holds."""
        if self._has_own_kernels(num_tokens):
            return parameters * interpolate(self._row_linear, num_tokens)
        if self.hardware.linear is not None and self.dtype in self.hardware.linear:
            return parameters * interpolate(self.hardware.linear[self.dtype], num_tokens)
        memory = parameters * self.itemsize / self._bandwidth
        compute = 2 * parameters * num_tokens / (self._flops * self.hardware.gemm_efficiency)
        larger, smaller = (memory, compute) if memory > compute else (compute, memory)
        ratio = smaller / larger
        return larger * float((1 + ratio**4) ** 0.25)

    def decode_work(self, contexts: Sequence[int]) -> StepWork:
        """The work of a decode step whose rows read so many KV tokens each."""
        read = len(contexts) * max(contexts, default=0) if self.hardware.pads_decode else sum(contexts)
        return StepWork(num_tokens=len(contexts), decode_context=read, num_rows=len(contexts))

    def attention_seconds(self, work: StepWork) -> float:
        """Attention of one layer on one device: prefill chunks and decode rows are kernels of their own."""
        seconds = 0.0
        if work.prefill_pairs:
            compute = work.prefill_pairs * self._pair_flops / self._attention_flops
            seconds += max(compute, work.prefill_context * self._layer_kv_bytes / self._bandwidth)
        if work.decode_context:
            compute = work.decode_context * self._pair_flops / self._attention_flops
            seconds += max(compute, work.decode_context * self._layer_kv_bytes / self._kv_bandwidth)
        return seconds

    def element_bytes(self, num_tokens: int) -> float:
        """Bytes that one layer reads and writes on one device outside matrix products and attention."""
        shape = self.shape
        sharded = shape.intermediate_size + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        passes = _HIDDEN_PASSES * shape.hidden_size + _SHARDED_PASSES * sharded / self.layout.tp
        return num_tokens * passes * self.itemsize

    def layer_seconds(self, work: StepWork) -> float:
        """One decoder layer, its two all-reduces included."""
        tokens = self._token_seconds(work.num_tokens)
        return tokens.layer + self.attention_seconds(work)

    def _token_seconds(self, num_tokens: int) -> _TokenSeconds:
        seconds = self._seconds_by_tokens.get(num_tokens)
        if seconds is None:
            qkv = self.linear_seconds(self._qkv_parameters, num_tokens)
            rest = self.linear_seconds(self._layer_parameters - self._qkv_parameters, num_tokens)
            message = num_tokens * self.shape.hidden_size * self.itemsize
            has_few_rows = self._has_own_kernels(num_tokens)
            all_reduce = self.hardware.all_reduce_seconds(message, self.layout.tp, has_few_rows)
            after_attention = rest + 2 * all_reduce
            element = self.element_bytes(num_tokens) / self._element_bandwidth
            overhead = self.hardware.layer_seconds
            if has_few_rows and self.hardware.row_layer_seconds is not None:
                overhead = self.hardware.row_layer_seconds
            seconds = _TokenSeconds(qkv + after_attention + element + overhead, after_attention)
            self._seconds_by_tokens[num_tokens] = seconds
        return seconds

    def head_seconds(self, num_rows: int) -> float:
        """The LM head for `num_rows` tokens, on the last stage."""
        if num_rows == 0:
            return 0.0
        seconds = self._head_by_rows.get(num_rows)
        if seconds is None:
            parameters = self.shape.vocab_size * self.shape.hidden_size / self.layout.tp
            seconds = self._head_by_rows[num_rows] = self.linear_seconds(parameters, num_rows)
        return seconds

    def end_seconds(self, work: StepWork) -> float:
        """What the last stage takes beside its layers: the LM head, less what the last layer is spared.

        May be negative. A decode step is spared nothing, for all its tokens are rows.
        """
        seconds = self.head_seconds(work.num_rows)
        if self.is_ours:
            rows = self._token_seconds(max(1, work.num_rows))  # one goes on where none is sampled
            seconds -= self._token_seconds(work.num_tokens).after_attention - rows.after_attention
        return seconds

    def stage_seconds(self, work: StepWork) -> list[float]:
        """Each stage's seconds for the micro-batch; the last one's with `end_seconds`."""
        layer = self.layer_seconds(work)
        seconds = [num_layers * layer for num_layers in self.stage_layers]
        seconds[-1] += self.end_seconds(work)
        return [max(once, self.hardware.least_step_seconds) for once in seconds]

    def round_seconds(self, num_rows: int, num_context_tokens: float) -> float:
        """Until each of `num_rows` sequences has its next token, with nothing but decode steps in the pipeline.

        They read `num_context_tokens` KV tokens together, and are in as many groups as the layout has stages::

            2 stages   stage 0   g0 g1 g0 g1     bound by the slowest stage, here, or by the way of a group through
                       stage 1      g0 g1 g0     all stages and back
        """
        num_groups = min(self.layout.pp, num_rows)
        work = self.group_work(-(-num_rows // num_groups), num_context_tokens / num_groups)
        return num_groups * self.step_interval(work, num_groups)

    def group_work(self, num_rows: int, num_context_tokens: float) -> StepWork:
        """The work of a decode step whose rows read so many KV tokens together."""
        return StepWork(num_tokens=num_rows, decode_context=round(num_context_tokens), num_rows=num_rows)

    def step_interval(self, work: StepWork, num_groups: int) -> float:
        """Between the ends of two steps that are alike, of `num_groups` groups that step in turn."""
        stages = self.stage_seconds(work)
        sends = (len(stages) - 1) * self.send_seconds(work.num_tokens)
        return max(max(stages), (sum(stages) + sends + self.sample_seconds(work.num_rows)) / num_groups)

    def send_seconds(self, num_tokens: int) -> float:
        """From one stage to the next: the activations of `num_tokens`; each of the TP ranks sends all of them."""
        num_bytes = num_tokens * self.shape.hidden_size * self.itemsize
        return self.hardware.send_seconds + num_bytes / self.hardware.send_bandwidth

    def sample_seconds(self, num_rows: int = 0) -> float:
        """From the last stage's end until the tokens of so many rows are known to the first stage and the scheduler."""
        return self.hardware.step_seconds + num_rows * self.hardware.row_seconds + self.feedback_seconds()

    def feedback_seconds(self) -> float:
        """From the last stage to the first: the sampled tokens."""
        return self.hardware.send_seconds if self.layout.pp > 1 else 0.0

"""The performance model of the Seesaw paper, appendix A, term by term as written there.

It knows no latency, no efficiency and no pipeline fill: a lower bound in form, kept to compare `seesaw_ds.plan.cost`
with and to show orders of magnitude. Every function is for one layer; b is the batch in sequences, s their average
length in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.shapes import ModelShape

_ITEMSIZE = 2  # the paper's weights, activations and KV are 16-bit


class LayerTerms(NamedTuple):
    """Seconds of one layer's parts on one device that holds the whole layer."""

    linear_memory: float
    linear_compute: float
    attention_memory: float
    attention_compute: float
    network: float


class Rates(NamedTuple):
    """Peak rates of one device: FLOP/s, bytes/s of memory, and bytes/s of an all-reduce over `tp` devices."""

    flops: float
    memory_bandwidth: float
    all_reduce_bandwidth: Callable[[int], float]


def layer_terms(shape: ModelShape, rates: Rates, phase: Phase, b: float, s: float, tp: int) -> LayerTerms:
    """The table of terms, by phase. The network term is 0 without tensor parallelism."""
    parameters = shape.layer_parameters
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tokens = b * s if phase is Phase.PREFILL else b
    if phase is Phase.PREFILL:
        attention_bytes = _ITEMSIZE * b * s * (heads + 2 * kv_heads) * dim
        attention_flops = 2 * b * heads * s * s * dim
    else:
        attention_bytes = 2 * _ITEMSIZE * b * s * kv_heads * dim
        attention_flops = 2 * b * heads * s * dim
    network = 2 * _ITEMSIZE * tokens * heads * dim / rates.all_reduce_bandwidth(tp) if tp > 1 else 0.0
    return LayerTerms(
        linear_memory=_ITEMSIZE * parameters / rates.memory_bandwidth,
        linear_compute=2 * parameters * tokens / rates.flops,
        attention_memory=attention_bytes / rates.memory_bandwidth,
        attention_compute=attention_flops / rates.flops,
        network=network,
    )


def seconds_per_sequence(shape: ModelShape, terms: LayerTerms, layout: ParallelLayout, b: float) -> float:
    """The inverse of the throughput: seconds of a phase's pass over a batch of `b`, for each sequence in it."""
    devices = layout.world_size
    linear = max(terms.linear_memory / layout.tp, terms.linear_compute / devices)
    attention = max(terms.attention_memory, terms.attention_compute) / devices
    return shape.num_layers / b * (linear + attention + terms.network / (layout.pp * layout.dp))


def max_batch(shape: ModelShape, memory_bytes: float, layout: ParallelLayout, s: float) -> float:
    """The most sequences of `s` tokens whose KV fits beside the weights; 0 or less when the weights do not fit."""
    room = memory_bytes * layout.tp * layout.pp - _ITEMSIZE * shape.num_layers * shape.layer_parameters
    return layout.dp * room / (2 * _ITEMSIZE * shape.num_layers * shape.num_kv_heads * shape.head_dim * s)

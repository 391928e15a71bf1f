"""The least time that a batch can take: a phase-separated run with free communication (paper, appendix A).

Prefill is compute: every parameter once for each token, and causal attention. Decode, step by step with all sequences
together, is the larger of reading the weights and computing, then reading the KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import DTYPE_BYTES, ModelShape


class Machine(NamedTuple):
    """Peak rates of one device: FLOP/s and bytes/s."""

    flops_per_second: float
    bytes_per_second: float


class Utilisation(NamedTuple):
    """Shares of the devices' peak in the seconds of each phase: model FLOPs, and bytes of weights and KV read."""

    prefill_flops: float
    decode_flops: float
    decode_bytes: float


def _parameters(shape: ModelShape) -> int:
    """Parameters that every decoded token passes through: the layers and the LM head."""
    return shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size


def prefill_flops(shape: ModelShape, input_tokens: int) -> float:
    """FLOPs of one prompt: twice the layers' parameters a token, and attention to half the prompt on average."""
    linear = 2 * shape.num_layers * shape.layer_parameters * input_tokens
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * input_tokens**2
    return linear + attention


def decode_flops(shape: ModelShape, length: RequestLength) -> float:
    """FLOPs of one request's output tokens after the first, which prefill gives."""
    steps = length.output_tokens - 1
    context = length.input_tokens + length.output_tokens / 2
    return steps * (2 * _parameters(shape) + 4 * shape.num_layers * shape.num_heads * shape.head_dim * context)


def utilisation(
    shape: ModelShape,
    lengths: Sequence[RequestLength],
    machine: Machine,
    num_devices: int,
    prefill_seconds: float,
    decode_seconds: float,
    num_decode_steps: int,
    num_decode_rows: int,
    dtype: str = "bfloat16",
) -> Utilisation:
    """How much of the devices' peak each phase reached. Every decode step reads the weights once, over all ranks.

    Of the output tokens `num_decode_rows` were made by decode steps, and the others rode in prefill; both are taken
    to be of sequences of average length.
    """
    peak = machine.flops_per_second * num_devices
    num_rows = sum(length.output_tokens - 1 for length in lengths)
    share = min(1.0, num_decode_rows / num_rows) if num_rows else 0.0
    decode = sum(decode_flops(shape, length) for length in lengths)
    prefill = sum(prefill_flops(shape, length.input_tokens) for length in lengths) + (1 - share) * decode
    weight_bytes = num_decode_steps * _parameters(shape) * DTYPE_BYTES[dtype]
    decode_bytes = weight_bytes + share * _decode_kv_bytes(shape, lengths, dtype)
    return Utilisation(
        prefill / (peak * prefill_seconds) if prefill_seconds else 0.0,
        share * decode / (peak * decode_seconds) if decode_seconds else 0.0,
        decode_bytes / (machine.bytes_per_second * num_devices * decode_seconds) if decode_seconds else 0.0,
    )


def _decode_kv_bytes(shape: ModelShape, lengths: Sequence[RequestLength], dtype: str) -> float:
    """KV read by all decode steps: each token reads its sequence so far."""
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]
    contexts = ((length.output_tokens - 1) * (length.input_tokens + length.output_tokens / 2) for length in lengths)
    return token_bytes * sum(contexts)


def roofline_seconds(
    shape: ModelShape, lengths: Sequence[RequestLength], machine: Machine, num_devices: int, dtype: str = "bfloat16"
) -> float:
    """Seconds of the whole batch at peak rates, with room for all its KV."""
    flops = machine.flops_per_second * num_devices
    bandwidth = machine.bytes_per_second * num_devices
    itemsize = DTYPE_BYTES[dtype]
    prefill = sum(prefill_flops(shape, length.input_tokens) for length in lengths) / flops
    weight_seconds = _parameters(shape) * itemsize / bandwidth
    token_seconds = 2 * _parameters(shape) / flops
    steps = 0.0
    running = len(lengths)
    outputs = sorted(length.output_tokens - 1 for length in lengths)
    done = 0
    for output in outputs:
        steps += (output - done) * max(weight_seconds, running * token_seconds)
        done = output
        running -= 1
    return prefill + steps + _decode_kv_bytes(shape, lengths, dtype) / bandwidth

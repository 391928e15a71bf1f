"""The sampler's random numbers: a pure function of (seed, output position, token id), with no state to carry.

A generator with state would tie a sequence's tokens to the steps that were run before, and so to the batch, the
layout and every eviction. Here each (seed, position) names a SplitMix64 stream (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), and token ids 2i and 2i+1 take the low and the high half of
its i-th output. Integer tensor operations wrap alike on CPU and CUDA, so the bits are the same on both.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "token_bits reads an int64 as (low half, high half)"


def _as_int64(value: int) -> int:
    """The signed integer with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_INCREMENT = _as_int64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _as_int64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _as_int64(0x94D049BB133111EB)

# A draw is bits / 2**31 with 31 bits; the clamp keeps the largest float32 below one from rounding up to one.
_BITS_MASK = 0x7FFFFFFF
_BITS_SCALE = 2.0**-31
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def seed_as_int64(seed: int) -> int:
    """Fold a seed of any size into what an int64 tensor holds; seeds that agree modulo 2**64 are the same seed."""
    return _as_int64(seed)


def _xor_shift_right(z: Tensor, shift: int) -> Tensor:
    # torch shifts int64 arithmetically: the mask drops the copies of the sign bit.
    return z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))


def _mix64(z: Tensor) -> Tensor:
    z = _xor_shift_right(z, 30) * _MULTIPLIER_1
    z = _xor_shift_right(z, 27) * _MULTIPLIER_2
    return _xor_shift_right(z, 31)


def splitmix64(state: Tensor, index: Tensor) -> Tensor:
    """Output number `index` (0-based) of the SplitMix64 generators that start at `state`.

    Both are int64 and broadcast against each other; the result has the 64 output bits in int64.
    """
    return _mix64(state + (index + 1) * _INCREMENT)


def stream_states(seeds: Tensor, positions: Tensor) -> Tensor:
    """The starting state of each (seed, output position)'s stream. All are [rows] int64."""
    first = torch.zeros((), dtype=torch.int64, device=seeds.device)
    return splitmix64(splitmix64(seeds, first), positions)


def token_bits(states: Tensor, vocab_size: int) -> Tensor:
    """32 random bits for every token id: [rows, vocab_size] int32 from [rows] int64 stream states."""
    outputs = torch.arange((vocab_size + 1) // 2, dtype=torch.int64, device=states.device)
    return splitmix64(states[:, None], outputs).view(torch.int32)[:, :vocab_size]


def gumbel_noise(states: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, one draw per token id: [rows, vocab_size] float32, always finite.

    The argmax of logits plus this noise is a draw from the softmax of the logits. Written as -log(-log(1 - u)): the
    large values, which decide, come from small u, where float32 is fine-grained, so the tail reaches 22.
    """
    u = (token_bits(states, vocab_size) & _BITS_MASK).to(torch.float32).add_(0.5).mul_(_BITS_SCALE)
    u.clamp_(max=_LARGEST_BELOW_ONE)
    return u.neg_().log1p_().neg_().log_().neg_()

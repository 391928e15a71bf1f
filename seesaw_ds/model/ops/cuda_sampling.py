"""`TorchDraw` as two Triton kernels, one program a row: what the filters leave, and the draw.

The filters compare with one value, the least that they keep, so it is searched for, not sorted for: floats are
ordered as the integers of their bits, and the range of these that holds the value shrinks to a quarter with each
pass over the row. Sums of the integer weights are the same in any order, so the value is that of
`sampling_filters`, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from seesaw_ds.model.sampling_state import GREEDY_BELOW, BatchPlan, RowParams

_BLOCK = 4096
"""Tokens that a program works on at once."""
_NUM_WARPS = 16


class CudaDraw:
    """For NVIDIA devices that Triton compiles for; does what `TorchDraw` does, in the place of some 25 kernels."""

    def __call__(self, logits: Tensor, params: RowParams, positions: Tensor, plan: BatchPlan) -> Tensor:
        num_rows, vocab_size = logits.shape
        tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        is_filtered = plan.min_p is not None or plan.truncated is not None
        least = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        if is_filtered:
            # Passes over the row read what the first of them has scaled.
            scaled = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
            _find_least_kept[(num_rows,)](
                logits,
                scaled,
                least,
                params.temperature,
                params.top_p,
                params.min_p,
                params.top_k,
                logits.stride(0),
                params.temperature.stride(0),
                params.top_k.stride(0),
                vocab_size,
                GREEDY=GREEDY_BELOW,
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
            )
        _draw[(num_rows,)](
            logits,
            least,
            tokens,
            params.temperature,
            params.seed,
            positions,
            logits.stride(0),
            params.temperature.stride(0),
            params.seed.stride(0),
            vocab_size,
            GREEDY=GREEDY_BELOW,
            IS_FILTERED=is_filtered,
            PAIRS=_BLOCK // 2,
            num_warps=_NUM_WARPS,
        )
        return tokens


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _splitmix64(state, index):
    """Output `index` of the stream; both uint64."""
    return _mix64(state + (index + 1) * 0x9E3779B97F4A7C15)


@triton.jit
def _gumbel(bits):
    """`sampling_rng.gumbel_noise` of 31 random bits."""
    u = (bits.to(tl.int32).to(tl.float32) + 0.5) * (2.0**-31)
    return -libdevice.log(-libdevice.log1p(-tl.minimum(u, 1.0 - 2.0**-24)))


@triton.jit
def _draw(
    logits,
    least,
    tokens,
    temperature,
    seed,
    positions,
    row_stride,
    float_stride,
    int_stride,
    vocab_size,
    GREEDY: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The token of a row whose scaled logit, with its noise, is greatest; of those with equal ones the first.

    The noise of tokens 2i and 2i + 1 are the halves of the stream's output i, so a program takes tokens in pairs.
    """
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row * float_stride)
    is_random = heat >= GREEDY
    scale = tl.where(is_random, heat, 1.0).to(tl.float32)
    keep_from = float("-inf")
    if IS_FILTERED:
        keep_from = tl.load(least + row)
    start = tl.load(seed + row * int_stride).to(tl.uint64)
    state = _splitmix64(_splitmix64(start, tl.full((), 0, tl.uint64)), tl.load(positions + row).to(tl.uint64))

    pair = tl.arange(0, PAIRS)
    best = tl.full((PAIRS,), float("-inf"), tl.float32)
    choice = tl.zeros((PAIRS,), tl.int64)
    for first in range(0, vocab_size, 2 * PAIRS):
        index = first // 2 + pair
        bits = _splitmix64(state, index.to(tl.uint64))
        for half in tl.static_range(2):
            token = 2 * index + half
            logit = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=float("-inf"))
            value = tl.div_rn(logit.to(tl.float32), scale)
            if IS_FILTERED:
                value = tl.where(value >= keep_from, value, float("-inf"))
            noise = _gumbel((bits >> (32 * half)) & 0x7FFFFFFF)
            value = tl.where(is_random, value + noise, value)
            is_better = value > best
            best = tl.where(is_better, value, best)
            choice = tl.where(is_better, token, choice)
    winner = tl.max(best, axis=0)
    # No token is left where all are forbidden, or none is a number: then it is token 0, as in an argmax.
    first_of_best = tl.min(tl.where(best == winner, choice, vocab_size), axis=0)
    tl.store(tokens + row, tl.where(first_of_best == vocab_size, 0, first_of_best))


@triton.jit
def _key(value):
    """An int32 that orders as the float32 does; both zeros have one key."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a `_key`, which is its own inverse."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(value, best):
    """As `sampling_filters._weights`, whose sums are exact."""
    return (libdevice.exp(value - best) * 4294967296.0).to(tl.int64)


@triton.jit
def _greatest_that_reaches(scaled, vocab_size, low, best, least, target, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest key of which the tokens at or above make up `target`; `low` is such a key, `best` the row's best.

    They are counted, or, if WEIGHTED, those from the value `least` on are weighed; sums are compared as float64.
    """
    low = low.to(tl.int64)
    high = _key(best).to(tl.int64) + 1
    offset = tl.arange(0, BLOCK)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        first, second, third = low + step, low + 2 * step, low + 3 * step
        sums_1 = tl.zeros((BLOCK,), tl.int64)
        sums_2 = tl.zeros((BLOCK,), tl.int64)
        sums_3 = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            value = tl.load(scaled + start + offset, mask=start + offset < vocab_size, other=float("-inf"))
            key = _key(value).to(tl.int64)
            if WEIGHTED:
                amount = tl.where(value >= least, _weight(value, best), 0)
            else:
                amount = tl.where(start + offset < vocab_size, 1, 0).to(tl.int64)
            sums_1 += tl.where(key >= first, amount, 0)
            sums_2 += tl.where(key >= second, amount, 0)
            sums_3 += tl.where(key >= third, amount, 0)
        is_first = tl.sum(sums_1, axis=0).to(tl.float64) >= target
        is_second = tl.sum(sums_2, axis=0).to(tl.float64) >= target
        is_third = tl.sum(sums_3, axis=0).to(tl.float64) >= target
        high = tl.minimum(high, tl.where(is_third, high, tl.where(is_second, third, tl.where(is_first, second, first))))
        low = tl.where(is_third, third, tl.where(is_second, second, tl.where(is_first, first, low)))
    return low


@triton.jit
def _find_least_kept(
    logits,
    scaled,
    least,
    temperature,
    top_p,
    min_p,
    top_k,
    row_stride,
    float_stride,
    int_stride,
    vocab_size,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """least[row] is the least scaled logit that min_p, top_k and top_p keep, each of what the one before it keeps."""
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row * float_stride)
    scale = tl.where(heat >= GREEDY, heat, 1.0).to(tl.float32)
    scaled += row * vocab_size
    offset = tl.arange(0, BLOCK)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        is_inside = start + offset < vocab_size
        logit = tl.load(logits + row * row_stride + start + offset, mask=is_inside, other=float("-inf"))
        value = tl.div_rn(logit.to(tl.float32), scale)
        tl.store(scaled + start + offset, value, mask=is_inside)
        greatest = tl.maximum(greatest, value)
    best = tl.max(greatest, axis=0)
    tl.debug_barrier()  # a thread reads below what others have stored

    keep_from = tl.full((), float("-inf"), tl.float32)
    smallest = tl.load(min_p + row * float_stride).to(tl.float32)
    if smallest > 0:
        keep_from = best + libdevice.log(smallest)
    count = tl.load(top_k + row * int_stride)
    if count < vocab_size:
        lowest = _key(tl.full((), float("-inf"), tl.float32))
        kth = _greatest_that_reaches(scaled, vocab_size, lowest, best, keep_from, count.to(tl.float64), False, BLOCK)
        keep_from = tl.maximum(keep_from, _value(kth))
    share = tl.load(top_p + row * float_stride)
    if share < 1.0:
        total = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            value = tl.load(scaled + start + offset, mask=start + offset < vocab_size, other=float("-inf"))
            total += tl.where(value >= keep_from, _weight(value, best), 0)
        target = tl.sum(total, axis=0).to(tl.float64) * share
        nucleus = _greatest_that_reaches(scaled, vocab_size, _key(keep_from), best, keep_from, target, True, BLOCK)
        keep_from = tl.maximum(keep_from, _value(nucleus))
    tl.store(least + row, keep_from)

"""What one sampling step returns: tokens, log-probabilities where asked for, and their one copy to the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from seesaw_ds.requests import TokenLogprobs

_LOW_32_BITS = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of the R rows that asked, from the logits as the model gave them.

    `rows` are batch rows and `num_top` how many top tokens each wants. On the device: `chosen` [R] float32,
    `top_ids` [R, N] int64 and `top` [R, N] float32, best first, equal values by lowest id; N is the greatest num_top.
    """

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def shifted(self, num_rows: int) -> RowLogprobs:
        """The same, of rows that come `num_rows` later."""
        return replace(self, rows=tuple(row + num_rows for row in self.rows))

    def joined(self, other: RowLogprobs) -> RowLogprobs:
        """The rows of both, these first."""
        width = max(self.top.shape[1], other.top.shape[1])
        top_ids, top = (
            torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])
            for parts in ((self.top_ids, other.top_ids), (self.top, other.top))
        )
        chosen = torch.cat((self.chosen, other.chosen))
        return RowLogprobs(self.rows + other.rows, self.num_top + other.num_top, chosen, top_ids, top)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per batch row, on the device: `token_ids` [rows] int64, and log-probabilities if any row asked."""

    token_ids: Tensor
    logprobs: RowLogprobs | None = None

    def joined(self, other: SampledTokens) -> SampledTokens:
        """The rows of both, these first."""
        num_rows = self.token_ids.shape[0]
        token_ids = torch.cat((self.token_ids, other.token_ids))
        if other.logprobs is None:
            return SampledTokens(token_ids, self.logprobs)
        shifted = other.logprobs.shifted(num_rows)
        return SampledTokens(token_ids, shifted if self.logprobs is None else self.logprobs.joined(shifted))

    def pack(self) -> Tensor:
        """Everything in one 1-D int64 device tensor, so that the host needs a single copy."""
        if self.logprobs is None:
            return self.token_ids
        values = torch.cat((self.logprobs.chosen, self.logprobs.top.flatten())).to(torch.float64)
        return torch.cat((self.token_ids, self.logprobs.top_ids.flatten(), values.view(torch.int64)))

    def unpack(self, packed: Tensor) -> list[tuple[int, TokenLogprobs | None]]:
        """Read a finished host copy of what `pack` gave; one entry per batch row."""
        num_rows = self.token_ids.shape[0]
        token_ids = packed[:num_rows].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * num_rows
        if self.logprobs is not None:
            asked, n = self.logprobs.top_ids.shape
            top_ids = packed[num_rows : num_rows + asked * n].view(asked, n).tolist()
            values = packed[num_rows + asked * n :].view(torch.float64)
            chosen, top = values[:asked].tolist(), values[asked:].view(asked, n).tolist()
            for i, (row, count) in enumerate(zip(self.logprobs.rows, self.logprobs.num_top, strict=True)):
                best = tuple(zip(top_ids[i][:count], top[i][:count], strict=True))
                logprobs[row] = TokenLogprobs(chosen[i], best)
        return list(zip(token_ids, logprobs, strict=True))

    def to_host(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Copy to the host and wait for it: (token id, log-probabilities or None) for each row."""
        return self.unpack(self.pack().cpu())


def row_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    rows: tuple[int, ...],
    num_top: tuple[int, ...],
    row_index: Tensor,
    rows_at_once: int,
) -> RowLogprobs:
    """Log-probabilities of `token_ids` and of the best tokens, for some rows of raw `logits` [B, V].

    `row_index` is `rows` on the device. At most `rows_at_once` rows are worked on together, to bound memory.
    """
    chosen, top_ids, top = [], [], []
    for start in range(0, len(rows), rows_at_once):
        index = row_index[start : start + rows_at_once]
        asked = logits[index].to(torch.float32)
        log_probs = asked.log_softmax(dim=-1)
        best = _top_ids(asked, max(num_top))
        chosen.append(log_probs.gather(1, token_ids[index, None]).squeeze(1))
        top_ids.append(best)
        top.append(log_probs.gather(1, best))
    return RowLogprobs(rows, num_top, torch.cat(chosen), torch.cat(top_ids), torch.cat(top))


def _top_ids(logits: Tensor, n: int) -> Tensor:
    """Ids of the `n` largest float32 logits per row, best first, lowest id first among equals.

    topk leaves the order of equal values open, and low-precision logits are often equal. So it gets 64-bit keys that
    are all different: the float's bits, made to order like an integer, above the id counted from the end.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
    keys = (ordered.to(torch.int64) << 32) | (_LOW_32_BITS - ids)
    best = keys.topk(min(n, logits.shape[1]), dim=-1).values
    return _LOW_32_BITS - (best & _LOW_32_BITS)

"""Sampling parameters of the sequences in a worker's slots, kept on the device between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seesaw_ds.model.sampling_rng import seed_as_int64
from seesaw_ds.requests import SamplingParams

# Below this, dividing by the temperature overflows for ordinary logits, and the draw is the argmax anyway.
GREEDY_BELOW = 1e-5

# Which rows of a batch something applies to: none, every row (a full slice), or a device index [rows] int64.
Rows = Tensor | slice | None


class RowParams(NamedTuple):
    """Parameters gathered for a batch, ready to broadcast over the vocabulary.

    [rows, 1] float64, except `seed` and `top_k` [rows, 1] int64. Columns of two tables: neighbours in memory.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    seed: Tensor
    top_k: Tensor


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which rows of a batch need which work, from host knowledge alone.

    `random`, `edited`, `penalized` and `logprob_index` select batch rows; `min_p` and `truncated` select among the
    rows of `random`. `max_top_k` is None when some truncated row has no top_k.
    """

    random: Rows
    edited: Rows
    penalized: Rows
    min_p: Rows
    truncated: Rows
    max_top_k: int | None
    any_top_p: bool
    logprob_rows: tuple[int, ...]
    num_top_logprobs: tuple[int, ...]
    logprob_index: Tensor | None


@dataclass(frozen=True, slots=True)
class _Slot:
    """What the host remembers of a slot, and what `flush` writes."""

    params: SamplingParams
    floats: tuple[float, ...]
    ints: tuple[int, int]
    edits: tuple[tuple[int, float, float], ...]
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]

    @property
    def is_random(self) -> bool:
        return self.params.temperature >= GREEDY_BELOW

    @property
    def has_top_k(self) -> bool:
        return self.params.top_k > 0

    @property
    def has_top_p(self) -> bool:
        return self.params.top_p < 1.0


class SamplingState:
    """Per-slot sampling parameters on `device`; `sample` reads them, and counts output tokens in them.

    Writes are queued and go to the device together before the next step, on the current stream, which has to be the
    one that samples. Token counts, which only penalties need, take memory (5 bytes per slot and vocabulary entry)
    from the first sequence that has a penalty.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_num_seqs = max_num_seqs
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._slots: dict[int, _Slot] = {}
        self._unwritten: set[int] = set()
        self._plans: dict[tuple[int, ...], BatchPlan] = {}
        self._floats = torch.zeros(max_num_seqs, 6, dtype=torch.float64, device=self.device)
        self._ints = torch.zeros(max_num_seqs, 2, dtype=torch.int64, device=self.device)
        self._edits = torch.zeros(max_num_seqs, 0, 3, dtype=torch.float64, device=self.device)
        self._output_counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=self.device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=self.device)

    def set_slot(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Give `slot` to a sequence. Costs no device work until the next step.

        `stop_token_ids` are those that min_tokens forbids. The prompt and the output so far matter only when
        `params.needs_token_history`; an evicted sequence that returns brings the output it had.
        Raises ValueError for a slot or a logit_bias token out of range.
        """
        if not 0 <= slot < self.max_num_seqs:
            raise ValueError(f"slot={slot}: must be in 0..{self.max_num_seqs - 1}")
        self._slots[slot] = _Slot(
            params=params,
            floats=(
                params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            ),
            ints=(seed_as_int64(seed), min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size),
            edits=self._make_edits(params, stop_token_ids),
            prompt_token_ids=tuple(prompt_token_ids) if params.needs_token_history else (),
            output_token_ids=tuple(output_token_ids) if params.needs_token_history else (),
        )
        self._unwritten.add(slot)
        self._plans.clear()

    def clear_slot(self, slot: int) -> None:
        """Take the slot away from its sequence. Raises RuntimeError when no sequence has it."""
        if slot not in self._slots:
            raise RuntimeError(f"slot={slot}: cleared, but no sequence has it")
        del self._slots[slot]
        self._unwritten.discard(slot)
        self._plans.clear()

    def _make_edits(
        self, params: SamplingParams, stop_token_ids: Sequence[int]
    ) -> tuple[tuple[int, float, float], ...]:
        for token in params.logit_bias:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"logit_bias={token}: token ids must be in 0..{self.vocab_size - 1}")
        edits = [(token, bias, math.inf) for token, bias in params.logit_bias.items()]
        if params.min_tokens > 0:
            # A tokenizer may list stop tokens that the model has no logit for; those need no forbidding.
            stops = {token for token in stop_token_ids if 0 <= token < self.vocab_size}
            edits += [(token, -math.inf, params.min_tokens) for token in sorted(stops)]
        return tuple(edits)

    def plan(self, host_slots: Sequence[int]) -> BatchPlan:
        """What the batch of these slots needs; writes queued changes to the device first.

        Plans are kept until a slot changes, so a steady batch costs neither host work nor copies.
        Raises RuntimeError when a slot has no sequence.
        """
        self._flush()
        key = tuple(host_slots)
        if key not in self._plans:
            self._plans[key] = self._make_plan(key)
        return self._plans[key]

    def _make_plan(self, host_slots: tuple[int, ...]) -> BatchPlan:
        unset = [slot for slot in host_slots if slot not in self._slots]
        if unset:
            raise RuntimeError(f"slots={unset}: sampled, but no sequence has them")
        batch = [self._slots[slot] for slot in host_slots]
        random = [slot for slot in batch if slot.is_random]
        truncated = [slot for slot in random if slot.has_top_k or slot.has_top_p]
        has_max_top_k = bool(truncated) and all(slot.has_top_k for slot in truncated)
        logprob_rows = tuple(row for row, slot in enumerate(batch) if slot.params.logprobs is not None)
        return BatchPlan(
            random=self._select([slot.is_random for slot in batch]),
            edited=self._select([bool(slot.edits) for slot in batch]),
            penalized=self._select([slot.params.needs_token_history for slot in batch]),
            min_p=self._select([slot.params.min_p > 0 for slot in random]),
            truncated=self._select([slot.has_top_k or slot.has_top_p for slot in random]),
            max_top_k=max(slot.ints[1] for slot in truncated) if has_max_top_k else None,
            any_top_p=any(slot.has_top_p for slot in truncated),
            logprob_rows=logprob_rows,
            num_top_logprobs=tuple(batch[row].params.logprobs or 0 for row in logprob_rows),
            logprob_index=self._to_device(logprob_rows, torch.int64) if logprob_rows else None,
        )

    def _select(self, wanted: list[bool]) -> Rows:
        if not any(wanted):
            return None
        if all(wanted):
            return slice(None)
        return self._to_device([row for row, want in enumerate(wanted) if want], torch.int64)

    def row_params(self, slots: Tensor) -> RowParams:
        """The parameters of `slots` [rows] int64."""
        floats, ints = self._floats[slots], self._ints[slots]
        return RowParams(*floats.chunk(6, dim=1), *ints.chunk(2, dim=1))

    def edits(self, slots: Tensor) -> Tensor:
        """The logit edits of `slots` [rows]: [rows, E, 3] float64, as `sampling_filters.add_edits` reads them."""
        return self._edits[slots]

    def token_history(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Output counts [rows, V] int32 and prompt membership [rows, V] bool, of slots that have penalties."""
        return self._output_counts[slots], self._in_prompt[slots]

    def count_tokens(self, slots: Tensor, token_ids: Tensor) -> None:
        """Add one output token to each of `slots`, which have penalties and are all different."""
        self._output_counts[slots, token_ids] += 1

    def share_history(self, src: int, group: ProcessGroup) -> None:
        """Take the output counts of rank `src`, which sampled last. All of `group` call it, with the same slots set."""
        self._flush()
        slots = [slot for slot, entry in self._slots.items() if entry.params.needs_token_history]
        if slots:
            index = self._to_device(sorted(slots), torch.int64)
            counts = self._output_counts[index]
            dist.broadcast(counts, src, group=group)
            self._output_counts[index] = counts

    def _flush(self) -> None:
        if not self._unwritten:
            return
        written = {slot: self._slots[slot] for slot in sorted(self._unwritten)}
        self._unwritten.clear()
        index = self._to_device(list(written), torch.int64)
        self._floats[index] = self._to_device([slot.floats for slot in written.values()], torch.float64)
        self._ints[index] = self._to_device([slot.ints for slot in written.values()], torch.int64)
        self._write_edits({slot: entry.edits for slot, entry in written.items() if entry.edits})
        self._write_histories({slot: entry for slot, entry in written.items() if entry.params.needs_token_history})

    def _write_edits(self, edits: dict[int, tuple[tuple[int, float, float], ...]]) -> None:
        if not edits:
            return
        capacity = self._edits.shape[1]
        longest = max(len(entries) for entries in edits.values())
        if longest > capacity:
            wider = 1 << (longest - 1).bit_length()
            self._edits = torch.nn.functional.pad(self._edits, (0, 0, 0, wider - capacity))
            capacity = wider
        padded = [entries + ((0, 0.0, 0.0),) * (capacity - len(entries)) for entries in edits.values()]
        self._edits[self._to_device(list(edits), torch.int64)] = self._to_device(padded, torch.float64)

    def _write_histories(self, entries: dict[int, _Slot]) -> None:
        if not entries:
            return
        if self._output_counts.shape[0] == 0:
            self._output_counts = self._output_counts.new_zeros(self.max_num_seqs, self.vocab_size)
            self._in_prompt = self._in_prompt.new_zeros(self.max_num_seqs, self.vocab_size)
        index = self._to_device(list(entries), torch.int64)
        self._output_counts.index_fill_(0, index, 0)
        self._in_prompt.index_fill_(0, index, False)
        prompts = [
            slot * self.vocab_size + token for slot, entry in entries.items() for token in entry.prompt_token_ids
        ]
        outputs = [
            slot * self.vocab_size + token for slot, entry in entries.items() for token in entry.output_token_ids
        ]
        self._in_prompt.view(-1).index_fill_(0, self._to_device(prompts, torch.int64), True)
        places = self._to_device(outputs, torch.int64)
        self._output_counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _to_device(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        # From pinned memory, so that the host does not wait for the device.
        host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

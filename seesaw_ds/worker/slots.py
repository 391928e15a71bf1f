"""What a rank knows of the sequences that decode, by slot: the same for both phases, so that a transition keeps it."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from seesaw_ds.engine.messages import Decode
from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_draw import Draw
from seesaw_ds.model.sampling_output import SampledTokens
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.parallel.device import to_device
from seesaw_ds.parallel.groups import PhaseGroups
from seesaw_ds.parallel.links import PipelineLink, most_unread_steps
from seesaw_ds.requests import SamplingParams, SequenceRequest


class SlotTable:
    """What the host knows of each slot: its sequence's next position, prompt length and blocks."""

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self.positions = np.zeros(max_num_seqs, dtype=np.int64)
        self.prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self.blocks = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs

    def set(self, slot: int, position: int, prompt_len: int, blocks: tuple[int, ...]) -> None:
        self.positions[slot] = position
        self.prompt_lens[slot] = prompt_len
        self.blocks[slot, : len(blocks)] = blocks
        self._num_blocks[slot] = len(blocks)

    def append_block(self, slot: int, block: int) -> None:
        self.blocks[slot, self._num_blocks[slot]] = block
        self._num_blocks[slot] += 1


class StepSlots:
    """The slots of one step: for the host, and as a device index (rows,) int64."""

    def __init__(self, slots: list[int], device: torch.device) -> None:
        self.host = np.array(slots, dtype=np.int64)
        self.index = to_device(self.host, device)

    def __len__(self) -> int:
        return len(self.host)


class DecodingSlots:
    """Per-slot state of one rank. `tokens` (max_num_seqs,) int64 on the device are the last tokens sampled.

    Every rank keeps all of it; ranks that do not sample in a phase catch up at its end (`share`).
    """

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, vocab_size: int, device: torch.device, draw: Draw
    ) -> None:
        self.table = SlotTable(max_num_seqs, max_blocks_per_seq)
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.max_num_seqs = max_num_seqs
        self._sampling = SamplingState(max_num_seqs, vocab_size, device)
        self._device = device
        self._draw = draw
        self._groups: dict[int, StepSlots] = {}

    def set(
        self,
        slot: int,
        num_tokens: int,
        blocks: tuple[int, ...],
        request: SequenceRequest,
        output_token_ids: list[int],
    ) -> None:
        """Give `slot` to a sequence with `num_tokens` tokens of KV in `blocks`."""
        self.tokens[slot].fill_(output_token_ids[-1])  # an assignment would copy the number, and wait for the device
        self.table.set(slot, num_tokens, len(request.prompt_token_ids), blocks)
        self._sampling.set_slot(
            slot, request.params, request.seed, request.stop_token_ids, request.prompt_token_ids, output_token_ids
        )

    def step(self, step: Decode) -> StepSlots:
        """The slots of a step that begins, with the blocks that it brings appended to their tables."""
        if step.slots is not None:
            self._groups[step.group] = StepSlots(step.slots, self._device)
        for slot, block in step.new_blocks:
            self.table.append_block(slot, block)
        return self._groups[step.group]

    def sample(self, logits: torch.Tensor, slots: StepSlots) -> SampledTokens:
        """Choose the next token of each row, and remember it as its slot's last."""
        output_positions = self.table.positions[slots.host] + 1 - self.table.prompt_lens[slots.host]
        positions = to_device(output_positions, self._device)
        sampled = sample(logits, slots.index, positions, self._sampling, slots.host.tolist(), self._draw)
        self.tokens[slots.index] = sampled.token_ids
        return sampled

    def sample_first(self, logits: torch.Tensor, requests: list[SequenceRequest]) -> SampledTokens:
        """Choose the first token of each request; none has a slot yet."""
        state = SamplingState(len(requests), logits.shape[1], self._device)
        for row, request in enumerate(requests):
            state.set_slot(
                row, request.params, request.seed, request.stop_token_ids, request.prompt_token_ids, output_token_ids=()
            )
        rows = torch.arange(len(requests), device=self._device)
        return sample(logits, rows, torch.zeros_like(rows), state, range(len(requests)), self._draw)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Sample tokens of made-up sequences in slot 0, so that the sampler's kernels are compiled and loaded.

        There is one for what is drawn from and one for filters, for logits as they are and for changed ones.
        """
        logits = torch.zeros((1, self._sampling.vocab_size), dtype=dtype, device=self._device)
        for top_p, logit_bias in itertools.product((1.0, 0.5), ({}, {0: 0.0})):
            params = SamplingParams(top_p=top_p, logit_bias=logit_bias)
            self.set(0, 1, (0,), SequenceRequest(0, (0,), params, seed=0), [0])
            self.sample(logits, StepSlots([0], self._device))

    def advance(self, slots: StepSlots) -> None:
        """Count the token that a step has computed for each of its slots."""
        self.table.positions[slots.host] += 1

    def share(self, src: int, group: ProcessGroup) -> None:
        """Take the last tokens and their counts from rank `src`, which sampled in the phase that ends."""
        dist.broadcast(self.tokens, src, group=group)
        self._sampling.share_history(src, group)


class TokenFeedback:
    """Brings sampled tokens from a phase's last stage to its first, which needs them for the next step.

    The first stage takes them off the link just before it needs them, in the order of the steps, so that a step can
    be queued before the tokens of the last one are known. Those that nobody needs, for their sequences have ended, it
    takes when too many steps' lie unread.
    """

    def __init__(self, groups: PhaseGroups, link: PipelineLink, slots: DecodingSlots) -> None:
        self._sends = groups.is_last_stage and not groups.is_first_stage
        self._receives = groups.is_first_stage and not groups.is_last_stage
        self._link = link
        self._slots = slots
        self._unread: deque[StepSlots] = deque()
        self._most_unread = most_unread_steps(groups.layout.pp)

    def pass_on(self, slots: StepSlots, sampled: SampledTokens | None) -> None:
        """Send a step's tokens, or expect them."""
        if self._sends:
            assert sampled is not None
            self._link.send_tokens(sampled.token_ids)
        elif self._receives:
            self._unread.append(slots)

    def read(self, slots: np.ndarray) -> None:
        """Take the tokens of earlier steps, oldest first, until no unread step has a token for `slots`."""
        while len(self._unread) >= self._most_unread or any(
            np.isin(slots, unread.host).any() for unread in self._unread
        ):
            self._read_oldest()

    def read_all(self) -> None:
        """Take all that is still under way; before the pipeline is taken apart."""
        while self._unread:
            self._read_oldest()

    def warm_up(self) -> None:
        """Send a token once, so that the transfer is connected. Collective over the pipeline."""
        if self._sends:
            self._link.send_tokens(self._slots.tokens[:1])
        elif self._receives:
            self._link.recv_tokens(1)

    def _read_oldest(self) -> None:
        unread = self._unread.popleft()
        self._slots.tokens[unread.index] = self._link.recv_tokens(len(unread))

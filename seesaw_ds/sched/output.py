"""What passes between the scheduler and whatever executes its decisions: actions down, events up.

The scheduler is pure: it never sees a token's logits, a tensor or a clock. `Scheduler.schedule` returns one
action (or None when nothing can start before something finishes), and every action is answered by one event,
in any order across kinds::

    PrefillBatch -> PrefillDone       the tokens of its decode rows, and first tokens of prompts that end in it
                 -> SwapOutDone       for each of its prompts that goes to the host: its KV is there
    Activate                          (no event: nothing is copied)
    Preload                           (no event: the next SwitchPhase completes it)
    DecodeBatch  -> DecodeDone
    SwapIn       -> SwapInDone
    Evict        -> EvictDone
    SwitchPhase  -> PhaseSwitched

Workers execute actions in the order given, except that SwapIn, Evict and the swap-outs of a PrefillBatch run
beside the compute; the scheduler reuses their blocks only after their event. All KV on the GPU is in the layout of
the phase: a SwitchPhase completes the copies before it, and re-shards the blocks that it names with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from seesaw_ds.layout import Phase
from seesaw_ds.requests import FinishReason
from seesaw_ds.sched.blocks import blocks_for


class PreloadSize(NamedTuple):
    """The exchange of weights into the decode layout: its rounds, and KV blocks for what a rank gets in one."""

    num_rounds: int
    round_blocks: int


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes that bound what the scheduler may do, for one replica.

    `num_gpu_blocks` is the pool on the devices, `num_host_blocks` the host pool; both count blocks of `block_size`
    tokens. `prefill_stages` and `decode_stages` are the two phases' pipeline depths. `mixes_steps`: sequences go on
    decoding during a prefill phase, as rows of its micro-batches. `is_static`: both phases have one layout. `preload`
    is None where weights do not come early.
    """

    block_size: int
    num_gpu_blocks: int
    num_host_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_stages: int
    decode_stages: int
    mixes_steps: bool = True
    is_static: bool = False
    preload: PreloadSize | None = None

    @property
    def has_one_phase(self) -> bool:
        """Whether decode steps and micro-batches alternate freely, so that the phase never changes."""
        return self.mixes_steps and self.is_static

    @property
    def may_stay(self) -> bool:
        """Whether sequences could decode on in the prefill layout, another than that of decode, once prefill stops."""
        return self.mixes_steps and not self.is_static

    def check_fits(self, spec: SequenceSpec) -> None:
        """Raise ValueError when a sequence could never run with these pools."""
        if spec.num_prompt_tokens < 1 or spec.max_tokens < 1:
            raise ValueError(
                f"seq_id={spec.seq_id}: num_prompt_tokens={spec.num_prompt_tokens} and "
                f"max_tokens={spec.max_tokens} must both be at least 1"
            )
        peak = blocks_for(spec.num_prompt_tokens + spec.max_tokens - 1, self.block_size)
        for name, available in (("num_gpu_blocks", self.num_gpu_blocks), ("num_host_blocks", self.num_host_blocks)):
            if peak > available:
                raise ValueError(
                    f"seq_id={spec.seq_id}: {spec.num_prompt_tokens} prompt tokens and max_tokens={spec.max_tokens} "
                    f"need {peak} blocks of {self.block_size}, but {name}={available}; "
                    "give the pool more memory, or shorten the request"
                )


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What the scheduler knows of a sequence."""

    seq_id: int
    num_prompt_tokens: int
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens ``start .. start + num_tokens`` of a prompt.

    `block_ids` is the sequence's whole table on the GPU. The last chunk (`is_last`) samples the first output token;
    it names `host_block_ids` when the prompt's KV is to go to the host.
    """

    seq_id: int
    start: int
    num_tokens: int
    block_ids: tuple[int, ...]
    is_last: bool
    host_block_ids: tuple[int, ...] = ()


class DecodeRow(NamedTuple):
    """One sequence's part in a decode step: it computes the token at `position` and samples the next.

    `new_block_ids` are appended to the sequence's table before the step.
    """

    seq_id: int
    slot: int
    position: int
    new_block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One decode step of one pipeline group."""

    step_id: int
    group: int
    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """One micro-batch for the prefill pipeline: chunks of prompts, and `rows` of decode `group` that ride with them."""

    step_id: int
    chunks: tuple[PrefillChunk, ...]
    group: int = 0
    rows: tuple[DecodeRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Activate:
    """Give `slot` (its worker-side state) to a sequence whose prompt's KV stays on the GPU.

    `num_tokens` is how many tokens the KV covers: the sequence's length less one, whose KV the next step writes.
    """

    seq_id: int
    slot: int
    num_tokens: int
    gpu_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Copy a sequence's KV from the host pool to the GPU pool and give it `slot`; `num_tokens` as for `Activate`."""

    seq_id: int
    slot: int
    num_tokens: int
    host_block_ids: tuple[int, ...]
    gpu_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evict:
    """Copy a running sequence's KV from the GPU pool to the host pool and take its slot away."""

    seq_id: int
    slot: int
    gpu_block_ids: tuple[int, ...]
    host_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwitchPhase:
    """Take the other phase's layout: workers re-shard weights and KV after the steps given before it.

    `gpu_block_ids` are the blocks whose KV is still needed.
    """

    to: Phase
    gpu_block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Preload:
    """Bring what the next `num_rounds` of the exchange into the decode layout move into `gpu_block_ids`, beside what
    steps follow.
    """

    num_rounds: int
    gpu_block_ids: tuple[int, ...]


Action = PrefillBatch | DecodeBatch | Activate | SwapIn | Evict | Preload | SwitchPhase


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """A micro-batch left the pipeline. `tokens` are (seq_id, token) of its rows, then of its chunks with `is_last`."""

    step_id: int
    tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SwapOutDone:
    """The whole prompt's KV of `seq_id` is in the host pool, from every stage."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class DecodeDone:
    """`tokens` are (seq_id, sampled token) for every row of the step."""

    step_id: int
    tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SwapInDone:
    seq_id: int


@dataclass(frozen=True, slots=True)
class EvictDone:
    seq_id: int


@dataclass(frozen=True, slots=True)
class PhaseSwitched:
    phase: Phase


Event = PrefillDone | SwapOutDone | DecodeDone | SwapInDone | EvictDone | PhaseSwitched


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence that ended; `num_output_tokens` of its sampled tokens count, later ones are to be dropped."""

    seq_id: int
    reason: FinishReason
    num_output_tokens: int

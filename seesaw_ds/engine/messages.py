"""What crosses a socket, as msgpack: commands down to workers, results up, and the frontend's talk with schedulers.

Every worker of a replica gets the same commands, in the same order, and takes its own part of each.
"""

from __future__ import annotations

import msgspec

from seesaw_ds.engine.process_id import ProcessId
from seesaw_ds.layout import Phase
from seesaw_ds.observe.metrics import RankCounters
from seesaw_ds.observe.timeline import Span
from seesaw_ds.requests import SequenceRequest, SequenceResult, TokenLogprobs
from seesaw_ds.sched.output import Activate, Evict, PrefillChunk, Preload, PreloadSize, SwapIn

# ---------------------------------------------------------------- scheduler -> workers


class Decode(msgspec.Struct, tag=True, frozen=True):
    """Run one decode step of a group.

    Workers keep each slot's position, block table and last token, so only changes travel: `slots` is None
    when the group has the rows of its last step, and `new_blocks` are (slot, block) pairs to append.
    """

    step_id: int
    group: int
    slots: list[int] | None
    new_blocks: list[tuple[int, int]]


class Prefill(msgspec.Struct, tag=True, frozen=True):
    """Run a micro-batch; `rows` is the decode step that rides in it.

    `requests` are those of sequences that the workers have not seen yet.
    """

    step_id: int
    chunks: tuple[PrefillChunk, ...]
    rows: Decode | None
    requests: list[SequenceRequest]


class Start(msgspec.Struct, tag=True, frozen=True):
    """Give a slot to a sequence whose prompt's KV stays on the GPU; `token_id` is its first."""

    activate: Activate
    token_id: int


class Load(msgspec.Struct, tag=True, frozen=True):
    """Swap a sequence in. `output_token_ids` are its tokens so far: all when sampling needs them, else the last."""

    swap: SwapIn
    output_token_ids: list[int]


class Store(msgspec.Struct, tag=True, frozen=True):
    """Evict a sequence to the host pool."""

    evict: Evict


class StartPreload(msgspec.Struct, tag=True, frozen=True):
    """Bring weights of the decode layout early, beside the steps that follow."""

    preload: Preload


class Switch(msgspec.Struct, tag=True, frozen=True):
    """Re-shard to the other phase's layout: the weights, and the KV of `gpu_block_ids`."""

    to: Phase
    gpu_block_ids: tuple[int, ...]


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Forget sequences that ended."""

    seq_ids: list[int]


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Finish what is queued, say goodbye and exit."""


Command = Prefill | Decode | Start | Load | Store | StartPreload | Switch | Drop | Stop

# ---------------------------------------------------------------- workers -> scheduler


class WorkerReady(msgspec.Struct, tag=True, frozen=True):
    """The worker has loaded its weights and made its pools; sizes are the replica's, the same from every rank.

    `preload` is None where weights do not come early.
    """

    process: ProcessId
    num_gpu_blocks: int
    num_host_blocks: int
    preload: PreloadSize | None


class StepDone(msgspec.Struct, tag=True, frozen=True):
    """A step's sampled tokens, in the order of its rows; from one rank of the last stage."""

    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None


class SwapOutDone(msgspec.Struct, tag=True, frozen=True):
    rank: int
    seq_ids: list[int]


class LoadDone(msgspec.Struct, tag=True, frozen=True):
    rank: int
    seq_id: int


class StoreDone(msgspec.Struct, tag=True, frozen=True):
    rank: int
    seq_id: int


class SwitchDone(msgspec.Struct, tag=True, frozen=True):
    """The new layout is in place; `num_bytes` of weights and KV came to this rank."""

    rank: int
    to: Phase
    num_bytes: int


class WorkerBye(msgspec.Struct, tag=True, frozen=True):
    rank: int


WorkerResult = WorkerReady | StepDone | SwapOutDone | LoadDone | StoreDone | SwitchDone | WorkerBye

# ---------------------------------------------------------------- frontend -> scheduler


class AddSequences(msgspec.Struct, tag=True, frozen=True):
    requests: list[SequenceRequest]
    is_last: bool


class AbortSequences(msgspec.Struct, tag=True, frozen=True):
    """Stop these where they are; nothing more is reported of them."""

    seq_ids: list[int]


class Finish(msgspec.Struct, tag=True, frozen=True):
    """Stop the workers and exit."""


SchedulerRequest = AddSequences | AbortSequences | Finish

# ---------------------------------------------------------------- scheduler -> frontend


class SchedulerReady(msgspec.Struct, tag=True, frozen=True):
    """A replica can take sequences; pool sizes in blocks."""

    num_gpu_blocks: int
    num_host_blocks: int


class WantInput(msgspec.Struct, tag=True, frozen=True):
    """The waiting queue is short: send up to `num_sequences` more."""

    num_sequences: int


class Results(msgspec.Struct, tag=True, frozen=True):
    results: list[SequenceResult]


class NewTokens(msgspec.Struct, tag=True, frozen=True):
    """Tokens of a sequence that has stop strings, as they come, with log-probabilities where it asks for them."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]


class Progress(msgspec.Struct, tag=True, frozen=True):
    """A replica's state, at most a few times a second, and at every phase change. Token counts are totals."""

    phase: Phase
    num_waiting: int
    num_running: int
    num_host: int
    host_blocks_used: int
    host_blocks_total: int
    num_evictions: int
    num_layout_changes: int
    num_decode_steps: int
    num_decode_rows: int
    prompt_tokens: int
    output_tokens: int


class PhaseChanged(msgspec.Struct, tag=True, frozen=True):
    """A transition: from the last step's end to every worker being done, monotonic seconds; bytes over ranks."""

    to: Phase
    start: float
    end: float
    num_bytes: int


class SchedulerBye(msgspec.Struct, tag=True, frozen=True):
    pass


SchedulerMessage = SchedulerReady | WantInput | Results | NewTokens | Progress | PhaseChanged | SchedulerBye

# ---------------------------------------------------------------- workers -> frontend


class Telemetry(msgspec.Struct, tag=True, frozen=True):
    """Timeline spans since the last message, and totals since the start."""

    rank: int
    spans: list[Span]
    counters: RankCounters


class StartingUp(msgspec.Struct, tag=True, frozen=True):
    """A part of start-up begins; the first rank says so for all."""

    part: str


class StartUp(msgspec.Struct, tag=True, frozen=True):
    """A worker is up; where its start-up time went, in seconds by part."""

    process: ProcessId
    seconds: dict[str, float]


WorkerTelemetry = Telemetry | StartingUp | StartUp

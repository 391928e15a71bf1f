"""What a run counts: requests, tokens, seconds per phase, bytes moved, peak memory. One clock: `time.monotonic`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from seesaw_ds.layout import Phase


class Activity(str, enum.Enum):
    """What a replica is doing; the phases, and what lies between them."""

    STARTUP = "startup"
    PREFILL = "prefill"
    DECODE = "decode"
    TRANSITION = "transition"

    @classmethod
    def of(cls, phase: Phase) -> Activity:
        """The activity of computing in `phase`."""
        return cls(phase.value)


@dataclass(frozen=True, slots=True)
class Interval:
    """One stretch of an activity, in seconds of the clock."""

    activity: Activity
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class RankCounters:
    """Totals of one worker since it started; a later report replaces the earlier.

    `reshard_seconds` are of transitions, for which the rank received `weight_bytes` of weights, `preloaded_bytes` of
    them before, and `kv_exchange_bytes` of KV that stays on the devices; `kv_out_bytes` and `kv_in_bytes` are what it
    copied to and from the host pool. `peak_host_bytes` is the resident memory of its process. `prefill_step_seconds`
    and `decode_step_seconds` are of its micro-batches and its decode steps, from their first kernel to their last,
    waits for other stages included.
    """

    reshard_seconds: float = 0.0
    weight_bytes: int = 0
    preloaded_bytes: int = 0
    kv_exchange_bytes: int = 0
    kv_out_bytes: int = 0
    kv_in_bytes: int = 0
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    prefill_step_seconds: float = 0.0
    decode_step_seconds: float = 0.0


@dataclass(slots=True)
class ReplicaMetrics:
    """One replica: what it is doing, for how long it did each thing before, and how full it is."""

    activity: Activity
    since: float
    seconds: dict[Activity, float] = field(default_factory=lambda: dict.fromkeys(Activity, 0.0))
    num_transitions: int = 0
    num_evictions: int = 0
    num_layout_changes: int = 0
    num_decode_steps: int = 0
    num_decode_rows: int = 0
    host_blocks_used: int = 0
    host_blocks_total: int = 0


class RunMetrics:
    """The counters of a run over all its replicas, fed by the frontend. Not thread-safe.

    `num_total` is the number of requests in the input, None until it is known; `num_resumed` those that an earlier
    run had finished; `num_done` and `num_failed` those this run answered with a result and with an error.
    `prompt_tokens` and `output_tokens` belong to the requests done; `prefilled_tokens` and `decoded_tokens`
    count work as it happens. `startup_part` is what start-up is at, once somebody has said.
    """

    def __init__(self, model: str, layouts: str, num_replicas: int, started: float) -> None:
        self.model = model
        self.layouts = layouts
        self.replicas = tuple(ReplicaMetrics(Activity.STARTUP, since=started) for _ in range(num_replicas))
        self.ranks: dict[int, RankCounters] = {}
        self.startup_part: str | None = None
        self.startup_seconds: dict[str, float] = {}
        self.num_total: int | None = None
        self.num_resumed = 0
        self.num_done = 0
        self.num_failed = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.prefilled_tokens = 0
        self.decoded_tokens = 0
        self.ready: float | None = None
        self.finished: float | None = None

    def request_done(self, prompt_tokens: int, output_tokens: int) -> None:
        """Count a request answered with a result; `output_tokens` is the sum over its n sequences."""
        self.num_done += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens

    def request_failed(self) -> None:
        """Count a request answered with an error."""
        self.num_failed += 1

    def tokens_computed(self, prefilled: int = 0, decoded: int = 0) -> None:
        """Count the tokens of steps that ended."""
        self.prefilled_tokens += prefilled
        self.decoded_tokens += decoded

    def enter(self, replica: int, activity: Activity, at: float) -> Interval | None:
        """A replica began `activity`; returns the stretch that this ended, None when it went on as before.

        The first end of a start-up is when the run is ready: `elapsed_seconds` counts from there. Raises RuntimeError
        after `finish`.
        """
        if self.finished is not None:
            raise RuntimeError(f"replica {replica} enters {activity.value} after the run has finished")
        state = self.replicas[replica]
        if activity is state.activity:
            return None
        if state.activity is Activity.STARTUP:
            self.ready = at if self.ready is None else min(self.ready, at)
        if activity is Activity.TRANSITION:
            state.num_transitions += 1
        return self._close(state, activity, at)

    def finish(self, at: float) -> list[Interval]:
        """The run is over; returns each replica's last stretch, in the replicas' order."""
        self.finished = at
        return [self._close(state, state.activity, at) for state in self.replicas]

    @staticmethod
    def _close(state: ReplicaMetrics, following: Activity, at: float) -> Interval:
        interval = Interval(state.activity, state.since, max(at, state.since))
        state.seconds[state.activity] += interval.end - interval.start
        state.activity = following
        state.since = interval.end
        return interval

    def set_host_blocks(self, replica: int, used: int, total: int) -> None:
        """How full the host pool of a replica is."""
        state = self.replicas[replica]
        state.host_blocks_used = used
        state.host_blocks_total = total

    def set_evictions(self, replica: int, num_evictions: int) -> None:
        """The evictions of a replica since the start."""
        self.replicas[replica].num_evictions = num_evictions

    def set_layout_changes(self, replica: int, num_changes: int) -> None:
        """How often a replica has decoded in another layout than its plan says since the start."""
        self.replicas[replica].num_layout_changes = num_changes

    def set_decode_steps(self, replica: int, num_steps: int, num_rows: int) -> None:
        """A replica's decode steps since the start, each pipeline group's counted as one, and their rows.

        What rode in micro-batches of prefill is not in them.
        """
        self.replicas[replica].num_decode_steps = num_steps
        self.replicas[replica].num_decode_rows = num_rows

    def set_rank(self, rank: int, counters: RankCounters) -> None:
        """The latest totals of a worker."""
        self.ranks[rank] = counters

    def add_startup(self, part: str, seconds: float) -> None:
        """A part of the start-up, such as loading weights, as one process measured it; the slowest one counts."""
        self.startup_seconds[part] = max(seconds, self.startup_seconds.get(part, 0.0))

    def elapsed_seconds(self, now: float) -> float:
        """Seconds of work so far, or in all: from ready to finished, start-up not included."""
        if self.ready is None:
            return 0.0
        return max(0.0, (now if self.finished is None else self.finished) - self.ready)

    def activity_seconds(self, activity: Activity) -> float:
        """Seconds spent in `activity`, the mean over replicas, so that the activities add up to the run."""
        return sum(state.seconds[activity] for state in self.replicas) / len(self.replicas)

    @property
    def num_answered(self) -> int:
        """Requests with a line in the output, those of earlier runs included."""
        return self.num_resumed + self.num_done + self.num_failed

    @property
    def num_transitions(self) -> int:
        """Phase changes that were begun, summed over replicas."""
        return sum(state.num_transitions for state in self.replicas)

    @property
    def num_decode_steps(self) -> int:
        return sum(state.num_decode_steps for state in self.replicas)

    @property
    def num_decode_rows(self) -> int:
        return sum(state.num_decode_rows for state in self.replicas)

    @property
    def num_layout_changes(self) -> int:
        """Choices of a layout to decode in that were not the plan's, summed over replicas."""
        return sum(state.num_layout_changes for state in self.replicas)

    @property
    def num_evictions(self) -> int:
        """Sequences sent back to the host pool, summed over replicas."""
        return sum(state.num_evictions for state in self.replicas)

    @property
    def host_pool_fill(self) -> float:
        """The share of host blocks in use, over all replicas: 0 to 1."""
        total = sum(state.host_blocks_total for state in self.replicas)
        return sum(state.host_blocks_used for state in self.replicas) / total if total else 0.0

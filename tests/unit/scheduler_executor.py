"""A stand-in for the workers that drives a scheduler to the end and distrusts it.

It executes actions with random delays, compute in the order given and transfers in any order, keeps its own record
of which sequence owns each block and which token's KV each block position holds, in which phase's layout, and asserts
that every decode step reads exactly its own sequence's tokens, in the layout it runs in.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from seesaw_ds.layout import Phase
from seesaw_ds.requests import FinishReason
from seesaw_ds.sched.output import (
    Activate,
    DecodeBatch,
    DecodeDone,
    DecodeRow,
    Evict,
    EvictDone,
    PhaseSwitched,
    PrefillBatch,
    PrefillDone,
    Preload,
    SequenceSpec,
    SwapIn,
    SwapInDone,
    SwapOutDone,
    SwitchPhase,
)
from seesaw_ds.sched.scheduler import Scheduler

STOP = 1
WEIGHTS = -1  # who owns blocks that are lent


@dataclass(frozen=True)
class Job:
    """A sequence and the tokens that sampling would give it, one for each of its `max_tokens`."""

    spec: SequenceSpec
    tokens: tuple[int, ...]

    @property
    def expected(self) -> tuple[FinishReason, int]:
        """Why the sequence must end, and with how many tokens."""
        for count, token in enumerate(self.tokens, start=1):
            if token in self.spec.stop_token_ids and count > self.spec.min_tokens:
                return FinishReason.STOP, count
        return FinishReason.LENGTH, self.spec.max_tokens


@dataclass
class Shadow:
    """What the executor knows of an admitted sequence."""

    job: Job
    num_prompt_issued: int = 0
    num_steps_issued: int = 0
    num_executed: int = 0
    num_tokens_known: int = 0
    steps_in_flight: int = 0
    step_group: int | None = None
    in_flight: int = 0
    slot: int | None = None
    host: tuple[int, ...] = ()
    gpu: list[int] = field(default_factory=list)
    swapping_in: bool = False
    ended: bool = False


class ShadowExecutor:
    """Runs `jobs` through a scheduler; `run` returns when all have ended. `stays`: it has a layout chooser.

    `counts` holds the actions of each kind, and as "stay" the decode steps in the prefill phase.
    """

    def __init__(
        self, scheduler: Scheduler, jobs: list[Job], seed: int, abort_rate: float = 0.0, stays: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.limits = scheduler.limits
        self.decodes_in_prefill = stays or scheduler.limits.has_one_phase
        self.random = random.Random(seed)
        self.abort_rate = abort_rate
        self.jobs = {job.spec.seq_id: job for job in jobs}
        self.to_add = deque(jobs)
        self.waiting: OrderedDict[int, Job] = OrderedDict()
        self.live: dict[int, Shadow] = {}
        self.finished: dict[int, tuple[FinishReason, int]] = {}
        self.aborted: set[int] = set()
        self.phase = Phase.PREFILL
        self.compute: deque[object] = deque()
        self.transfers: list[object] = []
        self.compute_events: deque[object] = deque()
        self.transfer_events: list[object] = []
        self.batches: dict[int, PrefillBatch | DecodeBatch] = {}
        self.owner: dict[tuple[str, int], int] = {}
        self.content: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
        self.counts: Counter[str] = Counter()
        self.lent: tuple[int, ...] = ()
        self.is_input_closed = False

    # The loop

    def run(self) -> None:
        """Drive to the end; fails on a stall, or after far more actions than the tokens account for."""
        num_tokens = sum(job.spec.num_prompt_tokens + job.spec.max_tokens for job in self.jobs.values())
        action_limit = 50 + 12 * (num_tokens + len(self.jobs))
        while not self.scheduler.is_done:
            moves = [self._execute_compute] * bool(self.compute)
            moves += [self._execute_transfer] * bool(self.transfers)
            moves += [self._deliver_compute] * bool(self.compute_events)
            moves += [self._deliver_transfer] * bool(self.transfer_events)
            if self.scheduler.wants_input:
                moves.append(self._feed)
            issued = self._issue() if not moves or self.random.random() < 0.6 else False
            assert moves or issued, f"stalled: {self.scheduler.stats()}"
            if moves:
                self.random.choice(moves)()
            if self.abort_rate and self.random.random() < self.abort_rate:
                self._abort()
            self.scheduler.check_integrity()
            assert sum(self.counts.values()) < action_limit, f"no end in sight: {self.counts}"
        assert not self.compute
        assert not self.transfers
        assert self.scheduler.schedule() is None

    def _feed(self) -> None:
        if not self.to_add:
            self.scheduler.close_input()
            self.is_input_closed = True
            return
        job = self.to_add.popleft()
        self.waiting[job.spec.seq_id] = job
        self.scheduler.add(job.spec)

    def _abort(self) -> None:
        seq_id = self.random.choice([*self.jobs])
        was_active = seq_id in self.waiting or (seq_id in self.live and not self.live[seq_id].ended)
        self.scheduler.abort(seq_id)
        if not was_active:
            return
        self.aborted.add(seq_id)
        if self.waiting.pop(seq_id, None) is None:
            self._end(seq_id)

    def _issue(self) -> bool:
        action = self.scheduler.schedule()
        if action is None:
            return False
        self.counts[type(action).__name__] += 1
        getattr(self, f"_issue_{type(action).__name__}")(action)
        return True

    # Ownership: a block belongs to one sequence from its first mention to the event that frees it.

    def _claim(self, pool: str, block_ids, seq_id: int) -> None:
        size = getattr(self.limits, f"num_{pool}_blocks")
        for block_id in block_ids:
            assert 0 <= block_id < size
            previous = self.owner.setdefault((pool, block_id), seq_id)
            assert previous == seq_id, f"{pool} block {block_id} of {previous} given to {seq_id}"

    def _disown(self, pool: str, block_ids) -> None:
        for block_id in block_ids:
            del self.owner[pool, block_id]
            self.content.pop((pool, block_id), None)

    def _end(self, seq_id: int) -> None:
        self.live[seq_id].ended = True
        self._drop_if_idle(seq_id)

    def _drop_if_idle(self, seq_id: int) -> None:
        shadow = self.live[seq_id]
        if shadow.ended and shadow.in_flight == 0:
            for pool, block_ids in (("host", shadow.host), ("gpu", shadow.gpu)):
                self._disown(pool, block_ids)
            del self.live[seq_id]

    # KV contents

    def _write(self, pool: str, table, seq_id: int, index: int) -> None:
        block, offset = divmod(index, self.limits.block_size)
        assert self.owner[pool, table[block]] == seq_id
        self.content.setdefault((pool, table[block]), {})[offset] = (seq_id, index, self._form(pool))

    def _form(self, pool: str) -> Phase | None:
        """The layout that KV of `pool` is in: on the GPU that of the phase."""
        return self.phase if pool == "gpu" and not self.limits.is_static else None

    def _check(self, pool: str, table, seq_id: int, num_tokens: int) -> None:
        for index in range(num_tokens):
            block, offset = divmod(index, self.limits.block_size)
            assert self.content[pool, table[block]][offset] == (seq_id, index, self._form(pool))

    def _copy(self, source: str, source_table, target: str, target_table, seq_id: int, num_tokens: int) -> None:
        self._check(source, source_table, seq_id, num_tokens)
        for index in range(num_tokens):
            self._write(target, target_table, seq_id, index)

    # Issue: check each action against the executor's own record

    def _issue_PrefillBatch(self, batch: PrefillBatch) -> None:
        limits = self.limits
        assert batch.chunks
        num_tokens = sum(chunk.num_tokens for chunk in batch.chunks)
        assert num_tokens <= max(limits.max_num_batched_tokens - len(batch.rows), limits.max_num_batched_tokens // 8, 1)
        assert limits.mixes_steps or not batch.rows
        for chunk in batch.chunks:
            if chunk.start == 0:
                seq_id, job = self.waiting.popitem(last=False)
                assert seq_id == chunk.seq_id, "prompts must start in order"
                self.live[seq_id] = Shadow(job)
            shadow = self.live[chunk.seq_id]
            spec = shadow.job.spec
            assert not shadow.ended
            assert chunk.num_tokens > 0
            assert chunk.start == shadow.num_prompt_issued
            assert len(chunk.block_ids) == self._blocks(spec.num_prompt_tokens)
            shadow.num_prompt_issued += chunk.num_tokens
            assert chunk.is_last == (shadow.num_prompt_issued == spec.num_prompt_tokens)
            shadow.gpu = list(chunk.block_ids)
            self._claim("gpu", chunk.block_ids, chunk.seq_id)
            shadow.in_flight += 1
            assert chunk.is_last or not chunk.host_block_ids
            if chunk.host_block_ids:
                assert self.is_input_closed or not limits.has_one_phase
                assert spec.max_tokens > 1
                shadow.in_flight += 1
                shadow.host = chunk.host_block_ids
                assert len(shadow.host) == len(shadow.gpu)
                self._claim("host", shadow.host, chunk.seq_id)
        self._check_rows(batch.rows, batch.group, limits.prefill_stages)
        self._queue_batch(batch)
        in_flight = sum(isinstance(other, PrefillBatch) for other in self.batches.values())
        assert in_flight <= limits.prefill_stages + 1

    def _issue_DecodeBatch(self, batch: DecodeBatch) -> None:
        assert batch.rows
        is_prefill = self.scheduler.phase is Phase.PREFILL
        assert not is_prefill or self.decodes_in_prefill
        self.counts["stay"] += is_prefill
        num_groups = self.limits.prefill_stages if is_prefill else self.limits.decode_stages
        self._check_rows(batch.rows, batch.group, num_groups)
        self._queue_batch(batch)

    def _check_rows(self, rows: tuple[DecodeRow, ...], group: int, num_groups: int) -> None:
        assert 0 <= group < num_groups
        assert len(rows) <= -(-self.limits.max_num_seqs // num_groups), "a group has more than its share of the slots"
        for row in rows:
            shadow = self.live[row.seq_id]
            assert not shadow.ended
            assert not shadow.swapping_in
            assert row.slot == shadow.slot
            assert row.position == shadow.job.spec.num_prompt_tokens + shadow.num_steps_issued
            assert shadow.step_group in (None, group) or shadow.steps_in_flight == 0
            shadow.step_group = group
            shadow.num_steps_issued += 1
            assert shadow.num_steps_issued < shadow.job.spec.max_tokens
            shadow.steps_in_flight += 1
            shadow.in_flight += 1
            self._claim("gpu", row.new_block_ids, row.seq_id)
            shadow.gpu += row.new_block_ids
            assert len(shadow.gpu) == self._blocks(row.position + 1)

    def _issue_Activate(self, action: Activate) -> None:
        shadow = self.live[action.seq_id]
        assert not shadow.ended
        assert shadow.num_tokens_known == 1
        assert action.num_tokens == shadow.job.spec.num_prompt_tokens
        assert list(action.gpu_block_ids) == shadow.gpu
        self._take_slot(shadow, action.slot)

    def _take_slot(self, shadow: Shadow, slot: int) -> None:
        assert slot not in {other.slot for other in self.live.values()}
        assert 0 <= slot < self.limits.max_num_seqs
        shadow.slot = slot

    def _queue_batch(self, batch: PrefillBatch | DecodeBatch) -> None:
        assert batch.step_id not in self.batches
        self.batches[batch.step_id] = batch
        self.compute.append(batch)

    def _issue_SwapIn(self, action: SwapIn) -> None:
        shadow = self.live[action.seq_id]
        assert not shadow.ended
        assert shadow.host == action.host_block_ids
        assert action.num_tokens == shadow.job.spec.num_prompt_tokens + shadow.num_tokens_known - 1
        assert len(action.gpu_block_ids) == self._blocks(action.num_tokens)
        self._claim("gpu", action.gpu_block_ids, action.seq_id)
        shadow.gpu = list(action.gpu_block_ids)
        self._take_slot(shadow, action.slot)
        shadow.swapping_in = True
        shadow.in_flight += 1
        self.transfers.append(action)

    def _issue_Evict(self, action: Evict) -> None:
        shadow = self.live[action.seq_id]
        assert shadow.in_flight == 0
        assert shadow.slot == action.slot
        assert tuple(shadow.gpu) == action.gpu_block_ids
        assert len(action.host_block_ids) == len(shadow.gpu)
        self._claim("host", action.host_block_ids, action.seq_id)
        shadow.host = action.host_block_ids
        shadow.in_flight += 1
        self.transfers.append(action)

    def _issue_Preload(self, action: Preload) -> None:
        size = self.limits.preload
        assert size is not None and 1 <= action.num_rounds <= size.num_rounds
        assert len(action.gpu_block_ids) == action.num_rounds * size.round_blocks
        assert self.scheduler.phase is Phase.PREFILL and self.is_input_closed
        assert len(self.lent) + len(action.gpu_block_ids) <= size.num_rounds * size.round_blocks
        assert not set(action.gpu_block_ids) & {block for pool, block in self.owner if pool == "gpu"}
        left = [seq_id for seq_id, shadow in self.live.items() if not shadow.ended] + list(self.waiting)
        peak = sum(map(self._peak, left))
        self.lent += action.gpu_block_ids
        assert peak + len(self.lent) <= self.limits.num_gpu_blocks, "some may have to wait for their blocks"
        self._claim("gpu", action.gpu_block_ids, WEIGHTS)

    def _issue_SwitchPhase(self, action: SwitchPhase) -> None:
        assert not self.limits.has_one_phase
        if action.to is Phase.PREFILL:
            assert not any(shadow.host for shadow in self.live.values())
            assert self.waiting
        else:
            self._check_no_room_left()
        for block_id in action.gpu_block_ids:
            shadow = self.live[self.owner["gpu", block_id]]
            assert not shadow.ended
            assert shadow.swapping_in or not shadow.host, "changed the layout of KV that leaves the GPU"
        for shadow in self.live.values():
            shadow.step_group = None
        self.compute.append(action)

    def _check_no_room_left(self) -> None:
        """To decode: no prompt is left, or nothing is under way and the next one has no room on the GPU or the host."""
        assert all(s.ended or s.num_prompt_issued == s.job.spec.num_prompt_tokens for s in self.live.values())
        if not self.waiting:
            assert self.is_input_closed
            return
        assert not self.batches
        assert all(shadow.in_flight == 0 for shadow in self.live.values())
        head = next(iter(self.waiting.values())).spec
        host_used, gpu_used = (sum(len(blocks) for blocks in column) for column in zip(*self._tables(), strict=True))
        held = {seq_id: len(s.host) or len(s.gpu) for seq_id, s in self.live.items()}
        held[head.seq_id] = self._blocks(head.num_prompt_tokens)
        need = [self._peak(seq_id) - blocks for seq_id, blocks in held.items()]
        num_free = self.limits.num_host_blocks + self.limits.num_gpu_blocks - sum(held.values())
        is_room = held[head.seq_id] <= self.limits.num_host_blocks - host_used
        is_room &= held[head.seq_id] <= self.limits.num_gpu_blocks - gpu_used - len(self.lent)
        assert not (is_room and num_free >= max(need) + max(held.values())), "changed to decode with room left"

    def _tables(self) -> list[tuple[tuple[int, ...], list[int]]]:
        return [((), [])] + [(shadow.host, shadow.gpu) for shadow in self.live.values()]

    def _peak(self, seq_id: int) -> int:
        spec = self.jobs[seq_id].spec
        return self._blocks(spec.num_prompt_tokens + spec.max_tokens - 1)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    # Execution: compute in order, transfers in any order

    def _execute_compute(self) -> None:
        action = self.compute.popleft()
        if isinstance(action, SwitchPhase):
            assert self.phase is not action.to
            while self.transfers:
                self._execute_transfer()
            self.phase = action.to
            self._reshard(action.gpu_block_ids)
            self.compute_events.append(PhaseSwitched(action.to))
        elif isinstance(action, PrefillBatch):
            assert self.phase is Phase.PREFILL
            self._execute_prefill(action)
        else:
            assert isinstance(action, DecodeBatch)
            assert self.phase is Phase.DECODE or self.decodes_in_prefill
            self.compute_events.append(DecodeDone(action.step_id, tuple(self._execute_rows(action.rows))))

    def _reshard(self, block_ids) -> None:
        assert len(set(block_ids)) == len(block_ids)
        assert not (block_ids and self.limits.is_static)
        for block_id in block_ids:
            content = self.content.get(("gpu", block_id), {})
            for offset, (seq_id, index, _) in content.items():
                content[offset] = (seq_id, index, self.phase)

    def _execute_prefill(self, batch: PrefillBatch) -> None:
        tokens = self._execute_rows(batch.rows)
        for chunk in batch.chunks:
            self._check("gpu", chunk.block_ids, chunk.seq_id, chunk.start)
            for index in range(chunk.start, chunk.start + chunk.num_tokens):
                self._write("gpu", chunk.block_ids, chunk.seq_id, index)
            if chunk.is_last:
                tokens.append((chunk.seq_id, self.jobs[chunk.seq_id].tokens[0]))
                if chunk.host_block_ids:
                    self.transfers.append(chunk)
        self.compute_events.append(PrefillDone(batch.step_id, tuple(tokens)))

    def _execute_rows(self, rows: tuple[DecodeRow, ...]) -> list[tuple[int, int]]:
        tokens = []
        for row in rows:
            shadow = self.live[row.seq_id]
            self._write("gpu", shadow.gpu, row.seq_id, row.position)
            self._check("gpu", shadow.gpu, row.seq_id, row.position + 1)
            shadow.num_executed += 1
            tokens.append((row.seq_id, self.jobs[row.seq_id].tokens[shadow.num_executed]))
        return tokens

    def _execute_transfer(self) -> None:
        action = self.transfers.pop(self.random.randrange(len(self.transfers)))
        shadow = self.live[action.seq_id]
        num_tokens = shadow.job.spec.num_prompt_tokens + max(shadow.num_tokens_known, 1) - 1
        if isinstance(action, SwapIn):
            self._copy("host", shadow.host, "gpu", shadow.gpu, action.seq_id, action.num_tokens)
            self.transfer_events.append(SwapInDone(action.seq_id))
        elif isinstance(action, Evict):
            self._copy("gpu", shadow.gpu, "host", shadow.host, action.seq_id, num_tokens)
            self.transfer_events.append(EvictDone(action.seq_id))
        else:
            self._copy("gpu", shadow.gpu, "host", shadow.host, action.seq_id, num_tokens)
            self.transfer_events.append(SwapOutDone(action.seq_id))

    # Events

    def _deliver_compute(self) -> None:
        event = self.compute_events.popleft()
        answered = []
        if isinstance(event, PhaseSwitched):
            self._disown("gpu", self.lent)
            self.lent = ()
        else:
            batch = self.batches.pop(event.step_id)
            stepped = [row.seq_id for row in batch.rows]
            answered = stepped + [chunk.seq_id for chunk in getattr(batch, "chunks", ())]
            for seq_id in stepped:
                self.live[seq_id].steps_in_flight -= 1
        for seq_id in answered:
            self.live[seq_id].in_flight -= 1
        for seq_id, _ in getattr(event, "tokens", ()):
            self.live[seq_id].num_tokens_known += 1
        self._finish(self.scheduler.update(event))
        for seq_id in answered:
            if seq_id in self.live:
                self._drop_if_idle(seq_id)

    def _finish(self, results) -> None:
        for result in results:
            assert result.seq_id not in self.finished
            assert result.seq_id not in self.aborted
            self.finished[result.seq_id] = (result.reason, result.num_output_tokens)
            self.live[result.seq_id].ended = True

    def _deliver_transfer(self) -> None:
        event = self.transfer_events.pop(self.random.randrange(len(self.transfer_events)))
        shadow = self.live[event.seq_id]
        shadow.in_flight -= 1
        if isinstance(event, SwapOutDone):
            self._disown("gpu", shadow.gpu)
            shadow.gpu = []
        elif isinstance(event, SwapInDone):
            self._disown("host", shadow.host)
            shadow.host, shadow.swapping_in = (), False
        else:
            self._disown("gpu", shadow.gpu)
            shadow.gpu, shadow.slot = [], None
        assert self.scheduler.update(event) == []
        self._drop_if_idle(event.seq_id)

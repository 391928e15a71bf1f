"""The engine's loop body: schedule, execute, update; between the pure scheduler and whoever carries messages.

`EngineCore` owns what the scheduler must not see: token ids, log-probabilities, and which workers have answered. It
turns actions into commands for workers and their results into events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from seesaw_ds.engine.messages import (
    Command,
    Decode,
    Drop,
    Load,
    LoadDone,
    NewTokens,
    Prefill,
    Start,
    StartPreload,
    StepDone,
    Store,
    StoreDone,
    SwapOutDone,
    Switch,
    SwitchDone,
)
from seesaw_ds.requests import SequenceRequest, SequenceResult, TokenLogprobs
from seesaw_ds.sched import output as actions
from seesaw_ds.sched.scheduler import Scheduler


@dataclass
class _Sequence:
    """A live sequence's tokens. `is_known` says that the workers have its request."""

    request: SequenceRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_known: bool = False
    num_sent: int = 0


class EngineCore:
    """Drives one replica's scheduler. `send` gives a command to every worker of the replica, in order.

    `on_action` is told of each action as it is issued.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_workers: int,
        send: Callable[[Command], None],
        on_action: Callable[[actions.Action], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._num_workers = num_workers
        self._send = send
        self._on_action = on_action
        self._sequences: dict[int, _Sequence] = {}
        self._step_rows: dict[int, list[int]] = {}
        self._prefill_steps: dict[int, list[int]] = {}
        self._group_slots: dict[int, list[int]] = {}
        self._acks: Counter[tuple[str, int]] = Counter()
        self._watched: set[int] = set()
        self._ended: list[int] = []
        self._results: list[SequenceResult] = []
        self.num_decode_steps = 0
        self.num_decode_rows = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    def add_all(self, requests: list[SequenceRequest]) -> None:
        """Queue a batch of sequences, those with the longest outputs first.

        Decode lasts at least as long as the sequence that ends last, so long ones must not start late. Batches keep
        their order, so no sequence waits for ever.
        """
        for request in sorted(requests, key=lambda request: -request.params.max_tokens):
            self.add(request)

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence. Raises ValueError when it can never fit the pools."""
        params = request.params
        self.scheduler.add(
            actions.SequenceSpec(
                seq_id=request.seq_id,
                num_prompt_tokens=len(request.prompt_token_ids),
                max_tokens=params.max_tokens,
                min_tokens=params.min_tokens,
                stop_token_ids=frozenset(request.stop_token_ids),
            )
        )
        self._sequences[request.seq_id] = _Sequence(request)
        if params.stop:
            self._watched.add(request.seq_id)

    def abort(self, seq_id: int) -> None:
        """Forget a sequence; its result is not reported."""
        self.scheduler.abort(seq_id)
        self._end(seq_id)

    def run_ahead(self) -> None:
        """Issue every action that can start now."""
        while (action := self.scheduler.schedule()) is not None:
            self._issue(action)
            if self._on_action is not None:
                self._on_action(action)
        if self._ended:
            self._send(Drop(self._ended))
            self._ended = []

    def take_results(self) -> list[SequenceResult]:
        """Sequences that finished since the last call."""
        results, self._results = self._results, []
        return results

    def take_new_tokens(self) -> list[NewTokens]:
        """Tokens, since the last call, of sequences whose stop strings somebody must look for."""
        news = []
        for seq_id in self._watched:
            sequence = self._sequences[seq_id]
            start = sequence.num_sent
            if len(sequence.token_ids) > start:
                news.append(NewTokens(seq_id, sequence.token_ids[start:], sequence.logprobs[start:]))
                sequence.num_sent = len(sequence.token_ids)
        return news

    # ------------------------------------------------------------ actions down

    def _issue(self, action: actions.Action) -> None:
        if isinstance(action, actions.PrefillBatch):
            self._issue_prefill(action)
        elif isinstance(action, actions.DecodeBatch):
            self.num_decode_steps += 1
            self.num_decode_rows += len(action.rows)
            self._send(self._decode(action.step_id, action.group, action.rows))
        elif isinstance(action, actions.Activate):
            self._send(Start(action, self._sequences[action.seq_id].token_ids[-1]))
        elif isinstance(action, actions.SwapIn):
            self._issue_load(action)
        elif isinstance(action, actions.Evict):
            self._send(Store(action))
        elif isinstance(action, actions.Preload):
            self._send(StartPreload(action))
        else:
            self._send(Switch(action.to, action.gpu_block_ids))

    def _issue_prefill(self, batch: actions.PrefillBatch) -> None:
        unknown = []
        for chunk in batch.chunks:
            sequence = self._sequences.get(chunk.seq_id)
            if sequence is not None and not sequence.is_known:
                sequence.is_known = True
                unknown.append(sequence.request)
        rows = self._decode(batch.step_id, batch.group, batch.rows) if batch.rows else None
        ends = [chunk.seq_id for chunk in batch.chunks if chunk.is_last]
        self._prefill_steps[batch.step_id] = ends
        self._step_rows[batch.step_id] = [row.seq_id for row in batch.rows] + ends
        self._send(Prefill(batch.step_id, batch.chunks, rows, unknown))

    def _decode(self, step_id: int, group: int, rows: tuple[actions.DecodeRow, ...]) -> Decode:
        slots = [row.slot for row in rows]
        changed = self._group_slots.get(group) != slots
        self._group_slots[group] = slots
        self._step_rows[step_id] = [row.seq_id for row in rows]
        new_blocks = [(row.slot, block) for row in rows for block in row.new_block_ids]
        return Decode(step_id, group, slots if changed else None, new_blocks)

    def _issue_load(self, swap: actions.SwapIn) -> None:
        sequence = self._sequences[swap.seq_id]
        tokens = sequence.token_ids
        self._send(Load(swap, list(tokens) if sequence.request.params.needs_token_history else tokens[-1:]))

    # ------------------------------------------------------------ results up

    def on_step(self, done: StepDone) -> None:
        """Take a step's tokens: record them, let the scheduler see them, and collect what finished."""
        rows = self._step_rows.pop(done.step_id)
        logprobs = done.logprobs or [None] * len(rows)
        for seq_id, token_id, logprob in zip(rows, done.token_ids, logprobs, strict=True):
            sequence = self._sequences.get(seq_id)
            if sequence is None:
                continue  # ended one step earlier: the step that was already under way is dropped
            sequence.token_ids.append(token_id)
            self.num_output_tokens += 1
            if logprob is not None:
                sequence.logprobs.append(logprob)
        tokens = tuple(zip(rows, done.token_ids, strict=True))
        if done.step_id in self._prefill_steps:
            ends = self._prefill_steps.pop(done.step_id)
            self.num_prompt_tokens += sum(
                len(self._sequences[seq_id].request.prompt_token_ids) for seq_id in ends if seq_id in self._sequences
            )
            self._update(actions.PrefillDone(done.step_id, tokens))
        else:
            self._update(actions.DecodeDone(done.step_id, tokens))

    def on_swap_out(self, done: SwapOutDone) -> None:
        for seq_id in done.seq_ids:
            if self._all_answered("swap_out", seq_id):
                self._update(actions.SwapOutDone(seq_id))

    def on_load(self, done: LoadDone) -> None:
        if self._all_answered("load", done.seq_id):
            self._update(actions.SwapInDone(done.seq_id))

    def on_store(self, done: StoreDone) -> None:
        if self._all_answered("store", done.seq_id):
            self._update(actions.EvictDone(done.seq_id))

    def on_switch(self, done: SwitchDone) -> bool:
        """Whether every worker has taken the new layout."""
        if not self._all_answered("switch", 0):
            return False
        self._group_slots.clear()
        self._update(actions.PhaseSwitched(done.to))
        return True

    def _all_answered(self, kind: str, key: int) -> bool:
        self._acks[kind, key] += 1
        if self._acks[kind, key] < self._num_workers:
            return False
        del self._acks[kind, key]
        return True

    def _update(self, event: actions.Event) -> None:
        for finished in self.scheduler.update(event):
            sequence = self._sequences[finished.seq_id]
            count = finished.num_output_tokens
            wants_logprobs = sequence.request.params.logprobs is not None
            self._results.append(
                SequenceResult(
                    seq_id=finished.seq_id,
                    token_ids=tuple(sequence.token_ids[:count]),
                    finish_reason=finished.reason,
                    logprobs=tuple(sequence.logprobs[:count]) if wants_logprobs else None,
                )
            )
            self._end(finished.seq_id)

    def _end(self, seq_id: int) -> None:
        sequence = self._sequences.pop(seq_id, None)
        self._watched.discard(seq_id)
        if sequence is not None and sequence.is_known:
            self._ended.append(seq_id)

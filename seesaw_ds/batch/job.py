"""A batch file as work: sequences to generate, handed out on demand, and results put back together per request.

Reads the input as sequences are asked for and holds only requests that are under way, so memory does not grow with
the file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from seesaw_ds.batch.input import read_batch
from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.batch.lines import BatchRequest, LineError, TokenizedPrompt, TokenizedRequest
from seesaw_ds.batch.output import (
    ChoiceResult,
    RequestResult,
    error_record,
    finish_choice,
    internal_error,
    result_record,
)
from seesaw_ds.batch.stop_strings import StopMatch, StopStringFinder
from seesaw_ds.batch.text import TextCodec
from seesaw_ds.batch.tokenization import tokenize_request
from seesaw_ds.errors import UserError
from seesaw_ds.observe.metrics import RunMetrics
from seesaw_ds.requests import FinishReason, SequenceRequest, SequenceResult, TokenLogprobs


@dataclass
class _OpenRequest:
    """A request under way, with a place for each of its choices."""

    request: TokenizedRequest
    choices: list[ChoiceResult | None]


@dataclass
class _OpenSequence:
    """One choice of an open request; tokens are kept only of those whose stop strings are looked for."""

    owner: _OpenRequest
    index: int
    request: SequenceRequest
    finder: StopStringFinder | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


def count_requests(path: Path) -> int:
    """Lines of a batch file that become records: those that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


class BatchJob:
    """One run over a batch file. Every line of it that is not done already ends as one record of `journal`.

    `seed` is the run's; requests that give none get one from it and their custom_id, so a resumed run samples
    the same tokens. `num_opened` are the lines taken up so far, `is_exhausted` whether these are all.
    """

    def __init__(
        self,
        input_path: Path,
        journal: ResultJournal,
        codec: TextCodec,
        metrics: RunMetrics,
        *,
        model: str,
        seed: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._lines: Iterator[BatchRequest | LineError] = read_batch(input_path)
        self._journal = journal
        self._codec = codec
        self._metrics = metrics
        self._model = model
        self._seed = seed
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._sequences: dict[int, _OpenSequence] = {}
        self._next_seq_id = 0
        self.num_opened = 0
        self.is_exhausted = False

    @property
    def is_done(self) -> bool:
        """Whether every line has its record."""
        return self.is_exhausted and not self._sequences

    def take(self, num_sequences: int) -> list[SequenceRequest]:
        """At least `num_sequences` more to generate (a request's sequences stay together); fewer at the input's end."""
        taken: list[SequenceRequest] = []
        while len(taken) < num_sequences and not self.is_exhausted:
            line = next(self._lines, None)
            if line is None:
                self.is_exhausted = True
            elif not self._journal.is_done(line.key):
                self.num_opened += 1
                taken.extend(self._open(line))
        return taken

    def _open(self, line: BatchRequest | LineError) -> list[SequenceRequest]:
        tokenized = self._tokenize(line) if isinstance(line, BatchRequest) else line
        if isinstance(tokenized, LineError):
            self._fail(tokenized)
            return []
        num_choices = sum(prompt.params.n for prompt in tokenized.prompts)
        owner = _OpenRequest(tokenized, [None] * num_choices)
        choices = ((prompt, choice) for prompt in tokenized.prompts for choice in range(prompt.params.n))
        return [self._open_choice(owner, index, *choice) for index, choice in enumerate(choices)]

    def _open_choice(self, owner: _OpenRequest, index: int, prompt: TokenizedPrompt, choice: int) -> SequenceRequest:
        params = prompt.params
        eos = () if params.ignore_eos else self._codec.eos_token_ids
        request = SequenceRequest(
            seq_id=self._next_seq_id,
            prompt_token_ids=prompt.token_ids,
            params=params,
            seed=self._choose_seed(params.seed, owner.request.custom_id, index, choice),
            stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *eos))),
        )
        finder = StopStringFinder(self._codec, params) if params.stop else None
        self._sequences[request.seq_id] = _OpenSequence(owner, index, request, finder)
        self._next_seq_id += 1
        return request

    def _tokenize(self, line: BatchRequest) -> TokenizedRequest | LineError:
        try:
            return tokenize_request(line, self._codec, self._max_model_len, self._vocab_size)
        except Exception as error:  # whatever a tokenizer does with strange text, it fails this request alone
            return LineError(line.line_number, line.custom_id, repr(error), None, "internal_error", status_code=500)

    def _choose_seed(self, seed: int | None, custom_id: str, index: int, choice: int) -> int:
        """A request's own seed is its first choice's; every other seed is derived, so that no two streams are alike."""
        if seed is not None and choice == 0:
            return seed
        text = f"{self._seed}\0{custom_id}\0{index}" if seed is None else f"{seed}\0{choice}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)

    def add_tokens(self, seq_id: int, token_ids: list[int], logprobs: list[TokenLogprobs]) -> bool:
        """Take new tokens of a sequence with stop strings; True when one was found, so that it can be aborted."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return False  # its last tokens crossed the abort on their way
        assert sequence.finder is not None
        sequence.token_ids.extend(token_ids)
        sequence.logprobs.extend(logprobs)
        match = sequence.finder.push(token_ids)
        if match is None:
            return False
        wants_logprobs = sequence.request.params.logprobs is not None
        result = SequenceResult(
            seq_id=seq_id,
            token_ids=tuple(sequence.token_ids),
            finish_reason=FinishReason.STOP,
            logprobs=tuple(sequence.logprobs) if wants_logprobs else None,
        )
        self._finish(sequence, result, match)
        return True

    def add_result(self, result: SequenceResult) -> None:
        """Take a finished sequence; writes the record when it is its request's last."""
        sequence = self._sequences.get(result.seq_id)
        if sequence is None:
            return
        match = None
        if sequence.finder is not None:
            match = sequence.finder.push(result.token_ids[len(sequence.token_ids) :])
        self._finish(sequence, result, match)

    def _finish(self, sequence: _OpenSequence, result: SequenceResult, match: StopMatch | None) -> None:
        del self._sequences[result.seq_id]
        owner = sequence.owner
        try:
            owner.choices[sequence.index] = finish_choice(self._codec, sequence.request, result, match)
            choices = tuple(choice for choice in owner.choices if choice is not None)
            if len(choices) < len(owner.choices):
                return
            record = result_record(
                RequestResult(owner.request, choices), self._codec, model=self._model, created=int(time.time())
            )
        except UserError:
            raise
        except Exception as error:  # a defect in writing up one request must not end the job
            self._fail(internal_error(owner.request, repr(error)))
            for other in [s for s in self._sequences.values() if s.owner is owner]:
                del self._sequences[other.request.seq_id]
            return
        self._journal.append(record)
        usage = record["response"]["body"]["usage"]
        self._metrics.request_done(usage["prompt_tokens"], usage["completion_tokens"])

    def _fail(self, error: LineError) -> None:
        self._journal.append(error_record(error))
        self._metrics.request_failed()

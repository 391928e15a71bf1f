"""How long the sequences of a batch file are: prompts by the tokenizer, outputs by max_tokens or by earlier results.

A large file is sampled: evenly spaced lines are tokenized, and each stands for its neighbours. Results that are in the
output file already tell how long outputs become: a line whose own result is there takes its length, any other line
with the same limit rule a share of its max_tokens, drawn evenly from the shares of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from seesaw_ds.batch.input import LineParser
from seesaw_ds.batch.lines import BatchRequest, Endpoint, RecordKey, TokenizedRequest
from seesaw_ds.batch.text import TextCodec, load_codec
from seesaw_ds.batch.tokenization import tokenize_request
from seesaw_ds.config import RunConfig, max_model_len
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape

MAX_SAMPLED_LINES = 1000
MAX_SAMPLED_BYTES = 4 << 20
"""Text that is tokenized at most: a few seconds."""
MIN_RESULTS = 20
"""Fewer results than this say nothing about the outputs to come."""

_GOLDEN_RATIO = 0.6180339887498949


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Body(msgspec.Struct):
    usage: _Usage | None = None
    choices: list[msgspec.Raw] = []


class _Response(msgspec.Struct):
    body: _Body


class _Result(msgspec.Struct):
    custom_id: str | None
    response: _Response | None


class _Line(msgspec.Struct):
    custom_id: str


@dataclass(frozen=True, slots=True)
class _Place:
    """A line of the input: its number, from 1, its bytes in the file, and its key where that was looked for."""

    number: int
    offset: int
    size: int
    key: RecordKey | None = None


def input_lengths(run: RunConfig, shape: ModelShape, overwrite: bool) -> list[RequestLength]:
    """Lengths of all sequences that the run has to generate, or a list that is like them when the file is large.

    Lines at fault have none. Results in the output file are used and, unless `overwrite`, their lines left out.
    """
    usages = _read_usages(Path(run.output))
    lines = list(_places(Path(run.input), with_keys=bool(usages)))
    done = [line for line in lines if line.key in usages]
    waiting = lines if overwrite else [line for line in lines if line.key not in usages]
    if not waiting:
        return []
    sampler = _Sampler(run, shape, usages)
    if len(done) >= MIN_RESULTS:
        sampler.learn(_spread(done))
    sample = _spread(waiting)
    lengths = [sampler.lengths(line) for line in sample]
    # Each sampled line stands for the lines up to the next one.
    repeats = [lengths[i * len(sample) // len(waiting)] for i in range(len(waiting))]
    return [length for line in repeats for length in line]


class _Sampler:
    """Tokenizes single lines, and tells their outputs' lengths from what was learned."""

    def __init__(self, run: RunConfig, shape: ModelShape, usages: dict[RecordKey, tuple[int, int]]) -> None:
        self._path = Path(run.input)
        self._longest = max_model_len(run, shape)
        self._vocab_size = shape.vocab_size
        self._codec: TextCodec = load_codec(Path(run.model))
        self._usages = usages
        self._shares: list[float] = []
        self._num_drawn = 0

    def learn(self, places: Sequence[_Place]) -> None:
        """Take the shares of max_tokens that these lines' results reached."""
        for place in places:
            request = self._parse(place)
            if not isinstance(request, BatchRequest) or request.params.ignore_eos:
                continue
            prompt_tokens, output_tokens = self._usages[request.key]
            limit = request.params.max_tokens
            if not request.max_tokens_given and request.url is Endpoint.CHAT:
                limit = self._longest - prompt_tokens
            self._shares.append(min(1.0, output_tokens / max(1, limit)))
        self._shares.sort()

    def lengths(self, place: _Place) -> list[RequestLength]:
        """Lengths of a line's sequences; none for a line at fault."""
        request = self._parse(place)
        if not isinstance(request, BatchRequest):
            return []
        tokenized = tokenize_request(request, self._codec, self._longest, self._vocab_size)
        if not isinstance(tokenized, TokenizedRequest):
            return []
        return [
            RequestLength(len(prompt.token_ids), self._output_tokens(request, prompt.params.max_tokens))
            for prompt in tokenized.prompts
            for _ in range(prompt.params.n)
        ]

    def _output_tokens(self, request: BatchRequest, max_tokens: int) -> int:
        if request.params.ignore_eos:
            return max_tokens
        if (usage := self._usages.get(request.key)) is not None:
            return min(max_tokens, max(1, usage[1]))
        if not self._shares:
            return max_tokens
        # Multiples of the golden ratio are spread evenly over 0..1, however many of them there are.
        self._num_drawn += 1
        share = self._shares[int(self._num_drawn * _GOLDEN_RATIO % 1.0 * len(self._shares))]
        return max(1, round(share * max_tokens))

    def _parse(self, place: _Place) -> object:
        with self._path.open("rb") as file:
            file.seek(place.offset)
            return LineParser().parse(place.number, file.read(place.size))


def _read_usages(path: Path) -> dict[RecordKey, tuple[int, int]]:
    """By key of every result: its prompt's tokens, and the output tokens of one choice, 0 for a failed one."""
    usages: dict[RecordKey, tuple[int, int]] = {}
    decoder = msgspec.json.Decoder(_Result)
    try:
        file = path.open("rb")
    except OSError:
        return {}
    with file:
        for line in file:
            try:
                result = decoder.decode(line)
            except msgspec.MsgspecError:
                continue  # a torn last line, which will be dropped, or a failed line without an id
            if result.custom_id is None or result.response is None:
                continue
            body = result.response.body
            usage = body.usage or _Usage(0, 0)
            usages[result.custom_id] = (usage.prompt_tokens, usage.completion_tokens // max(1, len(body.choices)))
    return usages


def _places(path: Path, with_keys: bool) -> Iterator[_Place]:
    """Where every line of the input is that is not blank."""
    decoder = msgspec.json.Decoder(_Line)
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                key: RecordKey | None = None
                if with_keys:
                    try:
                        key = decoder.decode(line).custom_id
                    except msgspec.MsgspecError:
                        key = number
                yield _Place(number, offset, len(line), key)
            offset += len(line)


def _spread(places: Sequence[_Place]) -> list[_Place]:
    """Evenly spaced lines, no more than are tokenized in good time."""
    mean_bytes = sum(place.size for place in places) / len(places)
    count = max(1, min(len(places), MAX_SAMPLED_LINES, int(MAX_SAMPLED_BYTES / mean_bytes)))
    return [places[i * len(places) // count] for i in range(count)]

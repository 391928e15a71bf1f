"""Result records: OpenAI's shapes, counts and ids."""

from __future__ import annotations

import json
import math

import pytest

from seesaw_ds.batch.lines import Endpoint, LineError, TokenizedPrompt, TokenizedRequest
from seesaw_ds.batch.output import (
    ChoiceResult,
    RequestResult,
    error_record,
    finish_choice,
    internal_error,
    result_record,
)
from seesaw_ds.batch.stop_strings import StopMatch
from seesaw_ds.batch.text import TextCodec
from seesaw_ds.requests import FinishReason, SamplingParams, SequenceRequest, SequenceResult, TokenLogprobs

PIECES = ["</s>", "one", "\u2581two", "\ufffd", "four"]
LOGPROBS = (TokenLogprobs(-0.5, ((2, -0.25), (1, -0.5))), TokenLogprobs(-math.inf, ((1, -0.125), (4, -2.0))))


class PieceTokenizer:
    """Token ids index `PIECES`; the first space of a text is dropped."""

    def __len__(self) -> int:
        return len(PIECES)

    def decode(self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        kept = [i for i in token_ids if i or not skip_special_tokens]
        return "".join(PIECES[i] for i in kept).replace("\u2581", " ").removeprefix(" ")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return PIECES[token_id]


CODEC = TextCodec(PieceTokenizer(), [0])


def tokenized(url: Endpoint, num_prompts: int = 1, n: int = 1) -> TokenizedRequest:
    params = SamplingParams(n=n)
    prompts = tuple(TokenizedPrompt((1,) * (length + 2), params) for length in range(num_prompts))
    return TokenizedRequest(3, "id-\N{EURO SIGN}", url, prompts)


def sequence(
    token_ids: tuple[int, ...] = (1, 2),
    reason: FinishReason = FinishReason.LENGTH,
    logprobs: tuple[TokenLogprobs, ...] | None = None,
) -> SequenceResult:
    return SequenceResult(0, token_ids, reason, logprobs)


def test_chat_completion() -> None:
    request = tokenized(Endpoint.CHAT)
    choice = ChoiceResult(sequence(logprobs=LOGPROBS), "one two")
    record = result_record(RequestResult(request, (choice,)), CODEC, model="m", created=1700000000)
    suffix = record["id"].removeprefix("batch_req_")
    assert len(suffix) == 24
    assert record["custom_id"] == "id-\N{EURO SIGN}"
    assert record["error"] is None
    assert record["response"]["status_code"] == 200
    assert record["response"]["request_id"] == f"req_{suffix}"
    body = record["response"]["body"]
    logprobs = body["choices"][0].pop("logprobs")
    assert body == {
        "id": f"chatcmpl-{suffix}",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "one two"}, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    }
    first, second = logprobs["content"]
    assert first == {
        "token": "one",
        "logprob": -0.5,
        "bytes": list(b"one"),
        "top_logprobs": [
            {"token": " two", "logprob": -0.25, "bytes": list(b" two")},
            {"token": "one", "logprob": -0.5, "bytes": list(b"one")},
        ],
    }
    assert second["logprob"] == -9999.0
    json.dumps(record, allow_nan=False)


def test_part_of_a_character_has_no_bytes() -> None:
    choice = ChoiceResult(sequence((3,), logprobs=(TokenLogprobs(-1.0),)), "")
    record = result_record(RequestResult(tokenized(Endpoint.CHAT), (choice,)), CODEC, model="m", created=0)
    (entry,) = record["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert entry == {"token": "\ufffd", "logprob": -1.0, "bytes": None, "top_logprobs": []}


def test_text_completion_logprobs() -> None:
    choice = ChoiceResult(sequence(logprobs=LOGPROBS), "one two")
    record = result_record(RequestResult(tokenized(Endpoint.COMPLETIONS), (choice,)), CODEC, model="m", created=0)
    body = record["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    (answer,) = body["choices"]
    assert answer["text"] == "one two"
    assert answer["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{" two": -0.25, "one": -0.5}, {"one": -0.125, "four": -2.0, " two": -9999.0}],
        "text_offset": [0, 3],
    }


def test_logprobs_are_null_when_not_asked_for() -> None:
    for url in Endpoint:
        result = RequestResult(tokenized(url), (ChoiceResult(sequence(), "one two"),))
        record = result_record(result, CODEC, model="m", created=0)
        assert record["response"]["body"]["choices"][0]["logprobs"] is None


def test_a_prompt_counts_once_however_many_answers() -> None:
    request = tokenized(Endpoint.COMPLETIONS, num_prompts=2, n=3)
    choices = tuple(ChoiceResult(sequence((1,) * (i + 1)), str(i)) for i in range(6))
    body = result_record(RequestResult(request, choices), CODEC, model="m", created=0)["response"]["body"]
    assert body["usage"] == {"prompt_tokens": 2 + 3, "completion_tokens": 21, "total_tokens": 26}
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, str(i)) for i in range(6)]


def test_ids_repeat_for_a_line_and_differ_between_lines() -> None:
    errors = [LineError(1, "a", "m", None, "c"), LineError(2, "a", "m", None, "c"), LineError(1, "b", "m", None, "c")]
    ids = [error_record(error)["id"] for error in errors]
    assert len(set(ids)) == 3
    assert error_record(errors[0])["id"] == ids[0]


def test_line_error() -> None:
    record = error_record(LineError(7, None, "the line is not JSON", None, "invalid_json"))
    assert record["custom_id"] is None
    assert record["error"] == {"code": "invalid_json", "message": "the line is not JSON", "line": 7}
    assert record["response"]["status_code"] == 400
    assert record["response"]["body"] == {
        "error": {
            "message": "the line is not JSON",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_json",
        }
    }


def test_internal_error() -> None:
    record = error_record(internal_error(tokenized(Endpoint.CHAT), "worker lost"))
    assert record["custom_id"] == "id-\N{EURO SIGN}"
    assert record["response"]["status_code"] == 500
    assert record["response"]["body"]["error"]["type"] == "internal_error"
    assert record["error"] == {"code": "internal_error", "message": "worker lost", "line": 3}


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (SamplingParams(), "one two"),
        (SamplingParams(skip_special_tokens=False), "one two"),
        (SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), "one two</s>"),
    ],
)
def test_a_stop_token_is_counted_but_not_shown(params: SamplingParams, text: str) -> None:
    request = SequenceRequest(0, (1,), params, 0, stop_token_ids=(0,))
    result = sequence((1, 2, 0), FinishReason.STOP)
    choice = finish_choice(CODEC, request, result, None)
    assert choice.text == text
    assert choice.sequence is result


def test_a_stop_string_cuts_tokens_and_logprobs() -> None:
    request = SequenceRequest(0, (1,), SamplingParams(stop=("two",)), 0)
    result = sequence((1, 2, 4), FinishReason.LENGTH, (*LOGPROBS, TokenLogprobs(-3.0)))
    choice = finish_choice(CODEC, request, result, StopMatch(2, "one "))
    assert choice == ChoiceResult(sequence((1, 2), FinishReason.STOP, LOGPROBS), "one ")


def test_length_keeps_the_last_token() -> None:
    request = SequenceRequest(0, (1,), SamplingParams(), 0, stop_token_ids=(0,))
    assert finish_choice(CODEC, request, sequence((1, 2)), None).text == "one two"

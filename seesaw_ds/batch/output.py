"""Result lines in the form of OpenAI's batch output: completions, chat completions and errors.

Ids are derived from the request's line, so that running again gives the same ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from seesaw_ds.batch.lines import Endpoint, LineError, TokenizedRequest
from seesaw_ds.batch.logprobs import chat_logprobs, completion_logprobs
from seesaw_ds.batch.stop_strings import StopMatch
from seesaw_ds.batch.text import TextCodec
from seesaw_ds.requests import FinishReason, SequenceRequest, SequenceResult

Record = dict[str, Any]
"""One line of the result file, as a JSON object."""

ERROR_TYPES = {400: "invalid_request_error", 500: "internal_error"}


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One generated answer: the sequence, cut where a stop string was found, and its text."""

    sequence: SequenceResult
    text: str


@dataclass(frozen=True, slots=True)
class RequestResult:
    """All answers to a request: `params.n` for its first prompt, then as many for the next."""

    request: TokenizedRequest
    choices: tuple[ChoiceResult, ...]


def finish_choice(
    codec: TextCodec, request: SequenceRequest, result: SequenceResult, match: StopMatch | None
) -> ChoiceResult:
    """The answer that a finished sequence gives; `match` is the stop string found in it, if any.

    A stop token is the last of the sequence's tokens and is no part of the text, unless the request includes it.
    """
    if match is not None:
        logprobs = None if result.logprobs is None else result.logprobs[: match.num_tokens]
        token_ids = result.token_ids[: match.num_tokens]
        return ChoiceResult(SequenceResult(result.seq_id, token_ids, FinishReason.STOP, logprobs), match.text)
    token_ids = result.token_ids
    stopped = result.finish_reason is FinishReason.STOP and token_ids[-1] in request.stop_token_ids
    if stopped and not request.params.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    return ChoiceResult(result, codec.decode(token_ids, request.params.skip_special_tokens))


def result_record(result: RequestResult, codec: TextCodec, *, model: str, created: int) -> Record:
    """The result line of a request that was answered.

    `model` is the name to report, `created` the time of completion in seconds since 1970.
    """
    request = result.request
    suffix = _id_suffix(request.line_number, request.custom_id)
    is_chat = request.url is Endpoint.CHAT
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{suffix}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(index, choice, is_chat, codec) for index, choice in enumerate(result.choices)],
        "usage": _usage(result),
    }
    return _record(request.line_number, request.custom_id, 200, body, None)


def error_record(error: LineError) -> Record:
    """The result line of a request that failed.

    The error stands in the response's body, as the endpoint would answer, and beside the response, as OpenAI
    reports lines that it could not run; readers look at either.
    """
    detail = {
        "message": error.message,
        "type": ERROR_TYPES[error.status_code],
        "param": error.param,
        "code": error.code,
    }
    top_level = {"code": error.code, "message": error.message, "line": error.line_number}
    return _record(error.line_number, error.custom_id, error.status_code, {"error": detail}, top_level)


def internal_error(request: TokenizedRequest, message: str) -> LineError:
    """The error of a request that the engine could not finish, through no fault of the request."""
    return LineError(request.line_number, request.custom_id, message, None, "internal_error", status_code=500)


def _record(line_number: int, custom_id: str | None, status_code: int, body: Record, error: Record | None) -> Record:
    suffix = _id_suffix(line_number, custom_id)
    response = {"status_code": status_code, "request_id": f"req_{suffix}", "body": body}
    return {"id": f"batch_req_{suffix}", "custom_id": custom_id, "response": response, "error": error}


def _id_suffix(line_number: int, custom_id: str | None) -> str:
    return hashlib.sha256(f"{line_number}:{custom_id or ''}".encode()).hexdigest()[:24]


def _choice(index: int, choice: ChoiceResult, is_chat: bool, codec: TextCodec) -> Record:
    finish_reason = choice.sequence.finish_reason.value
    if is_chat:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": chat_logprobs(choice.sequence, codec),
            "finish_reason": finish_reason,
        }
    return {
        "index": index,
        "text": choice.text,
        "logprobs": completion_logprobs(choice.sequence, codec),
        "finish_reason": finish_reason,
    }


def _usage(result: RequestResult) -> dict[str, int]:
    """Token counts: a prompt counts once however many answers it has."""
    prompt_tokens = sum(len(prompt.token_ids) for prompt in result.request.prompts)
    completion_tokens = sum(len(choice.sequence.token_ids) for choice in result.choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }

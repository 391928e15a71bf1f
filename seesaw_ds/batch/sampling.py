"""Sampling fields of a request body, checked and turned into `SamplingParams`."""

from __future__ import annotations

import math
import re

from seesaw_ds.batch.fields import (
    FieldError,
    Fields,
    JsonObject,
    check_number,
    is_integer,
    require_list,
    require_object,
    shown,
    wrong_type,
    wrong_value,
)
from seesaw_ds.batch.lines import Endpoint
from seesaw_ds.requests import SamplingParams

COMMON_FIELDS = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "max_tokens",
        "min_tokens",
        "ignore_eos",
        "logprobs",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "skip_special_tokens",
        "include_stop_str_in_output",
    }
)
SAMPLING_FIELDS = {
    Endpoint.CHAT: COMMON_FIELDS | {"max_completion_tokens", "top_logprobs"},
    Endpoint.COMPLETIONS: COMMON_FIELDS,
}

DEFAULT_MAX_TOKENS = 16
"""Tokens that /v1/completions generates when the body gives no max_tokens."""

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
INTEGER_TEXT = re.compile(r"-?[0-9]{1,18}")


def parse_sampling_params(body: JsonObject, endpoint: Endpoint) -> SamplingParams:
    """The sampling parameters of a request body.

    `max_tokens` is `DEFAULT_MAX_TOKENS` when the body gives none; see `requested_max_tokens`.

    Raises:
        FieldError: a value of the wrong type or out of its range.
    """
    fields = Fields(body)
    max_tokens = requested_max_tokens(body, endpoint)
    return SamplingParams(
        n=fields.integer("n", 1, 1, MAX_CHOICES),
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above_low=True),
        # -1 and 0 both keep every token.
        top_k=max(0, fields.integer("top_k", 0, -1, MAX_INT32)),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        seed=fields.integer("seed", None, -MAX_INT64 - 1, MAX_INT64),
        stop=_stop_strings(fields.raw("stop")),
        stop_token_ids=_stop_token_ids(fields.raw("stop_token_ids")),
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        min_tokens=fields.integer("min_tokens", 0, 0, MAX_INT32),
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=_chat_logprobs(fields) if endpoint is Endpoint.CHAT else _completion_logprobs(fields),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.0, math.inf, above_low=True),
        logit_bias=_logit_bias(fields.raw("logit_bias")),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output", False),
    )


def requested_max_tokens(body: JsonObject, endpoint: Endpoint) -> int | None:
    """The limit on generated tokens that the body gives, None if it gives none.

    A chat may say it as max_completion_tokens, which wins over the older max_tokens.
    """
    fields = Fields(body)
    max_tokens = fields.integer("max_tokens", None, 1, MAX_INT32)
    if endpoint is Endpoint.CHAT:
        return fields.integer("max_completion_tokens", max_tokens, 1, MAX_INT32)
    return max_tokens


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Check that the token ids named by `params` are below `vocab_size`.

    Raises:
        FieldError: an id is not.
    """
    for param, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise wrong_value(param, token_id, f"token id out of vocabulary, ids are below {vocab_size}")


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    expected = "a string or a list of strings"
    strings: list[str] = []
    for string in [value] if isinstance(value, str) else require_list(value, "stop", expected):
        if not isinstance(string, str):
            raise wrong_type("stop", value, expected)
        if not string:
            raise wrong_value("stop", value, "a stop string cannot be empty; leave it out")
        strings.append(string)
    return tuple(strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    token_ids: list[int] = []
    for token_id in require_list(value, "stop_token_ids", "a list of token ids"):
        if not is_integer(token_id):
            raise wrong_type("stop_token_ids", value, "a list of token ids")
        if token_id < 0:
            raise wrong_value("stop_token_ids", token_id, "a token id cannot be negative")
        token_ids.append(token_id)
    return tuple(token_ids)


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    biases: dict[int, float] = {}
    for key, bias in require_object(value, "logit_bias").items():
        if not INTEGER_TEXT.fullmatch(key):
            raise FieldError(f"logit_bias: key {shown(key)} must be a token id", "logit_bias", "invalid_value")
        token_id = int(key)
        if token_id < 0:
            raise wrong_value("logit_bias", token_id, "a token id cannot be negative")
        biases[token_id] = check_number(bias, f"logit_bias[{token_id}]", -100.0, 100.0)
    return biases


def _chat_logprobs(fields: Fields) -> int | None:
    """A chat asks with two fields: `logprobs` (whether) and `top_logprobs` (how many beside the chosen token)."""
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
    if top and not wanted:
        raise wrong_value("top_logprobs", top, "needs logprobs=true")
    return (top or 0) if wanted else None


def _completion_logprobs(fields: Fields) -> int | None:
    return fields.integer("logprobs", None, 0, MAX_LOGPROBS)

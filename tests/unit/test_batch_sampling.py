"""Sampling fields: names, defaults, types and ranges."""

from __future__ import annotations

import math

import pytest

from seesaw_ds.batch.fields import FieldError
from seesaw_ds.batch.lines import Endpoint
from seesaw_ds.batch.sampling import check_vocabulary, parse_sampling_params, requested_max_tokens
from seesaw_ds.requests import SamplingParams

CHAT, COMPLETIONS = Endpoint.CHAT, Endpoint.COMPLETIONS


def test_an_empty_body_gives_the_defaults() -> None:
    assert parse_sampling_params({}, CHAT) == SamplingParams()
    assert parse_sampling_params({}, COMPLETIONS) == SamplingParams(max_tokens=16)


def test_every_field() -> None:
    body: dict[str, object] = {
        "n": 128,
        "temperature": 2,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.25,
        "seed": -(2**63),
        "stop": ["a", "b"],
        "stop_token_ids": [5, 6],
        "max_tokens": 7,
        "min_tokens": 3,
        "ignore_eos": True,
        "logprobs": 5,
        "presence_penalty": -2,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.5,
        "logit_bias": {"3": -100, "4": 0.5},
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    assert parse_sampling_params(body, COMPLETIONS) == SamplingParams(
        n=128,
        temperature=2.0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        seed=-(2**63),
        stop=("a", "b"),
        stop_token_ids=(5, 6),
        max_tokens=7,
        min_tokens=3,
        ignore_eos=True,
        logprobs=5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={3: -100.0, 4: 0.5},
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )


def test_chat_takes_max_completion_tokens_before_max_tokens() -> None:
    assert requested_max_tokens({}, CHAT) is None
    assert requested_max_tokens({"max_tokens": 4}, CHAT) == 4
    assert requested_max_tokens({"max_tokens": 4, "max_completion_tokens": 9}, CHAT) == 9


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_chat_logprobs(body: dict[str, object], expected: int | None) -> None:
    assert parse_sampling_params(body, CHAT).logprobs == expected


@pytest.mark.parametrize(
    ("endpoint", "name", "value"),
    [
        (COMPLETIONS, "n", 0),
        (COMPLETIONS, "n", 129),
        (COMPLETIONS, "n", True),
        (COMPLETIONS, "n", 1.0),
        (COMPLETIONS, "temperature", -0.1),
        (COMPLETIONS, "temperature", 2.1),
        (COMPLETIONS, "temperature", math.nan),
        (COMPLETIONS, "temperature", math.inf),
        (COMPLETIONS, "temperature", 10**400),
        (COMPLETIONS, "temperature", "1"),
        (COMPLETIONS, "temperature", False),
        (COMPLETIONS, "top_p", 0),
        (COMPLETIONS, "top_p", 1.01),
        (COMPLETIONS, "top_k", -2),
        (COMPLETIONS, "min_p", 1.5),
        (COMPLETIONS, "seed", 2**63),
        (COMPLETIONS, "seed", 1.5),
        (COMPLETIONS, "stop", ""),
        (COMPLETIONS, "stop", ["a", 1]),
        (COMPLETIONS, "stop", 1),
        (COMPLETIONS, "stop_token_ids", [-1]),
        (COMPLETIONS, "stop_token_ids", [True]),
        (COMPLETIONS, "stop_token_ids", 3),
        (COMPLETIONS, "max_tokens", 0),
        (COMPLETIONS, "min_tokens", -1),
        (COMPLETIONS, "ignore_eos", 1),
        (COMPLETIONS, "logprobs", True),
        (COMPLETIONS, "logprobs", 21),
        (CHAT, "logprobs", 3),
        (CHAT, "top_logprobs", 3),
        (CHAT, "max_completion_tokens", 0),
        (COMPLETIONS, "presence_penalty", 2.5),
        (COMPLETIONS, "frequency_penalty", -2.5),
        (COMPLETIONS, "repetition_penalty", 0),
        (COMPLETIONS, "logit_bias", [1]),
        (COMPLETIONS, "logit_bias", {"x": 1}),
        (COMPLETIONS, "logit_bias", {"-3": 1}),
        (COMPLETIONS, "logit_bias", {"3": 101}),
        (COMPLETIONS, "logit_bias", {"3": None}),
        (COMPLETIONS, "skip_special_tokens", "no"),
    ],
)
def test_invalid_values_name_the_field(endpoint: Endpoint, name: str, value: object) -> None:
    with pytest.raises(FieldError, match=name) as caught:
        parse_sampling_params({name: value}, endpoint)
    assert caught.value.param is not None
    assert caught.value.param.startswith(name)
    assert caught.value.code in ("invalid_type", "invalid_value")


def test_message_gives_value_and_rule() -> None:
    with pytest.raises(FieldError, match=r"^top_p=0: must be above 0 and at most 1$"):
        parse_sampling_params({"top_p": 0}, CHAT)
    with pytest.raises(FieldError, match=r"^n=true: must be an integer$"):
        parse_sampling_params({"n": True}, CHAT)


def test_vocabulary_bounds_the_token_ids() -> None:
    check_vocabulary(SamplingParams(stop_token_ids=(9,), logit_bias={9: 1.0}), 10)
    with pytest.raises(FieldError, match="stop_token_ids=10: token id out of vocabulary"):
        check_vocabulary(SamplingParams(stop_token_ids=(10,)), 10)
    with pytest.raises(FieldError, match="logit_bias=12: token id out of vocabulary"):
        check_vocabulary(SamplingParams(logit_bias={12: 1.0}), 10)

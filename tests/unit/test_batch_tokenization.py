"""Checks that need token ids, with a tokenizer whose tokens are characters."""

from __future__ import annotations

import dataclasses

import pytest

from seesaw_ds.batch.lines import (
    BatchRequest,
    Chat,
    ChatMessage,
    Endpoint,
    LineError,
    Prompt,
    TokenizedPrompt,
    TokenizedRequest,
)
from seesaw_ds.batch.text import TextCodec
from seesaw_ds.batch.tokenization import tokenize_request
from seesaw_ds.requests import SamplingParams

VOCAB_SIZE = 128
MAX_MODEL_LEN = 20


class CharTokenizer:
    """Token ids are code points; chats are their contents in a row."""

    def __len__(self) -> int:
        return VOCAB_SIZE

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text if char != "\0"]

    def get_chat_template(self) -> str:
        return "template"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(message["content"] for message in messages)


CODEC = TextCodec(CharTokenizer(), [0])


def tokenize(*prompts: Prompt, max_tokens: int | None = None, **params: object) -> TokenizedRequest | LineError:
    is_chat = isinstance(prompts[0], Chat)
    sampling = dataclasses.replace(SamplingParams(max_tokens=16 if max_tokens is None else max_tokens), **params)
    request = BatchRequest(
        line_number=4,
        custom_id="a",
        url=Endpoint.CHAT if is_chat else Endpoint.COMPLETIONS,
        prompts=prompts,
        params=sampling,
        max_tokens_given=max_tokens is not None,
    )
    return tokenize_request(request, CODEC, MAX_MODEL_LEN, VOCAB_SIZE)


def chat(content: str) -> Chat:
    return Chat((ChatMessage("user", content),))


def error_of(tokenized: TokenizedRequest | LineError) -> LineError:
    assert isinstance(tokenized, LineError)
    assert (tokenized.line_number, tokenized.custom_id, tokenized.status_code) == (4, "a", 400)
    return tokenized


def prompts_of(tokenized: TokenizedRequest | LineError) -> tuple[TokenizedPrompt, ...]:
    assert isinstance(tokenized, TokenizedRequest), tokenized
    return tokenized.prompts


def test_prompts_become_token_ids() -> None:
    prompts = prompts_of(tokenize("ab", (1, 2, 3)))
    assert [prompt.token_ids for prompt in prompts] == [(97, 98), (1, 2, 3)]


@pytest.mark.parametrize(
    ("prompt", "given", "expected"),
    [
        ("x", None, 16),
        ("x" * 10, None, 10),
        ("x" * 10, 10, 10),
        ("x" * 10, 3, 3),
        (chat("x"), None, 19),
        (chat("x"), 5, 5),
    ],
)
def test_max_tokens(prompt: Prompt, given: int | None, expected: int) -> None:
    (tokenized,) = prompts_of(tokenize(prompt, max_tokens=given))
    assert tokenized.params.max_tokens == expected


def test_default_max_tokens_is_cut_for_each_prompt_alone() -> None:
    prompts = prompts_of(tokenize("x", "x" * 15))
    assert [prompt.params.max_tokens for prompt in prompts] == [16, 5]


@pytest.mark.parametrize("prompt", ["x" * 20, chat("x" * 21)])
def test_prompt_longer_than_the_model(prompt: Prompt) -> None:
    error = error_of(tokenize(prompt, max_tokens=1))
    assert error.code == "context_length_exceeded"
    assert "max_model_len=20" in error.message


def test_max_tokens_that_does_not_fit() -> None:
    error = error_of(tokenize("x" * 10, max_tokens=11))
    assert (error.code, error.param) == ("context_length_exceeded", "max_tokens")
    assert error.message == "max_tokens=11: with 10 prompt tokens exceeds max_model_len=20; at most 10 fit"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**70])
def test_token_id_out_of_vocabulary(token_id: int) -> None:
    error = error_of(tokenize("ab", (1, token_id)))
    assert error.param == "prompt[1]"
    assert f"prompt[1]={token_id}: token id out of vocabulary" in error.message


def test_sampling_ids_out_of_vocabulary() -> None:
    assert error_of(tokenize("a", logit_bias={VOCAB_SIZE: 1.0})).param == "logit_bias"
    assert error_of(tokenize("a", stop_token_ids=(VOCAB_SIZE,))).param == "stop_token_ids"


def test_prompt_without_tokens() -> None:
    assert "no tokens" in error_of(tokenize("\0")).message
    assert error_of(tokenize(chat("\0"))).param == "messages"


def test_min_tokens_above_max_tokens() -> None:
    assert error_of(tokenize("x", min_tokens=17)).param == "min_tokens"
    assert "max_tokens, which is 5" in error_of(tokenize("x" * 15, min_tokens=6)).message
    prompts_of(tokenize(chat("x"), min_tokens=19))


def test_chat_without_a_template_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: CharTokenizer) -> str:
        raise ValueError("no template")

    monkeypatch.setattr(CharTokenizer, "get_chat_template", absent)
    assert "no chat template" in error_of(tokenize(chat("x"))).message
    prompts_of(tokenize("x"))

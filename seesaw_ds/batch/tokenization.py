"""Turns a request's prompts into token ids, and checks what only the token ids can tell."""

from __future__ import annotations

import dataclasses

from seesaw_ds.batch.fields import FieldError, wrong_value
from seesaw_ds.batch.lines import BatchRequest, Chat, Endpoint, LineError, Prompt, TokenizedPrompt, TokenizedRequest
from seesaw_ds.batch.sampling import check_vocabulary
from seesaw_ds.batch.text import TextCodec
from seesaw_ds.errors import UserError
from seesaw_ds.requests import SamplingParams


def tokenize_request(
    request: BatchRequest, codec: TextCodec, max_model_len: int, vocab_size: int
) -> TokenizedRequest | LineError:
    """The request with its prompts as token ids and a final max_tokens for each, or what is wrong with it.

    A max_tokens that the request gives must fit beside the prompt in `max_model_len` tokens. The default of
    /v1/completions is cut to the room left, and a chat may fill the room. `vocab_size` is the model's: ids of
    prompts, stop_token_ids and logit_bias are below it.
    """
    try:
        check_vocabulary(request.params, vocab_size)
        names = _prompt_names(request)
        prompts = tuple(
            _tokenize_prompt(request, prompt, name, codec, max_model_len, vocab_size)
            for prompt, name in zip(request.prompts, names, strict=True)
        )
    except FieldError as error:
        return LineError(request.line_number, request.custom_id, error.message, error.param, error.code)
    return TokenizedRequest(request.line_number, request.custom_id, request.url, prompts)


def _prompt_names(request: BatchRequest) -> list[str]:
    if request.url is Endpoint.CHAT:
        return ["messages"]
    if len(request.prompts) == 1:
        return ["prompt"]
    return [f"prompt[{i}]" for i in range(len(request.prompts))]


def _tokenize_prompt(
    request: BatchRequest, prompt: Prompt, name: str, codec: TextCodec, max_model_len: int, vocab_size: int
) -> TokenizedPrompt:
    token_ids = _encode(prompt, name, codec)
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise wrong_value(name, token_id, f"token id out of vocabulary, ids are from 0 to {vocab_size - 1}")
    if not token_ids:
        raise FieldError(f"{name}: the prompt has no tokens", name, "invalid_value")
    return TokenizedPrompt(token_ids, _fit_max_tokens(request, len(token_ids), name, max_model_len))


def _encode(prompt: Prompt, name: str, codec: TextCodec) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return codec.encode(prompt)
    if isinstance(prompt, Chat):
        try:
            return codec.encode_chat(prompt)
        except UserError as error:
            raise FieldError(str(error), name, "invalid_value") from error
    return prompt


def _fit_max_tokens(request: BatchRequest, prompt_len: int, name: str, max_model_len: int) -> SamplingParams:
    """The request's sampling parameters with the final max_tokens for a prompt of `prompt_len` tokens."""
    params = request.params
    room = max_model_len - prompt_len
    if room < 1:
        text = f"{name}: {prompt_len} tokens, and at least one to generate, do not fit max_model_len={max_model_len}"
        raise FieldError(text + "; shorten the prompt", name, "context_length_exceeded")
    if request.max_tokens_given:
        max_tokens = params.max_tokens
        if max_tokens > room:
            text = f"max_tokens={max_tokens}: with {prompt_len} prompt tokens exceeds max_model_len={max_model_len}"
            raise FieldError(f"{text}; at most {room} fit", "max_tokens", "context_length_exceeded")
    else:
        max_tokens = room if request.url is Endpoint.CHAT else min(params.max_tokens, room)
    if params.min_tokens > max_tokens:
        raise wrong_value("min_tokens", params.min_tokens, f"must not exceed max_tokens, which is {max_tokens}")
    return params if max_tokens == params.max_tokens else dataclasses.replace(params, max_tokens=max_tokens)

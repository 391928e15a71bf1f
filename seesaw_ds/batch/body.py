"""Which fields a request body may have, and what becomes of each: used, ignored, or refused with a reason."""

from __future__ import annotations

from seesaw_ds.batch.fields import FieldError, JsonObject, is_integer, shown, unknown_field, wrong_type, wrong_value
from seesaw_ds.batch.lines import Endpoint
from seesaw_ds.batch.sampling import SAMPLING_FIELDS

PROMPT_FIELDS = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt"}

IGNORED_FIELDS: dict[str, type] = {
    "model": str,
    "user": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "parallel_tool_calls": bool,
    "request_id": str,
    "cache_salt": str,
    "priority": int,
}
"""Fields that do not change the completion, with their type."""

TYPE_NAMES = {str: "a string", dict: "an object", bool: "true or false", int: "an integer"}

COMMON_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "response_format": ({"type": "text"},),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "spaces_between_special_tokens": (True,),
    "echo": (False,),
    "return_token_ids": (False,),
}
NEUTRAL_VALUES: dict[Endpoint, dict[str, tuple[object, ...]]] = {
    Endpoint.CHAT: COMMON_NEUTRAL_VALUES
    | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
    },
    Endpoint.COMPLETIONS: COMMON_NEUTRAL_VALUES | {"suffix": ("",), "add_special_tokens": (True,)},
}
"""Fields known from OpenAI and vLLM that would change the completion and are not supported, with the values
(beside null) that change nothing and are therefore accepted."""


def check_fields(body: JsonObject, endpoint: Endpoint) -> None:
    """Check that every field of `body` can be honoured or safely ignored.

    Raises:
        FieldError: a field that the endpoint does not have, or one whose effect is not supported.
    """
    used = SAMPLING_FIELDS[endpoint] | {PROMPT_FIELDS[endpoint]}
    neutral = NEUTRAL_VALUES[endpoint]
    for name, value in body.items():
        if name in used or value is None:
            continue
        if name in IGNORED_FIELDS:
            _check_ignored(name, value)
        elif name == "best_of":
            _check_best_of(value, body.get("n"))
        elif name not in neutral:
            raise unknown_field(name, [*used, *IGNORED_FIELDS, *neutral], endpoint.value)
        elif not any(_same_json(value, allowed) for allowed in neutral[name]):
            raise FieldError(f"{name}={shown(value)}: not supported; remove it", name, "unsupported_parameter")


def _check_ignored(name: str, value: object) -> None:
    expected = IGNORED_FIELDS[name]
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise wrong_type(name, value, TYPE_NAMES[expected])


def _check_best_of(value: object, n: object) -> None:
    """`best_of` equal to `n` asks for nothing beyond `n`."""
    if not is_integer(value):
        raise wrong_type("best_of", value, "an integer")
    if value != (1 if n is None else n):
        raise wrong_value("best_of", value, "only best_of equal to n is supported; remove it")


def _same_json(value: object, other: object) -> bool:
    """Equality of JSON values at their top level: unlike in Python, true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other

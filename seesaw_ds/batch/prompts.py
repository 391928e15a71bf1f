"""Prompts of a request body: text, token ids, lists of either, and chat messages."""

from __future__ import annotations

from seesaw_ds.batch.fields import (
    FieldError,
    JsonObject,
    is_integer,
    require_list,
    require_object,
    shown,
    unknown_field,
    wrong_type,
    wrong_value,
)
from seesaw_ds.batch.lines import Chat, ChatMessage, Prompt

PROMPT_TYPES = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
CONTENT_TYPES = "a string or a list of text parts"
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = ("role", "content", "name")
# Answers of OpenAI's models carry these, so a recorded conversation has them; they say nothing while empty.
EMPTY_MESSAGE_FIELDS = ("tool_calls", "function_call", "refusal", "audio", "annotations")


def parse_prompts(body: JsonObject) -> tuple[Prompt, ...]:
    """The prompts of a /v1/completions body.

    Raises:
        FieldError: `prompt` is missing, empty or of another type.
    """
    value = body.get("prompt")
    if value is None:
        raise FieldError("prompt: missing; give " + PROMPT_TYPES, "prompt", "missing_required_parameter")
    if isinstance(value, str):
        return (_text(value, "prompt"),)
    items = require_list(value, "prompt", PROMPT_TYPES)
    if not items:
        raise _empty("prompt", items)
    if is_integer(items[0]):
        return (_token_ids(items, "prompt"),)
    if isinstance(items[0], list):
        return tuple(_token_ids(item, f"prompt[{i}]") for i, item in enumerate(items))
    return tuple(_text(item, f"prompt[{i}]") for i, item in enumerate(items))


def parse_chat(body: JsonObject) -> Chat:
    """The conversation of a /v1/chat/completions body.

    Raises:
        FieldError: `messages` is missing or empty, or a message has an unknown role or content that is not text.
    """
    value = body.get("messages")
    if value is None:
        raise FieldError("messages: missing; give a list of messages", "messages", "missing_required_parameter")
    messages = require_list(value, "messages", "a list of messages")
    if not messages:
        raise _empty("messages", messages)
    return Chat(tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages)))


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(param, value, "a string, like the first prompt in the list")
    if not value:
        raise _empty(param, value)
    return value


def _token_ids(value: object, param: str) -> tuple[int, ...]:
    token_ids: list[int] = []
    for i, token_id in enumerate(require_list(value, param, "a list of token ids, like the first prompt in the list")):
        if not is_integer(token_id):
            raise wrong_type(f"{param}[{i}]", token_id, "a token id, like the first in the list")
        token_ids.append(token_id)
    if not token_ids:
        raise _empty(param, value)
    return tuple(token_ids)


def _empty(param: str, value: object) -> FieldError:
    return wrong_value(param, value, "a prompt cannot be empty")


def _message(value: object, param: str) -> ChatMessage:
    message = require_object(value, param)
    for name, item in message.items():
        if name in EMPTY_MESSAGE_FIELDS:
            if item:
                fault = f"{param}.{name}: not supported; only text messages are"
                raise FieldError(fault, f"{param}.{name}", "unsupported_parameter")
        elif name not in MESSAGE_FIELDS:
            raise unknown_field(name, MESSAGE_FIELDS, "a message", prefix=f"{param}.")
    role = message.get("role")
    if role not in ROLES:
        raise wrong_value(f"{param}.role", role, f"must be one of {', '.join(ROLES)}")
    author = message.get("name")
    if author is not None and not isinstance(author, str):
        raise wrong_type(f"{param}.name", author, "a string")
    return ChatMessage(str(role), _content(message.get("content"), f"{param}.content"), author)


def _content(value: object, param: str) -> str:
    if isinstance(value, str):
        return value
    parts = require_list(value, param, CONTENT_TYPES)
    if not parts:
        raise wrong_value(param, value, "a list of parts cannot be empty")
    return "\n".join(_part_text(part, f"{param}[{i}]") for i, part in enumerate(parts))


def _part_text(value: object, param: str) -> str:
    part = require_object(value, param)
    if part.get("type") != "text":
        fault = f"{param}.type={shown(part.get('type'))}: only parts of type text are supported"
        raise FieldError(fault, f"{param}.type", "unsupported_value")
    text = part.get("text")
    if not isinstance(text, str):
        raise wrong_type(f"{param}.text", text, "a string")
    return text

"""What a line of the batch file becomes: a request, then token ids, or an error that is that line's result."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from seesaw_ds.requests import SamplingParams

RecordKey = str | int
"""What a line's result is filed under: its `custom_id`, or the line number when it has none of its own."""


class Endpoint(str, enum.Enum):
    """The OpenAI endpoints that a line may ask for."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation. Text given in parts is already joined, with a newline between parts."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, for the model's chat template to write as a prompt."""

    messages: tuple[ChatMessage, ...]


Prompt = str | tuple[int, ...] | Chat
"""Text, token ids, or a conversation."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line that can be read. A chat has one prompt, a completion one or several.

    `params.max_tokens` is the default of /v1/completions when the line gives none (`max_tokens_given`); what is
    final stands in the `TokenizedPrompt`. `model` is the name the line asked for and changes nothing.
    """

    line_number: int
    custom_id: str
    url: Endpoint
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    max_tokens_given: bool
    model: str | None = None

    @property
    def key(self) -> RecordKey:
        return self.custom_id


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a line has no completion: the request is at fault (400) or the engine is (500).

    `custom_id` is None where the line has none of its own: it is missing, unusable, or an earlier line's.
    `param` names the field at fault, as in ``messages[1].content``.
    """

    line_number: int
    custom_id: str | None
    message: str
    param: str | None
    code: str
    status_code: int = 400

    @property
    def key(self) -> RecordKey:
        return self.line_number if self.custom_id is None else self.custom_id


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt ready to run; `params.max_tokens` is final and fits beside the prompt."""

    token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A request ready to run: each prompt becomes `params.n` sequences."""

    line_number: int
    custom_id: str
    url: Endpoint
    prompts: tuple[TokenizedPrompt, ...]

    @property
    def key(self) -> RecordKey:
        return self.custom_id

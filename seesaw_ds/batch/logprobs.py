"""Log-probabilities of a sequence in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

from typing import Any

from seesaw_ds.batch.text import REPLACEMENT, TextCodec
from seesaw_ds.requests import SequenceResult

LOWEST_LOGPROB = -9999.0
"""Stands for the log-probability of an impossible token, as JSON has no infinity."""


def chat_logprobs(sequence: SequenceResult, codec: TextCodec) -> dict[str, Any] | None:
    """One entry per output token with the most likely tokens beside it; None when not asked for."""
    if sequence.logprobs is None:
        return None
    content = [
        _entry(token_id, step.token_logprob, codec)
        | {"top_logprobs": [_entry(top_id, logprob, codec) for top_id, logprob in step.top]}
        for token_id, step in zip(sequence.token_ids, sequence.logprobs, strict=True)
    ]
    return {"content": content}


def completion_logprobs(sequence: SequenceResult, codec: TextCodec) -> dict[str, Any] | None:
    """Parallel lists over the output tokens; None when not asked for.

    `top_logprobs` maps token text to log-probability and always has the chosen token. `text_offset` counts
    characters in the joined token texts.
    """
    if sequence.logprobs is None:
        return None
    tokens = [codec.token_text(token_id) for token_id in sequence.token_ids]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(step.token_logprob) for step in sequence.logprobs],
        "top_logprobs": [
            _top_by_text([*step.top, (token_id, step.token_logprob)], codec)
            for token_id, step in zip(sequence.token_ids, sequence.logprobs, strict=True)
        ],
        "text_offset": offsets[:-1],
    }


def _entry(token_id: int, logprob: float, codec: TextCodec) -> dict[str, Any]:
    text = codec.token_text(token_id)
    # A token that is part of a character has no text of its own to give the bytes of.
    token_bytes = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": token_bytes}


def _top_by_text(top: list[tuple[int, float]], codec: TextCodec) -> dict[str, float]:
    """Tokens with the same text share an entry, the likelier one's."""
    by_text: dict[str, float] = {}
    for token_id, logprob in top:
        by_text.setdefault(codec.token_text(token_id), _finite(logprob))
    return by_text


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)

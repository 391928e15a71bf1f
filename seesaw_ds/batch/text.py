"""Text to token ids and back, through the tokenizer and chat template of a local Hugging Face model folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from seesaw_ds.batch.lines import Chat
from seesaw_ds.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in decoded text for bytes that are not, or not yet, a whole character."""

METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in the token strings of SentencePiece tokenizers."""


class TextCodec:
    """A model's tokenizer. `eos_token_ids` end a sequence; `vocab_size` counts the tokenizer's own ids."""

    def __init__(self, tokenizer: Any, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = len(tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens that the tokenizer adds (usually one at the start)."""
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        """Token ids of the conversation in the model's chat template, open for the assistant's answer.

        Raises:
            UserError: the model has no chat template, or the template refuses the conversation.
        """
        try:
            self._tokenizer.get_chat_template()
        except ValueError as error:
            text = "messages: the model has no chat template; use /v1/completions or add chat_template.jinja to it"
            raise UserError(text) from error
        messages = [
            {"role": message.role, "content": message.content} | ({"name": message.name} if message.name else {})
            for message in chat.messages
        ]
        try:
            prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A template is a program that came with the model: it may raise anything, and only this request is at fault.
        except Exception as error:
            raise UserError(f"messages: the model's chat template refuses them: {error}") from error
        # The template writes the special tokens itself.
        return tuple(self._tokenizer.encode(prompt, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `token_ids`; bytes that form no character become U+FFFD."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token as it stands inside a text: a leading space is kept."""
        text = self.decode([token_id], skip_special_tokens=False)
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is not None and piece.startswith(METASPACE) and not text.startswith(" "):
            return " " + text
        return text


def load_codec(folder: Path) -> TextCodec:
    """The tokenizer of the model in `folder`; nothing is downloaded.

    Raises:
        UserError: the folder has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"model={folder}: no such folder; give a local Hugging Face model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # A broken folder shows as OSError, ValueError, KeyError or the Rust tokenizer's bare Exception.
    except Exception as error:
        raise UserError(f"model={folder}: its tokenizer does not load: {error}") from error
    return TextCodec(tokenizer, _eos_token_ids(folder, tokenizer.eos_token_id))


def _eos_token_ids(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """End-of-sequence ids as `generate` of transformers takes them: generation_config.json, then config.json.

    Either may give one id or a list. The tokenizer's own counts when neither gives any.
    """
    for name in ("generation_config.json", "config.json"):
        token_ids = _read_json(folder / name).get("eos_token_id")
        if isinstance(token_ids, int):
            return (token_ids,)
        if isinstance(token_ids, list) and token_ids:
            return tuple(token_ids)
    return () if tokenizer_eos is None else (tokenizer_eos,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"model: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"model: {path} must hold a JSON object")
    return value

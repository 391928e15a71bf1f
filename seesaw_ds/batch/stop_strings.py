"""Finds stop strings in a sequence's text while its tokens arrive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from seesaw_ds.batch.text import REPLACEMENT, TextCodec
from seesaw_ds.requests import SamplingParams

MAX_HELD_TOKENS = 16
"""Tokens held back while the text ends inside a character, which four bytes complete: more is not a character."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found: the sequence ends after `num_tokens` output tokens and its text is `text`."""

    num_tokens: int
    text: str


class StopStringFinder:
    """Watches one sequence for its stop strings.

    Of several matches the one that ends first counts (of those the longest), so that the result does not
    depend on how the text is cut into tokens. A match must end after the text of the first `min_tokens` tokens.

    Each token is decoded with the few before it whose text is known, and only the new text is searched::

        tokens   ...... | context | held        text   ...... | tail | new
                                                                ^ one less than the longest stop string

    Context is needed because a token's text can depend on the one before it: some tokenizers drop a leading
    space from the first token that is decoded. Tokens are held while their text ends inside a multi-byte
    character, or while they have none (special tokens).
    """

    def __init__(self, codec: TextCodec, params: SamplingParams) -> None:
        self._codec = codec
        self._params = params
        self._tail_size = max(map(len, params.stop), default=1) - 1
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._tail = ""
        self._context: list[int] = []
        self._held: list[int] = []
        self._num_chars_given = 0

    def push(self, token_ids: Iterable[int]) -> StopMatch | None:
        """Take the next output tokens; tokens after the match are not used."""
        if not self._params.stop:
            return None
        for token_id in token_ids:
            self._num_tokens += 1
            piece = self._decode_next(token_id)
            if piece and (match := self._search(piece)):
                return match
        return None

    def _decode_next(self, token_id: int) -> str:
        """The text that this token makes whole; empty while a character is not."""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        whole = text.rstrip(REPLACEMENT)
        is_held = len(whole) < len(text) or len(text) == self._num_chars_given
        if is_held and len(self._held) < MAX_HELD_TOKENS:
            piece = whole[self._num_chars_given :]
            self._num_chars_given += len(piece)
            return piece
        piece = text[self._num_chars_given :]
        if piece:
            self._context = self._held
            self._num_chars_given = len(self._decode(self._context))
        self._held = []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._codec.decode(token_ids, self._params.skip_special_tokens)

    def _search(self, piece: str) -> StopMatch | None:
        # A stop string may begin in the tail but must end in the new text: what ended earlier was searched before,
        # or belongs to the first min_tokens tokens.
        text = self._tail + piece
        first = self._first_match(text) if self._num_tokens > self._params.min_tokens else None
        if first is None:
            self._pieces.append(piece)
            self._tail = text[len(text) - min(len(text), self._tail_size) :]
            return None
        start, end = first
        keep = end if self._params.include_stop_str_in_output else start
        before = "".join(self._pieces)
        return StopMatch(self._num_tokens, before[: len(before) - len(self._tail)] + text[:keep])

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """Start and end in `text` of the stop string that ends first in the part after the tail."""
        found: list[tuple[int, int]] = []
        for stop in self._params.stop:
            start = text.find(stop, max(0, len(self._tail) - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if not found:
            return None
        end, start = min(found)
        return start, end

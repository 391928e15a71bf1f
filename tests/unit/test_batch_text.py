"""The codec over a real tokenizer, and stop strings found token by token against decoding everything each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from seesaw_ds.batch.lines import Chat, ChatMessage
from seesaw_ds.batch.stop_strings import MAX_HELD_TOKENS, StopMatch, StopStringFinder
from seesaw_ds.batch.text import REPLACEMENT, TextCodec, load_codec
from seesaw_ds.errors import UserError
from seesaw_ds.requests import SamplingParams

TEXT = "the cat sat on the mat, the dog ran; déjà vu \N{EURO SIGN} \N{GRINNING FACE}"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('content refused') }}{% endif %}"
    "{{ bos_token }}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = Chat((ChatMessage("user", "the cat", "ada"),))


def save_tokenizer(folder: Path, chat_template: str | None = TEMPLATE) -> None:
    """A byte-level BPE tokenizer: <s> is 0 and starts a text, </s> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    # The second text makes a token of "d" with the first byte of the letter after it.
    tokenizer.train_from_iterator([TEXT] * 4 + ["dà dá dâ dã dä då dæ dç dè dê dë"] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return load_codec(folder)


@pytest.fixture(scope="module")
def metaspace_codec() -> TextCodec:
    """A tokenizer as Llama 2's: spaces are part of tokens, the first is dropped, rare characters are bytes."""
    pieces = ["<unk>", "</s>", "\u2581", "\u2581the", "\u2581c", "a", "t", "\u2581a", "b", "c"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return TextCodec(fast, [1])


def test_text_there_and_back(codec: TextCodec) -> None:
    token_ids = codec.encode(TEXT)
    assert token_ids[0] == 0
    assert codec.decode(token_ids, skip_special_tokens=True) == TEXT
    assert codec.decode(token_ids, skip_special_tokens=False) == "<s>" + TEXT
    assert codec.vocab_size > 256


def test_token_text_keeps_the_leading_space(codec: TextCodec, metaspace_codec: TextCodec) -> None:
    token_ids = codec.encode("the cat sat")[1:]
    assert "".join(map(codec.token_text, token_ids)) == "the cat sat"
    assert [metaspace_codec.token_text(i) for i in (3, 2, 5)] == [" the", " ", "a"]


def test_chat_goes_through_the_template(codec: TextCodec) -> None:
    token_ids = codec.encode_chat(CHAT)
    assert codec.decode(token_ids, skip_special_tokens=False) == "<s>user(ada): the cat\nassistant:"


def test_chat_the_template_refuses(codec: TextCodec) -> None:
    with pytest.raises(UserError, match="content refused"):
        codec.encode_chat(Chat((ChatMessage("user", "no"),)))


def test_model_without_a_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        load_codec(tmp_path).encode_chat(CHAT)


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        (None, None, {1}),
        (None, {"eos_token_id": 5}, {5}),
        ({"eos_token_id": [6, 7]}, {"eos_token_id": 5}, {6, 7}),
        ({}, {"eos_token_id": [8]}, {8}),
        ({"eos_token_id": None}, {}, {1}),
    ],
)
def test_eos_token_ids(
    folder: Path, tmp_path: Path, generation_config: object, config: object, expected: set[int]
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, value in (("generation_config.json", generation_config), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps({"model_type": "llama"} | dict(value)))
    assert load_codec(tmp_path).eos_token_ids == expected


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_codec(tmp_path / "absent")
    with pytest.raises(UserError, match="tokenizer does not load"):
        load_codec(tmp_path)


def whole_text(codec: TextCodec, token_ids: list[int], params: SamplingParams) -> str:
    return codec.decode(token_ids, params.skip_special_tokens).rstrip(REPLACEMENT)


def find_by_decoding_everything(codec: TextCodec, token_ids: list[int], params: SamplingParams) -> StopMatch | None:
    """The meaning of stop strings without regard to cost."""
    ignored = len(whole_text(codec, token_ids[: params.min_tokens], params))
    for num_tokens in range(params.min_tokens + 1, len(token_ids) + 1):
        text = whole_text(codec, token_ids[:num_tokens], params)
        found = [
            (start + len(stop), start)
            for stop in params.stop
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > ignored
        ]
        if found:
            end, start = min(found)
            return StopMatch(num_tokens, text[: end if params.include_stop_str_in_output else start])
    return None


def push_in_pieces(finder: StopStringFinder, token_ids: list[int], sizes: Callable[[], int]) -> StopMatch | None:
    start = 0
    while start < len(token_ids):
        size = sizes()
        if match := finder.push(token_ids[start : start + size]):
            return match
        start += size
    return None


STOPS = st.lists(
    st.sampled_from(
        ["the", "t", " c", "cat s", "at on", "\N{EURO SIGN}", "é", "d", "aa", "aab", "ab", "b c", "zz", "</s>"]
    ),
    max_size=3,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), stops=STOPS, min_tokens=st.integers(0, 6), include=st.booleans(), skip=st.booleans())
def test_finder_equals_decoding_everything(
    codec: TextCodec, data: st.DataObject, stops: list[str], min_tokens: int, include: bool, skip: bool
) -> None:
    if data.draw(st.booleans(), label="from text"):
        words = st.sampled_from(
            ["the", " cat", " sat", " on", "a", "b", " \N{EURO SIGN}", "dé", "dà", "\N{GRINNING FACE}"]
        )
        token_ids = list(codec.encode("".join(data.draw(st.lists(words, max_size=12)))))
    else:
        # Any tokens: text that is broken inside characters, special tokens, bytes that are no character.
        token_ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=MAX_HELD_TOKENS - 1))
    params = SamplingParams(
        stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include, skip_special_tokens=skip
    )
    match = push_in_pieces(StopStringFinder(codec, params), token_ids, lambda: data.draw(st.integers(1, 4)))
    assert match == find_by_decoding_everything(codec, token_ids, params)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(stops=STOPS, token_ids=st.lists(st.integers(1, 9), max_size=14), min_tokens=st.integers(0, 4))
def test_finder_with_a_tokenizer_that_drops_the_first_space(
    metaspace_codec: TextCodec, stops: list[str], token_ids: list[int], min_tokens: int
) -> None:
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens)
    match = StopStringFinder(metaspace_codec, params).push(token_ids)
    assert match == find_by_decoding_everything(metaspace_codec, token_ids, params)


def test_stop_string_before_half_a_character(codec: TextCodec) -> None:
    half = next(i for i in range(codec.vocab_size) if codec.token_text(i) == "d" + REPLACEMENT)
    assert StopStringFinder(codec, SamplingParams(stop=("d",))).push([half]) == StopMatch(1, "")


def test_tokens_whose_text_shows_only_with_the_next(metaspace_codec: TextCodec) -> None:
    """The first space is dropped, the second is not; decoded alone, either would be."""
    token_ids = [2, 3, 2, 7, 8]
    assert metaspace_codec.decode(token_ids, skip_special_tokens=True) == " the  ab"
    params = SamplingParams(stop=("b",))
    assert StopStringFinder(metaspace_codec, params).push(token_ids) == StopMatch(5, " the  a")


def test_the_match_that_ends_first_wins(codec: TextCodec) -> None:
    token_ids = codec.encode("a b c d")
    params = SamplingParams(stop=("b c d", " c", "b c"))
    match = StopStringFinder(codec, params).push(token_ids)
    assert match is not None
    assert match.text == "a "


def test_no_stop_strings_costs_nothing() -> None:
    finder = StopStringFinder(TextCodec([], []), SamplingParams())
    assert finder.push([1, 2, 3]) is None


def test_cost_of_a_token_does_not_grow(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with the text, nor with tokens that have none or never become a character."""
    longest = 0
    decode = TextCodec.decode

    def measured(self: TextCodec, token_ids: list[int], skip_special_tokens: bool) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(self, token_ids, skip_special_tokens)

    stray_byte = next(i for i in range(codec.vocab_size) if codec.token_text(i) == REPLACEMENT)
    monkeypatch.setattr(TextCodec, "decode", measured)
    finder = StopStringFinder(codec, SamplingParams(stop=("zzz",)))
    for token_ids in (codec.encode(TEXT * 20), [1] * 200, [stray_byte] * 200):
        assert finder.push(token_ids) is None
    assert longest <= 2 * MAX_HELD_TOKENS
    match = finder.push(codec.encode("zzz"))
    assert match is not None
    assert match.text == TEXT * 20 + REPLACEMENT * 200

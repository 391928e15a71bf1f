"""Batch lines: what is accepted, and one clear error per line for what is not."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw_ds.batch import input as batch_input
from seesaw_ds.batch.input import LineParser, read_batch
from seesaw_ds.batch.lines import BatchRequest, Chat, ChatMessage, Endpoint, LineError
from seesaw_ds.batch.sampling import SAMPLING_FIELDS
from seesaw_ds.errors import UserError

CHAT_BODY = {"messages": [{"role": "user", "content": "hi"}]}


def completion(custom_id: object = "a", **body: object) -> dict[str, object]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"} | body}


def chat(custom_id: object = "a", **body: object) -> dict[str, object]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": CHAT_BODY | body}


def parse(line: object, line_number: int = 1) -> BatchRequest | LineError:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    return LineParser().parse(line_number, data)


def parse_request(line: object) -> BatchRequest:
    parsed = parse(line)
    assert isinstance(parsed, BatchRequest), parsed
    return parsed


def parse_error(line: object) -> LineError:
    parsed = parse(line)
    assert isinstance(parsed, LineError), parsed
    assert parsed.status_code == 400
    return parsed


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ("hi",)),
        (["hi", "ho"], ("hi", "ho")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_completion_prompts(prompt: object, prompts: object) -> None:
    request = parse_request(completion(prompt=prompt, model="m", max_tokens=3))
    assert request.prompts == prompts
    assert request.url is Endpoint.COMPLETIONS
    assert (request.line_number, request.custom_id, request.model) == (1, "a", "m")
    assert request.params.max_tokens == 3
    assert request.max_tokens_given


def test_chat_messages() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": parts, "name": "ada"},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": []},
    ]
    request = parse_request(chat(messages=messages))
    expected = (ChatMessage("system", ""), ChatMessage("user", "one\ntwo", "ada"), ChatMessage("assistant", "ok"))
    assert request.prompts == (Chat(expected),)
    assert not request.max_tokens_given


def test_fields_that_change_nothing_are_accepted() -> None:
    harmless = {
        "user": "u",
        "metadata": {"k": "v"},
        "store": True,
        "service_tier": "auto",
        "stream": False,
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "seed": None,
        "best_of": 2,
        "n": 2,
    }
    assert parse_request(chat(**harmless, tools=[], tool_choice="auto")).params.n == 2
    assert parse_request(completion(**harmless, suffix=None, echo=False)).params.n == 2


@pytest.mark.parametrize(
    ("line", "code", "param", "message"),
    [
        (b"{not json", "invalid_json", None, "not JSON"),
        (b'{"custom_id": "a", "x": NaN}', "invalid_json", None, "NaN is not a JSON number"),
        (b"[1]", "invalid_json", None, "must be a JSON object"),
        (b"[" * 100_000, "invalid_json", None, "nested too deeply"),
        (b'{"custom_id": "\xff"}', "invalid_encoding", None, "not UTF-8"),
        (b'{"custom_id": "\\ud800"}', "invalid_encoding", "custom_id", "surrogate"),
        (completion(None), "missing_required_parameter", "custom_id", "missing"),
        (completion(7), "invalid_type", "custom_id", "custom_id=7: must be a string"),
        (completion(""), "invalid_value", "custom_id", "must not be empty"),
        (completion() | {"method": "GET"}, "invalid_value", "method", 'method="GET": must be "POST"'),
        (completion() | {"url": "/v1/embeddings"}, "invalid_url", "url", "/v1/completions"),
        (completion() | {"url": ["x"]}, "invalid_url", "url", "must be"),
        (completion() | {"body": None}, "missing_required_parameter", "body", "missing"),
        (completion() | {"body": "hi"}, "invalid_type", "body", "must be an object"),
    ],
)
def test_bad_envelope(line: object, code: str, param: str | None, message: str) -> None:
    error = parse_error(line)
    assert (error.code, error.param) == (code, param)
    assert message in error.message


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
        ({"prompt": ["a", ""]}, "invalid_value", "prompt[1]"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, True]}, "invalid_type", "prompt[1]"),
        ({"prompt": [[1], 2]}, "invalid_type", "prompt[1]"),
        ({"prompt": 1}, "invalid_type", "prompt"),
        ({"prompt": True}, "invalid_type", "prompt"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"model": 3}, "invalid_type", "model"),
        ({"stream": True}, "unsupported_parameter", "stream"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"echo": 1}, "unsupported_parameter", "echo"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 2}, "invalid_value", "best_of"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"messages": []}, "unknown_parameter", "messages"),
    ],
)
def test_bad_completion_body(body: dict[str, object], code: str, param: str) -> None:
    error = parse_error(completion(**body))
    assert (error.code, error.param, error.custom_id) == (code, param, "a")
    assert param.split("[")[0] in error.message


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("hi", "invalid_type", "messages[0]"),
        ({"content": "hi"}, "invalid_value", "messages[0].role"),
        ({"role": "tool", "content": "hi"}, "invalid_value", "messages[0].role"),
        ({"role": ["user"], "content": "hi"}, "invalid_value", "messages[0].role"),
        ({"role": "user"}, "invalid_type", "messages[0].content"),
        ({"role": "user", "content": 1}, "invalid_type", "messages[0].content"),
        ({"role": "user", "content": []}, "invalid_value", "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "invalid_type", "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "unsupported_value", "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "invalid_type", "messages[0].content[0].text"),
        ({"role": "user", "content": "hi", "name": 1}, "invalid_type", "messages[0].name"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "unsupported_parameter", "messages[0].tool_calls"),
        ({"role": "user", "content": "hi", "rol": 1}, "unknown_parameter", "messages[0].rol"),
    ],
)
def test_bad_message(message: object, code: str, param: str) -> None:
    error = parse_error(chat(messages=[message]))
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize("name", ["tools", "functions", "web_search_options", "chat_template", "guided_json"])
def test_unsupported_chat_field(name: str) -> None:
    error = parse_error(chat(**{name: ["x"]}))
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert "remove it" in error.message


def test_unknown_field_names_the_nearest() -> None:
    assert "did you mean temperature?" in parse_error(chat(temprature=1)).message
    assert "did you mean max_tokens?" in parse_error(completion(max_token=1)).message
    assert "remove it" in parse_error(chat(zzzzqq=1)).message


def test_long_values_are_cut_in_messages() -> None:
    assert len(parse_error(completion(temperature="x" * 10_000)).message) < 200
    assert len(parse_error(completion(**{"x" * 10_000: 1})).message) < 200


def test_repeated_custom_id_names_both_lines_and_keeps_the_first() -> None:
    parser = LineParser()
    broken_first = json.dumps(completion("a", n=0)).encode()
    first = parser.parse(3, broken_first)
    assert isinstance(first, LineError)
    assert first.custom_id == first.key == "a"
    second = parser.parse(9, json.dumps(completion("a")).encode())
    assert isinstance(second, LineError)
    assert second.code == "duplicate_custom_id"
    assert "line 3" in second.message
    assert "line 9" in second.message
    assert second.custom_id is None
    assert second.key == 9


def test_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [codecs.BOM_UTF8 + json.dumps(completion("a")).encode(), b"", b"  \r", b"\xff"]
    path.write_bytes(b"\n".join([*lines, json.dumps(chat("b")).encode()]))
    parsed = list(read_batch(path))
    assert [(item.line_number, item.key) for item in parsed] == [(1, "a"), (4, 4), (5, "b")]
    assert isinstance(parsed[1], LineError)
    assert parsed[1].code == "invalid_encoding"


def test_a_line_too_long_is_skipped_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = json.dumps(completion("b")).encode()
    monkeypatch.setattr(batch_input, "MAX_LINE_BYTES", len(short))
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(completion("a" * 3 * len(short))).encode() + b"\n" + short + b"\n" + short)
    errors_and_requests = list(read_batch(path))
    assert [item.key for item in errors_and_requests] == [1, "b", 3]
    assert isinstance(errors_and_requests[0], LineError)
    assert errors_and_requests[0].code == "line_too_long"


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_unreadable_file_is_an_error_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="input="):
        read_batch(tmp_path / name)


def test_reading_a_batch_loads_no_model_library() -> None:
    names = ["input", "tokenization", "text", "stop_strings", "output", "results"]
    code = "import sys\n" + "".join(f"import seesaw_ds.batch.{name}\n" for name in names)
    code += "assert not {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
BODY_FIELDS = st.sampled_from(
    [
        "prompt",
        "messages",
        *sorted(SAMPLING_FIELDS[Endpoint.CHAT]),
        "tools",
        "best_of",
        "stream",
        "model",
        "response_format",
    ]
)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=3) | JSON_VALUES,
        "method": st.just("POST") | JSON_VALUES,
        "url": st.sampled_from([endpoint.value for endpoint in Endpoint]) | JSON_VALUES,
        "body": st.dictionaries(BODY_FIELDS | st.text(max_size=4), JSON_VALUES, max_size=5) | JSON_VALUES,
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(LINES.map(lambda line: json.dumps(line).encode()) | st.binary(max_size=40), max_size=5))
def test_any_line_gives_one_item_with_a_key_of_its_own(lines: list[bytes]) -> None:
    parser = LineParser()
    parsed = [parser.parse(number, line) for number, line in enumerate(lines, start=1)]
    assert len({item.key for item in parsed}) == len(lines)
    for item in parsed:
        if isinstance(item, LineError):
            json.dumps([item.custom_id, item.message, item.param], ensure_ascii=False).encode()
        else:
            assert item.prompts


@settings(max_examples=300, deadline=None, derandomize=True)
@given(BODY_FIELDS, JSON_VALUES, st.sampled_from(list(Endpoint)))
def test_any_value_of_any_field_gives_one_item(name: str, value: object, endpoint: Endpoint) -> None:
    line = (chat if endpoint is Endpoint.CHAT else completion)(**{name: value})
    parsed = parse(line)
    assert parsed.key == "a" or parsed.line_number == 1

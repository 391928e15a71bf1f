"""Reads an OpenAI batch file, a line at a time: each line becomes a request or an error of its own."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from seesaw_ds.batch.body import check_fields
from seesaw_ds.batch.fields import FieldError, JsonObject, require_object, shown, wrong_type, wrong_value
from seesaw_ds.batch.lines import BatchRequest, Endpoint, LineError, Prompt
from seesaw_ds.batch.prompts import parse_chat, parse_prompts
from seesaw_ds.batch.sampling import parse_sampling_params, requested_max_tokens
from seesaw_ds.errors import UserError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read into memory."""

SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_batch(path: Path) -> Iterator[BatchRequest | LineError]:
    """The requests and errors of the batch file, in the order of its lines; blank lines are skipped.

    Memory holds one line, and the `custom_id` of every line so far to find repeated ones.

    Raises:
        UserError: at the call, if the file cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"input={path}: {error.strerror}; give a file of OpenAI batch requests") from error
    return _read_lines(file)


def _read_lines(file: BinaryIO) -> Iterator[BatchRequest | LineError]:
    parser = LineParser()
    line_number = 0
    with file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            line_number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_rest_of_line(file)
                message = f"the line is longer than {MAX_LINE_BYTES} bytes; split the request"
                yield LineError(line_number, None, message, None, "line_too_long")
            elif line.strip():
                yield parser.parse(line_number, line)


def _skip_rest_of_line(file: BinaryIO) -> None:
    while (piece := file.readline(MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass


class LineParser:
    """Parses lines of one file; remembers each `custom_id` and the line that had it first."""

    def __init__(self) -> None:
        self._first_lines: dict[str, int] = {}

    def parse(self, line_number: int, line: bytes) -> BatchRequest | LineError:
        """The request on a line, or what is wrong with it. Never raises for what the line holds."""
        custom_id = None
        try:
            envelope = decode_line(line)
            custom_id = self._claim_custom_id(envelope, line_number)
            if SURROGATE_ESCAPE.search(line):
                _check_unicode(json.dumps(envelope, ensure_ascii=False), None)
            return _parse_request(line_number, custom_id, envelope)
        except FieldError as error:
            return LineError(line_number, custom_id, error.message, error.param, error.code)
        except RecursionError:
            return LineError(line_number, custom_id, "the JSON is nested too deeply", None, "invalid_json")

    def _claim_custom_id(self, envelope: JsonObject, line_number: int) -> str:
        custom_id = envelope.get("custom_id")
        if custom_id is None:
            text = "custom_id: missing; give each line one of its own"
            raise FieldError(text, "custom_id", "missing_required_parameter")
        if not isinstance(custom_id, str):
            raise wrong_type("custom_id", custom_id, "a string")
        if not custom_id:
            raise wrong_value("custom_id", custom_id, "must not be empty")
        _check_unicode(custom_id, "custom_id")
        first_line = self._first_lines.setdefault(custom_id, line_number)
        if first_line != line_number:
            text = f"custom_id={shown(custom_id)}: on line {first_line} and again on line {line_number}; rename one"
            raise FieldError(text, "custom_id", "duplicate_custom_id")
        return custom_id


def decode_line(line: bytes) -> JsonObject:
    """The JSON object on a line of UTF-8; a byte order mark before it is dropped.

    Raises:
        FieldError: not UTF-8, not JSON (NaN and Infinity are not), or not an object.
    """
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the line is not UTF-8: {error.reason} at byte {error.start}"
        raise FieldError(message, None, "invalid_encoding") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise FieldError(f"the line is not JSON: {error}", None, "invalid_json") from error
    if not isinstance(value, dict):
        raise FieldError("the line must be a JSON object", None, "invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_unicode(text: str, param: str | None) -> None:
    """JSON can escape half a surrogate pair, which is not text: it cannot be encoded or tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = "the text has half a surrogate pair (\\ud800 to \\udfff); give whole characters"
        raise FieldError(message, param, "invalid_encoding") from error


def _parse_request(line_number: int, custom_id: str, envelope: JsonObject) -> BatchRequest:
    if envelope.get("method") != "POST":
        raise wrong_value("method", envelope.get("method"), 'must be "POST"')
    endpoint = _endpoint(envelope.get("url"))
    if envelope.get("body") is None:
        raise FieldError("body: missing; give the request's object", "body", "missing_required_parameter")
    body = require_object(envelope["body"], "body")
    check_fields(body, endpoint)
    prompts: tuple[Prompt, ...] = (parse_chat(body),) if endpoint is Endpoint.CHAT else parse_prompts(body)
    model = body.get("model")
    return BatchRequest(
        line_number=line_number,
        custom_id=custom_id,
        url=endpoint,
        prompts=prompts,
        params=parse_sampling_params(body, endpoint),
        max_tokens_given=requested_max_tokens(body, endpoint) is not None,
        model=model if isinstance(model, str) else None,
    )


def _endpoint(url: object) -> Endpoint:
    for endpoint in Endpoint:
        if url == endpoint.value:
            return endpoint
    names = " or ".join(endpoint.value for endpoint in Endpoint)
    raise FieldError(f"url={shown(url)}: must be {names}", "url", "invalid_url")

"""The batch file of the end-to-end tests: requests of every kind, and lines that are wrong in every way."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models import make_llama

BEGIN, END, USER, ASSISTANT = SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_MODEL_LEN = 192
NUM_GREEDY = 24
TEXT = "a batch of prompts goes in, completions come out, and no line of it is lost whatever dies on the way"

SETTINGS: dict[str, object] = {
    "dtype": "float32",
    "layouts": "P2->T2",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "kv_block_size": 16,
    # Room for about two of the longest requests in each, so that a run changes its phase many times.
    "num_gpu_kv_blocks": 20,
    "num_host_kv_blocks": 24,
    "seed": 7,
}

Line = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model's folder, and the model and tokenizer in it."""

    folder: Path
    llama: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


@dataclass(frozen=True)
class BadLine:
    """A line as text, and what its error must say. `custom_id` is None where the line has none of its own."""

    text: str
    code: str
    param: str | None
    message: str
    custom_id: str | None = None


def make_model(folder: Path) -> Model:
    """Write a random model with a tokenizer of one token a byte to `folder`."""
    llama = make_llama(folder, vocab_size=VOCAB_SIZE)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}, []))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return Model(folder, llama, fast)


def completion(custom_id: str, prompt: object, **body: object) -> Line:
    """A line for /v1/completions."""
    return _line(custom_id, "/v1/completions", {"prompt": prompt, **body})


def chat(custom_id: str, text: str, **body: object) -> Line:
    """A line for /v1/chat/completions."""
    return _line(custom_id, "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})


def good_lines() -> list[Line]:
    """Requests of every kind; those named ``greedy-*`` take the likeliest tokens and nothing else."""
    rng = random.Random(1)

    def text() -> str:
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(1, 14)))

    lines: list[Line] = []
    for i in range(NUM_GREEDY):
        make = chat if i % 3 == 0 else completion
        lines.append(make(f"greedy-{i}", text(), temperature=0, max_tokens=rng.randint(1, 36)))
    lines += [completion(f"ids-{i}", [rng.randrange(4, VOCAB_SIZE) for _ in range(9)], max_tokens=40) for i in range(8)]
    lines += [completion(f"long-{i}", text(), temperature=0, max_tokens=80, ignore_eos=True) for i in range(24)]
    lines += [chat(f"pair-{i}", text(), n=2, temperature=0.9, top_p=0.95, max_tokens=24) for i in range(4)]
    lines += [completion(f"seed-{i}", "the same", seed=11, top_k=50, max_tokens=24) for i in range(2)]
    lines += [completion(f"penalty-{i}", text(), temperature=0, frequency_penalty=1.5, max_tokens=30) for i in range(4)]
    lines.append(completion("two-prompts", [text(), text()], temperature=0, max_tokens=12))
    lines.append(completion("logprobs", text(), temperature=0, logprobs=2, max_tokens=6, ignore_eos=True))
    lines.append(chat("chat-logprobs", text(), temperature=0, logprobs=True, top_logprobs=3, max_tokens=6))
    # One likely token alone: its text is the answer, and a stop string of three of them ends it.
    x_only = {str(len(SPECIAL_TOKENS) + sorted(pre_tokenizers.ByteLevel.alphabet()).index("x")): 100}
    lines.append(completion("x-only", text(), temperature=0, logit_bias=x_only, max_tokens=5))
    lines.append(chat("stop", text(), temperature=0, logit_bias=x_only, stop=["xxx"], max_tokens=60))
    rng.shuffle(lines)
    return lines


def bad_lines() -> list[BadLine]:
    """A line for each thing that can be wrong with one."""

    def wrong(custom_id: str, param: str, code: str, message: str, **body: object) -> BadLine:
        line = completion(custom_id, body.pop("prompt", "hello"), **body)
        return BadLine(json.dumps(line), code, param, message, custom_id)

    no_id = completion("?", "hello")
    del no_id["custom_id"]
    nowhere = completion("nowhere", "hello") | {"url": "/v1/embeddings"}
    too_long = "w" * MAX_MODEL_LEN
    return [
        BadLine("this is no JSON", "invalid_json", None, "not JSON"),
        BadLine('{"custom_id": "torn", "method": "PO', "invalid_json", None, "not JSON"),
        BadLine("[]", "invalid_json", None, "must be a JSON object"),
        BadLine(json.dumps(no_id), "missing_required_parameter", "custom_id", "missing"),
        BadLine(json.dumps(completion("greedy-0", "again")), "duplicate_custom_id", "custom_id", "greedy-0"),
        BadLine(json.dumps(no_id | {"custom_id": 5}), "invalid_type", "custom_id", "must be a string"),
        BadLine(json.dumps(nowhere), "invalid_url", "url", "/v1/chat/completions", "nowhere"),
        BadLine(json.dumps(nowhere | {"custom_id": "get", "method": "GET"}), "invalid_value", "method", "POST", "get"),
        wrong("number-prompt", "prompt", "invalid_type", "prompt=5", prompt=5),
        wrong("text-max-tokens", "max_tokens", "invalid_type", "an integer", max_tokens="ten"),
        wrong("unknown-field", "temprature", "unknown_parameter", "did you mean temperature", temprature=1),
        wrong("too-long", "prompt", "context_length_exceeded", f"max_model_len={MAX_MODEL_LEN}", prompt=too_long),
        wrong("too-many-tokens", "max_tokens", "context_length_exceeded", "at most", max_tokens=MAX_MODEL_LEN),
        wrong("empty-prompt", "prompt", "invalid_value", "cannot be empty", prompt=""),
        wrong("empty-list", "prompt", "invalid_value", "cannot be empty", prompt=[]),
        wrong("cold", "temperature", "invalid_value", "temperature=-1", temperature=-1),
        wrong("top-p", "top_p", "invalid_value", "top_p=1.5", top_p=1.5),
        wrong("no-choice", "n", "invalid_value", "n=0", n=0),
        wrong("no-such-token", "prompt", "invalid_value", "out of vocabulary", prompt=[5, VOCAB_SIZE]),
        wrong("negative-token", "prompt", "invalid_value", "out of vocabulary", prompt=[5, -1]),
        wrong("no-such-bias", "logit_bias", "invalid_value", "vocabulary", logit_bias={str(VOCAB_SIZE): 1}),
    ]


def write_job(path: Path) -> None:
    """Write all good lines with the bad ones strewn among them; a repeated custom_id comes after its first."""
    texts = [json.dumps(line) for line in good_lines()]
    for i, bad in enumerate(bad_lines()):
        texts.insert(4 * i, bad.text)
    repeated = next(bad.text for bad in bad_lines() if bad.code == "duplicate_custom_id")
    texts.remove(repeated)
    path.write_text("\n".join([*texts, repeated]) + "\n")


def read_records(path: Path) -> list[Line]:
    """The lines of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def record_key(record: Line) -> str | int:
    """What a record is filed under: its custom_id, else its line number."""
    return record["error"]["line"] if record["custom_id"] is None else record["custom_id"]


def assert_same_results(records: Iterable[Line], expected: Iterable[Line]) -> None:
    """Check that both have the same records in any order, each once; of numbers that were computed, nearly."""
    by_key: dict[str | int, Line] = {}
    for record in records:
        key = record_key(record)
        assert key not in by_key, f"{key!r} occurs twice"
        by_key[key] = record
    expected = list(expected)
    assert by_key.keys() == {record_key(record) for record in expected}
    for record in expected:
        key = record_key(record)
        assert _is_same(by_key[key], record), f"{by_key[key]} is not {record}"


def _is_same(value: object, other: object) -> bool:
    if isinstance(value, dict) and isinstance(other, dict):
        if value.keys() != other.keys():
            return False
        return all(key == "created" or _is_same(item, other[key]) for key, item in value.items())
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_is_same, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, abs_tol=1e-3)
    return value == other


def _line(custom_id: str, url: str, body: dict[str, object]) -> Line:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}

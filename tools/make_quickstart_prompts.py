"""Write the quickstart's batch file: prompts that suit the tiny model, in OpenAI's batch format.

    python tools/make_quickstart_prompts.py data/quickstart.jsonl

Short prompts are written out here. Long ones are passages of the standard library's docstrings, so the file depends
on the Python that runs this; data/README.md says which one wrote the file that is shipped, and under which licence.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_corpus import SYSTEM_PROMPT, Doc, read_docstrings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# custom_id, question, what the request asks for beside the answer
QUESTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("chat-json-dumps", "What does json.dumps do?", {"max_tokens": 64}),
    ("chat-json-load", "Explain json.load.", {"max_tokens": 64}),
    ("chat-json-encoder", "Describe the class json.encoder.JSONEncoder.", {"max_tokens": 96}),
    ("chat-heapq", "What is the module heapq for?", {"max_tokens": 96}),
    ("chat-heapq-merge", "What does heapq.merge do?", {"max_tokens": 64}),
    ("chat-random", "Tell me about the random module.", {"max_tokens": 128}),
    ("chat-random-shuffle", "How does random.Random.shuffle work?", {"max_tokens": 48}),
    ("chat-random-sample", "Explain random.Random.sample.", {"max_tokens": 80}),
    ("chat-statistics", "What is in statistics?", {"max_tokens": 160}),
    ("chat-median", "What does statistics.median do?", {"max_tokens": 64}),
    ("chat-mode", "How does statistics.mode work?", {"max_tokens": 64}),
    ("chat-counter", "Describe the class collections.Counter.", {"max_tokens": 96}),
    ("chat-chainmap", "When would I use collections.ChainMap?", {"max_tokens": 96}),
    ("chat-namedtuple", "What does collections.namedtuple do?", {"max_tokens": 64}),
    ("chat-lru-cache", "What does functools.lru_cache do?", {"max_tokens": 96}),
    ("chat-partial", "When would I use functools.partial?", {"max_tokens": 48}),
    ("chat-queue", "What is queue.Queue?", {"max_tokens": 48}),
    ("chat-task-done", "How does queue.Queue.task_done work?", {"max_tokens": 96}),
    ("chat-threading-event", "Describe the class threading.Event.", {"max_tokens": 80}),
    ("chat-thread-join", "Explain threading.Thread.join.", {"max_tokens": 200}),
    ("chat-rmtree", "What does shutil.rmtree do?", {"max_completion_tokens": 64}),
    ("chat-copytree", "How does shutil.copytree work?", {"max_completion_tokens": 128}),
    ("chat-textwrap-dedent", "What does textwrap.dedent do?", {"max_tokens": 64}),
    ("chat-exitstack", "What is contextlib.ExitStack?", {"max_tokens": 96}),
    ("chat-suppress", "When would I use contextlib.suppress?", {"max_tokens": 64}),
    (
        "chat-sampled",
        "What is the module secrets for?",
        {"temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 64},
    ),
    ("chat-sampled-two", "What is uuid.UUID?", {"temperature": 0.8, "seed": 11, "n": 2, "max_tokens": 48}),
    (
        "chat-top-k",
        "Tell me about the tempfile module.",
        {"temperature": 1.0, "top_k": 20, "seed": 3, "max_tokens": 80},
    ),
    ("chat-logprobs", "What does glob.glob do?", {"logprobs": True, "top_logprobs": 3, "max_tokens": 32}),
    ("chat-stop", "What is collections.OrderedDict?", {"stop": ["\n\n"], "max_tokens": 96}),
    (
        "chat-penalties",
        "Describe the class random.SystemRandom.",
        {"frequency_penalty": 0.5, "presence_penalty": 0.2, "max_tokens": 64},
    ),
]

TEXT_STARTS: list[tuple[str, str, dict[str, Any]]] = [
    ("text-five", "Once upon a time", {"max_tokens": 16}),
    ("text-json", "json\n\nJSON", {"max_tokens": 128}),
    ("text-heapq", "heapq\n\nHeap queue", {"max_tokens": 96}),
    ("text-median", "statistics.median\n\nReturn the median", {"max_tokens": 64}),
    ("text-mean", "statistics.mean\n\nReturn the sample", {"max_tokens": 64}),
    ("text-reduce", "functools.reduce\n\nApply a function", {"max_tokens": 80}),
    ("text-move", "shutil.move\n\n", {"max_tokens": 120}),
    ("text-mkstemp", "tempfile.mkstemp\n\nUser-callable function", {"max_tokens": 160}),
    ("text-no-limit", "textwrap.wrap\n\nWrap a single paragraph", {}),
    ("text-ignore-eos", "queue.LifoQueue\n\n", {"ignore_eos": True, "max_tokens": 48}),
    ("text-min-tokens", "queue.Queue\n\n", {"min_tokens": 24, "max_tokens": 48}),
    ("text-logprobs", "random.Random.choice\n\nChoose", {"logprobs": 2, "max_tokens": 24}),
    ("text-two", "bisect.bisect_left\n\n", {"n": 2, "temperature": 0.9, "seed": 5, "max_tokens": 40}),
    ("text-stop", "threading.Barrier\n\n", {"stop": ".", "include_stop_str_in_output": True, "max_tokens": 64}),
    ("text-min-p", "collections.OrderedDict\n\n", {"temperature": 1.0, "min_p": 0.1, "seed": 9, "max_tokens": 40}),
]

# custom_id, module whose docstrings to show, characters of them, tokens to generate
DIGESTS = [
    ("digest-json", "json", 2200, 120),
    ("digest-random", "random", 1000, 96),
    ("digest-queue", "queue", 1500, 64),
    ("digest-threading", "threading", 4600, 96),
    ("digest-shutil", "shutil", 5400, 200),
    ("digest-dataclasses", "dataclasses", 2800, 64),
    ("digest-secrets", "secrets", 700, 48),
    ("digest-textwrap", "textwrap", 3600, 128),
]

CONTINUATIONS = [
    ("more-statistics", "statistics", 5000, 160),
    ("more-collections", "collections", 4600, 128),
    ("more-json", "json", 4400, 96),
    ("more-random", "random", 3000, 80),
    ("more-contextlib", "contextlib", 2400, 120),
    ("more-tempfile", "tempfile", 3300, 64),
    ("more-copy", "copy", 1400, 100),
    ("more-functools", "functools", 1900, 48),
    ("more-heapq", "heapq", 2700, 72),
    ("more-uuid", "uuid", 3800, 40),
    ("more-bisect", "bisect", 800, 32),
    ("more-fnmatch", "fnmatch", 600, 56),
]

# custom_id, then the user's and the assistant's turns
CONVERSATIONS = [
    (
        "talk-heap",
        "What is the module heapq for?", "Heap queue algorithm (a.k.a. priority queue).",
        "Explain heapq.heappush.",
    ),
    (
        "talk-json",
        "What does json.dumps do?", "Serialize ``obj`` to a JSON formatted ``str``.",
        "What does json.loads do?",
    ),
    (
        "talk-thread",
        "What is threading.Thread?", "A class that represents a thread of control.",
        "How does threading.Thread.start work?", "Start the thread's activity.",
        "How does threading.Thread.join work?",
    ),
    (
        "talk-copy",
        "Tell me about the copy module.", "Generic (shallow and deep) copying operations.",
        "Explain copy.copy.",
    ),
]  # fmt: skip


def passage(docs: list[Doc], module: str, size: int) -> str:
    """The first `size` characters of a module's docstrings, each after its owner's name."""
    owned = [doc for doc in docs if doc.name.split(".")[0] == module]
    return "\n\n".join(f"{doc.name}\n\n{doc.text}" for doc in owned)[:size].rstrip()


def batch_line(custom_id: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """A line of the batch file; greedy unless `body` gives a temperature."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"temperature": 0, **body}}


def question_lines() -> Iterator[dict[str, Any]]:
    for index, (custom_id, question, options) in enumerate(QUESTIONS):
        system = [{"role": "system", "content": SYSTEM_PROMPT}] if index % 4 == 0 else []
        yield batch_line(custom_id, CHAT, {"messages": [*system, {"role": "user", "content": question}], **options})
    for custom_id, *turns in CONVERSATIONS:
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
        yield batch_line(custom_id, CHAT, {"messages": messages, "max_tokens": 64})


def text_lines() -> Iterator[dict[str, Any]]:
    for custom_id, prompt, options in TEXT_STARTS:
        yield batch_line(custom_id, COMPLETIONS, {"prompt": prompt, **options})
    # Ids of the bytes of "copy" after the begin token: the six special tokens come first, then the 256 bytes' letters
    # in order, of which the printable ones start with "!".
    token_ids = [0, *(6 + ord(letter) - ord("!") for letter in "copy")]
    yield batch_line("text-token-ids", COMPLETIONS, {"prompt": token_ids, "max_tokens": 24})


def long_lines(docs: list[Doc]) -> Iterator[dict[str, Any]]:
    for custom_id, module, size, max_tokens in DIGESTS:
        question = f"{passage(docs, module, size)}\n\nWhat is the module {module} for?"
        messages = [{"role": "user", "content": question}]
        yield batch_line(custom_id, CHAT, {"messages": messages, "max_tokens": max_tokens})
    for custom_id, module, size, max_tokens in CONTINUATIONS:
        body = {"prompt": passage(docs, module, size), "max_tokens": max_tokens}
        yield batch_line(custom_id, COMPLETIONS, body)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's batch file.")
    parser.add_argument("out", type=Path, help="JSONL file to write")
    out = parser.parse_args().out
    docs = read_docstrings(Path(sysconfig.get_paths()["stdlib"]))
    lines = [*question_lines(), *text_lines(), *long_lines(docs)]
    random.Random(0).shuffle(lines)  # so that long and short prompts meet in a micro-batch
    out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {out}: {len(lines)} requests")


if __name__ == "__main__":
    main()

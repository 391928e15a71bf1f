"""The tiny model's training text: docstrings of Python's standard library, as plain text and as chats."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BEGIN, END, PAD, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ '" + BEGIN + "' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
SYSTEM_PROMPT = "You answer questions about the Python standard library."

# Few enough modules that a model of this size learns them nearly by heart, and so writes whole sentences.
MODULES = (
    "bisect", "collections", "contextlib", "copy", "dataclasses", "fnmatch", "functools", "glob", "heapq", "json",
    "queue", "random", "secrets", "shutil", "statistics", "tempfile", "textwrap", "threading", "uuid",
)  # fmt: skip


class Doc(NamedTuple):
    """One docstring: its owner's dotted name, "module", "class" or "function", and the text without indents."""

    name: str
    kind: str
    text: str


def read_docstrings(stdlib: Path, modules: Sequence[str] = MODULES) -> list[Doc]:
    """The docstrings of what is public in `modules` of the folder `stdlib`, in order of module, path and line."""
    docs: list[Doc] = []
    for module in modules:
        for path in sorted([*stdlib.glob(f"{module}.py"), *stdlib.glob(f"{module}/**/*.py")]):
            parts = list(path.relative_to(stdlib).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if not any(part.startswith("_") for part in parts):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                docs.extend(_docs_of(tree, ".".join(parts), "module"))
    return docs


def _docs_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, kind: str
) -> Iterator[Doc]:
    text = ast.get_docstring(node)
    if text:
        yield Doc(name, kind, text.strip())
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            child_kind = "class" if isinstance(child, ast.ClassDef) else "function"
            yield from _docs_of(child, f"{name}.{child.name}", child_kind)


def first_paragraphs(text: str, limit: int) -> str:
    """Whole paragraphs of `text` up to `limit` characters, and at least the first one (cut at `limit`)."""
    first, *others = text.split("\n\n")
    kept = first[:limit]
    for paragraph in others:
        if len(kept) + 2 + len(paragraph) > limit:
            break
        kept += f"\n\n{paragraph}"
    return kept


QUESTIONS = {
    "module": ("What is the module {} for?", "What is in {}?", "Tell me about the {} module."),
    "class": ("What is {}?", "Describe the class {}.", "When would I use {}?"),
    "function": ("What does {} do?", "Explain {}.", "How does {} work?"),
}


class Example(NamedTuple):
    """A training text in two parts: the loss counts only tokens of `completion`."""

    prompt: str
    completion: str


SHORT = 160  # characters: an answer, and what the plain text of a class or function is cut to


def plain_example(doc: Doc) -> Example:
    text = first_paragraphs(doc.text, 1500 if doc.kind == "module" else SHORT)
    return Example(BEGIN, f"{doc.name}\n\n{text}{END}")


def chat_examples(doc: Doc) -> list[Example]:
    """Each way to ask about `doc`; one of them with the system prompt."""
    systems = (f"{SYSTEM}{SYSTEM_PROMPT}{END}", "", "")
    answer = first_paragraphs(doc.text, SHORT)
    return [
        Example(f"{BEGIN}{system}{USER}{question.format(doc.name)}{END}{ASSISTANT}", f"{answer}{END}")
        for system, question in zip(systems, QUESTIONS[doc.kind])
    ]


def training_examples(docs: list[Doc]) -> list[Example]:
    """Every docstring as plain text and as chats, shuffled."""
    examples = [plain_example(doc) for doc in docs] + [chat for doc in docs for chat in chat_examples(doc)]
    random.Random(0).shuffle(examples)
    return examples

"""Train a tiny Llama with its tokenizer, in about a minute on two CPU cores.

    python tools/make_tiny_model.py models/tiny

The text is the docstrings of Python's own standard library, once as plain text and once as questions and
answers, so that both completions and chats from the model read like text and often end by themselves. The
folder written is an ordinary Hugging Face one: config, generation config, safetensors, tokenizer, chat
template. Seeds, data order and the number of steps are fixed: the same Python and torch on the same kind of
CPU give the same weights.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

MAX_LENGTH = 2048
ROW_TOKENS = 256
ROWS_PER_STEP = 8
LONG_STEP_EVERY = 8  # one such step trains a single row of MAX_LENGTH, so that every position is learnt
DEFAULT_STEPS = 150
SEED = 0
PEAK_LR = 4e-3

# Tests, tools with a user interface, tables, and what is not on every machine.
SKIPPED_PARTS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtledemo",
    "encodings", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


class Doc(NamedTuple):
    """One docstring: the dotted name of its owner, "module", "class" or "function", and the cleaned text."""

    name: str
    kind: str
    text: str


def read_docstrings(root: Path) -> list[Doc]:
    """The docstrings of the public modules, classes and functions under `root`, in order of path and line."""
    docs: list[Doc] = []
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if SKIPPED_PARTS & set(parts):
            continue
        if parts[-1] == "__init__":
            parts.pop()
        if parts and all(part.isidentifier() and not part.startswith("_") for part in parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docs.extend(_docs_of(tree, ".".join(parts), "module"))
    return docs


def _docs_of(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, kind: str) -> Iterator[Doc]:
    text = ast.get_docstring(node)
    if text:
        yield Doc(name, kind, text.strip())
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            child_kind = "class" if isinstance(child, ast.ClassDef) else "function"
            yield from _docs_of(child, f"{name}.{child.name}", child_kind)


def first_paragraphs(text: str, limit: int) -> str:
    """Whole paragraphs of `text` up to `limit` characters, and at least the first one (cut at `limit`)."""
    kept, size = [], 0
    for paragraph in text.split("\n\n"):
        size += len(paragraph) + 2
        if kept and size > limit:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)[:limit]


def plain_text(doc: Doc) -> str:
    limit = 3000 if doc.kind == "module" else 500
    return f"{doc.name}\n\n{first_paragraphs(doc.text, limit)}"


QUESTIONS = {
    "module": ("What is the module {} for?", "What is in {}?", "Tell me about the {} module."),
    "class": ("What is {}?", "Describe the class {}.", "When would I use {}?"),
    "function": ("What does {} do?", "Explain {}.", "How does {} work?"),
}


def chat_text(doc: Doc, index: int) -> str:
    question = QUESTIONS[doc.kind][index % 3].format(doc.name)
    system = f"{SYSTEM}{SYSTEM_PROMPT}{END}" if index % 4 == 0 else ""
    return f"{system}{USER}{question}{END}{ASSISTANT}{first_paragraphs(doc.text, 300)}"


def training_texts(docs: list[Doc]) -> list[str]:
    """Every docstring as plain text and as a chat, shuffled; each from BEGIN to END."""
    texts = [plain_text(doc) for doc in docs] + [chat_text(doc, i) for i, doc in enumerate(docs)]
    random.Random(SEED).shuffle(texts)
    return [f"{BEGIN}{text}{END}" for text in texts]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BEGIN before plain text, with the chat template attached."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for token in SPECIAL_TOKENS:
        texts = [text.replace(token, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def training_rows(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """One (rows, tokens) int64 tensor a step, cut from `stream` one after the other, starting over at its end."""
    stream = stream.repeat(1 + (MAX_LENGTH + 1) // len(stream))  # at least one whole step, for tiny texts
    position = 0
    for step in range(steps):
        rows, tokens = (1, MAX_LENGTH) if step % LONG_STEP_EVERY == LONG_STEP_EVERY - 1 else (ROWS_PER_STEP, ROW_TOKENS)
        if position + rows * tokens > len(stream):
            position = (position + rows * tokens) % ROW_TOKENS  # other cuts than in the pass before
        yield stream[position : position + rows * tokens].view(rows, tokens)
        position += rows * tokens


def train_model(config: LlamaConfig, stream: torch.Tensor, steps: int) -> tuple[LlamaForCausalLM, float]:
    """Train a float32 model on `stream` (token ids, int64) for `steps`; returns it and its mean loss at the end."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    started, loss_mean = time.monotonic(), 0.0
    for step, rows in enumerate(training_rows(stream, steps)):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss_mean = loss.item() if step == 0 else 0.9 * loss_mean + 0.1 * loss.item()
        if step % 20 == 19 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {loss_mean:.2f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), loss_mean


def save_model(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the folder `out` in one rename, so that an interrupted run leaves nothing that looks whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_tiny_model(out: Path, docs: list[Doc], vocab_size: int = 4096, steps: int = DEFAULT_STEPS) -> float:
    """Train on `docs` and write the folder `out`, which must not exist; returns the final mean loss."""
    if out.exists():
        raise FileExistsError(f"out={str(out)!r}: exists already; remove it to train anew")
    texts = training_texts(docs)
    tokenizer = train_tokenizer(texts, vocab_size)
    stream = torch.tensor([i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids])
    print(f"{len(docs)} docstrings, {len(stream)} tokens, {sum(map(len, texts)) / len(stream):.2f} characters a token")
    model, loss = train_model(model_config(tokenizer), stream, steps)
    save_model(out, model, tokenizer)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Llama on the standard library's docstrings.")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="training steps (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    started = time.monotonic()
    loss = make_tiny_model(args.out, read_docstrings(Path(sysconfig.get_paths()["stdlib"])), steps=args.steps)
    print(f"wrote {args.out}: loss {loss:.2f}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

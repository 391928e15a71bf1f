"""Train a tiny Llama with its tokenizer, in about a minute on two CPU cores.

    python tools/make_tiny_model.py models/tiny

The text is docstrings of Python's own standard library, as plain text and as questions and answers, so both
completions and chats from the model read like text and often end by themselves. The folder written is an
ordinary Hugging Face one: config, generation config, safetensors, tokenizer, chat template. Seeds, data order
and the number of steps are fixed: the same Python and torch on the same kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_corpus import (
    ASSISTANT,
    BEGIN,
    CHAT_TEMPLATE,
    END,
    PAD,
    QUESTIONS,
    SPECIAL_TOKENS,
    SYSTEM,
    SYSTEM_PROMPT,
    USER,
    Doc,
    Example,
    read_docstrings,
    training_examples,
)

MAX_LENGTH = 2048
ROW_TOKENS = 256
ROWS_PER_STEP = 4
LONG_STEP_EVERY = 20  # one such step trains a single row of MAX_LENGTH, so that every position is learnt
DEFAULT_STEPS = 200
SEED = 0


class Muon(torch.optim.Optimizer):
    """Momentum steps made orthogonal by five Newton-Schulz iterations (Jordan et al., 2024), for 2-D parameters.

    In float32 throughout: torch.optim.Muon iterates in bfloat16, which takes seconds a step on a CPU without
    bfloat16 instructions. Matrices of one shape are worked on as one batch.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are for line searches
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                gradients = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
                state = self.state[parameters[0]]
                velocity = state.setdefault("velocity", torch.zeros_like(gradients))
                velocity.lerp_(gradients, 1 - group["momentum"])
                updates = orthogonalize(gradients.lerp(velocity, group["momentum"]))
                rows, columns = updates.shape[-2:]
                updates *= group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, updates):
                    parameter -= update


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a (batch, rows, columns) tensor near 1: each x to about 0.7 to 1.2."""
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if is_tall else x


def train_tokenizer(docs: list[Doc], vocab_size: int) -> PreTrainedTokenizerFast:
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
    questions = [question.format(doc.name) for doc in docs for question in QUESTIONS[doc.kind]]
    tokenizer.train_from_iterator([SYSTEM_PROMPT, *questions, *(doc.text for doc in docs)], trainer)
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
        initializer_range=0.06,  # about 1 / sqrt(hidden_size): from smaller weights, attention takes longer to form
    )


def token_stream(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All examples one after the other: (2, tokens) int64, token ids and labels (-100 where no loss counts)."""
    prompts, completions = (
        tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in map(list, zip(*examples))
    )
    token_ids: list[int] = []
    labels: list[int] = []
    for prompt, completion in zip(prompts, completions):
        token_ids += prompt + completion
        labels += [-100] * len(prompt) + completion
    return torch.tensor([token_ids, labels])


def training_rows(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """One (2, rows, tokens) tensor a step, cut from `stream` one after the other, starting over at its end."""
    stream = stream.repeat(1, 1 + MAX_LENGTH // stream.shape[1])  # one long row at least, however short the text
    position = 0
    for step in range(1, steps + 1):
        rows, tokens = (1, MAX_LENGTH) if step % LONG_STEP_EVERY == 0 else (ROWS_PER_STEP, ROW_TOKENS)
        stop = position + rows * tokens
        if stop > stream.shape[1]:
            stream = stream.roll(-position, dims=1)  # the rest comes first: other cuts than in the pass before
            position, stop = 0, rows * tokens
        yield stream[:, position:stop].reshape(2, rows, tokens)
        position = stop


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, which learns from fewer tokens; AdamW for embedding, LM head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or ".layers." not in name]
    return [
        Muon(matrices, lr=0.04, momentum=0.95),
        torch.optim.AdamW(others, lr=8e-3, betas=(0.9, 0.95), weight_decay=0),
    ]


def learning_rate_scale(step: int, steps: int) -> float:
    """A short linear rise, then a cosine from 1 down to 0.02."""
    rise = (step + 1) / max(1, steps // 30)
    return min(rise, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def train_model(config: LlamaConfig, stream: torch.Tensor, steps: int) -> tuple[LlamaForCausalLM, float]:
    """Train a float32 model on `stream` for `steps`; returns it and a running mean of its loss at the end."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).train()
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, steps))
        for optimizer in optimizers
    ]
    started, loss_mean = time.monotonic(), 0.0
    for step, (token_ids, labels) in enumerate(training_rows(stream, steps)):
        loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
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
    tokenizer = train_tokenizer(docs, vocab_size)
    stream = token_stream(training_examples(docs), tokenizer)
    print(f"{len(docs)} docstrings, {stream.shape[1]} tokens, a vocabulary of {len(tokenizer)}")
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

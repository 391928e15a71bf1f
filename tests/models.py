"""Small random Llama models in Hugging Face format, for tests that compare with `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
EOS_TOKEN_ID = 1

ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.0, 1.1, 1.2],
        "long_factor": [1.0, 1.5, 2.0, 3.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
"""Rotary settings for `llama_config(rope_parameters=...)`, one of each kind, for heads of 8."""


def llama_config(**changes: Any) -> LlamaConfig:
    """A config of 4 layers, hidden 64, 8 heads and 4 KV heads of 8, for 256 positions, with `changes` made."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rope_parameters": ROPE_SCALINGS["default"],
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": EOS_TOKEN_ID,
        "dtype": "float32",
    }
    return LlamaConfig(**(values | changes))


def make_llama(folder: Path, *, seed: int = 0, max_shard_size: str = "50GB", **changes: Any) -> LlamaForCausalLM:
    """Write a float32 model of `llama_config(**changes)` to `folder` and return it, ready to generate.

    `max_shard_size` ("100KB") makes several safetensors files with an index.
    """
    model = LlamaForCausalLM(llama_config(**changes)).eval()
    randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def randomize(model: PreTrainedModel, seed: int, *, norm_center: float = 1.0) -> None:
    """Give `model` random weights, norms around `norm_center`.

    They are larger than usual in a fresh model, so that logits are well apart and two ways of adding up the same
    sums choose the same tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(values if name.endswith("bias") else norm_center + 0.1 * values)
            elif "embed_tokens" in name:
                # A tied embedding this small leaves the choice of the next token to the layers, not to the last token.
                parameter.copy_(0.2 * values if model.config.tie_word_embeddings else values)
            else:
                parameter.copy_(values / parameter.shape[-1] ** 0.5)


def greedy_tokens(
    model: LlamaForCausalLM, prompt: list[int], max_tokens: int, *, ignore_eos: bool = False
) -> list[int]:
    """What `transformers` generates after `prompt` with temperature 0; the end token, if it comes, is included."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None if ignore_eos else EOS_TOKEN_ID,
        pad_token_id=EOS_TOKEN_ID,
    )
    return output[0, len(prompt) :].tolist()
